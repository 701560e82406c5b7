"""Tests that need a GPU.

    RE_GPU=1 python -m pytest -n 0 tests/test_gpu.py

Skipped without RE_GPU. All other tests run on the CPU, some of them compare results bit by bit.
"""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from data import Template
from distributed import Worker
from graph_step import GraphStep, make_step
from model import RelationModel, predict, relation_loss
from sample.tiny_encoder import make_tiny_encoder
from settings import Settings
from step import TrainStep
from task import RelationTask
from tests.helpers import CPU, DECODERS, FAMILIES, SAMPLE, encoder_of, examples_of
from tokens import collate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs RE_GPU=1 and a GPU")
GPU = Worker(torch.device("cuda"))
LENGTHS = (7, 30, 7, 13, 25, 25, 60, 3)


def model_of(family, head):
    """A random model with weights ten times larger than usual.

    With the usual weights attention has almost no effect, so that no test would notice errors.
    """
    model = RelationModel(encoder_of(family), 30, head)
    for name, weight in model.encoder.named_parameters():
        if weight.ndim > 1 and "embed" not in name:
            weight.data *= 10
    return model


def loss_and_gradients(model, worker):
    """The losses of a batch, (B,), and the gradients of all parameters, concatenated."""
    model.to(worker.device).train()
    batch = collate(examples_of(LENGTHS), np.arange(len(LENGTHS))).to(worker.device)
    with worker.autocast():
        logits = model(batch)
    losses = relation_loss(logits, batch.labels)
    losses.sum().backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return losses.detach().cpu(), torch.cat(gradients).cpu()


def distance(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    ("amp", "tolerance"), [(None, 1e-3), (torch.bfloat16, 0.05), (torch.float16, 0.01)]
)
@pytest.mark.parametrize("family", FAMILIES | DECODERS)
def test_a_gpu_and_a_cpu_give_the_same_gradients(family, amp, tolerance):
    """The GPU uses varlen_attn in half precision, and a product per sentence length in fp32."""
    on_cpu = model_of(family, "entity")
    on_gpu = copy.deepcopy(on_cpu)
    expected = loss_and_gradients(on_cpu, CPU)
    found = loss_and_gradients(on_gpu, replace(GPU, amp=amp))
    assert max(map(distance, found, expected)) < tolerance


@pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", ["cls", "bilstm", "bigru"])
def test_heads_give_the_same_gradients_on_a_gpu_and_a_cpu(head, amp):
    on_cpu = model_of("bert", head)
    expected = loss_and_gradients(copy.deepcopy(on_cpu), CPU)
    found = loss_and_gradients(on_cpu, replace(GPU, amp=amp))
    tolerance = 0.01 if amp is None else 0.05  # cuDNN's RNNs use TF32
    assert max(map(distance, found, expected)) < tolerance


@pytest.mark.parametrize("family", FAMILIES)
def test_predictions_do_not_depend_on_the_batch(family):
    model, examples = model_of(family, "entity").to(GPU.device), examples_of(LENGTHS * 5)
    together = predict(model, examples, GPU)
    alone = predict(model, examples, GPU, max_tokens=1)
    np.testing.assert_allclose(alone, together, rtol=0, atol=1e-5)
    np.testing.assert_allclose(together, predict(model.cpu(), examples, CPU), rtol=0, atol=1e-4)


def test_a_batch_that_does_not_fit_runs_in_micro_batches(encoder_folder):
    settings = Settings(data=str(SAMPLE), model=str(encoder_folder), split="stratified")
    task, peaks = RelationTask(settings, GPU, print), []
    config = task.model.encoder.config
    settings = settings.resolve(config.hidden_size, config.num_hidden_layers)
    train_step = TrainStep(task, settings)

    def loss_with(max_tokens):
        """The loss of a batch of 1000 sentences; None if the GPU runs out of memory."""
        train_step.max_tokens = max_tokens
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        loss = train_step.gradients(np.arange(1000), 0)
        peaks.append(torch.cuda.max_memory_reserved())
        task.model.zero_grad()
        return loss and loss.item()

    many_parts, one_part = loss_with(1000), loss_with(10**6)
    assert many_parts == pytest.approx(one_part, rel=1e-3)
    limit = sum(peaks) / 2 / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(limit)
    try:
        assert loss_with(10**6) is None
        assert loss_with(1000) == pytest.approx(many_parts, rel=1e-3)

        before = train_step.optimizer.param_groups[0]["params"][0].clone()
        train_step.max_tokens = 10**6
        loss, skipped = train_step(np.arange(1000), 0, 1e-3)
        assert train_step.max_tokens < 10**6
        assert loss.item() == pytest.approx(many_parts, rel=1e-3)
        assert not skipped
        assert not torch.equal(before, train_step.optimizer.param_groups[0]["params"][0])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


# --- CUDA graphs --------------------------------------------------------------------------------


def task_without_dropout(encoder_folder, amp=torch.bfloat16, task_class=RelationTask, **options):
    settings = Settings(
        data=str(SAMPLE), model=str(encoder_folder), split="stratified", lr=1e-3, layer_decay=0.9,
        **options,
    )  # fmt: skip
    said = []
    task = task_class(settings, replace(GPU, amp=amp), said.append)
    task.said = said
    for module in task.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return task


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", ["cls", "entity", "bilstm"])
def test_graphs_give_the_gradients_and_weights_of_eager_steps(encoder_folder, head, amp):
    """In micro-batches, the last of them small; a second step replays the graphs."""
    task = task_without_dropout(encoder_folder, amp, head=head, max_tokens=700)
    other = copy.copy(task)
    other.model = copy.deepcopy(task.model)
    eager, graphed = TrainStep(task, task.settings), make_step(other, other.settings)
    assert isinstance(graphed, GraphStep)
    batches = [np.arange(64), np.arange(64, 128), np.arange(128, 150)]
    graphed.prepare(batches)
    for number, indices in enumerate(batches):
        expected, found = eager.gradients(indices, number), graphed.gradients(indices, number)
        assert found.item() == pytest.approx(expected.item(), rel=1e-2)
        gradients = (
            torch.cat([p.grad.flatten() for p in t.model.parameters()]) for t in (other, task)
        )
        assert distance(*gradients) < 0.02
        for step in (eager, graphed):
            step.set_lr(1e-3)
            assert step.update() == 0
    weights = (torch.cat([p.flatten() for p in t.model.parameters()]) for t in (other, task))
    assert distance(*weights) < 0.01
    assert not any("CUDA graphs" in text for text in task.said)


def test_dropout_of_a_graph_follows_the_seed(encoder_folder):
    task = task_without_dropout(encoder_folder)
    step = make_step(task, task.settings)
    for module in task.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    step.prepare([np.arange(64)])
    first, second, again = (step.gradients(np.arange(64), n).item() for n in (1, 2, 1))
    assert first == again != second


def test_a_batch_that_does_not_fit_is_recorded_in_micro_batches(encoder_folder):
    task = task_without_dropout(encoder_folder, batch_size=1000, max_tokens=10**6)
    step = make_step(task, task.settings)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    step.prepare([np.arange(1000)])
    whole = step.gradients(np.arange(1000), 0).item()
    used = torch.cuda.max_memory_reserved() - before
    step.passes.clear()
    torch.cuda.empty_cache()
    limit = (before + 0.6 * used) / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(limit)
    try:
        step.prepare([np.arange(1000)])
        assert step.max_tokens < 10**6
        assert step.gradients(np.arange(1000), 0).item() == pytest.approx(whole, rel=1e-2)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


class TaskThatWaits(RelationTask):
    def loss(self, model, batch):
        loss = super().loss(model, batch)
        assert loss.item() < 10**9  # not allowed in a capture
        return loss


def test_training_continues_without_graphs_that_cannot_be_recorded(encoder_folder):
    task = task_without_dropout(encoder_folder, task_class=TaskThatWaits)
    for module in task.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1  # its random numbers are drawn in another way in a capture
    step, losses = make_step(task, task.settings), []
    step.prepare([np.arange(64)])
    for number in range(8):
        losses.append(step(np.arange(64), number, 1e-3)[0].item())
    assert losses[-1] < 0.9 * losses[0]
    assert [text for text in task.said if "CUDA graphs failed" in text]


def test_recorded_prediction_is_that_of_the_model(encoder_folder):
    task = task_without_dropout(encoder_folder)
    few = predict(task.model, task.examples[:300], task.worker, max_tokens=10**5)
    many = predict(task.model, task.examples[:300], task.worker, max_tokens=400)
    np.testing.assert_allclose(many, few, atol=0.02)


# --- runs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        "train.py --demo",
        "train.py --demo --amp fp16",
        "train.py --demo --head bilstm --max-tokens 500",
        f"pretrain.py --data {SAMPLE} --model encoder --batch-size 32 --lr 1e-3",
    ],
)
def test_a_resumed_run_ends_with_the_same_bits(run, rows, tmp_path, command):
    if command.startswith("pretrain.py"):
        make_tiny_encoder(str(tmp_path / "encoder"), (Template().render(r).text for r in rows), 0)
    command = [*command.split(), "--epochs", "2", "--deterministic"]
    run(*command, "--out", "whole")
    run(*command, "--out", "parts", "--save-every", "7")
    (tmp_path / "parts" / "last.pt").unlink()  # previous.pt is of a step in the second epoch
    run(*command, "--out", "parts", "--save-every", "7")
    whole, parts = (
        torch.load(tmp_path / out / "last.pt", weights_only=True)["weights"]
        for out in ("whole", "parts")
    )
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert json.loads((tmp_path / "parts" / "summary.json").read_text())["skipped"] < 10


def test_the_demo_learns_and_predicts(run, tmp_path):
    run("train.py", "--demo")
    summary = json.loads((tmp_path / "runs" / "demo" / "summary.json").read_text())
    assert summary["best"]["micro_f1"] > 80
    assert "300 rows" in run("infer.py", "runs/demo/ckpt.pt").stdout
