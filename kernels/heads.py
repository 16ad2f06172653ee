"""Splits a fused QKV projection into heads, with rotary embedding; the backward pass packs the gradients again.

Shapes: ``s`` sequence, ``b`` batch, ``g`` key/value heads, ``q`` queries a key/value head, ``n = g * q`` heads, ``d``
head dim; the projection ``[s, b, g * (q + 2) * d]`` has for each key/value head its queries, its key and its value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_ds.kernels.autograd import first_derivative_only, main_gradients
from megatron_ds.kernels.column_sums import ColumnSums, with_bias_gradient
from megatron_ds.kernels.registry import Op, below_autograd, define
from megatron_ds.kernels.rotary import ROTARY, rotary

HEADS = Op("split_heads", twin="rotary", fuses=True)


def split_heads(
    qkv: Tensor,
    groups: int,
    head_dim: int,
    table: tuple[Tensor, Tensor] | None = None,
    *,
    interleaved: bool = False,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a fused QKV projection, the first two rotated where there is a table.

    ``qkv [s, b, g * (q + 2) * d]`` -> ``q [s, b, n, d]``, ``k, v [s, b, g, d]``. What is not rotated may be a view.
    On a GPU one kernel turns the gradients of queries and keys back, packs all three and adds up the bias's gradient.

    Args:
        table: cos and sin, as in :func:`megatron_ds.kernels.rotary.rotary`; None: nothing is rotated.
        bias: ``g * (q + 2) * d`` elements, a bias that ``qkv`` has in it already, as in
            :func:`megatron_ds.kernels.column_sums.with_bias_gradient`.
    """
    if HEADS.choose(qkv) == "triton" and (table is None or ROTARY.choose(qkv) == "triton"):
        q, k, v = _SplitHeads.apply(qkv, bias, *(table or (None, None)), groups, head_dim, interleaved)
        return q, k, v
    if bias is not None:
        qkv = with_bias_gradient(qkv, bias)
    q, k, v = _split(qkv, groups, head_dim)
    q = q.flatten(2, 3)
    if table is not None:
        q, k = rotary(q, k, *table, interleaved=interleaved)
    return q, k, v


def _split(qkv: Tensor, groups: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views ``[s, b, g, q, d]`` and twice ``[s, b, g, d]``."""
    s, b, columns = qkv.shape
    queries = columns // (groups * head_dim) - 2
    # One split: slices would each fill a gradient of the whole with zeros in the backward pass.
    q, k, v = qkv.view(s, b, groups, queries + 2, head_dim).split([queries, 1, 1], dim=-2)
    return q, k.squeeze(-2), v.squeeze(-2)


class _SplitHeads(torch.autograd.Function):
    """No operator of torch.library, which may not return views of what it is given."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        bias: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        groups: int,
        head_dim: int,
        interleaved: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(bias, cos, sin)
        ctx.main_grads, ctx.interleaved = main_gradients(bias), interleaved
        q, k, v = _split(qkv, groups, head_dim)
        if cos is None:
            return q.flatten(2, 3), k, v
        with below_autograd():
            return *torch.ops.megatron_ds.rotary(q, k, cos, sin, interleaved, 0, False), v

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        bias, cos, sin = ctx.saved_tensors
        with ColumnSums((bias,), ctx.needs_input_grad[1:2], ctx.main_grads) as sums:
            grad = torch.ops.megatron_ds.pack_heads(*grads, cos, sin, sums.totals, sums.keep, ctx.interleaved)
        return grad, sums.gradients[0], *[None] * 5


define(
    "pack_heads(Tensor q, Tensor k, Tensor v, Tensor? cos, Tensor? sin, Tensor(a!)[] totals, bool[] keep,"
    " bool interleaved) -> Tensor",
    lambda q, *others: HEADS.load(q).pack_heads(q, *others),
    lambda q, k, *others: q.new_empty((*q.shape[:2], (q.shape[2] + 2 * k.shape[2]) * q.shape[3])),
)
