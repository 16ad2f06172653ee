"""Scaled, masked softmax over the last dim of ``[b, n, q, k]``, a program a row.

A row of up to 16384 keys stays in registers between its one load and its one store. A longer one is read twice: once
for the running maximum and sum (Milakov and Gimelshein 2018), once to write. Under a causal mask the keys beyond the
diagonal are not loaded, forward or backward, but for the rest of the diagonal's own 16, which memory transfers
together and which a mask by elements would break into single loads. Zeros are stored there. A causal row that stays in
registers is taken in four quarters, and one beyond the diagonal is not computed either: with every key computed, causal
rows took longer in the arithmetic than in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from megatron_ds.kernels.triton.common import as_rows, on_device_of

MOST_KEYS = 16384  # of a row that is held in registers
LEAST_KEYS = 16  # of a causal row that is taken in quarters
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def sixteens(limit, keys, CAUSAL: tl.constexpr):
    """The limit of what is loaded where ``limit`` is the limit of what is seen."""
    if CAUSAL:
        limit = tl.minimum(keys, (tl.maximum(limit, 0) + 15) // 16 * 16)
    return limit


@triton.jit
def logits_of(
    scores, mask, slope, batch, head, query, key, limit, keys, last, scale, CAUSAL: tl.constexpr,
    mask_b, mask_n, mask_q, mask_k, HAS_MASK: tl.constexpr, HAS_SLOPES: tl.constexpr,
):  # fmt: skip
    """Scaled scores with bias of one row; -inf where the row does not look."""
    inside = key < sixteens(limit, keys, CAUSAL)
    z = tl.load(scores + key, mask=inside, other=0.0).to(tl.float32) * tl.cast(scale, tl.float32)
    if HAS_SLOPES:
        z += slope * (key - last).to(tl.float32)
    seen = key < limit
    if HAS_MASK:
        place = mask + batch.to(tl.int64) * mask_b + head.to(tl.int64) * mask_n + query.to(tl.int64) * mask_q
        place += key.to(tl.int64) * mask_k
        seen = seen & (tl.load(place, mask=inside, other=0) != 0)
    return tl.where(seen, z, float("-inf"))


@triton.jit
def place_of(row, slopes, heads, queries, keys, HAS_SLOPES: tl.constexpr):
    """Batch, head and query of a row of scores, the query's own place among the keys, and its head's slope."""
    query = row % queries
    head = (row // queries) % heads
    slope = 0.0
    if HAS_SLOPES:
        slope = tl.load(slopes + head).to(tl.float32)
    return row // (queries * heads), head, query, query + keys - queries, slope


@triton.jit
def softmax_kernel(
    scores, mask, slopes, out, heads, queries, keys, scores_stride, scale, mask_b, mask_n, mask_q, mask_k,
    CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_SLOPES: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    batch, head, query, last, slope = place_of(row, slopes, heads, queries, keys, HAS_SLOPES)
    scores += tl.cast(row, tl.int64) * scores_stride
    out += tl.cast(row, tl.int64) * keys
    limit = keys
    if CAUSAL:
        limit = tl.minimum(keys, last + 1)
    if WHOLE:
        key = tl.arange(0, BLOCK)
        z = logits_of(
            scores, mask, slope, batch, head, query, key, limit, keys, last, scale, CAUSAL,
            mask_b, mask_n, mask_q, mask_k, HAS_MASK, HAS_SLOPES,
        )  # fmt: skip
        top = tl.max(z, axis=0)
        top = tl.where(top == float("-inf"), 0.0, top)
        weights = tl.exp(z - top)
        total = tl.sum(weights, axis=0)
        weights *= 1.0 / tl.where(total == 0.0, 1.0, total)
        tl.store(out + key, weights.to(out.dtype.element_ty), mask=key < keys)
    else:
        top = float("-inf")
        total = 0.0
        for start in range(0, limit, BLOCK):
            key = start + tl.arange(0, BLOCK)
            z = logits_of(
                scores, mask, slope, batch, head, query, key, limit, keys, last, scale, CAUSAL,
                mask_b, mask_n, mask_q, mask_k, HAS_MASK, HAS_SLOPES,
            )  # fmt: skip
            higher = tl.maximum(top, tl.max(z, axis=0))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp(top - base) + tl.sum(tl.exp(z - base), axis=0)
            top = higher
        base = tl.where(top == float("-inf"), 0.0, top)
        norm = 1.0 / tl.where(total == 0.0, 1.0, total)
        for start in range(0, keys, BLOCK):
            key = start + tl.arange(0, BLOCK)
            z = logits_of(
                scores, mask, slope, batch, head, query, key, limit, keys, last, scale, CAUSAL,
                mask_b, mask_n, mask_q, mask_k, HAS_MASK, HAS_SLOPES,
            )  # fmt: skip
            tl.store(out + key, (tl.exp(z - base) * norm).to(out.dtype.element_ty), mask=key < keys)


@triton.jit
def store_quarter(out, weights, key, limit, keys, QUARTER: tl.constexpr, NUMBER: tl.constexpr):
    """Weights of a quarter of a row, or zeros where it is beyond the diagonal."""
    place = NUMBER * QUARTER + key
    if limit > NUMBER * QUARTER:
        tl.store(out + place, weights.to(out.dtype.element_ty), mask=place < keys)
    else:
        tl.store(out + place, tl.zeros((QUARTER,), out.dtype.element_ty), mask=place < keys)


@triton.jit
def softmax_causal_kernel(
    scores, mask, slopes, out, heads, queries, keys, scores_stride, scale, mask_b, mask_n, mask_q, mask_k,
    HAS_MASK: tl.constexpr, HAS_SLOPES: tl.constexpr, QUARTER: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    batch, head, query, last, slope = place_of(row, slopes, heads, queries, keys, HAS_SLOPES)
    scores += tl.cast(row, tl.int64) * scores_stride
    out += tl.cast(row, tl.int64) * keys
    limit = tl.minimum(keys, last + 1)
    key = tl.arange(0, QUARTER)
    z0 = tl.full((QUARTER,), float("-inf"), tl.float32)
    z1, z2, z3 = z0, z0, z0
    z0 = logits_of(
        scores, mask, slope, batch, head, query, key, limit, keys, last, scale, True,
        mask_b, mask_n, mask_q, mask_k, HAS_MASK, HAS_SLOPES,
    )  # fmt: skip
    if limit > QUARTER:
        z1 = logits_of(
            scores, mask, slope, batch, head, query, QUARTER + key, limit, keys, last, scale, True,
            mask_b, mask_n, mask_q, mask_k, HAS_MASK, HAS_SLOPES,
        )  # fmt: skip
    if limit > 2 * QUARTER:
        z2 = logits_of(
            scores, mask, slope, batch, head, query, 2 * QUARTER + key, limit, keys, last, scale, True,
            mask_b, mask_n, mask_q, mask_k, HAS_MASK, HAS_SLOPES,
        )  # fmt: skip
    if limit > 3 * QUARTER:
        z3 = logits_of(
            scores, mask, slope, batch, head, query, 3 * QUARTER + key, limit, keys, last, scale, True,
            mask_b, mask_n, mask_q, mask_k, HAS_MASK, HAS_SLOPES,
        )  # fmt: skip
    softmax_of_quarters(out, z0, z1, z2, z3, key, limit, keys, QUARTER)


@triton.jit
def softmax_of_quarters(out, z0, z1, z2, z3, key, limit, keys, QUARTER: tl.constexpr):
    most = z0
    if limit > QUARTER:
        most = tl.maximum(most, z1)
    if limit > 2 * QUARTER:
        most = tl.maximum(most, tl.maximum(z2, z3))
    top = tl.max(most, axis=0)
    top = tl.where(top == float("-inf"), 0.0, top) * LOG2_E
    z0 = tl.exp2(z0 * LOG2_E - top)
    sums = z0
    if limit > QUARTER:
        z1 = tl.exp2(z1 * LOG2_E - top)
        sums += z1
    if limit > 2 * QUARTER:
        z2 = tl.exp2(z2 * LOG2_E - top)
        sums += z2
    if limit > 3 * QUARTER:
        z3 = tl.exp2(z3 * LOG2_E - top)
        sums += z3
    total = tl.sum(sums, axis=0)
    norm = 1.0 / tl.where(total == 0.0, 1.0, total)
    store_quarter(out, z0 * norm, key, limit, keys, QUARTER, 0)
    store_quarter(out, z1 * norm, key, limit, keys, QUARTER, 1)
    store_quarter(out, z2 * norm, key, limit, keys, QUARTER, 2)
    store_quarter(out, z3 * norm, key, limit, keys, QUARTER, 3)


@triton.jit
def gradient_and_output(grad, y, key, limit, keys, CAUSAL: tl.constexpr):
    inside = key < sixteens(limit, keys, CAUSAL)
    g = tl.load(grad + key, mask=inside, other=0.0).to(tl.float32)
    p = tl.load(y + key, mask=inside, other=0.0).to(tl.float32)
    return tl.where(key < limit, g, 0.0), tl.where(key < limit, p, 0.0)


@triton.jit
def softmax_backward_kernel(
    grad, y, out, queries, keys, grad_stride, scale, CAUSAL: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    grad += tl.cast(row, tl.int64) * grad_stride
    y += tl.cast(row, tl.int64) * keys
    out += tl.cast(row, tl.int64) * keys
    limit = keys
    if CAUSAL:
        limit = tl.minimum(keys, row % queries + keys - queries + 1)
    if WHOLE:
        key = tl.arange(0, BLOCK)
        g, p = gradient_and_output(grad, y, key, limit, keys, CAUSAL)
        d = tl.cast(scale, tl.float32) * p * (g - tl.sum(g * p, axis=0))
        tl.store(out + key, d.to(out.dtype.element_ty), mask=key < keys)
    else:
        along = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, limit, BLOCK):
            key = start + tl.arange(0, BLOCK)
            g, p = gradient_and_output(grad, y, key, limit, keys, CAUSAL)
            along += g * p
        total = tl.sum(along, axis=0)
        for start in range(0, keys, BLOCK):
            key = start + tl.arange(0, BLOCK)
            g, p = gradient_and_output(grad, y, key, limit, keys, CAUSAL)
            d = tl.cast(scale, tl.float32) * p * (g - total)
            tl.store(out + key, d.to(out.dtype.element_ty), mask=key < keys)


@triton.jit
def softmax_causal_backward_kernel(grad, y, out, queries, keys, grad_stride, scale, QUARTER: tl.constexpr):
    row = tl.program_id(0)
    grad += tl.cast(row, tl.int64) * grad_stride
    y += tl.cast(row, tl.int64) * keys
    out += tl.cast(row, tl.int64) * keys
    limit = tl.minimum(keys, row % queries + keys - queries + 1)
    key = tl.arange(0, QUARTER)
    nothing = tl.zeros((QUARTER,), tl.float32)
    g1, g2, g3, p1, p2, p3 = nothing, nothing, nothing, nothing, nothing, nothing
    g0, p0 = gradient_and_output(grad, y, key, limit, keys, True)
    if limit > QUARTER:
        g1, p1 = gradient_and_output(grad, y, QUARTER + key, limit, keys, True)
    if limit > 2 * QUARTER:
        g2, p2 = gradient_and_output(grad, y, 2 * QUARTER + key, limit, keys, True)
    if limit > 3 * QUARTER:
        g3, p3 = gradient_and_output(grad, y, 3 * QUARTER + key, limit, keys, True)
    along = g0 * p0
    if limit > QUARTER:
        along += g1 * p1
    if limit > 2 * QUARTER:
        along += g2 * p2 + g3 * p3
    total = tl.sum(along, axis=0)
    factor = tl.cast(scale, tl.float32)
    store_quarter(out, factor * p0 * (g0 - total), key, limit, keys, QUARTER, 0)
    store_quarter(out, factor * p1 * (g1 - total), key, limit, keys, QUARTER, 1)
    store_quarter(out, factor * p2 * (g2 - total), key, limit, keys, QUARTER, 2)
    store_quarter(out, factor * p3 * (g3 - total), key, limit, keys, QUARTER, 3)


def softmax(scores: Tensor, mask: Tensor | None, slopes: Tensor | None, scale: float, causal: bool) -> Tensor:
    out = scores.new_empty(scores.shape)
    rows, slopes = as_rows(scores), None if slopes is None else slopes.contiguous()
    _, heads, queries, keys = scores.shape
    strides = (0, 0, 0, 0) if mask is None else mask.stride()
    arguments = (rows, mask, slopes, out, heads, queries, keys, rows.stride(0), scale, *strides)
    flags = {"HAS_MASK": mask is not None, "HAS_SLOPES": slopes is not None}
    grid = (rows.shape[0],)
    if out.numel():
        with on_device_of(scores):
            if causal and LEAST_KEYS <= keys <= MOST_KEYS:
                softmax_causal_kernel[grid](*arguments, **flags, **_quarters(keys))
            else:
                softmax_kernel[grid](*arguments, CAUSAL=causal, **flags, **_tile(keys))
    return out


def softmax_backward(grad: Tensor, y: Tensor, scale: float, causal: bool) -> Tensor:
    out = y.new_empty(y.shape)
    grads = as_rows(grad)
    queries, keys = y.shape[-2:]
    arguments = (grads, y.contiguous(), out, queries, keys, grads.stride(0), scale)
    grid = (grads.shape[0],)
    if out.numel():
        with on_device_of(y):
            if causal and LEAST_KEYS <= keys <= MOST_KEYS:
                softmax_causal_backward_kernel[grid](*arguments, **_quarters(keys))
            else:
                softmax_backward_kernel[grid](*arguments, CAUSAL=causal, **_tile(keys))
    return out


def _tile(keys: int) -> dict[str, int | bool]:
    block = min(triton.next_power_of_2(keys), MOST_KEYS)
    return {"WHOLE": keys <= MOST_KEYS, "BLOCK": block, "num_warps": max(1, block // 1024)}


def _quarters(keys: int) -> dict[str, int]:
    block = triton.next_power_of_2(keys)
    return {"QUARTER": block // 4, "num_warps": max(1, block // 1024)}
