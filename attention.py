"""Attention over flat batches, and faster dropout, norms and RNNs.

flat_attention is registered with transformers as "flat". An encoder built on transformers'
attention interface then needs no other change:

    encoder.set_attn_implementation("flat")
    encoder(ids[None], position_ids=positions[None], flat=batch)     # batch: tokens.Batch
"""

from functools import cache
from itertools import groupby

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface

from tokens import Batch


def flat_attention(module, query, key, value, attention_mask, *, flat: Batch, scaling=None,
                   sliding_window=None, softcap=None, **_):  # fmt: skip
    """Attention of each sentence of a flat batch to itself; transformers' attention interface.

    query: (1, heads, T, head_dim); key and value may have fewer heads, each shared by several
    heads of the query. Returns (1, T, heads, head_dim), and None instead of weights.

    A causal module attends to earlier tokens only; `sliding_window` w limits attention to fewer
    than w positions. There is no dropout on attention weights: the GPU kernel has none, and
    training should be the same on every device.
    """
    if softcap is not None:
        raise NotImplementedError("flat attention does not cap its scores")
    query, key = query.to(value.dtype), key.to(value.dtype)  # rotary embeddings return fp32
    causal = getattr(module, "is_causal", False)
    if query.shape[1] > key.shape[1]:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    if has_kernel(query.device, query.dtype, query.shape[-1]):
        out = _attention_on_gpu(query, key, value, flat, scaling, sliding_window, causal)
    else:
        out = _attention_by_length(query, key, value, flat, scaling, sliding_window, causal)
    return out[None], None


def has_kernel(device: torch.device, dtype: torch.dtype | None, head_dim: int) -> bool:
    """Whether torch's varlen_attn takes such a query: Ampere or newer, fp16 or bf16."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    return head_dim % 8 == 0 and head_dim <= 256 and compute_capability(device) >= (8, 0)


@cache
def compute_capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _attention_on_gpu(query, key, value, flat, scaling, sliding_window, causal) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn  # only in GPU builds of torch

    reach = -1 if sliding_window is None else sliding_window - 1  # -1: unlimited
    window = (reach, 0 if causal else reach)
    # squeeze(0) is a view in the backward pass too; [0] would fill and copy a gradient
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # (T, heads, head_dim)
    offsets, longest = flat.offsets, flat.longest
    return varlen_attn(
        q, k, v, offsets, offsets, longest, longest, scale=scaling, window_size=window
    )


def _attention_by_length(query, key, value, flat, scaling, sliding_window, causal) -> torch.Tensor:
    """One batched product for each group of sentences of equal length; (T, heads, head_dim)."""
    if query.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("attention by length cannot be recorded: its lengths are on the CPU")
    groups = [(length, len(list(same))) for length, same in groupby(flat.lengths)]
    scale = scaling or query.shape[-1] ** -0.5
    # Split once: a slice per group would make the backward pass fill a gradient of T tokens each.
    sizes = [length * count for length, count in groups]
    split = [x.squeeze(0).split(sizes, 1) for x in (query * scale, key, value)]
    pieces = []
    for (length, _), *qkv in zip(groups, *split):
        q, k, v = (x.unflatten(1, (-1, length)) for x in qkv)  # (heads, sentences, length, dim)
        mask, reach = None, (sliding_window or length) - 1
        if causal or reach < length - 1:
            mask = torch.ones(length, length, dtype=torch.bool, device=query.device)
            mask = mask.triu(-reach).tril(0 if causal else reach)
        if q.is_cuda or mask is not None:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1)
        else:  # on CPUs torch's fused kernel is four times slower on short sentences
            out = Softmax.apply(q @ k.transpose(-1, -2)) @ v
        pieces.append(out.flatten(1, 2).transpose(0, 1))
    return torch.cat(pieces)


AttentionInterface.register("flat", flat_attention)  # no mask function: transformers builds no mask


# --- fast paths -------------------------------------------------------------------------------


class Softmax(torch.autograd.Function):
    """Softmax over the last dimension, computed in fp32.

    On CPUs torch's bf16 softmax takes up to three times as long unless the length is a multiple
    of 32. The private backward function spares a conversion to fp32.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        probs = x.float().softmax(-1).to(x.dtype)
        ctx.save_for_backward(probs)
        return probs

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        (probs,) = ctx.saved_tensors
        return torch._softmax_backward_data(grad, probs, -1, probs.dtype)


class Dropout(nn.Dropout):
    """Dropout with a mask that takes a fifth of the time on CPUs.

    torch draws a number for each value on CPUs; this cuts 64 random bits into four. The
    probability is exact to 1/65536.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_cuda or not self.training or self.p == 0:
            return super().forward(x)
        n_words = -(-x.numel() // 4)
        random = np.random.SFC64(int(torch.randint(2**62, ()))).random_raw(n_words).view(np.int16)
        kept = torch.from_numpy(random)[: x.numel()].view(x.shape)
        kept = kept.ge_(round(self.p * 65536) - 32768)  # int16: 0 or 1
        if x.dtype == torch.bfloat16:
            # Multiplying the integers 0 and 1 by the bits of 1 / (1 - p) gives the bf16 factors;
            # converting them to bf16 would take six times as long.
            scale = torch.tensor(1 / (1 - self.p), dtype=torch.bfloat16).view(torch.int16)
            return x * kept.mul_(scale).view(torch.bfloat16)
        return x * (kept.to(x.dtype) / (1 - self.p))


def half_residual(module, inputs, output: torch.Tensor) -> torch.Tensor:
    """Forward hook of the embeddings: keep the residual stream in half precision.

    fp32 additions, norms and casts take a tenth of a step on CPUs, and more on GPUs. The residual
    stream of fp16 on GPUs stays fp32: its range is too small for some encoders.
    """
    if isinstance(output, tuple):  # LiLT's
        return output
    device = output.device.type
    if not torch.is_autocast_enabled(device):
        return output
    dtype = torch.get_autocast_dtype(device)
    return output if device == "cuda" and dtype == torch.float16 else output.to(dtype)


class LayerNorm(nn.LayerNorm):
    """Layer norm that keeps a bf16 residual stream on GPUs, where autocast would return fp32.

    Statistics are fp32 in either case. CPUs' layer norm takes bf16 as it is.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not x.is_cuda or x.dtype != torch.bfloat16 or not torch.is_autocast_enabled("cuda"):
            return super().forward(x)
        weight, bias = (w if w is None else w.to(x.dtype) for w in (self.weight, self.bias))
        with torch.autocast("cuda", enabled=False):
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


def last_rnn_states_on_cpu(rnn: nn.RNNBase, states: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Final forward and backward state of a one-layer bidirectional LSTM or GRU, (B, 2 * hidden).

    torch's CPU kernels take three times as long for packed sequences as for padded ones, and
    sentences of a batch have similar lengths. Each direction runs by itself, the backward one over
    the reversed sentences; that needs the private list of the RNN's weights. bf16 is used for
    prediction only: gradients summed over a sentence would lose precision.
    """
    n = len(batch.indices)
    lengths, first = torch.tensor(batch.lengths[:n]), batch.offsets[:n].long()
    position = torch.minimum(torch.arange(batch.lengths[0])[:, None], lengths - 1)  # (longest, B)
    in_bf16 = (
        torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and not torch.is_grad_enabled()
    )
    dtype = torch.bfloat16 if in_bf16 else torch.float32
    last = []
    with torch.autocast("cpu", enabled=False):
        for weights, order in (
            (rnn._flat_weights[:4], first + position),
            (rnn._flat_weights[4:], first + lengths - 1 - position),
        ):
            weights = [w.to(dtype) for w in weights]
            zero = states.new_zeros(1, len(lengths), rnn.hidden_size, dtype=dtype)
            run, start = (torch.gru, zero) if rnn.mode == "GRU" else (torch.lstm, (zero, zero))
            sequence = states[order].to(dtype)
            out = run(sequence, start, weights, True, 1, 0.0, rnn.training, False, False)[0]
            last.append(out[lengths - 1, torch.arange(len(lengths))])
    return torch.cat(last, 1)
