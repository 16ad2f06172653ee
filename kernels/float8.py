"""Eight-bit floating point: casts with a scale for each block, and products of such tensors.

A tensor ``[..., rows, k]`` is cut into blocks of ``(rows, k)`` elements. A block's largest magnitude (*amax*) becomes
the largest number of the format, so that ``values * scale`` is the tensor again but for the rounding. ``k`` is the dim
over which a product sums.

Formats (Micikevicius et al. 2022): ``e4m3`` has 3 bits of mantissa and ends at 448, ``e5m2`` has 2 and ends at 57344.

A layer needs most tensors twice, as they are and transposed, each with the scales of its own blocks: tensor cores sum
8-bit operands over the last dim alone. :func:`quantize_both` makes the two.

Not yet run on a GPU: the Triton twins run in its interpreter and compile for Hopper, and the calls of
``torch.nn.functional.scaled_mm`` pass torch's own checks of shapes and strides for CUDA.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType

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
        return self.values.to(dtype) * _spread(self.scale.to(dtype), rows, k, self.block)

    def group(self, number: int) -> Float8:
        """One of ``[g, rows, k]``."""
        return Float8(self.values[number], self.scale[number], self.block)

    def flat(self) -> Float8:
        """``[g, rows, k] -> [g * rows, k]``, with scales a row where there are several ``g``."""
        groups, rows, k = self.values.shape
        if groups == 1:
            return self.group(0)
        scale = self.scale.expand(groups, rows, -1).reshape(-1, self.scale.shape[-1])
        return Float8(self.values.reshape(-1, k), scale, Block(1, self.block.k))

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
    limit = torch.finfo(dtype).max
    scale = scale_of(block_amax(x, block) if amax is None else amax, dtype, power_of_two)
    wide = x if x.dtype == torch.float64 else x.float()
    rows, k = x.shape[-2:]
    scaled = wide / _spread(scale.to(wide.dtype), rows, k, block)
    # Row-major whatever ``x`` is, as Triton's: how a product sums may depend on where its operands lie.
    return Float8(scaled.clamp(-limit, limit).to(dtype).contiguous(), scale, block)


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
    found = torch.ops.megatron_ds.float8_amax(three, block.rows is None, plain, transposed)
    return _shaped(found[0], x), _shaped(found[1], x)


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
    three = x.reshape(-1, *x.shape[-2:])
    if block.k is None:
        whole = block.rows is None
        given = [a.reshape(-1, *a.shape[-2:]) for a in amax if a is not None]
        found = given if len(given) == 2 else torch.ops.megatron_ds.float8_amax(three, whole, plain, transposed)
        scales = [scale_of(a, dtype, power_of_two) for a in found]
        values = torch.ops.megatron_ds.float8_cast(three, *scales, whole, plain, transposed, dtype)
    else:
        *values, first, second = torch.ops.megatron_ds.float8_block_cast(
            three, block.k, block.is_square, plain, transposed, dtype, power_of_two, SMALLEST_AMAX
        )
        scales = [first, second]
    of_x, of_transpose = (Float8(_shaped(v, x), _shaped(s, x), block) for v, s in zip(values, scales))
    return of_x, of_transpose


def _shaped(three: Tensor, x: Tensor) -> Tensor:
    """``[g, rows, k]`` with the leading dims of ``x``; what was not wanted stays empty."""
    return three.view(*x.shape[:-2], *three.shape[-2:]) if three.numel() else three


def _spread(scale: Tensor, rows: int, k: int, block: Block) -> Tensor:
    """A scale for each element, as a view where a block is a row or the whole tensor."""
    row_blocks, k_blocks, block_rows, block_k = block.grid(rows, k)
    if k_blocks > 1:
        scale = scale.repeat_interleave(block_k, dim=-1)[..., :k]
    if row_blocks > 1 and block_rows > 1:
        scale = scale.repeat_interleave(block_rows, dim=-2)[..., :rows, :]
    return scale


@dataclass(frozen=True)
class ScaledProduct:
    """The arguments of ``torch.nn.functional.scaled_mm``, laid out as CUDA wants them.

    ``left [m, k]`` is row-major, ``right [k, n]`` column-major, both with k padded to a multiple of 16; scales of rows
    are contiguous ``[m, 1]`` and ``[1, n]``. Those of blocks are fp32 with rows next to each other, and those of 128 x
    128 are padded to a multiple of four along k.
    """

    left: Tensor
    right: Tensor
    scales: tuple[Tensor, Tensor]
    kinds: tuple[ScalingType, ScalingType]

    def __call__(self, out: torch.dtype) -> Tensor:
        # CUDA's row-wise product writes bf16 alone.
        half = self.left.is_cuda and self.kinds[0] == ScalingType.RowWise
        result: Tensor = F.scaled_mm(
            self.left,
            self.right,
            self.scales[0],
            self.kinds[0],
            self.scales[1],
            self.kinds[1],
            output_dtype=torch.bfloat16 if half else out,
            use_fast_accum=False,
        )
        return result.to(out)


def scaled_product(a: Float8, b: Float8) -> ScaledProduct | None:
    """``a @ b.T`` as torch's call; None where it has none: blocks that are not CUDA's, or a k that ends within one."""
    left, right = _multiple(a.values), _multiple(b.values).t()
    if a.scale.numel() == b.scale.numel() == 1:
        return ScaledProduct(left, right, (a.scale, b.scale), (ScalingType.TensorWise, ScalingType.TensorWise))
    if max(a.scale.shape[-1], b.scale.shape[-1]) == 1:
        # Blocks of several rows that are as long as k have a scale for all of their rows.
        rows = [x.values.shape[0] for x in (a, b)]
        spread = [_spread(x.scale, count, x.values.shape[1], x.block) for x, count in zip((a, b), rows)]
        first, second = (scale.expand(count, 1).contiguous() for scale, count in zip(spread, rows))
        return ScaledProduct(left, right, (first, second.t()), (ScalingType.RowWise, ScalingType.RowWise))
    kinds = {
        Block(1, CUDA_BLOCK): ScalingType.BlockWise1x128,
        Block(CUDA_BLOCK, CUDA_BLOCK): ScalingType.BlockWise128x128,
    }
    square = [x.block.is_square for x in (a, b)]
    whole = not any(x.values.shape[0] % CUDA_BLOCK for x in (a, b) if x.block.is_square)
    if a.block not in kinds or b.block not in kinds or all(square) or a.values.shape[-1] % CUDA_BLOCK or not whole:
        return None
    scales = [F.pad(x.scale, (0, -x.scale.shape[1] % 4)) if x.block.is_square else x.scale for x in (a, b)]
    first, second = (s.t() if tiled else s.t().contiguous().t() for s, tiled in zip(scales, square))
    return ScaledProduct(left, right, (first, second), (kinds[a.block], kinds[b.block]))


def product(a: Float8, b: Float8, out: torch.dtype) -> Tensor:
    """``a @ b.T``: ``[m, k]``, ``[n, k] -> [m, n]`` of dtype ``out``, summed in fp32 (in fp64 if ``out`` is fp64).

    ``torch.nn.functional.scaled_mm`` does it where it can: on a CPU where no scale changes along k, on CUDA with blocks
    too, by Hopper. Other GPUs multiply blocks by Triton. Elsewhere, and in float64, the dequantized tensors are
    multiplied.
    """
    blocks = max(a.scale.shape[-1], b.scale.shape[-1]) > 1
    if out != torch.float64 and a.values.numel() * b.values.numel() > 0:
        call = scaled_product(a, b) if torch_multiplies(a.values.device, blocks) else None
        if call is not None:
            return call(out)
        if blocks and _twin_multiplies(a, b, out):
            rows = [x.block.rows or x.values.shape[0] for x in (a, b)]
            values, scales = (a.values, b.values), (a.scale, b.scale)
            result: Tensor = torch.ops.megatron_ds.float8_block_product(*values, *scales, *rows, a.block.k, out)
            return result
    compute = torch.float64 if out == torch.float64 else torch.float32
    return (a.dequantize(compute) @ b.dequantize(compute).t()).to(out)


def torch_multiplies(device: torch.device, blocks: bool) -> bool:
    """Whether ``scaled_mm`` runs there; with ``blocks`` along k by cuBLAS of CUDA 12.9 on Hopper alone."""
    if not blocks or not has_tensor_cores(device):
        return not blocks and (device.type == "cpu" or has_tensor_cores(device))
    version = tuple(int(part) for part in (torch.version.cuda or "0.0").split(".")[:2])
    return capability(device)[0] == 9 and version >= (12, 9)


def _twin_multiplies(a: Float8, b: Float8, out: torch.dtype) -> bool:
    one = torch.empty(1, dtype=out, device=a.values.device)  # the op is asked by what it is to write
    return a.block.k == b.block.k and takes_twin(one, a.block) and takes_twin(one, b.block)


def _multiple(values: Tensor) -> Tensor:
    """``values [rows, k]``, contiguous, with zeros behind k where tensor cores want them."""
    missing = -values.shape[-1] % CUDA_MULTIPLE
    if missing:
        values = F.pad(values.view(torch.uint8), (0, missing)).view(values.dtype)
    return values.contiguous()


def _outputs(x: Tensor, plain: bool, transposed: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    groups, rows, columns = x.shape
    out = x.new_empty((groups, rows, columns) if plain else (0,), dtype=dtype)
    return out, x.new_empty((groups, columns, rows) if transposed else (0,), dtype=dtype)


def _fake_amax(x: Tensor, whole: bool, plain: bool, transposed: bool) -> tuple[Tensor, Tensor]:
    groups, rows, columns = x.shape
    shapes = [(groups, 1, 1)] * 2 if whole else [(groups, rows, 1), (groups, columns, 1)]
    first, second = (x.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return first, second


def _fake_block_cast(
    x: Tensor,
    side: int,
    square: bool,
    plain: bool,
    transposed: bool,
    dtype: torch.dtype,
    power_of_two: bool,
    smallest: float,
) -> tuple[Tensor, ...]:
    groups, rows, columns = x.shape
    across, down = -(-columns // side), -(-rows // side)
    scale = (groups, down if square else rows, across) if plain else (0,)
    scale_t = (groups, across if square else columns, down) if transposed else (0,)
    return (*_outputs(x, plain, transposed, dtype), *(x.new_empty(s, dtype=torch.float32) for s in (scale, scale_t)))


define(
    "float8_scale(Tensor amax, ScalarType dtype, bool power_of_two) -> Tensor",
    _scale_of,
    lambda amax, *how: torch.empty_like(amax),
)
define(
    "float8_amax(Tensor x, bool whole, bool plain, bool transposed) -> (Tensor, Tensor)",
    lambda x, *how: FLOAT8.load(x).amax(x, *how),
    _fake_amax,
)
define(
    "float8_cast(Tensor x, Tensor scale, Tensor scale_t, bool whole, bool plain, bool transposed, ScalarType dtype) "
    "-> (Tensor, Tensor)",
    lambda x, *how: FLOAT8.load(x).cast(x, *how),
    lambda x, scale, scale_t, whole, *wanted: _outputs(x, *wanted),
)
define(
    "float8_block_cast(Tensor x, int side, bool square, bool plain, bool transposed, ScalarType dtype, "
    "bool power_of_two, float smallest) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda x, *how: FLOAT8.load(x).block_cast(x, *how),
    _fake_block_cast,
)
define(
    "float8_block_product(Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, int a_rows, int b_rows, int side, "
    "ScalarType dtype) -> Tensor",
    lambda a, *how: FLOAT8.load(a).block_product(a, *how),
    lambda a, b, *how: a.new_empty((a.shape[0], b.shape[0]), dtype=how[-1]),
)
