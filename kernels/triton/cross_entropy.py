"""Two passes over the logits of a chunk of tokens: statistics (one read), then the gradient in their place (one read,
one write): 6 bytes a half-precision logit.

Where one rank has the whole vocabulary one kernel makes both, a token at a time, with two programs an SM: so few rows
are under way that the second pass finds its row in the L2 cache, and 4 bytes a logit are moved.

The columns are walked in whole tiles without a mask and one masked tile at the end: a mask whose end is not a multiple
of 16, as most vocabularies are, would break every load into single elements.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_ds.kernels.triton.common import STAGES, on_device_of, processors

STATISTICS_BLOCK = 4096
GRADIENT_BLOCK = 1024
PROGRAMS, WARPS = 2, 16  # of an SM, and of a program, which makes losses and gradient


@triton.jit
def merge_tile(z, top, total):
    """Running maxima and sums of exponentials (Milakov and Gimelshein 2018) of a tile's rows of 8, with one more tile.

    Each thread keeps those of its own eight columns: a maximum over the whole tile would have all threads wait for each
    other once a tile, and one a column would take two exponentials an element.
    """
    higher = tl.maximum(top, tl.max(z, axis=1))
    base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing but -inf
    return higher, total * tl.exp(top - base) + tl.sum(tl.exp(z - base[:, None]), axis=1)


@triton.jit
def statistics_of(row, columns, WANT_SUM: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """Of a row of logits: maximum, sum of ``exp(logit - maximum)`` (maximum 0 for a row of nothing but -inf), sum."""
    tops = tl.full((BLOCK // 8,), float("-inf"), tl.float32)
    totals = tl.zeros((BLOCK // 8,), tl.float32)
    sums = tl.zeros((BLOCK // 8,), tl.float32)
    own = tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    whole = columns // BLOCK * BLOCK
    for start in tl.range(0, whole, BLOCK, num_stages=STAGES):
        z = tl.load(row + start + own).to(tl.float32)
        if WANT_SUM:
            # Not of the load itself: where a loop adds up those of fp32, and its result has two uses, Triton's compiler
            # stops with an assertion (3.6 and 3.7).
            sums += tl.sum(z + 0.0, axis=1)
        tops, totals = merge_tile(z, tops, totals)
    if whole < columns:
        column = whole + own
        z = tl.load(row + column, mask=column < columns, other=float("-inf")).to(tl.float32)
        if WANT_SUM:
            sums += tl.sum(tl.where(column < columns, z, 0.0), axis=1)
        tops, totals = merge_tile(z, tops, totals)
    top = tl.max(tops, axis=0)
    base = tl.where(top == float("-inf"), 0.0, top)
    return top, tl.sum(totals * tl.exp(tops - base), axis=0), tl.sum(sums, axis=0)


@triton.jit
def token_statistics_kernel(
    logits, target, stats, stride, tokens, columns, WANT_SUM: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * stride
    top, total, logit_sum = statistics_of(row, columns, WANT_SUM, BLOCK, 1)
    label = tl.load(target + token)
    here = (label >= 0) & (label < columns)
    tl.store(stats + token, top)
    tl.store(stats + tokens + token, total)
    tl.store(stats + 2 * tokens + token, tl.load(row + label, mask=here, other=0.0).to(tl.float32))
    tl.store(stats + 3 * tokens + token, logit_sum)


@triton.jit
def gradient_of(z, column, lse, factor, label, hit, spread):
    """``factor softmax(z) - hit onehot(label) - spread``."""
    return tl.exp(z - lse) * factor - tl.where(column == label, hit, 0.0) - spread


@triton.jit
def logit_gradient_kernel(
    logits, lse, target, mask, seed, stride, columns, z_loss, hit, spread, BLOCK: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    row = logits + token * stride + start
    column = tl.arange(0, BLOCK)
    if tl.load(mask + token) == 0:
        if start + BLOCK <= columns:
            tl.store(row + column, tl.zeros((BLOCK,), logits.dtype.element_ty))
        else:
            tl.store(row + column, tl.zeros((BLOCK,), logits.dtype.element_ty), mask=start + column < columns)
    else:
        own_lse = tl.load(lse + token)
        factor = 1.0 + 2.0 * tl.cast(z_loss, tl.float32) * own_lse
        label = tl.load(target + token) - start
        h, s = tl.cast(hit, tl.float32), tl.cast(spread, tl.float32)
        if seed is not None:
            own_seed = tl.load(seed).to(tl.float32)
            factor, h, s = factor * own_seed, h * own_seed, s * own_seed
        if start + BLOCK <= columns:
            z = tl.load(row + column).to(tl.float32)
            tl.store(row + column, gradient_of(z, column, own_lse, factor, label, h, s).to(logits.dtype.element_ty))
        else:
            inside = start + column < columns
            z = tl.load(row + column, mask=inside, other=0.0).to(tl.float32)
            d = gradient_of(z, column, own_lse, factor, label, h, s).to(logits.dtype.element_ty)
            tl.store(row + column, d, mask=inside)


@triton.jit
def token_losses_kernel(
    logits, target, mask, seed, losses, stride, tokens, columns, z_loss, hit, spread,
    WANT_SUM: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    own = tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    whole = columns // BLOCK * BLOCK
    factor = 1.0
    if seed is not None:
        factor = tl.load(seed).to(tl.float32)
    w, h, s = tl.cast(z_loss, tl.float32), tl.cast(hit, tl.float32), tl.cast(spread, tl.float32)
    for number in range(tl.program_id(0), tokens, tl.num_programs(0)):
        token = tl.cast(number, tl.int64)
        row = logits + token * stride
        label, live = tl.load(target + token), tl.load(mask + token) != 0
        here = (label >= 0) & (label < columns)
        hit_logit = tl.load(row + label, mask=here, other=0.0).to(tl.float32)
        top, total, logit_sum = statistics_of(row, columns, WANT_SUM, BLOCK, STAGES)
        lse = top + tl.log(total)
        loss = lse - h * hit_logit + w * lse * lse
        if WANT_SUM:
            loss -= s * logit_sum
        tl.store(losses + token, tl.where(live, loss, 0.0))
        # The logit of the label has been read by all threads before one writes over it. The row is in the cache still.
        tl.debug_barrier()
        scaled = factor * (1.0 + 2.0 * w * lse)
        for start in tl.range(0, whole, BLOCK, num_stages=STAGES):
            z = tl.load(row + start + own).to(tl.float32)
            d = gradient_of(z, start + own, lse, scaled, label, h * factor, s * factor)
            tl.store(row + start + own, tl.where(live, d, 0.0).to(logits.dtype.element_ty))
        if whole < columns:
            column = whole + own
            z = tl.load(row + column, mask=column < columns, other=0.0).to(tl.float32)
            d = gradient_of(z, column, lse, scaled, label, h * factor, s * factor)
            tl.store(row + column, tl.where(live, d, 0.0).to(logits.dtype.element_ty), mask=column < columns)


def token_statistics(logits: Tensor, target: Tensor, want_sum: bool) -> Tensor:
    tokens, columns = logits.shape
    _check(logits)
    stats = logits.new_empty((4, tokens), dtype=torch.float32)
    if tokens:
        with on_device_of(logits):
            token_statistics_kernel[(tokens,)](
                logits, target.contiguous(), stats, logits.stride(0), tokens, columns,
                WANT_SUM=want_sum, BLOCK=STATISTICS_BLOCK, num_warps=8,
            )  # fmt: skip
    return stats


def logit_gradient_(
    logits: Tensor,
    lse: Tensor,
    target: Tensor,
    mask: Tensor,
    seed: Tensor | None,
    label_smoothing: float,
    z_loss: float,
    vocab_size: int,
) -> None:
    _check(logits)
    if logits.numel():
        grid = (logits.shape[0], triton.cdiv(logits.shape[1], GRADIENT_BLOCK))
        with on_device_of(logits):
            logit_gradient_kernel[grid](
                logits, lse.contiguous(), target.contiguous(), mask.contiguous(), seed, logits.stride(0),
                logits.shape[1], z_loss, 1.0 - label_smoothing,
                label_smoothing / vocab_size, BLOCK=GRADIENT_BLOCK, num_warps=4,
            )  # fmt: skip


def token_losses_(
    logits: Tensor,
    target: Tensor,
    mask: Tensor,
    seed: Tensor | None,
    label_smoothing: float,
    z_loss: float,
    vocab_size: int,
) -> Tensor:
    _check(logits)
    losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
    if logits.numel():
        with on_device_of(logits):
            token_losses_kernel[(min(len(losses), PROGRAMS * processors(logits)),)](
                logits, target.contiguous(), mask.contiguous(), seed, losses, logits.stride(0), *logits.shape,
                z_loss, 1.0 - label_smoothing, label_smoothing / vocab_size,
                WANT_SUM=label_smoothing > 0.0, BLOCK=STATISTICS_BLOCK, STAGES=STAGES, num_warps=WARPS,
                # No more than all of them have room for: masks of a vocabulary that is no multiple of 16 take 85.
                maxnreg=min(255, 65536 // (32 * WARPS * PROGRAMS)),
            )  # fmt: skip
    return losses


def _check(logits: Tensor) -> None:
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        raise ValueError(
            f"logits of strides {logits.stride()}: the gradient is written in place; columns must be dense"
        )
