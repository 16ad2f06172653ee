"""Rows of keys or values that are written and read by their places, in the model's precision or in eight bits."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ds.kernels.float8 import E4M3, SMALLEST_AMAX
from megatron_ds.kernels.paged_attention import PagedKV


class Pages:
    """Blocks of ``size`` slots, ``[blocks, g, size, d]`` in a dtype.

    In e4m3 each row of a head has a scale of its own, so none leaves its range. On a GPU the heads of a slot lie
    together, as its kernel reads them; elsewhere the slots of a head in a block, as batched products do. All of a block
    is in one piece: texts whose heads lie apart are read at half the rate.
    """

    def __init__(
        self, blocks: int, size: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device | str
    ):
        self.size, self._float8 = size, dtype == E4M3

        def made(width: int, dtype: torch.dtype) -> Tensor:
            if torch.device(device).type == "cuda":
                return torch.zeros(blocks, size, heads, width, dtype=dtype, device=device).transpose(1, 2)
            return torch.zeros(blocks, heads, size, width, dtype=dtype, device=device)

        self.data = made(head_dim, torch.uint8 if self._float8 else dtype)  # bytes: not every operation knows FP8
        self.scale = made(1, torch.float32) if self._float8 else None

    @property
    def pages(self) -> PagedKV:
        """As a kernel takes them: on a GPU as they lie."""
        data, scale = (None if x is None else x.transpose(1, 2).flatten(0, 1) for x in (self.data, self.scale))
        assert data is not None
        return PagedKV(data, scale)

    @staticmethod
    def bytes_of_token(heads: int, head_dim: int, dtype: torch.dtype) -> int:
        return heads * (head_dim * dtype.itemsize + (4 if dtype == E4M3 else 0))

    def write(self, slots: Tensor, rows: Tensor) -> None:
        """``rows [t, g, d]`` to ``slots [t]``."""
        if self.scale is None:
            self._put(self.data, slots, rows.to(self.data.dtype))
            return
        wide = rows.float()
        scale = wide.abs().amax(2, keepdim=True).clamp(min=SMALLEST_AMAX) / torch.finfo(E4M3).max
        self._put(self.data, slots, (wide / scale).to(E4M3).view(torch.uint8))
        self._put(self.scale, slots, scale)

    def _put(self, x: Tensor, slots: Tensor, rows: Tensor) -> None:
        of_slots = x.transpose(1, 2)
        if of_slots.is_contiguous():
            of_slots.flatten(0, 1).index_copy_(0, slots, rows)
        else:
            of_slots[slots // self.size, slots % self.size] = rows

    def read(self, at: slice | Tensor, dtype: torch.dtype) -> Tensor:
        """``[g, b, l, d]`` of blocks ``[b, l / size]``; of consecutive slots ``[g, 1, l, d]``."""
        rows = self._rows(self.data, at)
        if self.scale is None:
            return rows.to(dtype)
        return rows.view(E4M3).to(dtype) * self._rows(self.scale, at).to(dtype)

    def _rows(self, x: Tensor, at: slice | Tensor) -> Tensor:
        heads = x.shape[1]
        if isinstance(at, slice):
            first = at.start // self.size
            blocks = x[first : -(-at.stop // self.size)].transpose(0, 1).flatten(1, 2)
            return blocks[:, None, at.start - first * self.size : at.stop - first * self.size]
        if not x.is_contiguous():
            return x[at].permute(2, 0, 1, 3, 4).flatten(2, 3)
        own = at.view(-1) * heads + torch.arange(heads, device=x.device).unsqueeze(1)
        return x.flatten(0, 1).flatten(1).index_select(0, own.view(-1)).view(heads, at.shape[0], -1, x.shape[3])

    def clear(self, blocks: Tensor) -> None:
        """Forget what they hold, which may be no numbers: a product with zero weights would be none either."""
        for tensor in (self.data, self.scale):
            if tensor is not None:
                tensor.index_fill_(0, blocks, 0)

    def copy(self, source: int, target: int) -> None:
        """A block to another."""
        for tensor in (self.data, self.scale):
            if tensor is not None:
                tensor[target] = tensor[source]
