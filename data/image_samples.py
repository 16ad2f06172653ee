"""Images as a diffusion model is trained on them: each with noise, a time and perhaps without its condition."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from megatron_ds.data import noise
from megatron_ds.data.aspect_buckets import BucketOrder, Size
from megatron_ds.data.samples import Batch

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
    """The same with noise as embeddings of texts.

    Args:
        text: tokens of a text and the width of their embeddings. pooled: width of the one embedding of a text.
    """

    def __init__(self, shape: tuple[int, int, int], text: tuple[int, int], pooled: int):
        super().__init__(shape, 1)
        self._texts = {"text": text, "pooled": (pooled,)}
        self.empty = {name: np.zeros((1, *size), np.float32) for name, size in self._texts.items()}

    def condition(self, rows: npt.NDArray[np.int64]) -> Batch:
        sizes = enumerate(self._texts.items())
        return {name: noise.normal(number, noise.TEXT, rows, size) for number, (name, size) in sizes}
