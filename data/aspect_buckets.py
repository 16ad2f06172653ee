"""Aspect-ratio buckets: the few sizes to which images of any shape are brought, so that a batch has one of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megatron_ds.errors import DataError, multiples_around

Size = tuple[int, int]
"""Height and width."""


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


def nearest_bucket(sizes: npt.NDArray[np.int64], buckets: Sequence[Size]) -> npt.NDArray[np.int64]:
    """The bucket whose aspect ratio is nearest by its logarithm, the first of equals: int64 ``[n]`` for ``[n, 2]``."""
    ratios = np.log(sizes[:, 0] / sizes[:, 1])
    known = np.log([height / width for height, width in buckets])
    return np.abs(ratios[:, None] - known).argmin(axis=1).astype(np.int64)
