"""The order of samples: a function of (seed, consumed samples) and of nothing else.

Epoch ``e`` of ``n`` rows visits them in its own pseudo-random permutation, evaluated point by point: sample
``c`` is row ``permute(c mod n)`` of epoch ``c div n``. There is no table, so any position of a run of any length
is found at once, every rank finds the same, and a longer run has the shorter one as its prefix.

The permutation is a Feistel network over pairs of residues, ``Z_a x Z_b`` with ``a * b >= n`` (the construction
FE1 of Bellare, Ristenpart, Rogaway and Stegers, "Format-preserving encryption", SAC 2009), with cycle walking: a
point that falls in ``[n, a * b)`` is permuted again until it is a row. ``a`` and ``b`` are about ``sqrt(n)``, so
``a * b - n < 2 sqrt(n) + 1`` and almost no point walks.

Up to :data:`SMALL` rows the permutation is the order of ``n`` keyed hashes instead, which is uniform over all of them:
a network over so few points is not, and where ``a`` and ``b`` are odd it gives even permutations alone. Only integer
arithmetic of numpy: stable for ever, on any machine, which a library's random generator does not promise.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

ROUNDS = 8
SMALL = 1024
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def mix(x: int) -> int:
    """SplitMix64's finalizer (Steele, Lea and Flood, OOPSLA 2014): 64 bits in, 64 well-mixed bits out."""
    x = (x + _GOLDEN) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def key(*parts: int) -> int:
    """One 64-bit key from several integers, order mattering."""
    state = 0
    for part in parts:
        state = mix(state ^ mix(part & _MASK))
    return state


def mix_array(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """:func:`mix` of every element."""
    x = x + np.uint64(_GOLDEN)  # unsigned arrays wrap around silently, as wanted
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return mixed


def order(seed: int, consumed: npt.ArrayLike, num_rows: int) -> npt.NDArray[np.int64]:
    """The rows at positions ``consumed`` of the run.

    Args:
        seed: of the run (any integer).
        consumed: int64, any shape: how many samples precede the wanted ones.
        num_rows: rows of one epoch, at least 1.

    Returns:
        int64 of the same shape, in ``[0, num_rows)``; over each epoch every row once.
    """
    positions = np.asarray(consumed, np.int64)
    flat = positions.ravel()
    epochs = flat // num_rows
    distinct, which = np.unique(epochs, return_inverse=True)
    if num_rows <= SMALL:
        keys = mix_array(np.uint64(key(seed)) ^ mix_array(distinct.astype(np.uint64)))  # key(seed, epoch) of each
        return _small(flat - epochs * num_rows, which, keys, num_rows).reshape(positions.shape)
    rows = np.empty(flat.size, np.int64)
    for number, epoch in enumerate(distinct.tolist()):
        here = which == number
        rows[here] = permute(flat[here] - epoch * num_rows, num_rows, key(seed, epoch))
    return rows.reshape(positions.shape)


def permute(positions: npt.NDArray[np.int64], size: int, permutation_key: int) -> npt.NDArray[np.int64]:
    """The images of ``positions`` (in ``[0, size)``) under the permutation of ``range(size)`` with this key."""
    if size <= SMALL:
        keys = np.array([permutation_key], np.uint64)
        return _small(positions, np.zeros(positions.shape, np.int64), keys, size)
    high = math.isqrt(size - 1) + 1
    low = -(-size // high)
    round_keys = [np.uint64(key(permutation_key, number)) for number in range(ROUNDS)]
    points = positions.astype(np.uint64)
    outside = np.ones(points.shape, bool)
    while outside.any():
        points[outside] = _feistel(points[outside], high, low, round_keys)
        outside = points >= np.uint64(size)
    return points.astype(np.int64)


def _small(
    positions: npt.NDArray[np.int64], which: npt.NDArray[np.int64], keys: npt.NDArray[np.uint64], size: int
) -> npt.NDArray[np.int64]:
    """The image of each position under permutation ``which`` of those with ``keys``, of few points each."""
    rows = np.empty(positions.shape, np.int64)
    step = max(1, (1 << 20) // size)  # permutations at a time: memory does not grow with their number
    hashes = mix_array(np.arange(size, dtype=np.uint64))
    for start in range(0, keys.size, step):
        images = np.argsort(mix_array(keys[start : start + step, None] ^ hashes), axis=1, kind="stable")
        here = slice(None) if keys.size <= step else (which >= start) & (which < start + step)
        rows[here] = images[which[here] - start, positions[here]]
    return rows


def _feistel(
    points: npt.NDArray[np.uint64], high: int, low: int, round_keys: list[np.uint64]
) -> npt.NDArray[np.uint64]:
    """One pass over ``range(high * low)``: each round shifts one residue by a keyed hash of the other."""
    left, right = np.divmod(points, np.uint64(low))
    for number, round_key in enumerate(round_keys):
        if number % 2:
            right = (right + mix_array(left ^ round_key) % np.uint64(low)) % np.uint64(low)
        else:
            left = (left + mix_array(right ^ round_key) % np.uint64(high)) % np.uint64(high)
    image: npt.NDArray[np.uint64] = left * np.uint64(low) + right
    return image
