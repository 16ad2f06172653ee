"""Rotation of queries and keys in one launch, and back again with the packing of their gradients.

A program takes a few heads, of the queries or, further along the grid, of the keys (and of the values), so that the
angles of a token are loaded once for all of those heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_ds.kernels.triton.common import STAGES, on_device_of, persistent, unit_stride
from megatron_ds.kernels.triton.partial_sums import add_partial_sums

WARPS, RESIDENT_WARPS = 4, 24  # of a program, and of those that walk over the tokens for their columns' sums
LEAST_TILE, MOST_TILE = 8 * 32 * WARPS, 8192  # elements: each thread loads 8 side by side


@triton.jit
def turn(
    x, out, present, cos, sin, angle, planes, dim,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, TURNS: tl.constexpr, PASSES: tl.constexpr,
    HEADS: tl.constexpr, PLANES: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Write the heads ``x`` ``[HEADS, 1]`` of a token, rotated, to ``out``.

    Returns both sides of the planes and the other dims, in fp32.
    """
    first = tl.zeros((HEADS, PLANES), tl.float32)
    second = first
    others = tl.zeros((HEADS, REST), tl.float32)
    if TURNS:
        plane = tl.arange(0, PLANES)[None, :]
        c = tl.load(cos + angle + plane, mask=plane < planes, other=0.0).to(tl.float32)
        w = tl.load(sin + angle + plane, mask=plane < planes, other=0.0).to(tl.float32)
        if INVERSE:
            w = -w
        if INTERLEAVED:
            # Neighbours are loaded together and taken apart in registers, so that the loads stay wide.
            both = tl.arange(0, 2 * PLANES)[None, :]
            inside = present & (both < 2 * planes)
            pair = tl.load(x + both, mask=inside, other=0.0).to(tl.float32)
            left, right = tl.split(tl.reshape(pair, (HEADS, PLANES, 2)))
            first, second = left * c - right * w, right * c + left * w
            pair = tl.reshape(tl.join(first, second), (HEADS, 2 * PLANES))
            tl.store(out + both, pair.to(out.dtype.element_ty), mask=inside)
        else:
            inside = present & (plane < planes)
            left = tl.load(x + plane, mask=inside, other=0.0).to(tl.float32)
            right = tl.load(x + planes + plane, mask=inside, other=0.0).to(tl.float32)
            first, second = left * c - right * w, right * c + left * w
            tl.store(out + plane, first.to(out.dtype.element_ty), mask=inside)
            tl.store(out + planes + plane, second.to(out.dtype.element_ty), mask=inside)
    if PASSES:
        rest = 2 * planes + tl.arange(0, REST)[None, :]
        inside = present & (rest < dim)
        values = tl.load(x + rest, mask=inside, other=0.0)
        tl.store(out + rest, values, mask=inside)
        others = values.to(tl.float32)
    return first, second, others


@triton.jit
def rotary_kernel(
    q, k, q_out, k_out, cos, sin, batch, queries, q_heads, k_heads, dim, planes, offset,
    q_s, q_b, q_g, q_n, k_s, k_b, k_n, table_s, table_b,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, PASSES: tl.constexpr,
    HEADS: tl.constexpr, PLANES: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    s, b = tl.cast(token // batch, tl.int64), tl.cast(token % batch, tl.int64)
    blocks = tl.cdiv(q_heads, HEADS)
    block = tl.program_id(1)
    each, heads = tl.cast(queries, tl.int64), q_heads
    x, out, stride, step = q + s * q_s + b * q_b, q_out, tl.cast(q_g, tl.int64), tl.cast(q_n, tl.int64)
    if block >= blocks:
        each, heads = tl.cast(1, tl.int64), k_heads
        x, out, stride, step = k + s * k_s + b * k_b, k_out, tl.cast(k_n, tl.int64), tl.cast(0, tl.int64)
        block -= blocks
    head = block * HEADS + tl.arange(0, HEADS)[:, None]
    x += (head // each) * stride + (head % each) * step
    out += tl.cast(token, tl.int64) * heads * dim + head * dim
    turn(
        x, out, head < heads, cos, sin, (s + offset) * table_s + b * table_b, planes, dim,
        INTERLEAVED, INVERSE, True, PASSES, HEADS, PLANES, REST,
    )  # fmt: skip


@triton.jit
def pack_some(
    x, cos, sin, out, partial, block, each, slot, heads, tokens, batch, columns, slots, dim, planes,
    x_s, x_b, x_n, table_s, table_b,
    INTERLEAVED: tl.constexpr, TURNS: tl.constexpr, PASSES: tl.constexpr, SUMS: tl.constexpr,
    HEADS: tl.constexpr, PLANES: tl.constexpr, REST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A block of heads, of which each key/value head has ``each``, from ``slot`` of its ``slots`` places on."""
    head = block * HEADS + tl.arange(0, HEADS)[:, None]
    present = head < heads
    column = (head // each * slots + slot + head % each) * dim
    x += head.to(tl.int64) * x_n
    firsts = tl.zeros((HEADS, PLANES), tl.float32)
    seconds = tl.zeros((HEADS, PLANES), tl.float32)
    others = tl.zeros((HEADS, REST), tl.float32)
    for token in tl.range(tl.program_id(0), tokens, tl.num_programs(0), num_stages=STAGES):
        s, b = tl.cast(token // batch, tl.int64), tl.cast(token % batch, tl.int64)
        first, second, other = turn(
            x + s * x_s + b * x_b, out + tl.cast(token, tl.int64) * columns + column, present,
            cos, sin, s * table_s + b * table_b, planes, dim,
            INTERLEAVED, True, TURNS, PASSES, HEADS, PLANES, REST,
        )  # fmt: skip
        if SUMS:
            firsts += first
            seconds += second
            others += other
    if SUMS:
        place = partial + tl.program_id(0).to(tl.int64) * columns + column
        if TURNS:
            if INTERLEAVED:
                both = tl.arange(0, 2 * PLANES)[None, :]
                pair = tl.reshape(tl.join(firsts, seconds), (HEADS, 2 * PLANES))
                tl.store(place + both, pair, mask=present & (both < 2 * planes))
            else:
                plane = tl.arange(0, PLANES)[None, :]
                tl.store(place + plane, firsts, mask=present & (plane < planes))
                tl.store(place + planes + plane, seconds, mask=present & (plane < planes))
        if PASSES:
            rest = 2 * planes + tl.arange(0, REST)[None, :]
            tl.store(place + rest, others, mask=present & (rest < dim))


@triton.jit
def pack_heads_kernel(
    q, k, v, cos, sin, out, partial, tokens, batch, queries, groups, dim, planes,
    q_s, q_b, q_n, k_s, k_b, k_n, v_s, v_b, v_n, table_s, table_b,
    INTERLEAVED: tl.constexpr, TURNS: tl.constexpr, PASSES: tl.constexpr, SUMS: tl.constexpr,
    HEADS: tl.constexpr, PLANES: tl.constexpr, REST: tl.constexpr, WHOLE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of queries and keys turned back, and of values, into one row a token; and the columns' sums.

    Each of the three has a loop of its own: of a pointer that is chosen, Triton 3.6 does not load ahead.
    """
    slots = queries + 2
    columns = groups * slots * dim
    few = tl.cdiv(groups, HEADS)
    many = tl.cdiv(groups * queries, HEADS)
    block = tl.program_id(1)
    if block < many:
        pack_some(
            q, cos, sin, out, partial, block, queries, 0, groups * queries,
            tokens, batch, columns, slots, dim, planes, q_s, q_b, q_n, table_s, table_b,
            INTERLEAVED, TURNS, PASSES, SUMS, HEADS, PLANES, REST, STAGES,
        )  # fmt: skip
    elif block < many + few:
        pack_some(
            k, cos, sin, out, partial, block - many, 1, queries, groups,
            tokens, batch, columns, slots, dim, planes, k_s, k_b, k_n, table_s, table_b,
            INTERLEAVED, TURNS, PASSES, SUMS, HEADS, PLANES, REST, STAGES,
        )  # fmt: skip
    else:
        pack_some(
            v, cos, sin, out, partial, block - many - few, 1, queries + 1, groups,
            tokens, batch, columns, slots, dim, 0, v_s, v_b, v_n, table_s, table_b,
            INTERLEAVED, False, True, SUMS, HEADS, 1, WHOLE, STAGES,
        )  # fmt: skip


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, offset: int, inverse: bool
) -> tuple[Tensor, Tensor]:
    q, k = unit_stride(q), unit_stride(k)
    groups, queries = q.shape[2:-1] if q.dim() == 5 else (q.shape[2], 1)
    q_heads, k_heads = groups * queries, k.shape[2]
    length, batch, dim = q.shape[0], q.shape[1], q.shape[-1]
    if q.dtype != k.dtype or k.shape[:2] != q.shape[:2] or k.shape[3] != dim:
        raise ValueError(f"q {tuple(q.shape)} {q.dtype} and k {tuple(k.shape)} {k.dtype} do not fit")
    cos, sin, planes, strides = _table(cos, sin, offset + length, batch, dim)
    q_out, k_out = q.new_empty((length, batch, q_heads, dim)), k.new_empty(k.shape)
    if q_out.numel() + k_out.numel():
        tile = _tile(dim, planes, max(q_heads, k_heads))
        strips = triton.cdiv(q_heads, tile["HEADS"]) + triton.cdiv(k_heads, tile["HEADS"])
        with on_device_of(q):
            rotary_kernel[(length * batch, strips)](
                q, k, q_out, k_out, cos, sin, batch, queries, q_heads, k_heads, dim, planes, offset,
                *q.stride()[:3], q.stride(3) if q.dim() == 5 else 0, *k.stride()[:3], *strides,
                INTERLEAVED=interleaved, INVERSE=inverse, **tile,
            )  # fmt: skip
    return q_out, k_out


def pack_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    totals: Sequence[Tensor],
    keep: Sequence[bool],
    interleaved: bool,
) -> Tensor:
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    length, batch, groups, dim = k.shape
    queries, tokens = q.shape[2] // max(groups, 1), length * batch
    if (*q.shape[:2], *q.shape[3:]) != (length, batch, dim) or v.shape != k.shape or queries * groups != q.shape[2]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit")
    planes, strides = 0, (0, 0)
    if cos is not None and sin is not None:
        cos, sin, planes, strides = _table(cos, sin, length, batch, dim)
    out = q.new_empty((length, batch, groups * (queries + 2) * dim))
    tile: dict[str, int | bool] = {}
    strips, walks = 0, 0
    if out.numel():
        tile = _tile(dim, planes, q.shape[2])
        strips = triton.cdiv(q.shape[2], tile["HEADS"]) + 2 * triton.cdiv(groups, tile["HEADS"])
        # Where little of a head is rotated, tiles are so large that there are registers for half as many warps.
        large = tile["HEADS"] * triton.next_power_of_2(dim) > MOST_TILE // 4
        resident = RESIDENT_WARPS // 2 if large else RESIDENT_WARPS
        walks = persistent(q, tokens, WARPS, resident, strips) if totals else tokens
    partial = q.new_empty((1, walks, out.shape[-1]), dtype=torch.float32) if totals else None
    with on_device_of(q):
        if walks:
            pack_heads_kernel[(walks, strips)](
                q, k, v, cos, sin, out, partial, tokens, batch, queries, groups, dim, planes,
                *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *strides,
                INTERLEAVED=interleaved, TURNS=planes > 0, SUMS=bool(totals), WHOLE=triton.next_power_of_2(dim),
                STAGES=STAGES if totals else 1, **tile,
            )  # fmt: skip
        if partial is not None:
            add_partial_sums(partial, totals, keep)
    return out


def _table(cos: Tensor, sin: Tensor, end: int, batch: int, dim: int) -> tuple[Tensor, Tensor, int, tuple[int, int]]:
    """The tables with neighbouring planes side by side, how many planes they have, and their strides."""
    size = cos.shape[-1]
    if size > dim or size % 2:
        raise ValueError(f"{size} rotated dims do not fit into heads of {dim}")
    if cos.shape != sin.shape or cos.shape[0] < end or cos.shape[1] not in (1, batch):
        raise ValueError(f"tables {tuple(cos.shape)} do not hold {end} positions of {batch} rows")
    cos, sin = unit_stride(cos), unit_stride(sin)
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    return cos, sin, size // 2, (cos.stride(0), cos.stride(1) if cos.shape[1] > 1 else 0)


def _tile(dim: int, planes: int, heads: int) -> dict[str, int | bool]:
    """What of a head is rotated and what passes, and how many heads a program takes."""
    rest = dim - 2 * planes
    widths = [triton.next_power_of_2(max(1, part)) for part in (planes, rest)]
    least = min(width for width, part in zip(widths, (planes, rest)) if part)
    most = min(LEAST_TILE // least, MOST_TILE // triton.next_power_of_2(dim), triton.next_power_of_2(heads))
    return {"PASSES": rest > 0, "PLANES": widths[0], "REST": widths[1], "HEADS": max(1, most), "num_warps": WARPS}
