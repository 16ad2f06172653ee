"""Rows of keys or values that are written and read by their places, in the model's precision or in eight bits."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megatron_ds.kernels.float8 import E4M3, SMALLEST_AMAX
from megatron_ds.kernels.paged_attention import PagedKV


class Pages:
    """``[slots, g, d]`` in a dtype. In e4m3 each row of a head has a scale of its own, so none leaves its range."""

    def __init__(self, slots: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device | str):
        self._float8 = dtype == E4M3
        # Bytes: not every operation knows FP8.
        kept = torch.uint8 if self._float8 else dtype
        self.data = torch.zeros(slots, heads, head_dim, dtype=kept, device=device)
        self.scale = torch.zeros(slots, heads, 1, dtype=torch.float32, device=device) if self._float8 else None

    @property
    def pages(self) -> PagedKV:
        """As a kernel takes them."""
        return PagedKV(self.data, self.scale)

    @staticmethod
    def bytes_of_token(heads: int, head_dim: int, dtype: torch.dtype) -> int:
        return heads * (head_dim * dtype.itemsize + (4 if dtype == E4M3 else 0))

    def write(self, slots: Tensor, rows: Tensor) -> None:
        """``rows [t, g, d]`` to ``slots [t]``."""
        if self.scale is None:
            self.data.index_copy_(0, slots, rows.to(self.data.dtype))
            return
        wide = rows.float()
        scale = wide.abs().amax(2, keepdim=True).clamp(min=SMALLEST_AMAX) / torch.finfo(E4M3).max
        self.data.index_copy_(0, slots, (wide / scale).to(E4M3).view(torch.uint8))
        self.scale.index_copy_(0, slots, scale)

    @staticmethod
    def rows_of(slots: np.ndarray, heads: int) -> np.ndarray:
        """``[b, g, l]``: where :meth:`read` finds the heads of ``slots [b, l]``."""
        return slots[:, None] * heads + np.arange(heads)[:, None]

    def read(self, at: slice | Tensor, dtype: torch.dtype) -> Tensor:
        """``[b, g, l, d]`` of :meth:`rows_of`, or of consecutive slots, which are not copied."""
        rows = _rows(self.data, at)
        if self.scale is None:
            return rows.to(dtype)
        return rows.view(E4M3).to(dtype) * _rows(self.scale, at).to(dtype)

    def copy(self, source: slice, target: slice) -> None:
        for tensor in (self.data, self.scale):
            if tensor is not None:
                tensor[target] = tensor[source]


def _rows(x: Tensor, at: slice | Tensor) -> Tensor:
    if isinstance(at, slice):
        return x[at].transpose(0, 1).unsqueeze(0)
    return x.view(-1, x.shape[2]).index_select(0, at.view(-1)).view(*at.shape, -1)
