"""What an update needs of one rank's slice beside its gradient, wherever that lives between updates.

The rows of a slice (master weights, where they are not the parameters themselves, and each kind of optimizer state) are
one region of a store. In device memory, or in the host memory of a CPU run, they are there all the time; elsewhere they
are fetched for the update and taken back. Reads are started one bucket ahead, and writes end in the background.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_ds.comm import Pending
from megatron_ds.zero.store import Region, Store


class RegionAccess:
    """One region and the tensor of it while somebody uses it. Uses may be nested; the outermost one moves data."""

    def __init__(self, region: Region):
        self.region = region
        self.resident = region.tensor is not None
        self._coming: Pending | None = None
        self._tensor: torch.Tensor | None = None
        self._uses = 0
        self._changed = False

    def read_start(self) -> None:
        """Start to fetch it, so that a :meth:`acquire` to come need not wait."""
        if self._coming is None and self._tensor is None:
            self._coming = self.region.read_start()

    def acquire(self) -> torch.Tensor:
        """``[numel]`` on the compute device, until as many calls of :meth:`release`."""
        if self._tensor is None:
            self.read_start()
            assert self._coming is not None
            self._tensor, self._coming = self._coming.wait(), None
        self._uses += 1
        return self._tensor

    def release(self, changed: bool) -> None:
        self._changed |= changed
        self._uses -= 1
        if self._uses == 0:
            self._tensor = None
            self.region.write_start() if self._changed else self.region.release()
            self._changed = False


class BucketState:
    """Rows of ``numel`` elements each.

    Args:
        rows: ``"master"`` first where there is one, then the kinds of optimizer state. May be empty.
    """

    def __init__(self, name: str, rows: Sequence[str], numel: int, dtype: torch.dtype, store: Store):
        self.rows, self.numel = tuple(rows), numel
        self.holding = RegionAccess(store.allocate(name, len(self.rows) * numel, dtype)) if rows else None

    @property
    def resident(self) -> bool:
        """Whether the rows are there all the time."""
        return self.holding is None or self.holding.resident

    def offset(self, row: str) -> int:
        """Where a row begins in what the holding holds."""
        return self.rows.index(row) * self.numel

    def read_start(self) -> None:
        if self.holding is not None:
            self.holding.read_start()

    def acquire(self) -> dict[str, torch.Tensor]:
        """Each row, ``[numel]``."""
        return dict(zip(self.rows, self.holding.acquire().split(self.numel))) if self.holding is not None else {}

    def release(self, changed: bool) -> None:
        if self.holding is not None:
            self.holding.release(changed)
