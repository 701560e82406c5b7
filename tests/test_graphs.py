"""Padded batches, and the optimiser step that CUDA graphs record, on the CPU."""

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import attention
from distributed import Worker
from graph_step import GraphStep
from graphs import EagerRecorder, GraphedForward, capture_stream
from model import RelationModel, predict, relation_loss
from pretrain import MaskedTokenTask, PretrainingSettings
from settings import Settings
from step import TrainStep
from task import RelationTask
from tests import varlen_on_cpu
from tests.helpers import CPU, DECODERS, FAMILIES, SAMPLE, encoder_of, examples_of
from tokens import IGNORED, PAD_LENGTH, collate, epoch_batches, padded_size

LENGTHS = (7, 30, 7, 13, 25, 25, 60, 3)


@pytest.fixture
def kernel(monkeypatch):
    """The attention kernel reads offsets: lengths on the CPU would be those of the recording."""
    monkeypatch.setattr(attention, "has_kernel", attention.has_kernel)
    varlen_on_cpu.install()


# --- padded batches ---------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 127, 128, 2047, 2048, 4095, 4096, 16383])
def test_padded_sizes_leave_room_for_a_token_and_are_few(n):
    size = padded_size(n)
    assert n < size <= n + max(PAD_LENGTH, n / 8)
    assert padded_size(size - 1) == size


def test_eight_sizes_per_octave():
    assert len({padded_size(n) for n in range(2048, 4096)}) == 8


@pytest.mark.parametrize("n_sentences", [8, 11])
@pytest.mark.parametrize("head", ["cls", "entity", "bilstm", "bigru"])
@pytest.mark.parametrize("family", FAMILIES | DECODERS)
def test_padding_changes_neither_loss_nor_gradients(family, head, n_sentences):
    model = RelationModel(encoder_of(family), 30, head, entity_embedding="typed").train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    batch = collate(examples_of(LENGTHS), np.arange(len(LENGTHS)))
    padded = batch.pad(padded_size(len(batch.ids)), n_sentences, longest=128)
    results = []
    for given in (batch, padded):
        logits = model(given)
        losses = relation_loss(logits, given.labels)
        assert (losses[len(LENGTHS) :] == 0).all()
        model.zero_grad()
        losses.sum().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([losses[: len(LENGTHS)], *gradients])
    assert len(results[0]) == len(results[1])
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_missing_sentences_have_no_loss_and_no_gradient_with_targets():
    targets = np.random.default_rng(0).dirichlet(np.ones(30), len(LENGTHS)).astype(np.float32)
    examples = [e._replace(targets=t) for e, t in zip(examples_of(LENGTHS), targets)]
    batch = collate(examples, np.arange(len(LENGTHS)))
    np.testing.assert_array_equal(batch.targets, targets[batch.indices])
    padded = batch.pad(padded_size(len(batch.ids)), 11, longest=128)
    assert set(padded.tensors()) >= {"labels", "targets"}
    logits = torch.randn(11, 30, requires_grad=True)
    losses = relation_loss(logits, padded.labels, targets=padded.targets)
    losses.sum().backward()
    assert (losses[:8] > 0).all()
    assert (losses[8:] == 0).all()
    assert (logits.grad[8:] == 0).all()


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_ignored_sentences_have_no_loss_and_no_gradient(gamma):
    logits = torch.randn(3, 30, requires_grad=True)
    labels, alpha = torch.tensor([4, IGNORED, 0]), torch.rand(30)
    losses = relation_loss(logits, labels, focal_gamma=gamma, focal_alpha=alpha)
    losses.sum().backward()
    assert losses[1] == 0
    assert (logits.grad[1] == 0).all()
    assert (logits.grad[[0, 2]] != 0).all()


def test_graphed_logits_are_those_of_the_model(kernel):
    model, examples = RelationModel(encoder_of("roberta"), 30).eval(), examples_of(LENGTHS * 6)
    forward = GraphedForward(model, CPU, 20, 128, EagerRecorder())
    with torch.inference_mode():
        for indices in np.split(np.arange(48), [3, 20, 40]):
            batch = collate(examples, indices)
            torch.testing.assert_close(forward(batch), model(batch), rtol=1e-5, atol=1e-5)
    assert len(forward.passes) > 1


# --- steps ------------------------------------------------------------------------------------


class FxRecorder:
    """Records the operations of forward and backward, and replays them without Python.

    Numbers that a graph would contain show here, and reading a value raises.
    """

    def warm_up(self, function):
        function()

    def record(self, function):
        recorded = make_fx(function)()

        def replay():
            with torch.no_grad():
                return recorded()

        return replay


def relation_task(encoder_folder, **options) -> RelationTask:
    settings = Settings(
        data=str(SAMPLE), model=str(encoder_folder), limit=150, valid="none", batch_size=16,
        lr=1e-3, layer_decay=0.9, **options,
    )  # fmt: skip
    return RelationTask(settings, CPU, lambda text: None)


def soft_target_task(encoder_folder, **options) -> RelationTask:
    task = relation_task(encoder_folder, **options)
    targets = np.random.default_rng(0).dirichlet(np.ones(30), len(task.examples))
    targets = targets.astype(np.float32)
    task.examples = [e._replace(targets=t, label=-1) for e, t in zip(task.examples, targets)]
    return task


def masked_token_task(encoder_folder, **options) -> MaskedTokenTask:
    settings = PretrainingSettings(
        data=str(SAMPLE), model=str(encoder_folder), limit=150, valid="none", batch_size=16,
        lr=1e-3, **options,
    )  # fmt: skip
    return MaskedTokenTask(settings, CPU, lambda text: None)


def without_dropout(task):
    for module in task.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return task


def train(task, step, batches):
    """Run the steps; returns the losses and the weights."""
    step.prepare(batches)
    losses = []
    for number, indices in enumerate(batches):
        loss, skipped = step(indices, number, 1e-3 / (number + 1))
        assert skipped == 0
        losses.append(loss.item())
    return losses, dict(task.model.state_dict())


@pytest.mark.parametrize("recorder", [EagerRecorder, FxRecorder])
@pytest.mark.parametrize("max_tokens", [10**6, 500])
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (relation_task, {"head": "cls", "focal_gamma": 2.0}),
        (relation_task, {"head": "entity", "norm": "batch", "entity_embedding": "typed"}),
        (relation_task, {"head": "bilstm", "gelu": True}),
        (soft_target_task, {"head": "entity"}),
        (masked_token_task, {}),
    ],
)
def test_ten_steps_give_the_weights_of_eager_steps(
    encoder_folder, kernel, recorder, max_tokens, make, options
):
    if options.get("head") == "bilstm" and recorder is FxRecorder:
        pytest.skip("make_fx cannot split forward and backward")
    eager = without_dropout(make(encoder_folder, max_tokens=max_tokens, **options))
    graphed = copy.copy(eager)
    graphed.model = copy.deepcopy(eager.model)
    before = copy.deepcopy(eager.model.state_dict())
    # the last batch is smaller
    batches = epoch_batches(eager.lengths, 16, seed=0, epoch=0)
    expected_losses, expected = train(eager, TrainStep(eager, eager.settings), batches)
    step = GraphStep(graphed, graphed.settings, recorder())
    losses, weights = train(graphed, step, batches)
    assert len(step.passes) < len(batches) or max_tokens == 500
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-4)
    # AdamW makes a whole step of a gradient that is almost zero, so single weights may differ
    start, end, found = (
        torch.cat([w.flatten() for w in x.values()]) for x in (before, expected, weights)
    )
    assert (found - end).norm() < 1e-3 * (end - start).norm()


@pytest.mark.parametrize("head", ["cls", "bilstm"])
def test_steps_after_an_evaluation_train_with_dropout(encoder_folder, kernel, head):
    """In a graph that was recorded before the evaluation, and in one that is recorded after it."""
    task = relation_task(encoder_folder, head=head, dropout=0.5)
    step, batches = GraphStep(task, task.settings, EagerRecorder()), [np.arange(16), np.arange(9)]
    step.prepare(batches[:1])
    for prepared in ([], batches):
        task.model.eval()
        if prepared:
            step.prepare(prepared)
        for indices in batches:
            losses = [step.gradients(indices, seed).item() for seed in (1, 2, 1)]
            assert losses[0] == losses[2] != losses[1]
            task.model.eval()


def test_prediction_continues_without_graphs_that_cannot_be_recorded(kernel):
    class Failing(EagerRecorder):
        def record(self, function):
            raise RuntimeError("planted")

    model, examples = RelationModel(encoder_of("roberta"), 30).eval(), examples_of(LENGTHS)
    forward = GraphedForward(model, CPU, 20, 128, Failing())
    with torch.inference_mode():
        for indices in (np.arange(3), np.arange(3, 8)):
            batch = collate(examples, indices)
            torch.testing.assert_close(forward(batch), model(batch))


def test_running_statistics_survive_a_warm_up_that_runs_out_of_memory(encoder_folder, kernel):
    class Failing(EagerRecorder):
        def warm_up(self, function):
            function()
            raise torch.OutOfMemoryError("planted")

    task = relation_task(encoder_folder, norm="batch")
    step = GraphStep(task, task.settings, Failing())
    before = copy.deepcopy(dict(task.model.named_buffers()))
    with pytest.raises(torch.OutOfMemoryError):
        step.pass_of(step.padded_batch(np.arange(16), 0), False)
    for name, buffer in task.model.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_a_prediction_records_on_its_own_gpu(monkeypatch, kernel):
    entered, worker = [], Worker(torch.device("cuda", 1))
    monkeypatch.setattr(
        torch.cuda, "device", lambda device: entered.append(device) or nullcontext()
    )
    with worker.current_device(), CPU.current_device():
        assert entered == [worker.device]
    # predict enters it before it makes the recorder
    model = RelationModel(encoder_of("bert"), 30).eval()
    monkeypatch.setattr("model.MANY_BATCHES", 1)
    monkeypatch.setattr("model.is_capturable", lambda *_: True)
    order = []
    monkeypatch.setattr(
        Worker, "current_device", lambda self: order.append("device") or nullcontext()
    )
    monkeypatch.setattr(
        "model.GraphedForward",
        lambda *a: order.append("recorder") or GraphedForward(*a, EagerRecorder()),
    )
    predict(model, examples_of([5, 7]), CPU, progress=False)
    assert order == ["device", "recorder"]


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_an_evaluation_records_graphs_unless_the_run_has_none(
    encoder_folder, monkeypatch, kernel, cuda_graphs
):
    task, recorded = relation_task(encoder_folder, cuda_graphs=cuda_graphs), []
    monkeypatch.setattr("model.MANY_BATCHES", 1)
    monkeypatch.setattr("model.is_capturable", lambda *_: True)
    monkeypatch.setattr(
        "model.GraphedForward",
        lambda *a: recorded.append(a) or GraphedForward(*a, EagerRecorder()),
    )
    task.evaluate(max_tokens=4096)
    assert bool(recorded) == cuda_graphs


def test_each_gpu_and_thread_records_on_a_stream_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
    capture_stream.cache_clear()
    streams = [capture_stream(*key) for key in ((0, 1), (0, 1), (1, 1), (0, 2))]
    assert streams[0] is streams[1]
    assert len(set(streams)) == 3
    capture_stream.cache_clear()
