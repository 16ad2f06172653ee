"""Ranks whose gathers are matched by their order alone: whether they had the same one.

Units of one size would be taken for each other, and nothing else would notice.
"""

from __future__ import annotations

from collections.abc import Sequence
from zlib import crc32

import torch

from megatron_ds import comm
from megatron_ds.comm.together import exchange
from megatron_ds.mesh import Axis


class OrderComparison:
    """Of what the ranks of ``axis`` gathered in a step. Made by all ranks.

    In two parts, so that the host waits for no device here: when it asks, it has waited for the gradient norm anyway.

    Args:
        names: of what this rank gathered, in order.
    """

    def __init__(self, axis: Axis, names: Sequence[str], device: torch.device):
        self.axis, self.names = axis, list(names)
        # Filled on the device: copying numbers there would wait for all that is queued, the whole backward pass.
        digest = torch.full((2,), len(self.names), dtype=torch.int64, device=device)
        digest[1:].fill_(crc32("\n".join(self.names).encode()))
        self._digests = comm.gather_dim0(digest, axis)

    def require_one(self) -> None:
        """Raise on all ranks if they gathered other units than each other, or in other order."""
        axis = self.axis
        everyone = self._digests.wait().view(axis.size, 2).tolist()
        if all(digest == everyone[0] for digest in everyone):
            return
        lists = [text.splitlines() for text in exchange(axis, "\n".join(self.names))]
        other = next(rank for rank in range(axis.size) if lists[rank] != lists[0])
        at = next((i for i, pair in enumerate(zip(*(lists[0], lists[other]))) if pair[0] != pair[1]), None)
        at = min(len(lists[0]), len(lists[other])) if at is None else at
        said = [lists[rank][at] if at < len(lists[rank]) else "nothing more" for rank in (0, other)]
        raise RuntimeError(
            f"gather number {at + 1} of this step was of the unit of {said[0]} on rank {axis.ranks[0]}, but of "
            f"{said[1]} on rank {axis.ranks[other]}: at stage 3 all ranks use the same modules in the same order, "
            "because a gather takes a part of each; let every rank run every module (on zeros, say), or use stage 2"
        )
