"""Random numbers of a sample, as functions of (seed, purpose, the sample's index) and of nothing else.

Every rank of every mesh finds the same numbers for a sample, and no two samples share theirs. The generator is a
counter hashed by :func:`~megatron_ds.data.order.mix_array`: integer arithmetic that no library's next release changes.
"""

from __future__ import annotations

from math import prod

import numpy as np
import numpy.typing as npt

from megatron_ds.data.order import key, mix_array

# What the numbers are for; each purpose has its own.
NOISE, TIME, CONDITION, FLIP, CROP, LATENT, TEXT, OFFSET = range(8)
_DOMAIN = 0x6E6F697365  # apart from the keys of the samples' order


def uniform(seed: int, purpose: int, indices: npt.ArrayLike, count: int = 1) -> npt.NDArray[np.float64]:
    """Uniform in (0, 1), neither end included: float64 ``[b, count]`` for ``indices`` int64 ``[b]``."""
    index = np.asarray(indices, np.int64).astype(np.uint64)
    samples = mix_array(np.uint64(key(_DOMAIN, seed, purpose)) ^ mix_array(index))
    bits = mix_array(samples[:, None] ^ mix_array(np.arange(count, dtype=np.uint64)))
    return ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def normal(seed: int, purpose: int, indices: npt.ArrayLike, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Standard normal: float32 ``[b, *shape]``, two from two uniform numbers (Box and Muller 1958)."""
    size = prod(shape)
    half = -(-size // 2)
    both = uniform(seed, purpose, indices, 2 * half)
    radius, angle = np.sqrt(-2.0 * np.log(both[:, :half])), 2.0 * np.pi * both[:, half:]
    values = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return values[:, :size].astype(np.float32).reshape(-1, *shape)
