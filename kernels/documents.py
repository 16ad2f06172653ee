"""Document boundaries of packed sequences: where each token's document starts and ends.

Shapes: ``b`` batch, ``s`` sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """The bounds of the document of every token, for attention that stays inside it.

    Attributes:
        starts: ``[b, s]`` int64, the first place of the token's document.
        ends: ``[b, s]`` int64, the place behind its last token.
    """

    starts: Tensor
    ends: Tensor

    @staticmethod
    def of_ids(ids: Tensor) -> Documents:
        """From ``[b, s]`` ids. A document is a run of equal ids."""
        places = torch.arange(ids.shape[1], device=ids.device)
        first = torch.ones_like(ids, dtype=torch.bool)
        first[:, 1:] = ids[:, 1:] != ids[:, :-1]
        last = first.roll(-1, 1)
        starts = torch.where(first, places, 0).cummax(1).values
        ends = torch.where(last, places + 1, ids.shape[1]).flip(1).cummin(1).values.flip(1)
        return Documents(starts, ends)

    def same(self) -> Tensor:
        """``[b, 1, s, s]`` bool: whether query and key are of one document. Grows with the square of the sequence."""
        return (self.starts.unsqueeze(2) == self.starts.unsqueeze(1)).unsqueeze(1)
