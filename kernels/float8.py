"""Eight-bit floating point: casts with a scale for each block, and products of such tensors.

A tensor ``[..., rows, k]`` is cut into blocks of ``(rows, k)`` elements. A block's largest magnitude (*amax*) becomes
the largest number of the format, so that ``values * scale`` is the tensor again but for the rounding. ``k`` is the dim
over which a product sums.

Formats (Micikevicius et al. 2022): ``e4m3`` has 3 bits of mantissa and ends at 448, ``e5m2`` has 2 and ends at 57344.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2

SMALLEST_AMAX = 1e-12
"""Below it a block has this amax: the scale of zeros is a number to divide by, and none is subnormal."""

CUDA_MULTIPLE = 16
"""Tensor cores take contracted dims that are multiples of this."""


@dataclass(frozen=True)
class Block:
    """The elements that share a scale; None: all of that dim."""

    rows: int | None
    k: int | None

    def grid(self, rows: int, k: int) -> tuple[int, int, int, int]:
        """Blocks along rows and along k, and the elements of a block along each."""
        block_rows, block_k = self.rows or max(rows, 1), self.k or max(k, 1)
        return -(-rows // block_rows), -(-k // block_k), block_rows, block_k


@dataclass(frozen=True)
class Float8:
    """A quantised tensor.

    Attributes:
        values: ``[..., rows, k]`` in a float8 format.
        scale: ``[..., row blocks, k blocks]`` fp32; ``values * scale`` of its block is what they stand for.
    """

    values: Tensor
    scale: Tensor
    block: Block

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """``[..., rows, k]``. In float64 exact."""
        rows, k = self.values.shape[-2:]
        return self.values.to(dtype) * _spread(self.scale.to(dtype), rows, k, self.block)


def block_amax(x: Tensor, block: Block) -> Tensor:
    """The largest magnitude of each block: ``[..., rows, k] -> [..., row blocks, k blocks]`` fp32. NaN stays NaN."""
    rows, k = x.shape[-2:]
    row_blocks, k_blocks, block_rows, block_k = block.grid(rows, k)
    padding = (0, k_blocks * block_k - k, 0, row_blocks * block_rows - rows)
    magnitude = x.abs() if not any(padding) else F.pad(x.abs(), padding)
    blocks = magnitude.view(*x.shape[:-2], row_blocks, block_rows, k_blocks, block_k)
    return blocks.amax(dim=(-3, -1)).float()


def scale_of(amax: Tensor, dtype: torch.dtype, power_of_two: bool) -> Tensor:
    """The scale that maps ``amax`` to the largest number of ``dtype``, in fp32.

    Args:
        power_of_two: the next power of two above it, so that multiplying by a scale never rounds.
    """
    scale = amax.clamp(min=SMALLEST_AMAX) / torch.finfo(dtype).max
    if not power_of_two:
        return scale
    fraction, exponent = torch.frexp(scale)
    rounded = torch.ldexp(torch.ones_like(scale), exponent - (fraction == 0.5).int())
    return torch.where(scale.isfinite(), rounded, scale)


def quantize(x: Tensor, amax: Tensor, block: Block, dtype: torch.dtype, power_of_two: bool = False) -> Float8:
    """Cast ``x [..., rows, k]`` with the scales that follow from :func:`block_amax`, rounded to nearest even.

    A NaN or an infinity makes its whole block NaN, so that a product shows it.
    """
    limit = torch.finfo(dtype).max
    scale = scale_of(amax, dtype, power_of_two)
    wide = x if x.dtype == torch.float64 else x.float()
    rows, k = x.shape[-2:]
    scaled = wide / _spread(scale.to(wide.dtype), rows, k, block)
    return Float8(scaled.clamp(-limit, limit).to(dtype), scale, block)


def _spread(scale: Tensor, rows: int, k: int, block: Block) -> Tensor:
    """A scale for each element, as a view where a block is a row or the whole tensor."""
    row_blocks, k_blocks, block_rows, block_k = block.grid(rows, k)
    if k_blocks > 1:
        scale = scale.repeat_interleave(block_k, dim=-1)[..., :k]
    if row_blocks > 1 and block_rows > 1:
        scale = scale.repeat_interleave(block_rows, dim=-2)[..., :rows, :]
    return scale


def product(a: Float8, b: Float8, out: torch.dtype) -> Tensor:
    """``a @ b.T``: ``[m, k]``, ``[n, k] -> [m, n]`` of dtype ``out``, summed in fp32 (in fp64 if ``out`` is fp64).

    Where no scale changes along k, ``torch.nn.functional.scaled_mm`` does it, on a CPU too. Otherwise, and in float64,
    the dequantized tensors are multiplied.
    """
    if (
        out == torch.float64
        or max(a.scale.shape[-1], b.scale.shape[-1]) > 1
        or a.values.numel() * b.values.numel() == 0
    ):
        compute = torch.float64 if out == torch.float64 else torch.float32
        return (a.dequantize(compute) @ b.dequantize(compute).t()).to(out)
    left, right = _multiple(a.values), _multiple(b.values)
    kind = ScalingType.TensorWise if a.scale.numel() == b.scale.numel() == 1 else ScalingType.RowWise
    scales = [a.scale, b.scale]
    if kind == ScalingType.RowWise:
        # Blocks of several rows that are as long as k have a scale for all of their rows.
        rows = [len(x.values) for x in (a, b)]
        spread = [_spread(x.scale, count, x.values.shape[1], x.block) for x, count in zip((a, b), rows)]
        scales = [scale.expand(count, 1).contiguous() for scale, count in zip(spread, rows)]
    # CUDA's row-wise product writes bf16 alone.
    written = torch.bfloat16 if kind == ScalingType.RowWise and left.is_cuda else out
    result: Tensor = F.scaled_mm(
        left, right.t(), scales[0], kind, scales[1].t(), kind, output_dtype=written, use_fast_accum=False
    )
    return result.to(out)


def _multiple(values: Tensor) -> Tensor:
    """``values [rows, k]``, contiguous, with zeros behind k where tensor cores want them."""
    missing = -values.shape[-1] % CUDA_MULTIPLE
    if missing:
        values = F.pad(values.view(torch.uint8), (0, missing)).view(values.dtype)
    return values.contiguous()
