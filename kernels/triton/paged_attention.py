"""Paged attention with an online softmax: one kernel for decoding and for prompts, and one that joins parts of texts.

A program owns a tile of the queries of one text that share a key/value head, and walks over the text's keys. Those are
in blocks; where, a table says. A text with a single query (decoding) is cut into ``SPLITS`` parts of its own length,
a program each (split-KV, as in Flash-Decoding, Dao et al. 2023), so that a few long texts keep a GPU busy. Where the
cuts are depends on nothing but the text, and so do all bits of its result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_ds.kernels.alibi import Alibi
from megatron_ds.kernels.paged_attention import PagedKV, PagedTexts
from megatron_ds.kernels.triton.common import on_device_of, sigmoid, unit_stride

SPLITS = 16
"""Times 8 key/value heads, as most models have: about as many programs as an H100 has multiprocessors, for one text."""
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def part_of_text(end, lowest, SPLITS: tl.constexpr, TN: tl.constexpr):
    """Keys of each part of a text's ``lowest`` to ``end``: whole tiles."""
    return tl.cdiv(tl.cdiv(end - lowest, TN), SPLITS) * TN


@triton.jit
def lowest_key(place, window, WINDOW: tl.constexpr, TN: tl.constexpr):
    """Where the tiles begin of which the query at ``place`` sees a key."""
    return tl.maximum(place - window + 1, 0) // TN * TN if WINDOW else 0


@triton.jit
def to_bf16(x):
    """fp32 rounded to the nearest bf16, ties to even; still fp32."""
    bits = x.to(tl.uint32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def load_pages(
    data, scale, slot, inside, kv, heads, DTYPE: tl.constexpr, FLOAT8: tl.constexpr,
    D: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """``[TN, D]`` of the keys or values in these slots."""
    column = tl.arange(0, D)
    at = data + slot[:, None] * (heads * HEAD_DIM) + kv * HEAD_DIM + column[None, :]
    if HEAD_DIM == D:
        tile = tl.load(at, mask=inside[:, None], other=0)
    else:
        tile = tl.load(at, mask=inside[:, None] & (column < HEAD_DIM)[None, :], other=0)
    if FLOAT8:
        factor = tl.load(scale + slot * heads + kv, mask=inside, other=0.0)
        tile = tile.to(tl.float8e4nv, bitcast=True).to(tl.float32) * factor[:, None]
    return tile.to(DTYPE)


@triton.jit
def by_rules(
    scores, place, own, slope, softcap, factor, window,
    WINDOW: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Scores ``[TM, TN]`` in units of log2; -inf where the query at ``own`` does not see the key at ``place``."""
    distance = place[None, :] - own[:, None]
    if SOFTCAP:
        scores = softcap * (2.0 * sigmoid(2.0 / softcap * scores) - 1.0)
    if ALIBI == "exact":
        scores += slope[:, None] * distance.to(tl.float32)
    elif ALIBI == "rounded":
        of_keys = to_bf16(slope[:, None] * to_bf16(place.to(tl.float32))[None, :])
        of_queries = to_bf16(slope * to_bf16(own.to(tl.float32)))
        scores += (of_keys - of_queries[:, None]) * factor
    seen = distance <= 0
    if WINDOW:
        seen &= distance > -window
    return tl.where(seen, scores * LOG2_E, float("-inf"))


@triton.jit
def attend_kernel(
    q, keys, values, key_scale, value_scale, tables, spans, slopes, out, lse,
    scale, softcap, factor, window, tiles, width, q_row, q_head, heads,
    SPLITS: tl.constexpr, GROUP: tl.constexpr, MEMBERS: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr,
    SIZE: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr, FLOAT8: tl.constexpr, WINDOW: tl.constexpr,
    ALIBI: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Row ``i`` of a tile is query ``i // MEMBERS`` of its text in head ``i % MEMBERS`` of the ``GROUP``.

    ``SPLITS`` above 1: of texts with one row, a part of the keys each, to ``out [m, n, SPLITS, d]`` and
    ``lse [m, n, SPLITS]`` in fp32 (log2 of the sum of the weights). Else of the other texts, to ``out [t, n, d]``.
    """
    text, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    kv, part = tl.program_id(1), tl.program_id(2)
    row, count, start = tl.load(spans + 3 * text), tl.load(spans + 3 * text + 1), tl.load(spans + 3 * text + 2)
    first = tile * (TM // MEMBERS)
    begin = lowest_key(start + first, window, WINDOW, TN)
    end = start + tl.minimum(count, first + TM // MEMBERS)
    if SPLITS > 1:
        length = part_of_text(end, begin, SPLITS, TN)
        begin += part * length
        end = tl.minimum(end, begin + length)
    if (first >= count) | (begin >= end) | ((count == 1) != (SPLITS > 1)):
        return
    line, column = tl.arange(0, TM), tl.arange(0, D)
    query, head = first + line // MEMBERS, kv * GROUP + line % MEMBERS
    mine = (query < count) & (line % MEMBERS < GROUP)
    inside_head = mine[:, None] & (column < HEAD_DIM)[None, :]
    q_at = q + (row + query).to(tl.int64)[:, None] * q_row + head[:, None] * q_head + column[None, :]
    q_tile = tl.load(q_at, mask=inside_head, other=0.0)
    slope = tl.load(slopes + head, mask=mine, other=0.0) if ALIBI is not None else 0.0
    top = tl.full([TM], float("-inf"), tl.float32)
    total = tl.zeros([TM], tl.float32)
    acc = tl.zeros([TM, D], tl.float32)
    tables += text.to(tl.int64) * width
    for key in range(begin, end, TN):
        place = key + tl.arange(0, TN)
        there = place < end
        slot = tl.load(tables + place // SIZE, mask=there, other=0).to(tl.int64) * SIZE + place % SIZE
        k_tile = load_pages(keys, key_scale, slot, there, kv, heads, q_tile.dtype, FLOAT8, D, HEAD_DIM)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale
        scores = by_rules(scores, place, start + query, slope, softcap, factor, window, WINDOW, ALIBI, SOFTCAP)
        scores = tl.where(there[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        # Of a query that has seen no key yet: -inf minus -inf would be NaN.
        level = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - level[:, None])
        shrink = tl.exp2(top - level)
        total = total * shrink + tl.sum(weights, 1)
        v_tile = load_pages(values, value_scale, slot, there, kv, heads, q_tile.dtype, FLOAT8, D, HEAD_DIM)
        acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision=PRECISION)
        top = new_top
    total = tl.where(mine, total, 1.0)
    of_row = (text + 0 * query if SPLITS > 1 else row + query).to(tl.int64) * (heads * GROUP) + head
    at = out + (of_row * SPLITS + part)[:, None] * HEAD_DIM + column[None, :]
    tl.store(at, (acc / total[:, None]).to(out.dtype.element_ty), mask=inside_head)
    if SPLITS > 1:
        tl.store(lse + of_row * SPLITS + part, top + tl.log2(total), mask=mine)


@triton.jit
def join_kernel(
    parts, lse, spans, out, window, heads,
    SPLITS: tl.constexpr, TN: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """The result of a head of a text with one row, from those of the parts of its keys."""
    text, head = tl.program_id(0), tl.program_id(1)
    row = tl.load(spans + 3 * text).to(tl.int64)
    place = tl.load(spans + 3 * text + 2)
    if tl.load(spans + 3 * text + 1) != 1:
        return
    lowest = lowest_key(place, window, WINDOW, TN)
    length = part_of_text(place + 1, lowest, SPLITS, TN)
    part, column = tl.arange(0, SPLITS), tl.arange(0, D)
    used = lowest + part * length <= place
    at = (text.to(tl.int64) * heads + head) * SPLITS + part
    level = tl.load(lse + at, mask=used, other=float("-inf"))
    weight = tl.exp2(level - tl.max(level, 0))
    inside = used[:, None] & (column < HEAD_DIM)[None, :]
    of_parts = tl.load(parts + at[:, None] * HEAD_DIM + column[None, :], mask=inside, other=0.0)
    joined = tl.sum(of_parts * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out + (row * heads + head) * HEAD_DIM + column, joined.to(out.dtype.element_ty), mask=column < HEAD_DIM)


def attend(
    q: Tensor, keys: PagedKV, values: PagedKV, texts: PagedTexts,
    window: int | None, alibi: Alibi | None, softcap: float | None, out: Tensor,
) -> None:  # fmt: skip
    """Write ``out [t, n, d]``, contiguous."""
    m, (_, n, d), g = len(texts.spans), q.shape, keys.data.shape[1]
    if not q.numel():
        return
    q = unit_stride(q)
    members = triton.next_power_of_2(n // g)
    shape = {"D": max(16, triton.next_power_of_2(d)), "HEAD_DIM": d, "WINDOW": window is not None}
    numbers = d**-0.5, softcap or 1.0, 1.0, window or 0
    kind, slopes = None, None
    if alibi is not None:
        kind, slopes = "exact" if alibi.rounded is None else "rounded", alibi.slopes
        if alibi.rounded is not None:
            numbers, slopes = (*numbers[:2], alibi.rounded, numbers[3]), slopes.bfloat16().float()
    sources = q, keys.data, values.data, keys.scale, values.scale, texts.tables, texts.spans, slopes
    width = texts.tables.shape[1], *q.stride()[:2], g
    rules = {
        "GROUP": n // g, "MEMBERS": members, "SIZE": texts.size, **shape, "FLOAT8": keys.scale is not None,
        "ALIBI": kind, "SOFTCAP": softcap is not None,
        # Of fp32 alone: three tf32 products carry its 24 bits; ieee ones run on the vector units and spill.
        "PRECISION": "tf32x3" if q.dtype == torch.float32 else "tf32",
    }  # fmt: skip
    with on_device_of(q):
        if texts.longest > 1:
            tile = _tiles(64, members, shape["D"], q.dtype)
            tiles = triton.cdiv(texts.longest, tile["TM"] // members)
            attend_kernel[m * tiles, g, 1](*sources, out, None, *numbers, tiles, *width, SPLITS=1, **rules, **tile)
        if texts.decodes:
            tile = _tiles(16, members, shape["D"], q.dtype)
            parts = q.new_empty((m, n, SPLITS, d), dtype=torch.float32)
            lse = q.new_empty((m, n, SPLITS), dtype=torch.float32)
            attend_kernel[m, g, SPLITS](*sources, parts, lse, *numbers, 1, *width, SPLITS=SPLITS, **rules, **tile)
            join_kernel[m, n](
                parts, lse, texts.spans, out, window or 0, n, SPLITS=SPLITS, TN=tile["TN"], **shape, num_warps=2
            )


def _tiles(rows: int, members: int, width: int, dtype: torch.dtype) -> dict[str, int]:
    """Rows and keys a tile, warps and pipeline stages, none of which depends on the step."""
    single = dtype == torch.float32
    rows = max(16 if single or width > 256 else rows, members)
    keys = 16 if (single and width > 64) or width > 256 else 32 if single or width > 128 else 64
    return {"TM": rows, "TN": keys, "num_warps": 4 if rows <= 64 else 8, "num_stages": 1 if single else 3}
