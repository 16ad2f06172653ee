"""Products of tensors in eight-bit floating point, with their scales.

Not yet run on a GPU: the calls of ``torch.nn.functional.scaled_mm`` pass torch's own checks of shapes and strides for
CUDA, and the Triton kernel runs in its interpreter and compiles for Hopper.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType

from megatron_ds.kernels.float8 import (
    CUDA_BLOCK,
    CUDA_MULTIPLE,
    FLOAT8,
    Block,
    Float8,
    capability,
    has_tensor_cores,
    spread,
    takes_twin,
)
from megatron_ds.kernels.registry import define

# Not those of torch 2.11.
CPU_MULTIPLIES = torch._C._dispatch_has_kernel_for_dispatch_key("aten::_scaled_mm_v2", "CPU")


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
        scales = [spread(x.scale, count, x.values.shape[1], x.block) for x, count in zip((a, b), rows)]
        first, second = (scale.expand(count, 1).contiguous() for scale, count in zip(scales, rows))
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

    ``torch.nn.functional.scaled_mm`` does it where it can: on a CPU where no scale changes along k (torch 2.11 has none
    there), on CUDA with blocks too, by Hopper. Other GPUs multiply blocks by Triton. Elsewhere, and in float64, the
    dequantized tensors are multiplied.
    """
    blocks = max(a.scale.shape[-1], b.scale.shape[-1]) > 1
    if out != torch.float64 and a.values.numel() * b.values.numel() > 0:
        call = scaled_product(a, b) if torch_multiplies(a.values.device, blocks) else None
        if call is not None:
            return call(out)
        if blocks and a.block.k == b.block.k and _twin_multiplies(a, b, out):
            rows = [x.block.rows or x.values.shape[0] for x in (a, b)]
            values, scales = (a.values, b.values), (a.scale, b.scale)
            result: Tensor = torch.ops.megatron_ds.float8_block_product(*values, *scales, *rows, a.block.k, out)
            return result
    compute = torch.float64 if out == torch.float64 else torch.float32
    return (a.dequantize(compute) @ b.dequantize(compute).t()).to(out)


def sum_of_products(a: Float8, b: Float8, out: torch.dtype) -> Tensor:
    """The sum over ``g`` of ``a @ b.T``: ``[g, m, k]``, ``[g, n, k] -> [m, n]``, with scales of rows or whole tensors.

    One product where a GPU multiplies blocks along k. Otherwise each product is written and read again to be added.
    """
    groups, k = a.values.shape[0], a.values.shape[-1]
    whole_blocks = out != torch.float64 and k % (a.block.k or CUDA_BLOCK) == 0
    if groups > 1 and whole_blocks and (torch_multiplies(a.values.device, True) or _twin_multiplies(a, b, out)):
        return product(a.joined(), b.joined(), out)
    total = product(a.group(0), b.group(0), out)
    for number in range(1, groups):
        total.add_(product(a.group(number), b.group(number), out))
    return total


def torch_multiplies(device: torch.device, blocks: bool) -> bool:
    """Whether ``scaled_mm`` runs there; with ``blocks`` along k by cuBLAS of CUDA 12.9 on Hopper alone."""
    if not blocks or not has_tensor_cores(device):
        return not blocks and (CPU_MULTIPLIES if device.type == "cpu" else has_tensor_cores(device))
    version = tuple(int(part) for part in (torch.version.cuda or "0.0").split(".")[:2])
    return capability(device)[0] == 9 and version >= (12, 9)


def _twin_multiplies(a: Float8, b: Float8, out: torch.dtype) -> bool:
    one = torch.empty(1, dtype=out, device=a.values.device)  # the op is asked by what it is to write
    return takes_twin(one, a.block) and takes_twin(one, b.block)


def _multiple(values: Tensor) -> Tensor:
    """``values [rows, k]``, contiguous, with zeros behind k where tensor cores want them."""
    missing = -values.shape[-1] % CUDA_MULTIPLE
    if missing:
        values = F.pad(values.view(torch.uint8), (0, missing)).view(values.dtype)
    return values.contiguous()


define(
    "float8_block_product(Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, int a_rows, int b_rows, int side, "
    "ScalarType dtype) -> Tensor",
    lambda a, *how: FLOAT8.load(a).block_product(a, *how),
    lambda a, b, *how: a.new_empty((a.shape[0], b.shape[0]), dtype=how[-1]),
)
