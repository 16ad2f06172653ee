"""Block-sparse attention with an online softmax: a forward kernel, and two backward kernels without atomics.

A program of ``forward_kernel`` and ``query_kernel`` owns a tile of queries of one head and walks the live blocks of its
row; one of ``key_kernel`` owns a tile of keys of one key/value head and walks, for every query head of the group, the
live blocks of its column. Where a column is long (a global one, in a sparse layout) several programs take a part of it
each, and another kernel adds up. So each result is written once, by one program, in an order that the layout alone
decides: two runs give the same bits. Full blocks come first and need no mask; partial ones load theirs, a tile of
bytes that neighbouring programs find in the cache. A window's line (``WINDOW``) is too short for two loops that each
fill a pipeline: one walks over its keys, reads no list on the way, and compares places instead of loading a mask.

Scores are kept in units of ``log2``: ``exp2`` is what the hardware has. A tile is at most a block wide; where the
registers of a pass do not hold a whole block beside its accumulators, a block is walked in several tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_ds.kernels.triton import specialized_attention
from megatron_ds.kernels.triton.attention_tiles import (
    causal,
    load_mask,
    load_tile,
    place_of_program,
    place_of_step,
    steps_of_column,
    steps_of_row,
    store_tile,
)
from megatron_ds.kernels.triton.common import on_device_of, unit_stride

_LOG2_E = 1.4426950408889634
LOG2_E = tl.constexpr(_LOG2_E)
# Windows by specialised warps, on Hopper. Never measured, and so not the default: `make bench-gpu` times both.
SPECIALIZED = False


@triton.jit
def forward_step(
    total, top, acc, q_tile, i, k, v, k_stride, v_stride, index, mask_of, masks, inside, length, scale,
    MASK: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr, BLOCK: tl.constexpr,
    D: tl.constexpr, HEAD_DIM: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first, key = place_of_step(i, index, MASK, TN, BLOCK)
    k_tile = load_tile(k, first, k_stride, length, TN, D, HEAD_DIM, EVEN)
    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
    if MASK == "loaded":
        allowed = load_mask(masks, tl.load(mask_of + i // (BLOCK // TN)), inside, key, TM, TN, BLOCK)
        scores = tl.where(allowed, scores, float("-inf"))
    if MASK == "causal":
        scores = tl.where(causal(inside, first, TM, TN), scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    # The scale is positive, and so it and the subtraction are one instruction after the maximum. A query that has seen
    # no allowed key yet: -inf minus -inf would be NaN. In a window it sees the first one that there is.
    level = tl.where(new_top == float("-inf"), 0.0, new_top * scale) if MASK == "loaded" else new_top * scale
    weights = tl.exp2(scores * scale - level[:, None])
    shrink = tl.exp2(top * scale - level)
    total = total * shrink + tl.sum(weights, 1)
    v_tile = load_tile(v, first, v_stride, length, TN, D, HEAD_DIM, EVEN)
    acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision=PRECISION)
    return total, new_top, acc


@triton.jit
def forward_kernel(
    q, k, v, out, lse, pattern, start, partial, index, mask_of, masks, scale,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, out_batch, out_head, out_row,
    heads, group, length, side,
    WINDOW: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr, BLOCK: tl.constexpr,
    D: tl.constexpr, HEAD_DIM: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, row_of_heads = place_of_program(tl.cdiv(length, TM))
    batch = (row_of_heads // heads).to(tl.int64)
    head = row_of_heads % heads
    kv = (head // group).to(tl.int64)
    # A causal layout's last rows are its longest: they start first.
    first = (tl.cdiv(length, TM) - 1 - tile) * TM
    line = tl.load(pattern + head) * side + first // BLOCK
    inside = first if WINDOW else first % BLOCK
    scaled = scale * LOG2_E
    q_tile = load_tile(q + batch * q_batch + head.to(tl.int64) * q_head, first, q_row, length, TM, D, HEAD_DIM, EVEN)
    k += batch * k_batch + kv * k_head
    v += batch * v_batch + kv * v_head
    top = tl.full([TM], float("-inf"), tl.float32)
    total = tl.zeros([TM], tl.float32)
    acc = tl.zeros([TM, D], tl.float32)
    begin, middle, end = steps_of_row(start, partial, index, line, first, WINDOW, TM, TN, BLOCK)
    if not WINDOW:
        for i in range(begin, middle):
            total, top, acc = forward_step(
                total, top, acc, q_tile, i, k, v, k_row, v_row, index, mask_of, masks, inside, length, scaled,
                "none", TM, TN, BLOCK, D, HEAD_DIM, EVEN, PRECISION,
            )  # fmt: skip
    for i in range(middle, end):
        total, top, acc = forward_step(
            total, top, acc, q_tile, i, k, v, k_row, v_row, index, mask_of, masks, inside, length, scaled,
            "causal" if WINDOW else "loaded", TM, TN, BLOCK, D, HEAD_DIM, EVEN, PRECISION,
        )  # fmt: skip
    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    store_tile(
        out + batch * out_batch + head.to(tl.int64) * out_head, first, out_row, length, acc, TM, D, HEAD_DIM, EVEN
    )
    row = first + tl.arange(0, TM)
    value = tl.where(empty, float("inf"), (top * scaled + tl.log2(tl.where(empty, 1.0, total))) / LOG2_E)
    tl.store(lse + row_of_heads.to(tl.int64) * length + row, value, mask=row < length)


@triton.jit
def query_step(
    dq, q_tile, grad_tile, lse_row, delta_row, i, k, v, k_stride, v_stride, index, mask_of, masks, inside, length,
    scale, MASK: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr, BLOCK: tl.constexpr,
    D: tl.constexpr, HEAD_DIM: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first, key = place_of_step(i, index, MASK, TN, BLOCK)
    k_tile = load_tile(k, first, k_stride, length, TN, D, HEAD_DIM, EVEN)
    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale
    if MASK == "loaded":
        allowed = load_mask(masks, tl.load(mask_of + i // (BLOCK // TN)), inside, key, TM, TN, BLOCK)
        scores = tl.where(allowed, scores, float("-inf"))
    if MASK == "causal":
        scores = tl.where(causal(inside, first, TM, TN), scores, float("-inf"))
    weights = tl.exp2(scores - lse_row[:, None])
    v_tile = load_tile(v, first, v_stride, length, TN, D, HEAD_DIM, EVEN)
    slope = weights * (tl.dot(grad_tile, tl.trans(v_tile), input_precision=PRECISION) - delta_row[:, None])
    return tl.dot(slope.to(k_tile.dtype), k_tile, dq, input_precision=PRECISION)


@triton.jit
def query_kernel(
    grad, q, k, v, out, lse, delta, dq, pattern, start, partial, index, mask_of, masks, scale,
    grad_batch, grad_head, grad_row, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    out_batch, out_head, out_row, dq_batch, dq_head, dq_row,
    heads, group, length, side,
    WINDOW: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr, BLOCK: tl.constexpr,
    D: tl.constexpr, HEAD_DIM: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of queries; and ``delta``, the sum of grad x out a query, which ``key_kernel`` reads."""
    tile, row_of_heads = place_of_program(tl.cdiv(length, TM))
    batch = (row_of_heads // heads).to(tl.int64)
    head = (row_of_heads % heads).to(tl.int64)
    kv = head // group
    first = (tl.cdiv(length, TM) - 1 - tile) * TM
    line = tl.load(pattern + head) * side + first // BLOCK
    inside = first if WINDOW else first % BLOCK
    scaled = scale * LOG2_E
    k += batch * k_batch + kv * k_head
    v += batch * v_batch + kv * v_head
    q_tile = load_tile(q + batch * q_batch + head * q_head, first, q_row, length, TM, D, HEAD_DIM, EVEN)
    grad_tile = load_tile(grad + batch * grad_batch + head * grad_head, first, grad_row, length, TM, D, HEAD_DIM, EVEN)
    out_tile = load_tile(out + batch * out_batch + head * out_head, first, out_row, length, TM, D, HEAD_DIM, EVEN)
    delta_row = tl.sum(grad_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    row = first + tl.arange(0, TM)
    at = row_of_heads.to(tl.int64) * length + row
    tl.store(delta + at, delta_row, mask=row < length)
    lse_row = tl.load(lse + at, mask=row < length, other=float("inf")) * LOG2_E
    acc = tl.zeros([TM, D], tl.float32)
    begin, middle, end = steps_of_row(start, partial, index, line, first, WINDOW, TM, TN, BLOCK)
    if not WINDOW:
        for i in range(begin, middle):
            acc = query_step(
                acc, q_tile, grad_tile, lse_row, delta_row, i, k, v, k_row, v_row, index, mask_of, masks, inside,
                length, scaled, "none", TM, TN, BLOCK, D, HEAD_DIM, EVEN, PRECISION,
            )  # fmt: skip
    for i in range(middle, end):
        acc = query_step(
            acc, q_tile, grad_tile, lse_row, delta_row, i, k, v, k_row, v_row, index, mask_of, masks, inside, length,
            scaled, "causal" if WINDOW else "loaded", TM, TN, BLOCK, D, HEAD_DIM, EVEN, PRECISION,
        )  # fmt: skip
    acc = acc * scale
    store_tile(dq + batch * dq_batch + head * dq_head, first, dq_row, length, acc, TM, D, HEAD_DIM, EVEN)


@triton.jit
def key_step(
    dk, dv, k_tile, v_tile, i, q, grad, lse, delta, q_stride, grad_stride, index, mask_of, masks, inside, length, scale,
    MASK: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr, BLOCK: tl.constexpr,
    D: tl.constexpr, HEAD_DIM: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first, query = place_of_step(i, index, MASK, TM, BLOCK)
    row = first + tl.arange(0, TM)
    q_tile = load_tile(q, first, q_stride, length, TM, D, HEAD_DIM, EVEN)
    grad_tile = load_tile(grad, first, grad_stride, length, TM, D, HEAD_DIM, EVEN)
    if EVEN:
        lse_row = tl.load(lse + row) * LOG2_E
        delta_row = tl.load(delta + row)
    else:
        lse_row = tl.load(lse + row, mask=row < length, other=float("inf")) * LOG2_E
        delta_row = tl.load(delta + row, mask=row < length, other=0.0)
    scores = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) * scale  # [TN, TM]
    if MASK == "loaded":
        allowed = load_mask(masks, tl.load(mask_of + i // (BLOCK // TM)), query, inside, TM, TN, BLOCK)
        scores = tl.where(tl.trans(allowed), scores, float("-inf"))
    if MASK == "causal":
        scores = tl.where(tl.trans(causal(first, inside, TM, TN)), scores, float("-inf"))
    weights = tl.exp2(scores - lse_row[None, :])
    dv = tl.dot(weights.to(grad_tile.dtype), grad_tile, dv, input_precision=PRECISION)
    slope = weights * (tl.dot(v_tile, tl.trans(grad_tile), input_precision=PRECISION) - delta_row[None, :])
    dk = tl.dot(slope.to(q_tile.dtype), q_tile, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def key_kernel(
    grad, q, k, v, lse, delta, dk, dv, pattern, start, partial, index, mask_of, masks, chosen, scale,
    grad_batch, grad_head, grad_row, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row, part_stride,
    tiles, groups, group, length, side,
    WINDOW: tl.constexpr, SPLIT: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr, BLOCK: tl.constexpr,
    D: tl.constexpr, HEAD_DIM: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile of keys and values, over all query heads that use them.

    ``SPLIT``: a part of them, that of the second program number; the parts lie one behind the other, ``part_stride``
    apart, with the ``chosen`` columns of blocks side by side.
    """
    tile, row_of_heads = place_of_program(tiles)
    batch = (row_of_heads // groups).to(tl.int64)
    kv = (row_of_heads % groups).to(tl.int64)
    inside = tile % (BLOCK // TN) * TN
    first = tl.load(chosen + tile // (BLOCK // TN)) * BLOCK + inside
    if WINDOW:
        inside = first
    scaled = scale * LOG2_E
    k_tile = load_tile(k + batch * k_batch + kv * k_head, first, k_row, length, TN, D, HEAD_DIM, EVEN)
    v_tile = load_tile(v + batch * v_batch + kv * v_head, first, v_row, length, TN, D, HEAD_DIM, EVEN)
    k_acc = tl.zeros([TN, D], tl.float32)
    v_acc = tl.zeros([TN, D], tl.float32)
    for member in range(group):
        head = kv * group + member
        line = tl.load(pattern + head) * side + first // BLOCK
        q_head_at = q + batch * q_batch + head * q_head
        grad_at = grad + batch * grad_batch + head * grad_head
        rows_at = (batch * groups * group + head) * length
        begin, middle, end = steps_of_column(start, partial, line, first, WINDOW, SPLIT, TM, BLOCK)
        if not WINDOW:
            for i in range(begin, middle):
                k_acc, v_acc = key_step(
                    k_acc, v_acc, k_tile, v_tile, i, q_head_at, grad_at, lse + rows_at, delta + rows_at, q_row,
                    grad_row, index, mask_of, masks, inside, length, scaled,
                    "none", TM, TN, BLOCK, D, HEAD_DIM, EVEN, PRECISION,
                )  # fmt: skip
        for i in range(middle, end):
            k_acc, v_acc = key_step(
                k_acc, v_acc, k_tile, v_tile, i, q_head_at, grad_at, lse + rows_at, delta + rows_at, q_row, grad_row,
                index, mask_of, masks, inside, length, scaled,
                "causal" if WINDOW else "loaded", TM, TN, BLOCK, D, HEAD_DIM, EVEN, PRECISION,
            )  # fmt: skip
    k_acc = k_acc * scale
    if SPLIT:
        dk += tl.program_id(1).to(tl.int64) * part_stride
        dv += tl.program_id(1).to(tl.int64) * part_stride
        first = tile * TN
        length = tiles * TN
    store_tile(dk + batch * dk_batch + kv * dk_head, first, dk_row, length, k_acc, TN, D, HEAD_DIM, EVEN)
    store_tile(dv + batch * dv_batch + kv * dv_head, first, dv_row, length, v_acc, TN, D, HEAD_DIM, EVEN)


@triton.jit
def add_up_kernel(
    parts, out, chosen, part_stride, parts_head, out_batch, out_head, out_row, tiles, groups, length, count,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The sum over the parts of a tile of the ``chosen`` columns, always in the same order."""
    tile, row_of_heads = place_of_program(tiles)
    batch = (row_of_heads // groups).to(tl.int64)
    kv = (row_of_heads % groups).to(tl.int64)
    place = tile * ROWS
    first = tl.load(chosen + place // BLOCK) * BLOCK + place % BLOCK
    parts += row_of_heads.to(tl.int64) * parts_head
    total = tl.zeros([ROWS, D], tl.float32)
    for _ in range(count):
        total += load_tile(parts, place, HEAD_DIM, place + ROWS, ROWS, D, HEAD_DIM, True)
        parts += part_stride
    store_tile(out + batch * out_batch + kv * out_head, first, out_row, length, total, ROWS, D, HEAD_DIM, EVEN)


def forward(
    q: Tensor, k: Tensor, v: Tensor, layout: list[Tensor], block: int, window: bool, scale: float, out: Tensor,
    lse: Tensor,
) -> None:  # fmt: skip
    """Write ``out [b, n, s, d]``, its last dim contiguous, and ``lse [b, n, s]``, contiguous fp32."""
    if not q.numel():
        return
    q, k, v = (unit_stride(x) for x in (q, k, v))
    b, n, s, d = q.shape
    if SPECIALIZED and window and specialized_attention.fits(q, k, v, block):
        return specialized_attention.forward(q, k, v, layout, block, scale, out, lse)
    tile = _tiles("forward", block, d, q.dtype, s % block == 0)
    with on_device_of(q):
        forward_kernel[(triton.cdiv(s, tile["TM"]) * b * n,)](
            q, k, v, out, lse, layout[0], *layout[1:5], layout[9], scale,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
            n, n // k.shape[1], s, triton.cdiv(s, block),
            BLOCK=block, **_shape(s, d, block, q.dtype, window), **tile,
        )  # fmt: skip


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, layout: list[Tensor],
    block: int, window: bool, scale: float, dq: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    """Write the gradients, each with its last dim contiguous."""
    if not q.numel():
        return
    grad, q, k, v = (unit_stride(x) for x in (grad, q, k, v))
    b, n, s, d = q.shape
    groups = k.shape[1]
    delta = lse.new_empty(lse.shape)
    shape = _shape(s, d, block, q.dtype, window)
    sizes = n // groups, s, triton.cdiv(s, block)
    inputs = *grad.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3]
    with on_device_of(q):
        tile = _tiles("query", block, d, q.dtype, s % block == 0)
        query_kernel[(triton.cdiv(s, tile["TM"]) * b * n,)](
            grad, q, k, v, out, lse, delta, dq, layout[0], *layout[1:5], layout[9], scale,
            *inputs, *out.stride()[:3], *dq.stride()[:3], n, *sizes, BLOCK=block, **shape, **tile,
        )  # fmt: skip
        tile = _tiles("key", block, d, q.dtype, s % block == 0)
        short, long = layout[10:]
        columns = block // tile["TN"]
        lists = layout[0], *layout[5:10]
        if len(short):
            tiles = len(short) * columns
            key_kernel[(tiles * b * groups,)](
                grad, q, k, v, lse, delta, dk, dv, *lists, short, scale,
                *inputs, *dk.stride()[:3], *dv.stride()[:3], 0, tiles, groups, *sizes,
                SPLIT=False, BLOCK=block, **shape, **tile,
            )  # fmt: skip
        if len(long):
            parts = min(32, sizes[-1] // 8)
            rows = len(long) * block
            both = lse.new_empty((2, parts, b, groups, rows, d))
            strides = both.stride()[2:5]
            tiles = len(long) * columns
            key_kernel[tiles * b * groups, parts](
                grad, q, k, v, lse, delta, both[0], both[1], *lists, long, scale,
                *inputs, *strides, *strides, both.stride(1), tiles, groups, *sizes,
                SPLIT=True, BLOCK=block, **shape, **tile,
            )  # fmt: skip
            for sums, out_ in zip(both, (dk, dv)):
                add_up_kernel[(rows // 16 * b * groups,)](
                    sums, out_, long, both.stride(1), strides[1], *out_.stride()[:3], rows // 16, groups, s, parts,
                    ROWS=16, BLOCK=block, D=shape["D"], HEAD_DIM=d, EVEN=shape["EVEN"], num_warps=2,
                )  # fmt: skip


def _shape(length: int, head_dim: int, block: int, dtype: torch.dtype, window: bool) -> dict[str, int | bool | str]:
    return {
        "D": max(16, triton.next_power_of_2(head_dim)),
        "HEAD_DIM": head_dim,
        "EVEN": length % block == 0,
        "WINDOW": window,
        # Of fp32 alone: three tf32 products carry its 24 bits; ieee ones run on the vector units and spill.
        "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32",
    }


def _tiles(kernel: str, block: int, head_dim: int, dtype: torch.dtype, even: bool) -> dict[str, int]:
    """Queries and keys a tile, warps and pipeline stages: in half precision those that were fastest on an H200."""
    wide = head_dim > 64
    if dtype == torch.float32:  # three tf32 products keep both halves of their operands in registers
        side = 16 if wide else min(block, 32)
        warps = {"forward": 4, "query": 4, "key": 8}[kernel] if wide else 8 if side == 32 else 4
        return {"TM": side, "TN": side, "num_warps": warps, "num_stages": 1}
    if kernel == "forward":
        tm, tn, stages = min(block, 64 if wide else 128), min(block, 64), 3
    elif kernel == "query":
        # The masks of a padded head dim take registers too.
        keys = 32 if not wide or head_dim & (head_dim - 1) else 64
        tm, tn, stages = min(block, 64), min(block, keys), 2
    else:
        # At wide heads a few registers spill: the widest tiles without any were slower. Masks of a sequence that ends
        # inside a block take more, and 64 queries a tile would spill many.
        most = 64 if even or not wide else 32
        tm, tn, stages = max(16, min(most, block // 2 if wide else block)), min(block, 128 if wide else 64), 2
    warps = {16: 1, 32: 2, 64: 4, 128: 8}[max(tm, tn)]
    return {"TM": tm, "TN": tn, "num_warps": warps, "num_stages": stages}
