"""Products whose rows do not depend, bit for bit, on how many other rows are computed with them.

A matrix product chooses its kernel by its number of rows, and each kernel adds up in an order of its own. So the rows
are computed in tiles of one size, for which one kernel serves; ``tests/inference/test_batch_invariance.py`` tries that
on the machine it runs on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ds.layers.recipe import Recipe

TILE = 32


class BatchInvariant(Recipe):
    """The products of another recipe, in tiles of rows."""

    def __init__(self, of: Recipe):
        super().__init__()
        self.of, self.has_weight = of, of.has_weight

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out = torch.cat([self._of_tile(tile, weight, bias) for tile in rows.split(TILE)])
        return out.view(*x.shape[:-1], -1)

    def _of_tile(self, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        count = rows.shape[0]
        if count < TILE:
            rows = torch.cat((rows, rows.new_zeros(TILE - count, rows.shape[1])))
        return self.of.product(rows, weight, bias)[:count]
