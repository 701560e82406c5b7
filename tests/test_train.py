"""The order of batches, the optimiser, one step, and a loss curve against a padded model."""

import copy
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModel

from distributed import Worker
from model import RelationModel
from settings import Settings
from step import TrainStep, learning_rate, make_optimizer, micro_batches
from task import RelationTask
from tests.helpers import CPU, DECODERS, FAMILIES, ROOT, SAMPLE, encoder_of
from tokens import epoch_batches


def test_batches_are_a_pure_function_of_seed_and_epoch_and_similar_in_length():
    lengths = np.random.default_rng(0).integers(20, 200, 1003)
    batches = epoch_batches(lengths, 16, seed=1, epoch=0)
    assert sorted(np.concatenate(batches)) == list(range(1003))
    assert sorted(len(b) for b in batches) == [1003 % 16] + [16] * (1003 // 16)
    again, other = epoch_batches(lengths, 16, 1, 0), epoch_batches(lengths, 16, 1, 1)
    assert all((a == b).all() for a, b in zip(batches, again))
    assert any((a != b).any() for a, b in zip(batches, other) if len(a) == len(b))
    assert np.mean([np.ptp(lengths[b]) for b in batches]) < np.ptp(lengths) / 5


def test_the_learning_rate_rises_and_falls_linearly():
    settings = Settings(lr=1.0, warmup_ratio=0.1)
    rates = [learning_rate(settings, step, 100) for step in range(100)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
    np.testing.assert_allclose(rates[10:], (90 - np.arange(90)) / 90)


# --- the optimiser ----------------------------------------------------------------------------


def test_biases_and_norms_do_not_decay():
    model = RelationModel(encoder_of("bert"), 30)
    settings = Settings(lr=1e-3, weight_decay=0.1, layer_decay=1)
    decayed, free = make_optimizer(model, settings).param_groups
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in free["params"]} == {1}
    assert len(decayed["params"]) + len(free["params"]) == len(list(model.parameters()))
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    assert decayed["betas"] == (0.9, 0.98)


@pytest.mark.parametrize("family", FAMILIES | DECODERS)
def test_lower_layers_have_lower_learning_rates(family):
    model = RelationModel(encoder_of(family), 30, "bilstm", entity_embedding="plain")
    optimizer = make_optimizer(model, Settings(lr=1e-3, layer_decay=0.5))
    scale = {id(p): group["scale"] for group in optimizer.param_groups for p in group["params"]}
    assert len(scale) == len(list(model.parameters()))
    assert scale[id(model.encoder.get_input_embeddings().weight)] == 0.5**4
    new = ("rnn", "classifier", "norm", "entity_embeddings")
    after_the_layers = ("encoder.final_norm.", "encoder.norm.", "encoder.ln_f.")
    for name, parameter in model.named_parameters():
        layer = re.search(r"(?:layers?|h)\.(\d)\.", name)  # three of them
        if layer:
            assert scale[id(parameter)] == 0.5 ** (3 - int(layer[1]))
        elif name.startswith(new):
            assert scale[id(parameter)] == 1
        elif name.startswith(after_the_layers):
            assert scale[id(parameter)] == 0.5
        else:
            assert scale[id(parameter)] == 0.5**4, name


@pytest.mark.parametrize(("clip_norm", "norm"), [(1.0, 1.0), (50.0, 10.0), (0.0, 10.0)])
def test_gradients_are_clipped_to_the_norm(clip_norm, norm):
    model = RelationModel(encoder_of("bert"), 30)
    before = copy.deepcopy(model.state_dict())
    n = sum(p.numel() for p in model.parameters())
    for parameter in model.parameters():  # a gradient of norm 10
        parameter.grad = torch.full_like(parameter, 10 / n**0.5)
    settings = Settings(lr=1.0, layer_decay=1, clip_norm=clip_norm)
    train_step = TrainStep(SimpleNamespace(model=model, worker=CPU), settings)
    train_step.optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
    assert train_step.update() == 0
    changes = [(p - before[name]).flatten() for name, p in model.named_parameters()]
    assert torch.cat(changes).norm().item() == pytest.approx(norm, rel=1e-4)


# --- one step ---------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_ranks_partition_a_batch_and_their_losses_have_equal_weight(world_size):
    lengths, indices = np.random.default_rng(0).integers(20, 200, 50), np.arange(5)
    workers = [Worker(CPU.device, None, rank, world_size) for rank in range(world_size)]
    shares = [micro_batches(indices, lengths, worker, 300, n_targets=5) for worker in workers]
    taken = [index for parts, weight in shares for part in parts for index in part if weight]
    assert sorted(taken) == indices.tolist()
    assert {weight for _, weight in shares} <= {0.0, world_size / 5}
    assert all(len(parts) >= 1 for parts, _ in shares)


@pytest.mark.parametrize(
    ("amp", "tolerance"),
    [(None, 1e-4), pytest.param(torch.bfloat16, 0.03, marks=pytest.mark.slow)],
)
def test_flat_batches_have_the_loss_curve_of_padded_ones(encoder_folder, amp, tolerance):
    """Micro-batches of 300 tokens, against padded batches and transformers' own attention."""
    settings = Settings(
        data=str(SAMPLE), model=str(encoder_folder), limit=160, valid="none", batch_size=16,
        head="cls", lr=1e-3, layer_decay=1, max_tokens=300,
    )  # fmt: skip
    worker = Worker(CPU.device, amp)
    task = RelationTask(settings, worker, lambda text: None)
    padded = copy.deepcopy(task.model)
    padded.encoder = AutoModel.from_pretrained(encoder_folder, add_pooling_layer=False)
    train_step, optimizer = TrainStep(task, settings), make_optimizer(padded, settings)
    losses = []
    for step, indices in enumerate(epoch_batches(task.lengths, 16, seed=0, epoch=0)):
        flat, _ = train_step(indices, step, settings.lr)
        chosen = [task.examples[i] for i in indices]
        ids, types, mask = (
            torch.nn.utils.rnn.pad_sequence(list(map(torch.from_numpy, arrays)), batch_first=True)
            for arrays in (
                [e.ids for e in chosen],
                [e.segments for e in chosen],
                [np.ones_like(e.ids) for e in chosen],
            )
        )
        with worker.autocast():
            states = padded.encoder(ids, token_type_ids=types, attention_mask=mask)[0]
            logits = padded.classifier(padded.norm(states[:, 0]))
        labels = torch.tensor([e.label for e in chosen])
        loss = torch.nn.functional.cross_entropy(logits.float(), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(padded.parameters(), settings.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append((flat.item(), loss.item()))
    curves = np.array(losses)
    assert curves[-3:].mean() < curves[:3].mean() - 0.3  # the model has learned something
    np.testing.assert_allclose(curves[:, 0], curves[:, 1], rtol=0, atol=tolerance)


# --- several processes --------------------------------------------------------------------------

PRINT_PRECISION = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from distributed import process_group

torch.cpu._is_avx512_bf16_supported = lambda: os.environ["RANK"] in os.environ["WITH_BF16"]
torch.cpu._is_amx_tile_supported = lambda: False
with process_group("auto") as worker:
    print(f"computes in {{worker.amp}}\\n", end="")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("with_bf16", "expected"), [("0 1", "torch.bfloat16"), ("0", "None")])
def test_processes_choose_the_same_precision(run, tmp_path, monkeypatch, with_bf16, expected):
    """bf16 only if every process supports it; rank 0 always does here."""
    monkeypatch.setenv("WITH_BF16", with_bf16)
    program = tmp_path / "print_precision.py"
    program.write_text(PRINT_PRECISION)
    printed = run(program, processes=2).stdout.splitlines()
    assert printed.count(f"computes in {expected}") == 2
