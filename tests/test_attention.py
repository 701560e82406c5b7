"""Attention over flat batches; softmax, dropout and RNNs on CPUs."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import attention
from attention import Dropout, Softmax, flat_attention, last_rnn_states_on_cpu
from model import RelationModel
from tests.helpers import DECODERS, FAMILIES, encoder_of, examples_of
from tokens import collate


@pytest.mark.parametrize("n_key_heads", [4, 2, 1])
@pytest.mark.parametrize("window", [None, 3, 12, 99])
@pytest.mark.parametrize("causal", [False, True])
def test_flat_attention_equals_attention_of_each_sentence(causal, window, n_key_heads):
    torch.manual_seed(0)
    batch = collate(examples_of((7, 30, 7, 13)), np.arange(4))
    shapes = (4, 57, 8), (n_key_heads, 57, 8), (n_key_heads, 57, 8)
    inputs = [torch.randn(1, *shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    module = SimpleNamespace(is_causal=causal)
    found, weights = flat_attention(
        module, *inputs, None, flat=batch, scaling=0.5, sliding_window=window
    )
    assert weights is None

    pieces = []
    for q, k, v in zip(*(x.split(batch.lengths, 2) for x in inputs)):
        position = torch.arange(q.shape[2])
        ahead = position - position[:, None]  # of the query
        visible = ahead.abs() < (window or 99)
        if causal:
            visible &= ahead <= 0
        options = {"attn_mask": visible, "scale": 0.5, "enable_gqa": True}
        pieces.append(F.scaled_dot_product_attention(q, k, v, **options))
    expected = torch.cat(pieces, 2).transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # the softmax is in fp32

    direction = torch.randn_like(found)
    gradients = (torch.autograd.grad((x * direction).sum(), inputs) for x in (found, expected))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"deberta-v2"} | DECODERS.keys()))
def test_gpu_kernel_gets_the_arguments_for_the_same_attention(family, monkeypatch):
    """The kernel itself needs a GPU (tests/test_gpu.py).

    The substitute here follows the kernel's documentation: it computes each sentence in double
    precision, and rejects other layouts.
    """
    n_calls = 0

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None,
                    window_size=(-1, -1)):  # fmt: skip
        nonlocal n_calls
        n_calls += 1
        assert query.shape == key.shape == value.shape
        assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
        assert torch.equal(cu_seq_q, cu_seq_k)
        assert max_q == max_k == cu_seq_q.diff().max()
        out = []
        for q, k, v in zip(*(x.split(cu_seq_q.diff().tolist()) for x in (query, key, value))):
            position = torch.arange(len(q))
            ahead = position - position[:, None]  # of the query
            left, right = (width if width >= 0 else len(q) for width in window_size)
            visible = (-left <= ahead) & (ahead <= right)
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
            attended = F.scaled_dot_product_attention(q, k, v, visible, scale=scale)
            out.append(attended.transpose(0, 1))
        return torch.cat(out)

    model = RelationModel(encoder_of(family), 30).double()  # fp32 does not use the kernel
    for module in model.modules():
        if hasattr(module, "scaling"):
            module.scaling = 0.5  # not the default of any encoder
    batch = collate(examples_of((7, 30, 7, 13, 25, 25)), np.arange(6))
    expected = model.encode(batch)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    monkeypatch.setattr(attention, "has_kernel", lambda *_: True)
    states = model.encode(batch)
    assert n_calls == 3
    torch.testing.assert_close(states, expected)


@pytest.mark.parametrize("length", [32, 83])
def test_softmax_and_its_gradient_match_torch(length):
    torch.manual_seed(0)
    x = 9 * torch.randn(5, length, length, dtype=torch.float64)
    direction = torch.randn(5, length, length)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        given, reference = x.to(dtype).requires_grad_(), x.to(dtype).double().requires_grad_()
        found = Softmax.apply(given)
        (found * direction.to(dtype)).sum().backward()
        expected = reference.softmax(-1)
        (expected * direction.to(dtype).double()).sum().backward()
        assert found.dtype == given.grad.dtype == dtype
        tolerances = {"rtol": tolerance, "atol": tolerance}
        torch.testing.assert_close(found.double(), expected, **tolerances)
        torch.testing.assert_close(given.grad.double(), reference.grad, **tolerances)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_zeroes_the_given_share_and_keeps_the_mean(dtype):
    torch.manual_seed(0)
    dropout, x = Dropout(0.1), torch.ones(1000, 1001, dtype=dtype, requires_grad=True)
    y = dropout(x)
    assert y.dtype == dtype
    assert abs((y == 0).float().mean() - 0.1) < 0.001
    assert abs(y.float().mean() - 1) < 0.002
    factor = torch.tensor(1.0) / 0.9
    assert set(y.unique().tolist()) == {0.0, float(factor.to(dtype))}
    y.sum().backward()
    assert torch.equal(x.grad, y)
    assert torch.equal(dropout.eval()(x), x)


@pytest.mark.parametrize("rnn_class", [torch.nn.LSTM, torch.nn.GRU])
def test_last_rnn_states_equal_those_of_each_sentence(rnn_class):
    torch.manual_seed(0)
    rnn = rnn_class(16, 24, bidirectional=True)
    batch = collate(examples_of((7, 30, 7, 13)), np.arange(4))
    states = torch.randn(57, 16, requires_grad=True)
    found = last_rnn_states_on_cpu(rnn, states, batch)
    outputs = [rnn(sentence[:, None])[0][:, 0] for sentence in states.split(batch.lengths)]
    expected = torch.stack([torch.cat([out[-1, :24], out[0, 24:]]) for out in outputs])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    direction, inputs = torch.randn(4, 48), (states, *rnn.parameters())
    gradients = (torch.autograd.grad((x * direction).sum(), inputs) for x in (found, expected))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)

    with torch.autocast("cpu", dtype=torch.bfloat16):  # bf16 for prediction, fp32 for training
        training = last_rnn_states_on_cpu(rnn, states, batch)
        with torch.no_grad():
            predicting = last_rnn_states_on_cpu(rnn, states, batch)
    assert torch.equal(training, found)
    assert predicting.dtype == torch.bfloat16
    torch.testing.assert_close(predicting.float(), expected, rtol=0.05, atol=0.05)
