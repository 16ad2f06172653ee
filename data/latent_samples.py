"""Cached latents with their text as a diffusion model is trained on them: each with noise, a time, perhaps no text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megatron_ds.data import noise
from megatron_ds.data.order import order
from megatron_ds.data.samples import Batch
from megatron_ds.errors import DataError

Arrays = Mapping[str, npt.NDArray]
EVALUATION = 1 << 62
"""Added to the indices of the noise of evaluated rows: no run trains on so many samples."""


class Latents(Protocol):
    """What is read: a :class:`~megatron_ds.data.latent_cache.LatentCache`."""

    buckets: Mapping[tuple[int, int], npt.NDArray[np.int64]]
    identity: Mapping[str, Any]
    scale: float
    shift: float

    def __len__(self) -> int: ...

    def rows(self, indices: npt.ArrayLike) -> Arrays: ...


class LatentSamples:
    """A :class:`~megatron_ds.data.samples.SampleSource` of latents of one size.

    A batch has ``latents`` and ``noise`` float32 ``[b, c, h, w]``, ``time`` float64 ``[b]`` uniform in (0, 1), ``text``
    float32 ``[b, s, channels]``, ``pooled`` float32 ``[b, channels]`` and ``time_ids`` float32 ``[b, 6]``. All that is
    random is a function of (seed, the sample's place in the run).

    Args:
        empty: ``text`` and ``pooled`` of a sample without its text, with a first dim 1. None: zeros.
        dropout: probability of that; not in evaluation.
        noise_offset: how much of a number that is the same for all pixels of a channel is added to the noise.

    Raises:
        DataError: latents of several sizes, or without text.
    """

    def __init__(
        self, latents: Latents, seed: int, dropout: float, empty: Arrays | None = None, noise_offset: float = 0
    ):
        self._latents, self._seed, self._dropout = latents, seed, dropout
        self._empty, self._noise_offset = empty, noise_offset
        if len(latents.buckets) != 1:
            raise DataError(
                f"the cache has latents of {len(latents.buckets)} sizes, and a batch is of one; write it with squares "
                "alone"
            )
        missing = sorted({"text", "pooled", "original_size", "crop_top_left", "target_size"} - set(latents.rows([0])))
        if missing:
            raise DataError(f"the cache has no {', '.join(missing)}; write it with two text encoders, as SDXL has them")

    def __len__(self) -> int:
        return len(self._latents)

    def batch(self, indices: npt.ArrayLike) -> Batch:
        places = np.asarray(indices, np.int64)
        batch = self._batch(order(self._seed, places, len(self)), places)
        dropped = noise.uniform(self._seed, noise.CONDITION, places)[:, 0] < self._dropout
        for name in ("text", "pooled"):
            batch[name][dropped] = 0.0 if self._empty is None else self._empty[name]
        return batch

    def rows(self, rows: npt.ArrayLike) -> Batch:
        wanted = np.asarray(rows, np.int64)
        return self._batch(wanted, wanted + EVALUATION)

    def _batch(self, rows: npt.NDArray[np.int64], keys: npt.NDArray[np.int64]) -> Batch:
        found = self._latents.rows(rows)
        latents: npt.NDArray[np.float32] = found["latents"]
        if "latents_std" in found:
            latents = latents + found["latents_std"].astype(np.float32) * noise.normal(self._seed, noise.LATENT, keys, latents.shape[1:])
        drawn = noise.normal(self._seed, noise.NOISE, keys, latents.shape[1:])
        if self._noise_offset:
            whole = noise.normal(self._seed, noise.OFFSET, keys, (latents.shape[1], 1, 1))
            drawn += np.float32(self._noise_offset) * whole
        sizes = [found[name] for name in ("original_size", "crop_top_left", "target_size")]
        return {
            "latents": latents,
            "noise": drawn,
            "time": noise.uniform(self._seed, noise.TIME, keys)[:, 0],
            "text": np.array(found["text"], np.float32),
            "pooled": np.array(found["pooled"], np.float32),
            "time_ids": np.concatenate(sizes, axis=1).astype(np.float32),
        }
