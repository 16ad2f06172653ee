"""Tensors for the cases under Triton's interpreter, in the memory layouts that models have."""

from __future__ import annotations

import torch
from torch import Tensor


def normal(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(dtype)


def strided(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Neither contiguous nor with dense rows: every second column of a transposed tensor."""
    return normal(shape[1], shape[0], *shape[2:-1], 2 * shape[-1], dtype=dtype).transpose(0, 1)[..., ::2]


def sliced(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Dense rows with a gap after each."""
    return normal(*shape[:-1], shape[-1] + 3, dtype=dtype)[..., : shape[-1]]


def keys(*shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31, shape).to(torch.int32)


LAYOUTS = {"": normal, " strided": strided, " sliced": sliced}


def table(length: int, batch: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angles = torch.rand(length, batch, 1, size // 2) * 6.28
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)
