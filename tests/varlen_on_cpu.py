"""torch's attention kernel for flat batches, on the CPU: for tests of what else runs on GPUs.

varlen_on_cpu.install()     # flat_attention then takes the GPU's path in this process
"""

import torch
from torch.nn.attention import varlen

import attention


def sentences(offsets, is_causal, window_size):
    """(slice, which token sees which) of each sentence that has tokens."""
    left, right = (10**9 if n < 0 else n for n in window_size or (-1, -1))
    for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist()):
        position = torch.arange(end - start)
        ahead = position - position[:, None]
        if end > start:
            yield slice(start, end), (ahead >= -left) & (ahead <= (0 if is_causal else right))


def probabilities(q, k, scale, visible):
    scores = (q.transpose(0, 1) @ k.permute(1, 2, 0)) * scale  # (heads, tokens, tokens)
    return scores.masked_fill(~visible, -torch.inf).softmax(-1)


def forward(query, key, value, offsets, offsets_k, max_q, max_k, is_causal=False, scale=None,
            window_size=None, *_):  # fmt: skip
    scale, out = scale or query.shape[-1] ** -0.5, torch.zeros_like(query)
    for part, visible in sentences(offsets, is_causal, window_size):
        assert len(visible) <= max_q
        probs = probabilities(query[part], key[part], scale, visible)
        out[part] = (probs @ value[part].transpose(0, 1)).transpose(0, 1)
    lse = torch.zeros(query.shape[1], len(query))
    return out, lse, torch.zeros(2, dtype=torch.uint64)


def backward(grad_out, query, key, value, out, lse, offsets, offsets_k, max_q, max_k, is_causal,
             rng_state, scale=None, window_size=None):  # fmt: skip
    scale = scale or query.shape[-1] ** -0.5
    grads = [torch.zeros_like(x) for x in (query, key, value)]
    for part, visible in sentences(offsets, is_causal, window_size):
        probs = probabilities(query[part], key[part], scale, visible)
        q, k, v, grad = (x[part].transpose(0, 1) for x in (query, key, value, grad_out))
        of_probs = grad @ v.transpose(1, 2)
        of_scores = probs * (of_probs - (of_probs * probs).sum(-1, keepdim=True)) * scale
        found = of_scores @ k, of_scores.transpose(1, 2) @ q, probs.transpose(1, 2) @ grad
        for whole, piece in zip(grads, found):
            whole[part] = piece.transpose(0, 1)
    return tuple(grads)


def install():
    varlen._varlen_attn.register_kernel("cpu", forward)
    varlen._varlen_attn_backward.register_kernel("cpu", backward)
    attention.has_kernel = lambda *_: True
