"""Rows of keys or values that are written and read by their places, in the model's precision or in eight bits."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ds.kernels.float8 import E4M3, SMALLEST_AMAX
from megatron_ds.kernels.paged_attention import PagedKV


class Pages:
    """Blocks of ``size`` slots, ``[g, slots, d]`` in a dtype.

    In e4m3 each row of a head has a scale of its own, so none leaves its range. On a GPU the heads of a slot lie
    together, as its kernel reads them; elsewhere the slots of a head, as batched products do.
    """

    def __init__(
        self, blocks: int, size: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device | str
    ):
        self.size, self._float8 = size, dtype == E4M3

        def made(width: int, dtype: torch.dtype) -> Tensor:
            if torch.device(device).type == "cuda":
                return torch.zeros(blocks * size, heads, width, dtype=dtype, device=device).transpose(0, 1)
            return torch.zeros(heads, blocks * size, width, dtype=dtype, device=device)

        self.data = made(head_dim, torch.uint8 if self._float8 else dtype)  # bytes: not every operation knows FP8
        self.scale = made(1, torch.float32) if self._float8 else None

    @property
    def pages(self) -> PagedKV:
        """As a kernel takes them: on a GPU as they lie."""
        data, scale = (None if x is None else x.transpose(0, 1).contiguous() for x in (self.data, self.scale))
        assert data is not None
        return PagedKV(data, scale)

    @staticmethod
    def bytes_of_token(heads: int, head_dim: int, dtype: torch.dtype) -> int:
        return heads * (head_dim * dtype.itemsize + (4 if dtype == E4M3 else 0))

    def write(self, slots: Tensor, rows: Tensor) -> None:
        """``rows [t, g, d]`` to ``slots [t]``."""
        rows = rows.transpose(0, 1)
        if self.scale is None:
            self.data.index_copy_(1, slots, rows.to(self.data.dtype))
            return
        wide = rows.float()
        scale = wide.abs().amax(2, keepdim=True).clamp(min=SMALLEST_AMAX) / torch.finfo(E4M3).max
        self.data.index_copy_(1, slots, (wide / scale).to(E4M3).view(torch.uint8))
        self.scale.index_copy_(1, slots, scale)

    def read(self, at: slice | Tensor, dtype: torch.dtype) -> Tensor:
        """``[g, b, l, d]`` of blocks ``[b, l / size]``; of consecutive slots ``[g, 1, l, d]``, not copied."""
        rows = self._rows(self.data, at)
        if self.scale is None:
            return rows.to(dtype)
        return rows.view(E4M3).to(dtype) * self._rows(self.scale, at).to(dtype)

    def _rows(self, x: Tensor, at: slice | Tensor) -> Tensor:
        if isinstance(at, slice):
            return x[:, at].unsqueeze(1)
        blocks = (
            x.view(x.shape[0], -1, self.size * x.shape[2]) if x.is_contiguous() else x.unflatten(1, (-1, self.size))
        )
        return blocks.index_select(1, at.view(-1)).view(x.shape[0], at.shape[0], -1, x.shape[2])

    def clear(self, blocks: Tensor) -> None:
        """Forget what they hold, which may be no numbers: a product with zero weights would be none either."""
        for tensor in (self.data, self.scale):
            if tensor is not None:
                tensor.unflatten(1, (-1, self.size)).index_fill_(1, blocks, 0)

    def copy(self, source: int, target: int) -> None:
        """A block to another."""
        for tensor in (self.data, self.scale):
            if tensor is not None:
                blocks = tensor.unflatten(1, (-1, self.size))
                blocks[:, target] = blocks[:, source]
