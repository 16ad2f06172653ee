"""Products with weights of four bits on a CPU, which torch keeps in an order of its own.

torch's operator reads every weight again for each row or two. For many rows it is faster to widen the weights first,
some outputs at a time, so that they stay in the cache.

Shapes: ``t`` rows, ``i`` inputs in groups that share a scale, ``o`` outputs, a multiple of 16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ds.kernels.cpu.allocator import use_huge_pages

_OUTPUTS = 64
"""Outputs that are packed together: a byte of inputs ``k`` has outputs ``o`` and ``o + 32`` of them."""
_WIDENED = 1024
"""Outputs that are widened at a time."""
_FEW_ROWS = 128
"""Up to so many rows torch's operator is faster."""


def can_pack(values: Tensor, group: int) -> bool:
    """Whether torch's operator takes ``values [o, i]`` in groups of so many inputs."""
    return values.shape[0] % 16 == 0 and group in (32, 64, 128, 256)


def packed(values: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """``values [o, i]`` from -8 to 7, ``scale [o, groups]`` -> what :func:`product` takes."""
    pairs = torch.stack((scale.t(), torch.zeros_like(scale.t())), dim=2).to(torch.bfloat16).contiguous()
    in_order = torch._convert_weight_to_int4pack_for_cpu(values.to(torch.int32) + 8, 2)
    for read in (in_order, pairs):
        use_huge_pages(read.data_ptr(), read.nbytes)
    return in_order, pairs


def can_widen(values: Tensor, weight: Tensor) -> bool:
    """Whether ``weight``, packed from ``values``, has the order that is known here: others have no 512-bit vectors."""
    known = weight.shape[0] % _OUTPUTS == 0
    return known and torch.equal(_unpacked(weight).transpose(1, 2).flatten(0, 1), (values + 8).to(torch.uint8))


def product(x: Tensor, weight: Tensor, pairs: Tensor, widen: bool) -> Tensor:
    """``[t, i]`` bf16 -> ``[t, o]``. ``widen``: what :func:`can_widen` says."""
    group = x.shape[1] // len(pairs)
    rows = x.shape[0]  # len() would make a constant of it in a graph for any number of rows
    if rows <= _FEW_ROWS or not widen:
        return torch._weight_int4pack_mm_for_cpu(x.contiguous(), weight, group, pairs)
    out = x.new_empty(rows, weight.shape[0])
    for first in range(0, weight.shape[0], _WIDENED):
        last = min(first + _WIDENED, weight.shape[0])
        values = _unpacked(weight[first:last]).unflatten(1, (len(pairs), group))
        scale = pairs[:, first:last, 0].unflatten(1, (-1, _OUTPUTS)).transpose(0, 1).unsqueeze(2)
        widened = torch.addcmul(-8 * scale, values.to(x.dtype), scale).flatten(1, 2)
        torch.mm(x, widened.transpose(0, 1).flatten(1), out=out[:, first:last])
    return out


def _unpacked(weight: Tensor) -> Tensor:
    """``[o / 64, i, 64]`` uint8 from 0 to 15."""
    pairs = weight.view(-1, 2 * weight.shape[1], _OUTPUTS // 2)
    return torch.cat((pairs & 15, pairs >> 4), dim=2)
