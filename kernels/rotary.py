"""Rotary position embedding of queries and keys together (Su et al. 2021, eq. 34).

Shapes: ``q [s, b, n, d]``, ``k [s, b, g, d]``; the tables ``[positions, b or 1, 1, r]`` with ``r <= d`` rotated dims.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_ds.kernels.registry import Op, below_autograd, define

ROTARY = Op("rotary", twin="rotary", fuses=True)


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, offset: int = 0
) -> tuple[Tensor, Tensor]:
    """Rotate the first ``r`` dims of every head of ``q`` and ``k``; the others pass.

    Args:
        cos, sin: ``[>= offset + s, b or 1, 1, r]``; the angles of the r/2 planes, twice over: ``[..., :r/2]`` are read.
            They get no gradient.
        interleaved: a plane is dims (2 i, 2 i + 1), as in the paper; else (i, i + r/2), as in Llama's published
            weights.
        offset: row of the tables that belongs to the first position.
    """
    if ROTARY.choose(q) == "triton":
        return torch.ops.megatron_ds.rotary(q, k, cos, sin, interleaved, offset, False)
    end = offset + q.shape[0]
    cos, sin = (t if (offset, end) == (0, t.shape[0]) else t[offset:end] for t in (cos, sin))
    return rotate_reference(q, cos, sin, interleaved), rotate_reference(k, cos, sin, interleaved)


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """``x [s, b, n, d]`` rotated by tables of exactly its positions."""
    size = cos.shape[-1]
    if size < x.shape[-1]:
        return torch.cat((rotate_reference(x[..., :size], cos, sin, interleaved), x[..., size:]), dim=-1)
    if interleaved:
        even, odd = x[..., ::2], x[..., 1::2]
        c, s = cos[..., : size // 2], sin[..., : size // 2]
        return torch.stack((even * c - odd * s, odd * c + even * s), dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, offset: int, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.arguments = interleaved, offset, not inverse
        with below_autograd():
            return torch.ops.megatron_ds.rotary(q, k, cos, sin, interleaved, offset, inverse)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # A rotation's transpose is the rotation back.
        return *torch.ops.megatron_ds.rotary(*grads, *ctx.saved_tensors, *ctx.arguments), *[None] * 5


define(
    "rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved, int offset, bool inverse)"
    " -> (Tensor, Tensor)",
    lambda q, k, cos, sin, interleaved, offset, inverse: ROTARY.load(q).rotary(
        q, k, cos, sin, interleaved, offset, inverse
    ),
    # Queries that lie packed with others, ``[s, b, g, q, d]``, come out as ``[s, b, n, d]`` too.
    lambda q, k, *others: (q.new_empty(q.flatten(2, -2).shape), k.new_empty(k.shape)),
    _Rotary,
)
