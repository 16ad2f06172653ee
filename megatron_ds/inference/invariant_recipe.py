"""Products whose rows do not depend, bit for bit, on how many other rows are computed with them.

A matrix product chooses its kernel by its number of rows, and each kernel adds up in an order of its own. So the rows
are computed in tiles of sizes for which one kernel serves. Which sizes those are was tried on a CPU with AMX
(torch 2.13, oneDNN); ``tests/inference/test_batch_invariance.py`` tries them anew on the machine it runs on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ds.layers.recipe import OwnPrecision

TILE = 32


class BatchInvariant(OwnPrecision):
    """A layer's own precision, in tiles of rows."""

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out = torch.cat([self._of_tile(tile, weight, bias) for tile in rows.split(TILE)])
        return out.view(*x.shape[:-1], -1)

    def _of_tile(self, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        count = rows.shape[0]
        if count < TILE:
            rows = torch.cat((rows, rows.new_zeros(TILE - count, rows.shape[1])))
        return super().product(rows, weight, bias)[:count]
