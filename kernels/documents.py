"""Document boundaries of packed sequences: where each token's document starts and ends.

Shapes: ``b`` batch, ``s`` sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """The bounds of the document of every token, for attention that stays inside it.

    Attributes:
        starts: ``[b, s]`` int64, the first place of the token's document.
        ends: ``[b, s]`` int64, the place behind its last token.
        bounds: ``[documents + 1]`` int32 on the host: where they begin and end, row after row, from 0 to ``b * s``.
    """

    starts: Tensor
    ends: Tensor
    bounds: Tensor | None = None

    @staticmethod
    def of_ids(ids: Tensor, bounds: Tensor | None = None) -> Documents:
        """From ``[b, s]`` ids. A document is a run of equal ids."""
        places = torch.arange(ids.shape[1], device=ids.device)
        first = torch.ones_like(ids, dtype=torch.bool)
        first[:, 1:] = ids[:, 1:] != ids[:, :-1]
        last = first.roll(-1, 1)
        starts = torch.where(first, places, 0).cummax(1).values
        ends = torch.where(last, places + 1, ids.shape[1]).flip(1).cummin(1).values.flip(1)
        return Documents(starts, ends, bounds)

    def same(self) -> Tensor:
        """``[b, 1, s, s]`` bool: whether query and key are of one document. Grows with the square of the sequence."""
        return (self.starts.unsqueeze(2) == self.starts.unsqueeze(1)).unsqueeze(1)

    @cached_property
    def cumulative(self) -> tuple[Tensor, int]:
        """``bounds`` on the device, and the length of the longest document; without them the host waits for it."""
        bounds = self.bounds
        if bounds is None:
            places = torch.arange(self.starts.shape[1], device=self.starts.device)
            begins = (self.starts == places).flatten().nonzero().squeeze(1)
            bounds = F.pad(begins, (0, 1), value=self.starts.numel()).to("cpu", torch.int32)
        longest = int(bounds.diff().max()) if len(bounds) > 1 else 0
        return bounds.to(self.starts.device, non_blocking=True), longest
