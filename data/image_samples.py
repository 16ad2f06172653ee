"""Images and latents by their row, and as a diffusion model is trained on them: each with noise, a time and perhaps
without its condition."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Literal

import numpy as np
import numpy.typing as npt

from megatron_ds.data import noise
from megatron_ds.data.aspect_buckets import BucketOrder, Size
from megatron_ds.data.image_source import SKIP, ImageSource, OnError
from megatron_ds.data.image_transforms import Crop, Pixels, UndecodableImage, load_pixels
from megatron_ds.data.latent_cache import LatentCache, sample_latents
from megatron_ds.data.samples import Batch
from megatron_ds.data.workers import usable_cores
from megatron_ds.errors import DataError

log = logging.getLogger(__name__)
Rows = npt.NDArray[np.int64]
EVALUATION = 1 << 62
"""Added to the indices of the random numbers of evaluated rows: no run trains on so many samples."""


class Images(ABC):
    """Images by their row, the same on every rank.

    Attributes:
        buckets: (height, width) to the rows that have them.
        empty: the fields of a text condition of no text, with a first dim 1; empty without text.
    """

    buckets: Mapping[Size, npt.NDArray[np.int64]]
    empty: Mapping[str, npt.NDArray] = MappingProxyType({})

    @abstractmethod
    def load(self, rows: npt.NDArray[np.int64], keys: npt.NDArray[np.int64]) -> Batch:
        """Rows of one bucket: ``images`` float32 ``[b, channels, height, width]`` of about -1 to 1, with ``labels``
        int64 ``[b]`` from 0 or the fields of a text condition.

        An image that cannot be decoded is zeros and False in ``counts`` bool ``[b]``; without that field all count.

        Args:
            keys: each sample's index, for random numbers such as the place of a crop.
        """


class DiffusionSamples:
    """A :class:`~megatron_ds.data.samples.SampleSource`.

    A batch has ``images`` and ``noise`` float32 ``[b, channels, height, width]``, ``time`` float64 ``[b]`` uniform in
    (0, 1), from which the objective makes its noise levels, ``counts`` bool ``[b]``, and ``labels`` int64 ``[b]`` or
    the fields of a text condition. ``rows`` has rows of one bucket in a block, as ``batch`` does.

    Args:
        no_class: the label of a sample whose class is dropped, with probability ``dropout``; not in evaluation.
        block: samples in a row that are of one bucket.
        noise_offset: how much of a number that all pixels of a channel share is added to the noise.
    """

    def __init__(
        self, images: Images, seed: int, no_class: int, dropout: float, block: int = 1, noise_offset: float = 0.0
    ):
        self._images, self._seed, self._no_class, self._dropout = images, seed, no_class, dropout
        self._noise_offset = noise_offset
        self.order = BucketOrder(seed, list(images.buckets.values()), block)

    def __len__(self) -> int:
        return len(self.order)

    def batch(self, indices: npt.ArrayLike) -> Batch:
        places = np.asarray(indices, np.int64)
        batch = self._batch(self.order.rows(places), places)
        dropped = noise.uniform(self._seed, noise.CONDITION, places)[:, 0] < self._dropout
        if "labels" in batch:
            batch["labels"] = np.where(dropped, self._no_class, batch["labels"])
        for name, empty in self._images.empty.items():
            batch[name] = np.where(dropped.reshape(-1, *[1] * (empty.ndim - 1)), empty, batch[name])
        return batch

    def rows(self, rows: npt.ArrayLike) -> Batch:
        wanted = np.asarray(rows, np.int64)
        return self._batch(self.order.stored(wanted), wanted + EVALUATION)

    def _batch(self, rows: npt.NDArray[np.int64], keys: npt.NDArray[np.int64]) -> Batch:
        batch = self._images.load(rows, keys)
        shape = batch["images"].shape[1:]
        drawn = noise.normal(self._seed, noise.NOISE, keys, shape)
        if self._noise_offset:
            drawn += np.float32(self._noise_offset) * noise.normal(self._seed, noise.OFFSET, keys, (shape[0], 1, 1))
        return {
            "counts": np.ones(len(rows), bool),
            **batch,
            "noise": drawn,
            "time": noise.uniform(self._seed, noise.TIME, keys)[:, 0],
        }


class Digits(Images):
    """scikit-learn's handwritten digits ``first`` to ``last - 1``: 8 x 8 pixels of -1 to 1, one channel."""

    def __init__(self, first: int, last: int | None = None):
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        self._images = (images[first:last] / 8.0 - 1.0).astype(np.float32).reshape(-1, 1, 8, 8)
        self._labels = labels[first:last].astype(np.int64)
        self.buckets = {(8, 8): np.arange(len(self._labels))}

    def load(self, rows: npt.NDArray[np.int64], keys: npt.NDArray[np.int64]) -> Batch:
        return {"images": self._images[rows], "labels": self._labels[rows]}


class SyntheticImages(Images):
    """Noise with random classes, for measuring speed: a million images that take no memory."""

    def __init__(self, shape: tuple[int, int, int], num_classes: int):
        self._shape, self._num_classes = shape, num_classes
        self.buckets = {shape[1:]: np.arange(1 << 20)}

    def load(self, rows: npt.NDArray[np.int64], keys: npt.NDArray[np.int64]) -> Batch:
        return {"images": noise.normal(0, noise.NOISE, rows, self._shape), **self.condition(rows)}

    def condition(self, rows: npt.NDArray[np.int64]) -> Batch:
        return {"labels": (rows % self._num_classes).astype(np.int64)}


class SyntheticTexts(SyntheticImages):
    """The same with noise as embeddings of texts: of ``text`` (tokens, width), and one of the width ``pooled``."""

    def __init__(self, shape: tuple[int, int, int], text: tuple[int, int], pooled: int):
        super().__init__(shape, 1)
        self._texts = {"text": text, "pooled": (pooled,)}
        self.empty = {name: np.zeros((1, *size), np.float32) for name, size in self._texts.items()}

    def condition(self, rows: npt.NDArray[np.int64]) -> Batch:
        sizes = enumerate(self._texts.items())
        return {name: noise.normal(number, noise.TEXT, rows, size) for number, (name, size) in sizes}


@dataclass(frozen=True)
class Augmentation:
    """How an image is brought to its bucket's size, each time by its sample's index.

    An image that cannot be decoded to its end counts nothing, or ends the run.
    """

    crop: Literal["centre", "random"] = "centre"
    flip: bool = False  # half of the samples
    on_error: OnError = "fail"
    workers: int | None = None  # threads that decode; None: one a core

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
    """Images of a source, of 1 or 3 channels, with their classes where it has them. ``seed``: of crops and flips."""

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
        return ThreadPoolExecutor(self._augmentation.workers or usable_cores(), thread_name_prefix="decode")


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
            way_out = "write it from images with classes, or with text encoders"
            if "labels" in missing and "text" in cache.fields:
                way_out = "a model that is told its texts has model.condition='text'"
            have = ", ".join(cache.fields)
            raise DataError(f"{cache.folder} has no {' and no '.join(missing)}, only {have}; {way_out}")
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
