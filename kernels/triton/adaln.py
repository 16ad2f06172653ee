"""adaLN: a residual sum by a gate, its layer norm by a shift and a scale a sample, and the gradients of all of them.

Forward, a program takes a token. Backward, it walks over tokens of one sample, whose sums over tokens (gradients of
shift, scale and gate) it has in registers, and leaves a partial sum of each; one more launch adds those. For wide rows
there are no registers for the sample's scale and gate besides: they are loaded again for each token, of which one is
under way ahead.

Shapes: ``b`` batch, ``h`` hidden; streams are rows ``[s * b, h]``, of which row ``i`` is of sample ``i % b``; shifts,
scales and gates ``[b, h]``; statistics fp32 ``[s * b]``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_ds.kernels.triton.common import STAGES, as_rows, on_device_of, persistent, sum_pair, unit_stride
from megatron_ds.kernels.triton.partial_sums import add_partial_sums

# Of an SM, of each kernel that walks: as many as there are registers for.
NORM_RESIDENT_WARPS, SCALE_RESIDENT_WARPS = 16, 24


@triton.jit
def modulated_norm_kernel(
    x, branch, shift, scale, gate, out, summed, mean, rstd, x_row, branch_row, shift_row, scale_row, gate_row,
    batch, columns, eps, HAS_BRANCH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    sample = row % batch
    column = tl.arange(0, BLOCK)
    own = column < columns
    v = tl.load(x + row * x_row + column, mask=own, other=0.0).to(tl.float32)
    if HAS_BRANCH:
        g = tl.load(gate + sample * gate_row + column, mask=own, other=0.0).to(tl.float32)
        v += g * tl.load(branch + row * branch_row + column, mask=own, other=0.0).to(tl.float32)
        rounded = v.to(summed.dtype.element_ty)
        tl.store(summed + row * columns + column, rounded, mask=own)
        v = rounded.to(tl.float32)  # the backward pass sees what was stored
    count = tl.cast(columns, tl.float32)
    mu = tl.sum(v, axis=0) / count
    v = tl.where(own, v - mu, 0.0)
    r = 1.0 / tl.sqrt(tl.sum(v * v, axis=0) / count + tl.cast(eps, tl.float32))
    tl.store(mean + row, mu)
    tl.store(rstd + row, r)
    by = tl.load(scale + sample * scale_row + column, mask=own, other=0.0).to(tl.float32)
    plus = tl.load(shift + sample * shift_row + column, mask=own, other=0.0).to(tl.float32)
    tl.store(out + row * columns + column, (v * r * (1.0 + by) + plus).to(out.dtype.element_ty), mask=own)


@triton.jit
def modulated_norm_backward_kernel(
    grad, d_summed, summed, branch, mean, rstd, scale, gate, d_x, d_branch, partial,
    grad_row, d_summed_row, summed_row, branch_row, scale_row, gate_row, tokens, batch, columns,
    HAS_BRANCH: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, RELOADS: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    own = column < columns
    if not RELOADS:
        by = 1.0 + tl.load(scale + sample * scale_row + column, mask=own, other=0.0).to(tl.float32)
        if HAS_BRANCH:
            through = tl.load(gate + sample * gate_row + column, mask=own, other=0.0).to(tl.float32)
    count = tl.cast(columns, tl.float32)
    d_shift = tl.zeros((1, BLOCK), tl.float32)
    d_scale = tl.zeros((1, BLOCK), tl.float32)
    d_gate = tl.zeros((1, BLOCK), tl.float32)
    for token in tl.range(tl.program_id(0), tokens, tl.num_programs(0), num_stages=STAGES):
        row = tl.cast(token, tl.int64) * batch + sample
        g = tl.load(grad + row * grad_row + column, mask=own, other=0.0).to(tl.float32)
        v = tl.load(summed + row * summed_row + column, mask=own, other=0.0).to(tl.float32)
        r = tl.load(rstd + row)
        unit = tl.where(own, (v - tl.load(mean + row)) * r, 0.0)
        d_shift += g
        d_scale += g * unit
        if RELOADS:
            by = 1.0 + tl.load(scale + sample * scale_row + column, mask=own, other=0.0).to(tl.float32)
        g *= by
        total, along = sum_pair(g, g * unit)
        d = tl.load(d_summed + row * d_summed_row + column, mask=own, other=0.0).to(tl.float32)
        d += (g - total / count - unit * (along / count)) * r
        tl.store(d_x + row * columns + column, d.to(d_x.dtype.element_ty), mask=own)
        if HAS_BRANCH:
            d_gate += d * tl.load(branch + row * branch_row + column, mask=own, other=0.0).to(tl.float32)
            if RELOADS:
                through = tl.load(gate + sample * gate_row + column, mask=own, other=0.0).to(tl.float32)
            tl.store(d_branch + row * columns + column, (d * through).to(d_branch.dtype.element_ty), mask=own)
    kind = tl.cast(tl.num_programs(0), tl.int64) * batch * columns
    to = partial + (tl.cast(tl.program_id(0), tl.int64) * batch + sample) * columns + column
    tl.store(to, d_shift, mask=own)
    tl.store(to + kind, d_scale, mask=own)
    if HAS_BRANCH:
        tl.store(to + 2 * kind, d_gate, mask=own)


@triton.jit
def scaled_add_backward_kernel(
    grad, y, scale, d_y, partial, grad_row, y_row, scale_row, tokens, batch, columns,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    own = column < columns
    by = tl.load(scale + sample * scale_row + column, mask=own, other=0.0).to(tl.float32)
    d_scale = tl.zeros((BLOCK,), tl.float32)
    for token in tl.range(tl.program_id(0), tokens, tl.num_programs(0), num_stages=STAGES):
        row = tl.cast(token, tl.int64) * batch + sample
        g = tl.load(grad + row * grad_row + column, mask=own, other=0.0).to(tl.float32)
        d_scale += g * tl.load(y + row * y_row + column, mask=own, other=0.0).to(tl.float32)
        tl.store(d_y + row * columns + column, (g * by).to(d_y.dtype.element_ty), mask=own)
    tl.store(partial + (tl.cast(tl.program_id(0), tl.int64) * batch + sample) * columns + column, d_scale, mask=own)


def _block(columns: int) -> tuple[int, int]:
    """The next power of two, and the warps that have it in registers: at most 8 numbers of each tensor a thread."""
    block = triton.next_power_of_2(columns)
    return block, min(16, max(1, block // 256))


def modulated_norm(
    x: Tensor, shift: Tensor, scale: Tensor, branch: Tensor | None, gate: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The norm, mean and reciprocal deviation of each row, and the sum (empty without a branch)."""
    rows, (batch, columns) = as_rows(x), x.shape[1:]
    added = None if branch is None else as_rows(branch)
    vectors = [None if each is None else unit_stride(each) for each in (shift, scale, gate)]
    dtype = torch.promote_types(x.dtype, scale.dtype)
    out, summed = x.new_empty(x.shape, dtype=dtype), x.new_empty(0 if added is None else x.shape, dtype=dtype)
    mean, rstd = (x.new_empty(len(rows), dtype=torch.float32) for _ in range(2))
    block, warps = _block(columns)
    if out.numel():
        with on_device_of(x):
            modulated_norm_kernel[(len(rows),)](
                rows, added, *vectors, out, summed, mean, rstd, *_strides(rows, added, *vectors), batch, columns, eps,
                HAS_BRANCH=added is not None, BLOCK=block, num_warps=warps,
            )  # fmt: skip
    return out, mean, rstd, summed


def modulated_norm_backward(
    grad: Tensor,
    d_summed: Tensor,
    summed: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scale: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the stream, of shift and scale, and of branch and gate (empty without them)."""
    streams = [None if each is None else as_rows(each) for each in (grad, d_summed, summed, branch)]
    vectors = [None if each is None else unit_stride(each) for each in (scale, gate)]
    tokens, batch, columns = summed.shape
    d_x = summed.new_empty(summed.shape)
    d_branch = summed.new_empty(0) if branch is None else branch.new_empty(branch.shape)
    sums = [scale.new_empty(scale.shape) for _ in range(2 if gate is None else 3)]
    block, warps = _block(columns)
    programs = persistent(summed, tokens, warps, NORM_RESIDENT_WARPS, batch) if summed.numel() else 0
    wide = block > 256 * warps
    partial = summed.new_empty(len(sums), programs, batch * columns, dtype=torch.float32)
    if programs:
        with on_device_of(summed):
            modulated_norm_backward_kernel[(programs, batch)](
                *streams, mean, rstd, *vectors, d_x, d_branch, partial, *_strides(*streams, *vectors),
                tokens, batch, columns, HAS_BRANCH=branch is not None, BLOCK=block, STAGES=2 if wide else STAGES,
                RELOADS=wide, num_warps=warps,
            )  # fmt: skip
    _add(partial, sums)
    return d_x, sums[0], sums[1], d_branch, sums[2] if gate is not None else scale.new_empty(0)


def scaled_add_backward(grad: Tensor, y: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Of ``x + y scale``: the gradients of ``y`` and of ``scale``."""
    rows, others, by = as_rows(grad), as_rows(y), unit_stride(scale)
    tokens, batch, columns = y.shape
    d_y, d_scale = y.new_empty(y.shape), scale.new_empty(scale.shape)
    block, warps = _block(columns)
    programs = persistent(y, tokens, warps, SCALE_RESIDENT_WARPS, batch) if y.numel() else 0
    partial = y.new_empty(1, programs, batch * columns, dtype=torch.float32)
    if programs:
        with on_device_of(y):
            scaled_add_backward_kernel[(programs, batch)](
                rows, others, by, d_y, partial, *_strides(rows, others, by), tokens, batch, columns,
                BLOCK=block, STAGES=STAGES, num_warps=warps,
            )  # fmt: skip
    _add(partial, [d_scale])
    return d_y, d_scale


def _strides(*tensors: Tensor | None) -> list[int]:
    """From row to row."""
    return [0 if tensor is None else tensor.stride(0) for tensor in tensors]


def _add(partial: Tensor, sums: Sequence[Tensor]) -> None:
    add_partial_sums(partial, [each.view(-1) for each in sums], [False] * len(sums))
