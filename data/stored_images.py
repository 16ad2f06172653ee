"""Images from files, decoded while a run goes on, and latents from a cache: both as :class:`.image_samples.Images`."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from megatron_ds.data import noise
from megatron_ds.data.aspect_buckets import Size
from megatron_ds.data.image_samples import Images
from megatron_ds.data.image_source import SKIP, ImageSource, OnError
from megatron_ds.data.image_transforms import Crop, Pixels, UndecodableImage, load_pixels
from megatron_ds.data.latent_cache import LatentCache, sample_latents
from megatron_ds.data.samples import Batch
from megatron_ds.errors import DataError

log = logging.getLogger(__name__)
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Augmentation:
    """How an image is brought to its bucket's size, each time by its sample's index.

    Args:
        crop: in the middle, or anywhere.
        flip: mirror half of the samples.
        on_error: an image that cannot be decoded to its end counts nothing, or ends the run.
        workers: threads that decode; None: one a core.
    """

    crop: Literal["centre", "random"] = "centre"
    flip: bool = False
    on_error: OnError = "fail"
    workers: int | None = None

    def load(
        self, source: ImageSource, row: int, size: Size, seed: int, key: int, channels: int = 3
    ) -> Pixels | UndecodableImage:
        """One image, or why there is none. ``key``: the index of its random numbers."""
        place: Literal["centre"] | tuple[float, float] = "centre"
        if self.crop == "random":
            y, x = noise.uniform(seed, noise.CROP, [key], 2)[0].tolist()
            place = y, x
        flip = self.flip and noise.uniform(seed, noise.FLIP, [key]).item() < 0.5
        try:
            return load_pixels(source.content(row), Crop(*size, place, flip), channels)
        except UndecodableImage as error:
            if self.on_error == "fail":
                raise DataError(
                    f"{source.name(row)} cannot be decoded: {error}; remove it, or leave such images out with {SKIP}"
                ) from None
            return error


class DecodedImages(Images):
    """Images of a source, with their classes where it has them.

    Args:
        buckets: the source's rows by height and width.
        seed: of crops and flips.
        channels: 1 or 3.
    """

    def __init__(
        self, source: ImageSource, buckets: Mapping[Size, Rows], augmentation: Augmentation, seed: int, channels: int
    ):
        self._source, self.buckets, self._augmentation = source, buckets, augmentation
        self._seed, self._channels = seed, channels
        self._sizes = np.zeros((len(source), 2), np.int64)
        for size, rows in buckets.items():
            self._sizes[rows] = size
        self.undecodable: set[int] = set()

    def load(self, rows: Rows, keys: Rows) -> Batch:
        height, width = self._sizes[rows[0]].tolist()

        def load(row: int, key: int) -> Pixels | UndecodableImage:
            return self._augmentation.load(self._source, row, (height, width), self._seed, key, self._channels)

        loaded = list(self._threads.map(load, rows.tolist(), keys.tolist()))
        images = np.zeros((len(rows), self._channels, height, width), np.float32)
        for place, (row, image) in enumerate(zip(rows.tolist(), loaded)):
            if isinstance(image, Pixels):
                images[place] = image.values
            elif row not in self.undecodable:
                self.undecodable.add(row)
                log.warning(
                    "%s cannot be decoded and counts nothing: %s (%d such images so far)",
                    *(self._source.name(row), image, len(self.undecodable)),
                )
        batch: Batch = {"images": images, "counts": np.array([isinstance(image, Pixels) for image in loaded])}
        return batch if self._source.labels is None else {**batch, "labels": self._source.labels[rows]}

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return ThreadPoolExecutor(self._augmentation.workers or cores, thread_name_prefix="decode")


class LatentImages(Images):
    """Latents of a cache, drawn anew for each sample where their spread was kept.

    Args:
        fields: of the condition, such as ``labels``, or ``text`` and ``pooled``.
        kept: rows of the cache, sorted. Default: all.

    Raises:
        DataError: the cache lacks one of the fields.
    """

    def __init__(self, cache: LatentCache, seed: int, fields: Sequence[str], kept: Rows | None = None):
        self._cache, self._seed, self._fields = cache, seed, tuple(fields)
        if missing := [name for name in fields if name not in cache.fields]:
            raise DataError(
                f"{cache.folder} has no {' and no '.join(missing)}, only {', '.join(cache.fields)}; write it from "
                "images with classes, or with text encoders"
            )
        self.buckets = cache.buckets
        if kept is not None:
            found = {bucket: rows[np.isin(rows, kept)] for bucket, rows in cache.buckets.items()}
            self.buckets = {bucket: rows for bucket, rows in found.items() if len(rows)}
        self.empty = {name: a for name, a in cache.empty.items() if name in fields}

    def load(self, rows: Rows, keys: Rows) -> Batch:
        found = self._cache.rows(rows)
        return {"images": sample_latents(found, self._seed, keys), **{name: found[name] for name in self._fields}}


def split_rows(rows: Rows, valid: int) -> tuple[Rows, Rows]:
    """The rows to train on, and ``valid`` of them spread evenly that are kept apart.

    Raises:
        DataError: none would be left.
    """
    if valid >= len(rows):
        raise DataError(f"data.valid={valid} of {len(rows)} images leaves none to train on; use fewer")
    kept = np.arange(valid) * len(rows) // max(valid, 1)
    return np.delete(rows, kept), rows[kept]
