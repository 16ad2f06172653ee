"""Aspect-ratio buckets: the few sizes to which images of any shape are brought, so that a batch has one of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megatron_ds.data.order import key, order, permute
from megatron_ds.errors import DataError, multiples_around

Size = tuple[int, int]
"""Height and width."""

_BLOCKS, _ROWS = 0x626C6F636B, 0x726F7773  # apart from the keys of other orders


def make_buckets(resolution: int, step: int, max_ratio: float) -> tuple[Size, ...]:
    """All sizes of multiples of ``step`` with about the pixels of ``resolution`` squared, none with more.

    For every width the largest height that fits, and for every height the largest width; sorted.

    Args:
        max_ratio: of the longer to the shorter side; 1 gives the square alone.

    Raises:
        DataError: ``resolution`` is no multiple of ``step``, or a ratio below 1.
    """
    if resolution % step or resolution < step:
        raise DataError(
            f"a resolution of {resolution} is no multiple of {step}; use {multiples_around(resolution, step)}"
        )
    if not (math.isfinite(max_ratio) and max_ratio >= 1):
        raise DataError(f"a longest side of {max_ratio} x the shortest: use 1 for squares alone, or more")
    found = set()
    for side in range(step, int(resolution * math.sqrt(max_ratio)) + step, step):
        other = resolution * resolution // side // step * step
        if other and max(side, other) <= max_ratio * min(side, other):
            found |= {(side, other), (other, side)}
    return tuple(sorted(found))


def bucket_rows(
    rows: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64], buckets: Sequence[Size]
) -> dict[Size, npt.NDArray[np.int64]]:
    """The rows whose aspect ratio is nearest to each bucket's by its logarithm, the first of equals; none is without.

    ``sizes`` ``[n, 2]`` are those of ``rows`` ``[n]``.
    """
    ratios = np.log(sizes[:, 0] / sizes[:, 1])
    known = np.log([height / width for height, width in buckets])
    nearest = np.abs(ratios[:, None] - known).argmin(axis=1)
    found = {bucket: rows[nearest == place] for place, bucket in enumerate(buckets)}
    return {bucket: here for bucket, here in found.items() if len(here)}


class BucketOrder:
    """The order of samples in which every ``block`` in a row are of one bucket: a function of (seed, place) alone.

    In each epoch every bucket's rows are permuted and cut into blocks, and the blocks of all buckets are permuted:
    buckets come in proportion to their images. What does not fill a block is left out of that epoch; other rows are
    left out of the next. Rows of one bucket alone come in the order of :func:`~megatron_ds.data.order.order`, all of
    them in each epoch.

    Args:
        buckets: rows of each.
        block: samples; a multiple of what a forward pass takes.

    Attributes:
        left_out: rows that are not in an epoch.
        unused: places in ``buckets`` of those that have fewer rows than a block.

    Raises:
        DataError: no bucket has a block.
    """

    def __init__(self, seed: int, buckets: Sequence[npt.NDArray[np.int64]], block: int):
        self._seed, self._buckets, self._block = seed, list(buckets), block
        blocks = [len(rows) // block for rows in buckets]
        self.left_out = 0 if len(buckets) == 1 else sum(len(rows) % block for rows in buckets)
        self.unused = [] if len(buckets) == 1 else [place for place, count in enumerate(blocks) if not count]
        self._starts = np.concatenate([[0], np.cumsum(blocks)]).astype(np.int64)
        if len(self.unused) == len(buckets):
            raise DataError(
                f"none of {len(buckets)} buckets has the {block} images that come in a row; the largest has "
                f"{max(map(len, buckets), default=0)}: use a smaller data.bucket_batch"
            )

    def __len__(self) -> int:
        """Samples of an epoch."""
        return len(self._buckets[0]) if len(self._buckets) == 1 else int(self._starts[-1]) * self._block

    def rows(self, places: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """The rows at places of the run, int64 ``[b]``."""
        wanted = np.asarray(places, np.int64)
        if len(self._buckets) == 1:
            return self._buckets[0][order(self._seed, wanted, len(self))]
        found = np.empty_like(wanted)
        epochs = wanted // len(self)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            found[here] = self._of_epoch(epoch, wanted[here] - epoch * len(self))
        return found

    def stored(self, places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The rows as they are stored where they are of one bucket, else in the order of the first epoch."""
        return self._buckets[0][places] if len(self._buckets) == 1 else self.rows(places)

    def _of_epoch(self, epoch: int, places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        found = np.empty_like(places)
        block = permute(places // self._block, int(self._starts[-1]), key(self._seed, _BLOCKS, epoch))
        buckets = np.searchsorted(self._starts, block, side="right") - 1
        within = (block - self._starts[buckets]) * self._block + places % self._block
        for bucket in np.unique(buckets).tolist():
            here, rows = buckets == bucket, self._buckets[bucket]
            found[here] = rows[permute(within[here], len(rows), key(self._seed, _ROWS, epoch, bucket))]
        return found
