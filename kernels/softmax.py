"""Softmax of attention scores: scaled, causal, padded, with ALiBi.

Shapes: ``[b, n, q, k]`` batch, heads, queries, keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_ds.kernels.autograd import first_derivative_only
from megatron_ds.kernels.registry import Op, below_autograd, define

SOFTMAX = Op("softmax", twin="softmax")


def scaled_masked_softmax(
    scores: Tensor,
    scale: float = 1.0,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    slopes: Tensor | None = None,
) -> Tensor:
    """``softmax(scale * scores + bias)`` over the keys, in fp32 at least, as ``scores.dtype``.

    Args:
        scores: ``[b, n, q, k]``.
        causal: query i sees keys up to ``i + k - q``: the last query sees every key.
        mask: bool, broadcastable to ``scores``, True where a query may see the key.
        slopes: ``[n]`` ALiBi slopes (Press et al. 2021): the bias is ``slope * (key - (query + k - q))``.

    A query that sees no key gets zeros, and passes no gradient.
    """
    if SOFTMAX.choose(scores) == "triton":
        if mask is not None:
            mask = mask.expand(scores.shape)
        return torch.ops.megatron_ds.softmax(scores, mask, slopes, scale, causal)
    return scaled_masked_softmax_reference(scores, scale, causal=causal, mask=mask, slopes=slopes)


def scaled_masked_softmax_reference(
    scores: Tensor,
    scale: float = 1.0,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    slopes: Tensor | None = None,
) -> Tensor:
    dtype = torch.promote_types(scores.dtype, torch.float32)
    queries, keys = scores.shape[-2:]
    query = torch.arange(keys - queries, keys, device=scores.device).unsqueeze(1)
    key = torch.arange(keys, device=scores.device)
    z = scores.to(dtype) * scale
    if slopes is not None:
        z = z + slopes.to(z).view(-1, 1, 1) * (key - query).to(dtype)
    seen = torch.ones((), dtype=torch.bool, device=scores.device)
    if causal:
        seen = key <= query
    if mask is not None:
        seen = seen & mask
    hidden = ~seen | (z == float("-inf"))
    # A row without a key is filled with zeros, here and afterwards, and gives no NaN, forward or backward. A finite
    # number in place of all -inf would take part in the sum where visible scores are as low.
    empty = hidden.all(dim=-1, keepdim=True)
    weights = z.masked_fill(hidden, float("-inf")).masked_fill(empty, 0.0).softmax(dim=-1)
    return weights.masked_fill(hidden, 0.0).to(scores.dtype)


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, mask: Tensor | None, slopes: Tensor | None, scale: float, causal: bool
    ) -> Tensor:
        with below_autograd():
            out = torch.ops.megatron_ds.softmax(scores, mask, slopes, scale, causal)
        ctx.save_for_backward(out)
        ctx.scale, ctx.causal = scale, causal
        return out

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (out,) = ctx.saved_tensors
        return torch.ops.megatron_ds.softmax_backward(grads[0], out, ctx.scale, ctx.causal), *[None] * 4


define(
    "softmax(Tensor scores, Tensor? mask, Tensor? slopes, float scale, bool causal) -> Tensor",
    lambda scores, mask, slopes, scale, causal: SOFTMAX.load(scores).softmax(scores, mask, slopes, scale, causal),
    lambda scores, mask, slopes, scale, causal: scores.new_empty(scores.shape),
    _Softmax,
)
define(
    "softmax_backward(Tensor grad, Tensor out, float scale, bool causal) -> Tensor",
    lambda grad, out, scale, causal: SOFTMAX.load(out).softmax_backward(grad, out, scale, causal),
    lambda grad, out, scale, causal: out.new_empty(out.shape),
)
