"""What only a GPU can show:

    RE_GPU=1 python -m pytest -n 0 tests/test_gpu.py

Skipped otherwise. All other tests stay on the CPU, whose bits they compare.
"""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from infer import Machine, predict
from model import RelationModel, collate, relation_loss
from tests.conftest import SAMPLE
from tests.test_model import CPU, DECODERS, FAMILIES, encoder_of, examples_of
from train import Relations, Settings, batch_gradients

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="RE_GPU=1 with a GPU")
GPU = Machine(torch.device("cuda"), None)
LENGTHS = (7, 30, 7, 13, 25, 25, 60, 3)


def model_of(family, head):
    """With weights ten times as large as they begin: else attention does next to nothing, and no test would tell."""
    model = RelationModel(encoder_of(family), 30, head)
    for name, weight in model.encoder.named_parameters():
        if weight.ndim > 1 and "embed" not in name:
            weight.data *= 10
    return model


def loss_and_gradients(model, machine):
    """What a batch gives: its losses (B,), and the gradients of all parameters, end to end."""
    model.to(machine.device).train()
    batch = collate(examples_of(LENGTHS), np.arange(len(LENGTHS))).to(machine.device)
    with machine.autocast():
        logits = model(batch)
    losses = relation_loss(logits, batch.labels)
    losses.sum().backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return losses.detach().cpu(), gradients.cpu()


def distance(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    ("amp", "compile", "tolerance"),
    [(None, False, 1e-3), (torch.bfloat16, False, 0.05), (torch.bfloat16, True, 0.05), (torch.float16, False, 0.01)],
)
@pytest.mark.parametrize("family", FAMILIES | DECODERS)
def test_a_gpu_computes_what_a_cpu_does(family, amp, compile, tolerance):
    """In half precision by varlen_attn, in fp32 by products for each group of equal lengths."""
    torch.compiler.reset()
    on_cpu = model_of(family, "entity")
    on_gpu = copy.deepcopy(on_cpu)
    if compile:
        on_gpu.compile_layers()
    expected, found = loss_and_gradients(on_cpu, CPU), loss_and_gradients(on_gpu, replace(GPU, amp=amp))
    assert max(map(distance, found, expected)) < tolerance


@pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", ["cls", "bilstm", "bigru"])
def test_heads_on_a_gpu_compute_what_they_do_on_a_cpu(head, amp):
    on_cpu = model_of("bert", head)
    expected = loss_and_gradients(copy.deepcopy(on_cpu), CPU)
    found = loss_and_gradients(on_cpu, replace(GPU, amp=amp))
    tolerance = 0.01 if amp is None else 0.05  # cuDNN's RNN takes TF32
    assert max(map(distance, found, expected)) < tolerance


@pytest.mark.parametrize("family", FAMILIES)
def test_predictions_do_not_depend_on_the_batch(family):
    model, examples = model_of(family, "entity").to(GPU.device), examples_of(LENGTHS * 5)
    alone, together = predict(model, examples, GPU, max_tokens=1), predict(model, examples, GPU)
    np.testing.assert_allclose(alone, together, rtol=0, atol=1e-5)
    np.testing.assert_allclose(together, predict(model.cpu(), examples, CPU), rtol=0, atol=1e-4)


def test_a_batch_that_does_not_fit_is_done_in_parts(encoder_folder):
    settings = Settings(data=str(SAMPLE), model=str(encoder_folder), split="stratified")
    task, scaler, peaks = Relations(settings, GPU, print), torch.amp.GradScaler("cuda", enabled=False), []

    def step(max_tokens):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        loss = batch_gradients(task, task.model, np.arange(1000), 0, scaler, max_tokens)
        peaks.append(torch.cuda.max_memory_reserved())
        task.model.zero_grad()
        return loss and loss.item()

    few, many = step(1000), step(10**6)
    assert few == pytest.approx(many, rel=1e-3)
    limit = sum(peaks) / 2 / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(limit)
    try:
        assert step(10**6) is None
        assert step(1000) == pytest.approx(few, rel=1e-3)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize(
    "options", ["", "--compile", "--amp fp16", "--head bilstm --max-tokens 500", "--objective mlm"]
)
def test_a_stopped_run_ends_with_the_same_bits(run, tmp_path, options):
    demo = ["train.py", "--demo", "--epochs", "2", "--deterministic", *options.split()]
    run(*demo, "--out", "whole")
    run(*demo, "--out", "parts", "--save-every", "7")
    (tmp_path / "parts" / "last.pt").unlink()  # previous.pt is of a step within the second epoch
    run(*demo, "--out", "parts", "--save-every", "7")
    whole, parts = (torch.load(tmp_path / out / "last.pt", weights_only=True) for out in ("whole", "parts"))
    assert all(torch.equal(whole["weights"][name], parts["weights"][name]) for name in whole["weights"])
    assert json.loads((tmp_path / "parts" / "summary.json").read_text())["skipped"] < 10


def test_the_demo_learns_and_predicts(run, tmp_path):
    run("train.py", "--demo")
    assert json.loads((tmp_path / "runs" / "demo" / "summary.json").read_text())["best"]["micro_f1"] > 80
    printed = run("infer.py", "runs/demo/ckpt.pt").stdout
    assert "300 rows" in printed
