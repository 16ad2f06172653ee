"""ALiBi: scores are lowered by how far the key is from the query, in each head at its own rate (Press et al. 2021).

Shapes: ``n`` heads, ``Q`` queries, ``K`` keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Alibi:
    """The biases of some heads.

    Attributes:
        slopes: ``[n]`` fp32.
        rounded: None: the bias is ``slope * (key - query)``. A number: the slope, and its product with a place, are
            rounded to bf16, and the bias is the difference of the key's and the query's times this number (Falcon-RW).
    """

    slopes: Tensor
    rounded: float | None = None

    def bias(self, queries: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
        """``[n, Q, K]`` for places ``[Q]`` and ``[K]`` int64."""
        if self.rounded is None:
            return self.slopes.to(dtype).view(-1, 1, 1) * (keys - queries.unsqueeze(1)).to(dtype)
        of_keys, of_queries = ((self.slopes.bfloat16().unsqueeze(1) * places).to(dtype) for places in (keys, queries))
        return (of_keys.unsqueeze(1) - of_queries.unsqueeze(2)) * self.rounded
