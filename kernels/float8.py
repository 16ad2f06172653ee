"""Eight-bit floating point: casts with a scale for each block (products: :mod:`megatron_ds.kernels.float8_product`).

A tensor ``[..., rows, k]`` is cut into blocks of ``(rows, k)`` elements. A block's largest magnitude (*amax*) becomes
the largest number of the format, so that ``values * scale`` is the tensor again but for the rounding. ``k`` is the dim
over which a product sums.

Formats (Micikevicius et al. 2022): ``e4m3`` has 3 bits of mantissa and ends at 448, ``e5m2`` has 2 and ends at 57344.

A layer needs most tensors twice, as they are and transposed, each with the scales of its own blocks: tensor cores sum
8-bit operands over the last dim alone. :func:`quantize_both` makes the two.

Not yet run on a GPU: the Triton twins run in its interpreter and compile for Hopper.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ds.kernels.registry import Op, define

FLOAT8 = Op("float8", twin="float8")

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2

SMALLEST_AMAX = 1e-12
"""Below it a block has this amax: the scale of zeros is a number to divide by, and none is subnormal."""

FIRST_CAPABILITY = (8, 9)
CUDA_MULTIPLE = 16
"""Tensor cores take contracted dims that are multiples of this."""
CUDA_BLOCK = 128
"""The side of the blocks that CUDA multiplies with."""


@dataclass(frozen=True)
class Block:
    """The elements that share a scale; None: all of that dim."""

    rows: int | None
    k: int | None

    @property
    def is_square(self) -> bool:
        return self.rows == self.k

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
        return self.values.to(dtype) * spread(self.scale.to(dtype), rows, k, self.block)

    def group(self, number: int) -> Float8:
        """One of ``[g, rows, k]``."""
        return Float8(self.values[number], self.scale[number], self.block)

    def flat(self) -> Float8:
        """``[g, rows, k] -> [rows * g, k]``, with scales a row where there are several ``g``."""
        groups, rows, k = self.values.shape
        if groups == 1:
            return self.group(0)
        scale = self.scale.expand(groups, rows, -1).transpose(0, 1).reshape(rows * groups, -1)
        return Float8(self.values.transpose(0, 1).reshape(-1, k), scale, Block(1, self.block.k))

    def joined(self) -> Float8:
        """Concatenates the groups along k: ``[g, rows, k] -> [rows, g * k]``. Blocks divide k.

        A scale that spans k is repeated for each block of 128, which a product may change scales at.
        """
        groups, rows, k = self.values.shape
        side = self.block.k or CUDA_BLOCK
        scale = self.scale.expand(groups, rows, k // side).transpose(1, 2).reshape(-1, rows).t()  # as CUDA wants them
        return Float8(self.values.transpose(0, 1).reshape(rows, -1), scale, Block(1, side))

    def transposed(self) -> Float8:
        """``[..., k, rows]`` with the same scales: of square blocks, which the transpose has too."""
        assert self.block.is_square
        return Float8(self.values.mT.contiguous(), self.scale.mT.contiguous(), self.block)


def capability(device: torch.device) -> tuple[int, int]:
    """Of a CUDA device, as ``torch.compile`` can trace it."""
    found = torch.cuda.get_device_properties(device)
    return found.major, found.minor


def has_tensor_cores(device: torch.device) -> bool:
    """Whether a CUDA device computes in FP8."""
    return device.type == "cuda" and capability(device) >= FIRST_CAPABILITY


def takes_twin(x: Tensor, block: Block) -> bool:
    """Whether Triton casts ``x``: where the op says so, on devices and in blocks that have FP8 products."""
    sides = (None, 16, 32, 64, CUDA_BLOCK)
    known = block.k in sides and block.rows in (block.k, 1)
    return x.numel() > 0 and known and FLOAT8.choose(x) == "triton" and (not x.is_cuda or has_tensor_cores(x.device))


def block_amax(x: Tensor, block: Block) -> Tensor:
    """The largest magnitude of each block: ``[..., rows, k] -> [..., row blocks, k blocks]`` fp32. NaN stays NaN."""
    if block.k is None and takes_twin(x, block):
        return _twin_amax(x, block, True, False)[0]
    rows, k = x.shape[-2:]
    row_blocks, k_blocks, block_rows, block_k = block.grid(rows, k)
    padding = (0, k_blocks * block_k - k, 0, row_blocks * block_rows - rows)
    magnitude = x.abs() if not any(padding) else F.pad(x.abs(), padding)
    blocks = magnitude.reshape(*x.shape[:-2], row_blocks, block_rows, k_blocks, block_k)
    return blocks.amax(dim=(-3, -1)).float()


def block_amax_both(x: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """:func:`block_amax` of ``x`` and of its transpose, in one read on a GPU."""
    if block.k is None and takes_twin(x, block):
        return _twin_amax(x, block, True, True)
    first = block_amax(x, block)
    return first, first.mT if block.is_square else block_amax(x.mT, block)


def scale_of(amax: Tensor, dtype: torch.dtype, power_of_two: bool) -> Tensor:
    """The scale that maps ``amax`` to the largest number of ``dtype``, in fp32.

    Args:
        power_of_two: the next power of two above it, so that multiplying by a scale never rounds.
    """
    if torch.compiler.is_compiling():
        # Kept whole: Inductor's division on a GPU is off by a bit at times, and a scale would depend on who made it.
        found: Tensor = torch.ops.megatron_ds.float8_scale(amax, dtype, power_of_two)
        return found
    return _scale_of(amax, dtype, power_of_two)


def _scale_of(amax: Tensor, dtype: torch.dtype, power_of_two: bool) -> Tensor:
    scale = amax.clamp(min=SMALLEST_AMAX) / torch.finfo(dtype).max
    if not power_of_two:
        return scale
    fraction, exponent = torch.frexp(scale)
    rounded = torch.ldexp(torch.ones_like(scale), exponent - (fraction == 0.5).int())
    return torch.where(scale.isfinite(), rounded, scale)


def quantize(x: Tensor, amax: Tensor | None, block: Block, dtype: torch.dtype, power_of_two: bool = False) -> Float8:
    """Cast ``x [..., rows, k]`` with the scales that follow from its amax, rounded to nearest even.

    A NaN or an infinity makes its whole block NaN, so that a product shows it.

    Args:
        amax: :func:`block_amax`, if it was reduced over ranks; None: it is found here, in the same read where possible.
    """
    if (amax is None or block.k is None) and takes_twin(x, block):
        return _twin(x, (amax, amax), block, dtype, power_of_two, True, False)[0]
    scale = scale_of(block_amax(x, block) if amax is None else amax, dtype, power_of_two)
    wide = x if x.dtype == torch.float64 else x.float()
    rows, k = x.shape[-2:]
    cast = torch.ops.megatron_ds.float8_plain_cast if torch.compiler.is_compiling() else _plain_cast
    return Float8(cast(wide, spread(scale.to(wide.dtype), rows, k, block), dtype), scale, block)


def _plain_cast(wide: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Row-major whatever ``wide`` is, as Triton's: how a product sums may depend on where its operands lie."""
    limit = torch.finfo(dtype).max
    return (wide / scale).clamp(-limit, limit).to(dtype).contiguous()


def quantize_both(
    x: Tensor,
    amax: tuple[Tensor | None, Tensor | None],
    block: Block,
    dtype: torch.dtype,
    power_of_two: bool = False,
) -> tuple[Float8, Float8]:
    """:func:`quantize` of ``x [..., rows, k]`` and of its transpose ``[..., k, rows]``; ``amax``: of each."""
    if (amax[0] is None or block.k is None) and takes_twin(x, block):
        return _twin(x, amax, block, dtype, power_of_two, True, True)
    first = quantize(x, amax[0], block, dtype, power_of_two)
    return first, first.transposed() if block.is_square else quantize(x.mT, amax[1], block, dtype, power_of_two)


def _twin_amax(x: Tensor, block: Block, plain: bool, transposed: bool) -> tuple[Tensor, Tensor]:
    if x.stride(-1) != 1 and x.stride(-2) == 1:  # the kernels read along the last dim
        of_transpose, of_x = _twin_amax(x.mT, block, transposed, plain)
        return of_x, of_transpose
    three = x.reshape(-1, *x.shape[-2:])
    found = _amax_of_both(three, block, plain, transposed)
    return _shaped(found[0], x), _shaped(found[1], x)


def _amax_of_both(three: Tensor, block: Block, plain: bool, transposed: bool) -> tuple[Tensor, Tensor]:
    whole = block.rows is None
    found: tuple[Tensor, Tensor] = torch.ops.megatron_ds.float8_amax(three, whole, plain, transposed)
    return (found[0], found[0]) if whole else found


def _twin(
    x: Tensor,
    amax: tuple[Tensor | None, Tensor | None],
    block: Block,
    dtype: torch.dtype,
    power_of_two: bool,
    plain: bool,
    transposed: bool,
) -> tuple[Float8, Float8]:
    """Of ``x`` and of its transpose, as wanted."""
    if x.stride(-1) != 1 and x.stride(-2) == 1:
        of_transpose, of_x = _twin(x.mT, amax[::-1], block, dtype, power_of_two, transposed, plain)
        return of_x, of_transpose
    three, how = x.reshape(-1, *x.shape[-2:]), (plain, transposed, dtype, power_of_two, SMALLEST_AMAX)
    if block.k is None:
        given = [a.reshape(-1, *a.shape[-2:]) for a in amax if a is not None]
        found = given if len(given) == 2 else _amax_of_both(three, block, plain, transposed)
        made = torch.ops.megatron_ds.float8_cast(three, *found, block.rows is None, *how)
    else:
        made = torch.ops.megatron_ds.float8_block_cast(three, block.k, block.is_square, *how)
    of_x, of_transpose = (Float8(_shaped(v, x), _shaped(s, x), block) for v, s in zip(made[:2], made[2:]))
    return of_x, of_transpose


def _shaped(three: Tensor, x: Tensor) -> Tensor:
    """``[g, rows, k]`` with the leading dims of ``x``; what was not wanted stays empty."""
    return three.view(*x.shape[:-2], *three.shape[-2:]) if three.numel() else three


def spread(scale: Tensor, rows: int, k: int, block: Block) -> Tensor:
    """A scale for each element, as a view where a block is a row or the whole tensor."""
    row_blocks, k_blocks, block_rows, block_k = block.grid(rows, k)
    if k_blocks > 1:
        scale = scale.repeat_interleave(block_k, dim=-1)[..., :k]
    if row_blocks > 1 and block_rows > 1:
        scale = scale.repeat_interleave(block_rows, dim=-2)[..., :rows, :]
    return scale


def outputs(x: Tensor, plain: bool, transposed: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Memory for ``x [g, rows, columns]`` and for its transpose, with groups innermost but one; empty if not wanted."""
    groups, rows, columns = x.shape
    out = x.new_empty((rows, groups, columns) if plain else (0, 0, 0), dtype=dtype)
    out_t = x.new_empty((columns, groups, rows) if transposed else (0, 0, 0), dtype=dtype)
    return out.transpose(0, 1), out_t.transpose(0, 1)


def _fake_amax(x: Tensor, whole: bool, plain: bool, transposed: bool) -> tuple[Tensor, Tensor]:
    groups, rows, columns = x.shape
    shapes = ((groups, 1, 1), (0,)) if whole else ((groups, rows, 1), (groups, columns, 1))
    return x.new_empty(shapes[0], dtype=torch.float32), x.new_empty(shapes[1], dtype=torch.float32)


def cast_outputs(
    x: Tensor,
    amax: Tensor,
    amax_t: Tensor,
    whole: bool,
    plain: bool,
    transposed: bool,
    dtype: torch.dtype,
    *how: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`outputs`, and memory for the scales of both."""
    scale, scale_t = (torch.empty_like(a if wanted else a[:0]) for a, wanted in ((amax, plain), (amax_t, transposed)))
    return *outputs(x, plain, transposed, dtype), scale, scale_t


def block_outputs(
    x: Tensor, side: int, square: bool, plain: bool, transposed: bool, dtype: torch.dtype, *how: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`outputs`, and memory for the scales of both, by blocks of ``side``."""
    groups, rows, columns = x.shape
    across, down = -(-columns // side), -(-rows // side)
    scale = x.new_empty((groups, down if square else rows, across) if plain else (0,), dtype=torch.float32)
    scale_t = x.new_empty((groups, across if square else columns, down) if transposed else (0,), dtype=torch.float32)
    return *outputs(x, plain, transposed, dtype), scale, scale_t


define(
    "float8_scale(Tensor amax, ScalarType dtype, bool power_of_two) -> Tensor",
    _scale_of,
    lambda amax, *how: torch.empty_like(amax),
)
define(
    "float8_plain_cast(Tensor wide, Tensor scale, ScalarType dtype) -> Tensor",
    _plain_cast,
    lambda wide, scale, dtype: wide.new_empty(wide.shape, dtype=dtype),
)
define(
    "float8_amax(Tensor x, bool whole, bool plain, bool transposed) -> (Tensor, Tensor)",
    lambda x, *how: FLOAT8.load(x).amax(x, *how),
    _fake_amax,
)
define(
    "float8_cast(Tensor x, Tensor amax, Tensor amax_t, bool whole, bool plain, bool transposed, ScalarType dtype, "
    "bool power_of_two, float smallest) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda x, *how: FLOAT8.load(x).cast(x, *how),
    cast_outputs,
)
define(
    "float8_block_cast(Tensor x, int side, bool square, bool plain, bool transposed, ScalarType dtype, "
    "bool power_of_two, float smallest) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda x, *how: FLOAT8.load(x).block_cast(x, *how),
    block_outputs,
)
