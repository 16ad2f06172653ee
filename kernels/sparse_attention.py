"""Attention that computes the live blocks of a :class:`~megatron_ds.kernels.block_layout.BlockLayout` and no others.

Time and memory grow with the number of live blocks, forward and backward, in the reference as well as in the Triton
twin: neither holds a score matrix. A query without any allowed key gives zeros, and gradients of zero.

Shapes: ``b`` batch, ``n`` query heads, ``g`` key/value heads, ``s`` tokens, ``d`` head dim, ``t`` blocks a side,
``e`` live blocks at a time.

Unlike other ops' references this one is called behind the operator too: its backward pass is written out, because what
autograd would keep of each chunk is the whole score matrix again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_ds.errors import ConfigError
from megatron_ds.kernels.autograd import first_derivative_only
from megatron_ds.kernels.block_layout import FULL, BlockLayout
from megatron_ds.kernels.registry import Op, below_autograd, define

SPARSE_ATTENTION = Op("sparse_attention", twin="sparse_attention")
# The twin keeps a tile of queries, keys and values in shared memory: no wider heads fit beside each other.
LARGEST_TRITON_HEAD_DIM = 128
# Scores that the reference holds at a time: 16 MB in fp32, a few times over. Larger was slower (out of cache).
_CHUNK = 1 << 22


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float | None = None) -> Tensor:
    """``softmax(scale q k^T) v`` over the tokens that ``layout`` allows.

    Args:
        q: ``[b, n, s, d]``, in any memory order.
        k, v: ``[b, g, s, d]``; query head ``h`` uses key/value head ``h // (n / g)``.
        layout: of ``n`` heads and ``s`` tokens, on the tensors' device.
        scale: of the scores, positive; default ``1 / sqrt(d)``.

    Returns:
        ``[b, n, s, d]`` in the memory order of ``q``.

    Raises:
        ConfigError: sizes that do not fit together, a scale that is not positive, or a head dim above 128 with the
            Triton twin.
    """
    _check(q, k, v, layout)
    implementation = SPARSE_ATTENTION.choose(q)
    if implementation == "triton" and q.shape[-1] > LARGEST_TRITON_HEAD_DIM:
        raise ConfigError(
            f"kernels.sparse_attention='triton' has head dims up to {LARGEST_TRITON_HEAD_DIM}, not {q.shape[-1]}; "
            "use more and narrower heads, or kernels.sparse_attention='reference'"
        )
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    if not scale > 0.0:
        raise ConfigError(f"sparse attention with scores times {scale}: the scale must be positive")
    out, _ = torch.ops.megatron_ds.sparse_attention(
        q, k, v, _flat(layout), layout.block, layout.is_window, scale, implementation
    )  # fmt: skip
    return out


def _check(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout) -> None:
    b, n, s, d = q.shape
    if k.shape != v.shape or (k.shape[0], *k.shape[2:]) != (b, s, d) or n % k.shape[1]:
        raise ConfigError(
            f"sparse attention of queries {list(q.shape)} with keys {list(k.shape)} and values {list(v.shape)}: both "
            "must be [batch, kv_heads, sequence, head_dim], and kv_heads divide the query heads"
        )
    if (layout.heads, layout.length) != (n, s):
        raise ConfigError(
            f"the layout is of {layout.heads} heads and {layout.length} tokens, the queries of {n} heads and {s}"
        )
    if layout.masks.device != q.device:
        raise ConfigError(f"the layout is on {layout.masks.device}, the queries on {q.device}; use layout.to(device)")


def _flat(layout: BlockLayout) -> list[Tensor]:
    """The tensors of a layout, as operators take them."""
    rows, columns = layout.rows, layout.columns
    return [
        layout.pattern,
        *(rows.start, rows.partial, rows.index, rows.mask),
        *(columns.start, columns.partial, columns.index, columns.mask),
        layout.masks,
        layout.short_columns,
        layout.long_columns,
    ]


@dataclass(frozen=True)
class _Chunk:
    """Some rows of blocks of the heads that share a pattern.

    Attributes:
        heads: ``[h]`` int64, the heads.
        first, last: rows of blocks.
        rows, columns: ``[e]`` int64, of each live block; rows count from ``first``.
        partial: ``[e']`` int64, which of them have a mask.
        masked: ``[e', block, block]`` bool, True where a token is not allowed.
    """

    heads: Tensor
    first: int
    last: int
    rows: Tensor
    columns: Tensor
    partial: Tensor
    masked: Tensor

    def scores(self, queries: Tensor, keys: Tensor, scale: float) -> Tensor:
        """``[..., e, block, block]`` of ``[..., e, block, d]`` each."""
        scores = (queries @ keys.transpose(-2, -1)).mul_(scale)
        scores[..., self.partial, :, :] = scores[..., self.partial, :, :].masked_fill_(self.masked, -math.inf)
        return scores


def _chunks(layout: list[Tensor], block: int, side: int, batch: int) -> Iterator[_Chunk]:
    pattern, start, _, index, mask = layout[:5]
    for number in range(len(layout[2]) // side):
        heads = (pattern == number).nonzero().flatten()
        starts = start[number * side : (number + 1) * side + 1].tolist()
        room = max(1, _CHUNK // (block * block * max(1, batch) * max(1, len(heads))))
        first = 0
        while first < side and len(heads):
            last = first + 1
            while last < side and starts[last + 1] - starts[first] <= room:
                last += 1
            these = slice(starts[first], starts[last])
            counts = start[number * side + first : number * side + last + 1].diff().to(torch.int64)
            rows = torch.arange(last - first, device=start.device).repeat_interleave(counts)
            partial = (mask[these] != FULL).nonzero().flatten()
            masked = ~layout[9][mask[these][partial].to(torch.int64)]
            yield _Chunk(heads, first, last, rows, index[these].to(torch.int64), partial, masked)
            first = last


def _blocks(x: Tensor, side: int, block: int) -> Tensor:
    """``[b, n, s, d]`` as ``[b, n, t, block, d]``, in fp32 at least, zeros behind the end."""
    padded = x.new_zeros(*x.shape[:2], side * block, x.shape[3], dtype=torch.promote_types(x.dtype, torch.float32))
    padded[:, :, : x.shape[2]] = x
    return padded.unflatten(2, (side, block))


def _gather(x: Tensor, heads: Tensor, places: Tensor) -> Tensor:
    """``[b, h, e, ...]``: from ``[b, n, t, ...]`` the blocks at ``places [e]`` of ``heads [h]``."""
    return x.flatten(1, 2)[:, heads.unsqueeze(1) * x.shape[2] + places]


def _add(x: Tensor, heads: Tensor, places: Tensor, part: Tensor) -> None:
    """Add ``[b, h, e, ...]`` to ``[b, n, t, ...]`` where :func:`_gather` would take it from; places may repeat."""
    x.flatten(1, 2).index_add_(1, (heads.unsqueeze(1) * x.shape[2] + places).flatten(), part.flatten(1, 2))


def _like(x: Tensor, blocks: Tensor) -> Tensor:
    """The blocks ``[b, n, t, block, d]`` as a tensor of the shape, dtype and memory order of ``x``."""
    return torch.empty_like(x).copy_(blocks.flatten(2, 3)[:, :, : x.shape[2]])


def reference_forward(
    q: Tensor, k: Tensor, v: Tensor, layout: list[Tensor], block: int, scale: float
) -> tuple[Tensor, Tensor]:
    """The result and ``[b, n, s]`` log-sum-exp of the scores, +inf for a query without keys."""
    b, n, s, _ = q.shape
    side, group = -(-s // block), n // k.shape[1]
    queries, keys, values = (_blocks(x, side, block) for x in (q, k, v))
    out = torch.zeros_like(queries)
    lse = out.new_full((b, n, side, block), math.inf)
    for chunk in _chunks(layout, block, side, b):
        own, lines = chunk.heads, slice(chunk.first, chunk.last)
        kv = own // group
        mine = _gather(queries, own, chunk.first + chunk.rows)
        scores = chunk.scores(mine, _gather(keys, kv, chunk.columns), scale)
        tops = scores.amax(-1)
        top = tops.new_full((b, len(own), chunk.last - chunk.first, block), -math.inf)
        top.scatter_reduce_(2, chunk.rows.view(-1, 1).expand_as(tops), tops, "amax")
        top = top.masked_fill_(top == -math.inf, 0.0)
        weights = scores.sub_(top[:, :, chunk.rows].unsqueeze(-1)).exp_()
        total = torch.zeros_like(top).index_add_(2, chunk.rows, weights.sum(-1))
        part = weights @ _gather(values, kv, chunk.columns)
        part = torch.zeros_like(out[:, own, lines]).index_add_(2, chunk.rows, part)
        empty = total == 0
        out[:, own, lines] = part / total.masked_fill(empty, 1.0).unsqueeze(-1)
        lse[:, own, lines] = (top + total.log()).masked_fill_(empty, math.inf)
    return _like(q, out), lse.flatten(2)[..., :s].contiguous()


def reference_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: list[Tensor],
    block: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``q``, ``k`` and ``v``, from the weights computed again chunk by chunk."""
    b, n, s, _ = q.shape
    side, group = -(-s // block), n // k.shape[1]
    queries, keys, values, grads = (_blocks(x, side, block) for x in (q, k, v, grad))
    delta = (grads * _blocks(out, side, block)).sum(-1)
    ends = lse.new_full((b, n, side * block), math.inf)
    ends[..., :s] = lse
    ends = ends.unflatten(2, (side, block))
    q_grad, k_grad, v_grad = (torch.zeros_like(x) for x in (queries, keys, values))
    for chunk in _chunks(layout, block, side, b):
        own, kv, rows = chunk.heads, chunk.heads // group, chunk.first + chunk.rows
        mine, my_grads = _gather(queries, own, rows), _gather(grads, own, rows)
        my_keys, my_values = _gather(keys, kv, chunk.columns), _gather(values, kv, chunk.columns)
        weights = chunk.scores(mine, my_keys, scale)
        weights = weights.sub_(_gather(ends, own, rows).unsqueeze(-1)).exp_()
        score_grads = my_grads @ my_values.transpose(-2, -1)
        score_grads.sub_(_gather(delta, own, rows).unsqueeze(-1)).mul_(weights).mul_(scale)
        # Heads of one group add to the same keys, and rows to the same columns: so each goes to its place by index.
        _add(q_grad, own, rows, score_grads @ my_keys)
        _add(k_grad, kv, chunk.columns, score_grads.transpose(-2, -1) @ mine)
        _add(v_grad, kv, chunk.columns, weights.transpose(-2, -1) @ my_grads)
    return _like(q, q_grad), _like(k, k_grad), _like(v, v_grad)


class _SparseAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: list[Tensor],
        block: int,
        window: bool,
        scale: float,
        implementation: str,
    ) -> tuple[Tensor, Tensor]:
        with below_autograd():
            out, lse = torch.ops.megatron_ds.sparse_attention(q, k, v, layout, block, window, scale, implementation)
        ctx.save_for_backward(q, k, v, out, lse, *layout)
        ctx.settings = block, window, scale, implementation
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *layout = ctx.saved_tensors
        results = torch.ops.megatron_ds.sparse_attention_backward(grads[0], q, k, v, out, lse, layout, *ctx.settings)
        return *results, *[None] * 5


def _forward(
    q: Tensor, k: Tensor, v: Tensor, layout: list[Tensor], block: int, window: bool, scale: float, implementation: str
) -> tuple[Tensor, Tensor]:
    if implementation == "reference":
        return reference_forward(q, k, v, layout, block, scale)
    out, lse = _forward_shapes(q)
    SPARSE_ATTENTION.load(q).forward(q, k, v, layout, block, window, scale, out, lse)
    return out, lse


def _forward_shapes(q: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, layout: list[Tensor], *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    block, window, scale, implementation = settings
    if implementation == "reference":
        return reference_backward(grad, q, k, v, out, lse, layout, block, scale)
    results = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    SPARSE_ATTENTION.load(q).backward(grad, q, k, v, out, lse, layout, block, window, scale, *results)
    return results


define(
    "sparse_attention(Tensor q, Tensor k, Tensor v, Tensor[] layout, int block, bool window, float scale, "
    "str implementation) -> (Tensor, Tensor)",
    _forward,
    _forward_shapes,
    _SparseAttention,
)
define(
    "sparse_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor[] layout, "
    "int block, bool window, float scale, str implementation) -> (Tensor, Tensor, Tensor)",
    _backward,
    lambda grad, q, k, v, *others: (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)),
)
