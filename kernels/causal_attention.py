"""Causal attention on a CPU as batched matmuls over blocks of queries.

torch's own CPU kernel (the flash one behind ``scaled_dot_product_attention``) computes its tiles at a fraction of the
matmul rate, in bf16 more slowly than in fp32. Matmuls over whole blocks of queries, each against the keys it may see,
run at full rate: forward and backward of 8 x 6 heads of 256 x 64 on one core take 19 ms in bf16 instead of 50, and
34 ms in fp32 instead of 44.

Shapes: ``s`` sequence, ``b`` batch, ``n`` query heads, ``g`` key/value heads, ``d`` head dim.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from megatron_ds.kernels.autograd import first_derivative_only

# Queries a block. Smaller blocks skip more of what lies above the diagonal; larger ones multiply at a better rate.
_BLOCK = 64


def is_faster(q: Tensor) -> bool:
    """Whether :func:`causal_attention` beats torch's own for queries ``[s, b, n, d]``: on a CPU in half precision, and
    in fp32 while the probabilities are kept (at ``s = 1024`` the two are level)."""
    return q.device.type == "cpu" and (q.dtype in (torch.bfloat16, torch.float16) or _keeps(q))


def _keeps(q: Tensor) -> bool:
    return q.shape[0] <= 4 * q.shape[-1]


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``q [s, b, n, d]``, ``k, v [s, b, g, d]`` -> ``[s, b, n * d]``, each position attending to itself and before.

    Any strides. Scores are rounded to the inputs' dtype before the softmax, which computes in fp32; those of fp16,
    which ends at 65,504, are fp32 themselves.
    Memory beyond the inputs: probabilities are kept for the backward pass while a row of them is no longer than an
    MLP's activations (``s <= 4 d``), and otherwise computed again.
    """
    out: Tensor = _CausalAttention.apply(q, k, v, _keeps(q))
    return out


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, keep: bool) -> Tensor:
        s, b, n, d = q.shape
        ctx.scale, ctx.keep, ctx.shape, ctx.groups = 1.0 / math.sqrt(d), keep, q.shape, k.shape[2]
        # The scale goes into the queries, the smallest tensor it can go into.
        queries, keys, values = _heads(q, n).mul_(ctx.scale), _heads(k, n), _heads(v, n)
        out = q.new_empty(s, b, n, d)
        by_head = out.permute(1, 2, 0, 3)  # [b, n, s, d]
        kept, wide_keys = [], _for_scores(keys)
        for start in range(0, s, _BLOCK):
            end = min(start + _BLOCK, s)
            probabilities = _probabilities(queries, wide_keys, start, end)
            by_head[:, :, start:end] = (probabilities @ values[:, :end]).view(b, n, end - start, d)
            if keep:
                kept.append(probabilities)
        ctx.save_for_backward(queries, keys, values, *kept)
        return out.view(s, b, n * d)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        queries, keys, values, *kept = ctx.saved_tensors
        s, b, n, d = ctx.shape
        grad = _heads(grads[0].view(s, b, n, d), n)
        grad_q = grad.new_empty(s, b, n, d)
        grad_queries = grad_q.permute(1, 2, 0, 3)
        grad_keys, grad_values = keys, values  # replaced by the last block, which sees all keys and comes first
        wide_keys = keys if ctx.keep else _for_scores(keys)
        total = torch.promote_types(keys.dtype, torch.float32)  # of the sums over blocks of queries
        for start in reversed(range(0, s, _BLOCK)):
            end = min(start + _BLOCK, s)
            p = kept[start // _BLOCK] if ctx.keep else _probabilities(queries, wide_keys, start, end)
            to_values = p.transpose(1, 2) @ grad[:, start:end]
            grad_p = grad[:, start:end] @ values[:, :end].transpose(1, 2)
            grad_scores = torch._softmax_backward_data(grad_p, p, -1, p.dtype)
            grad_block = (grad_scores @ keys[:, :end]).mul_(ctx.scale)
            grad_queries[:, :, start:end] = grad_block.view(b, n, end - start, d)
            to_keys = grad_scores.transpose(1, 2) @ queries[:, start:end]
            if end == s:
                grad_keys, grad_values = to_keys.to(total), to_values.to(total)
            else:
                grad_keys[:, :end] += to_keys
                grad_values[:, :end] += to_values
        grad_k, grad_v = (
            t.view(b, ctx.groups, n // ctx.groups, s, d).sum(2).to(keys.dtype).permute(2, 0, 1, 3)
            if ctx.groups < n
            else t.view(b, n, s, d).to(keys.dtype).permute(2, 0, 1, 3)
            for t in (grad_keys, grad_values)
        )
        return grad_q, grad_k, grad_v, None


def _heads(tensor: Tensor, n: int) -> Tensor:
    """``[s, b, g, d] -> [b * n, s, d]``, a new contiguous tensor; a group's head is repeated for its queries."""
    s, b, g, d = tensor.shape
    new = tensor.new_empty(b, g, n // g, s, d)
    new.copy_(tensor.permute(1, 2, 0, 3).unsqueeze(2))
    return new.view(b * n, s, d)


def _for_scores(keys: Tensor) -> Tensor:
    """The keys in the dtype that scores are computed in."""
    return keys.float() if keys.dtype == torch.float16 else keys


def _probabilities(queries: Tensor, keys: Tensor, start: int, end: int) -> Tensor:
    """``[b * n, end - start, end]`` of the queries ``start:end``; ``keys`` from :func:`_for_scores`."""
    scores = queries[:, start:end].to(keys.dtype) @ keys[:, :end].transpose(1, 2)
    # Adding -inf is one vectorised pass; masked_fill is not.
    scores[:, :, start:] += scores.new_full((end - start, end - start), float("-inf")).triu_(1)
    return scores.softmax(-1).to(queries.dtype)
