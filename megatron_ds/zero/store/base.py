"""The one interface of the stores, and which buckets go to which.

A store hands out regions: 1-D tensors with a name. A region is read before each use and written back, or released,
after it. Reads are started ahead, so that the next region travels while this one is updated and the one before
returns::

    regions = [store.allocate(f"bucket {i}", numel, torch.float32) for i in range(n)]
    coming = regions[0].read_start()
    for i, region in enumerate(regions):
        tensor = coming.wait()
        if i + 1 < n:
            coming = regions[i + 1].read_start()
        update(tensor)
        region.write_start()
    store.drain()

A store belongs to the thread that made it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from megatron_ds.comm import Pending


class Region(Protocol):
    """``numel`` elements of ``dtype``, zero at first. Between uses no tensor of it may be touched."""

    name: str
    numel: int
    dtype: torch.dtype

    @property
    def tensor(self) -> torch.Tensor | None:
        """``[numel]``, where it is on the compute device all the time; None where it has to be brought there."""
        ...

    def read_start(self) -> Pending:
        """Start to bring it to the compute device; ``wait()`` gives a 1-D tensor ``[numel]`` there.

        The tensor is the caller's until :meth:`write_start` or :meth:`release`; one reading at a time.
        """
        ...

    def write_start(self) -> None:
        """The tensor last read was changed: start to take it back. It is the store's again at once."""
        ...

    def release(self) -> None:
        """The tensor last read (or still being read) is not needed any more, and was not changed."""
        ...


class Store(Protocol):
    """What regions are taken from."""

    def allocate(self, name: str, numel: int, dtype: torch.dtype) -> Region:
        """A new region of zeros. ``name`` is for messages."""
        ...

    def drain(self) -> None:
        """Wait for everything under way; raise what failed."""
        ...

    def close(self) -> None:
        """Give all memory, threads and files back. Raises nothing, may be repeated; the regions are gone."""
        ...


def placement(sizes: Sequence[int], ratio: float) -> tuple[bool, ...]:
    """Which buckets of these sizes are offloaded so that about ``ratio`` of the elements are.

    Off by half of the largest bucket at most. The chosen ones are spread evenly between the others, so that their
    transfers run while the others are updated.
    """
    chosen = []
    seen = taken = 0
    for size in sizes:
        seen += size
        chosen.append(taken + size / 2 < ratio * seen)
        taken += size * chosen[-1]
    return tuple(chosen)
