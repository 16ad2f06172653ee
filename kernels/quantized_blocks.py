"""Rows of numbers in 8 or 4 bits with a scale for each block of 256, as bytes that can be sent.

After ZeRO++ (Wang et al. 2023, arXiv 2306.10209, sections 3.1 and 3.3). A block's largest magnitude becomes the largest
number of the format; ``int8`` and ``int4`` are symmetric, ``fp8`` is e4m3. A block with a NaN or an Inf comes out
without a finite number, so that an overflow is still seen.

A row of ``n`` numbers is the scales of its blocks (fp32, or fp64 for fp64), then their values, the last block padded.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ds.kernels.dropout import COLUMN_STEP, mix
from megatron_ds.kernels.float8 import E4M3

BLOCK = 256
"""Numbers that share a scale."""
LARGEST: Mapping[str, float] = MappingProxyType({"int8": 127.0, "int4": 7.0, "fp8": torch.finfo(E4M3).max})


def _scale_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def packed_bytes(count: int, form: str, dtype: torch.dtype) -> int:
    """Of a row of ``count`` numbers of ``dtype``."""
    blocks = -(-count // BLOCK)
    return blocks * (_scale_dtype(dtype).itemsize + (BLOCK // 2 if form == "int4" else BLOCK))


def pack(x: Tensor, form: str, keys: Tensor | None = None) -> Tensor:
    """``[rows, n]`` to bytes ``[rows, packed_bytes]``.

    Args:
        keys: ``[rows]`` int32, for stochastic rounding: up with the probability of the fraction that is lost, so that a
            sum of many is not biased. The random number is a hash of the row's key and of the place in the row. Of
            ``int8`` and ``int4``; None: to the nearest.
    """
    wide = _scale_dtype(x.dtype)
    blocks = F.pad(x.to(wide), (0, -x.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    scale = blocks.abs().amax(2, keepdim=True) / LARGEST[form]
    # A quotient that was rounded up times what it was divided by is Inf, where there was the largest finite number.
    largest = scale.new_full((), torch.finfo(wide).max) / LARGEST[form]
    scale = torch.where(scale == largest, largest.nextafter(torch.zeros_like(largest)), scale)
    relative = blocks / torch.where(scale == 0, torch.ones_like(scale), scale)
    if form == "fp8":
        values = relative.to(E4M3).view(torch.uint8)
    else:
        rounded = relative.round() if keys is None else _by_chance(relative, keys)
        whole = rounded.clamp(-LARGEST[form], LARGEST[form]).nan_to_num().to(torch.int16)
        if form == "int4":
            low, high = (whole + 8).unflatten(2, (-1, 2)).unbind(3)
            values = (low | high << 4).to(torch.uint8)
        else:
            values = whole.to(torch.int8).view(torch.uint8)
    return torch.cat((scale.flatten(1).view(torch.uint8), values.flatten(1)), dim=1)


def row_keys(seed: int, first: int, rows: int, device: torch.device) -> Tensor:
    """``[rows]`` int32: a hash for each of the rows ``first ..``, of a seed of 63 bits and the row's number."""
    numbers = torch.arange(first, first + rows, device=device) ^ (seed & 0xFFFFFFFF)
    return mix(mix(numbers.to(torch.int32)) ^ (seed >> 32))


def _by_chance(relative: Tensor, keys: Tensor) -> Tensor:
    """Stochastic rounding of ``[rows, blocks, BLOCK]`` to whole numbers."""
    places = (torch.arange(relative.shape[1] * BLOCK, device=keys.device) * COLUMN_STEP).to(torch.int32)
    bits = mix(keys.view(-1, 1, 1) + places.view(1, -1, BLOCK)) & 0x7FFFFF
    # Compared with the fraction: added to the number, fp32 would round it, and a whole number could go up.
    chance = (bits.to(relative.dtype) + 0.5) * 2.0**-23
    below = relative.floor()
    return below + (chance < relative - below)


def unpack(data: Tensor, count: int, form: str, dtype: torch.dtype) -> Tensor:
    """The inverse: ``[rows, packed_bytes]`` to ``[rows, count]`` of ``dtype``."""
    wide = _scale_dtype(dtype)
    end = -(-count // BLOCK) * wide.itemsize
    scale = data[:, :end].contiguous().view(wide).unsqueeze(2)
    values = data[:, end:].contiguous()
    if form == "fp8":
        numbers = values.view(E4M3).to(wide)
    elif form == "int4":
        numbers = (torch.stack((values & 15, values >> 4), dim=2).flatten(1).to(torch.int16) - 8).to(wide)
    else:
        numbers = values.view(torch.int8).to(wide)
    return (numbers.unflatten(1, (-1, BLOCK)) * scale).flatten(1)[:, :count].to(dtype)
