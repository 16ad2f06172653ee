"""Rows of keys or values that are written and read by their places, in the model's precision or in eight bits."""

from __future__ import annotations

from copy import copy

import numpy as np
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
        self._heads_apart = torch.device(device).type != "cuda"

        def made(width: int, dtype: torch.dtype) -> Tensor:
            if self._heads_apart:
                return torch.zeros(blocks, heads, size, width, dtype=dtype, device=device)
            return torch.zeros(blocks, size, heads, width, dtype=dtype, device=device).transpose(1, 2)

        self._heads_at = torch.arange(heads, device=device) * size  # of a block, its slots of each head
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

    def rows_of(self, slots: Tensor) -> Tensor:
        """Where ``slots [t]`` lie, as :meth:`write` takes it: rows of all heads on a GPU, elsewhere of each head."""
        if not self._heads_apart:
            return slots
        of_first = slots + slots // self.size * ((self.data.shape[1] - 1) * self.size)
        return (of_first.unsqueeze(1) + self._heads_at).flatten()

    def blocks_of(self, blocks: Tensor) -> Tensor:
        """Where ``blocks [b, m]`` lie, as :meth:`read` takes it."""
        return self._of_heads(blocks) if self._heads_apart else blocks

    def _of_heads(self, blocks: Tensor) -> Tensor:
        """``[g, ...]``: the blocks of each head."""
        heads = self.data.shape[1]
        return blocks * heads + torch.arange(heads, device=blocks.device).view(-1, *[1] * blocks.dim())

    def write(self, at: Tensor, rows: Tensor) -> None:
        """``rows [t, g, d]`` to the slots of which ``at`` are the :meth:`rows_of`."""
        if self.scale is None:
            self._put(self.data, at, rows.to(self.data.dtype))
            return
        wide = rows.float()
        scale = wide.abs().amax(2, keepdim=True).clamp(min=SMALLEST_AMAX) / torch.finfo(E4M3).max
        self._put(self.data, at, (wide / scale).to(E4M3).view(torch.uint8))
        self._put(self.scale, at, scale)

    def _put(self, x: Tensor, at: Tensor, rows: Tensor) -> None:
        if self._heads_apart:
            x.view(-1, x.shape[3]).index_copy_(0, at, rows.flatten(0, 1))
        else:
            x.transpose(1, 2).flatten(0, 1).index_copy_(0, at, rows)

    def read(self, at: slice | Tensor, dtype: torch.dtype) -> Tensor:
        """``[g, b, l, d]`` of the :meth:`blocks_of` blocks ``[b, l / size]``; of consecutive slots ``[g, 1, l, d]``."""
        rows = self._rows(self.data, at)
        if self.scale is None:
            return rows.to(dtype)
        return rows.view(E4M3).to(dtype) * self._rows(self.scale, at).to(dtype)

    def _rows(self, x: Tensor, at: slice | Tensor) -> Tensor:
        if isinstance(at, slice):
            first = at.start // self.size
            blocks = x[first : -(-at.stop // self.size)].transpose(0, 1).flatten(1, 2)
            return blocks[:, None, at.start - first * self.size : at.stop - first * self.size]
        if not self._heads_apart:
            return x[at].permute(2, 0, 1, 3, 4).flatten(2, 3)
        found = x.view(x.shape[0] * x.shape[1], -1).index_select(0, at.view(-1))
        return found.view(*at.shape[:2], -1, x.shape[3])

    def clear(self, blocks: Tensor) -> None:
        """Forget what they hold, which may be no numbers: a product with zero weights would be none either."""
        for tensor in (self.data, self.scale):
            if tensor is not None:
                tensor.index_fill_(0, blocks, 0)

    def bytes_of(self, parts: int) -> list[np.ndarray]:
        """``[parts, blocks / parts, ...]``: the bytes of all tensors in the memory of the host, where they lie."""
        tensors = (x for x in (self.data, self.scale) if x is not None)
        return [x.view(torch.uint8).view(parts, len(x) // parts, -1).numpy() for x in tensors]

    def copy(self, sources: Tensor, targets: Tensor) -> None:
        """Blocks to others."""
        for tensor in (self.data, self.scale):
            if tensor is not None:
                tensor[targets] = tensor[sources]

    def part(self, blocks: slice) -> Pages:
        """These blocks, where they are."""
        part = copy(self)
        part.data, part.scale = self.data[blocks], None if self.scale is None else self.scale[blocks]
        return part
