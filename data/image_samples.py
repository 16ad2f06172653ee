"""Images as a diffusion model is trained on them: each with noise, a time and perhaps without its class."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from megatron_ds.data import noise
from megatron_ds.data.order import order
from megatron_ds.data.samples import Batch

_EVALUATION = 1 << 62  # indices of the noise of evaluated rows: no run trains on so many samples


class Images(Protocol):
    """Images by their row, the same on every rank."""

    def __len__(self) -> int: ...

    def images(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """``[b, channels, height, width]``, of about -1 to 1."""
        ...

    def labels(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """``[b]``, from 0."""
        ...


class DiffusionSamples:
    """A :class:`~megatron_ds.data.samples.SampleSource`.

    A batch has ``images`` and ``noise`` float32 ``[b, channels, height, width]``, ``time`` float64 ``[b]`` uniform in
    (0, 1), from which the objective makes its noise levels, ``labels`` int64 ``[b]`` and ``counts`` bool ``[b]``.

    Args:
        no_class: the label of a sample whose class is dropped, with probability ``dropout``; not in evaluation.
    """

    def __init__(self, images: Images, seed: int, no_class: int, dropout: float):
        self._images, self._seed, self._no_class, self._dropout = images, seed, no_class, dropout

    def __len__(self) -> int:
        return len(self._images)

    def batch(self, indices: npt.ArrayLike) -> Batch:
        places = np.asarray(indices, np.int64)
        batch = self._batch(order(self._seed, places, len(self)), places)
        dropped = noise.uniform(self._seed, noise.CONDITION, places)[:, 0] < self._dropout
        batch["labels"] = np.where(dropped, self._no_class, batch["labels"])
        return batch

    def rows(self, rows: npt.ArrayLike) -> Batch:
        wanted = np.asarray(rows, np.int64)
        return self._batch(wanted, wanted + _EVALUATION)

    def _batch(self, rows: npt.NDArray[np.int64], keys: npt.NDArray[np.int64]) -> Batch:
        images = self._images.images(rows)
        return {
            "images": images,
            "noise": noise.normal(self._seed, noise.NOISE, keys, images.shape[1:]),
            "time": noise.uniform(self._seed, noise.TIME, keys)[:, 0],
            "labels": self._images.labels(rows),
            "counts": np.ones(len(rows), bool),
        }


class Digits:
    """scikit-learn's handwritten digits ``first`` to ``last - 1``: 8 x 8 pixels of -1 to 1, one channel."""

    def __init__(self, first: int, last: int | None = None):
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        self._images = (images[first:last] / 8.0 - 1.0).astype(np.float32).reshape(-1, 1, 8, 8)
        self._labels = labels[first:last].astype(np.int64)

    def __len__(self) -> int:
        return len(self._labels)

    def images(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        return self._images[rows]

    def labels(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return self._labels[rows]


class SyntheticImages:
    """Noise with random classes, for measuring speed: a million images that take no memory."""

    def __init__(self, shape: tuple[int, int, int], num_classes: int):
        self._shape, self._num_classes = shape, num_classes

    def __len__(self) -> int:
        return 1 << 20

    def images(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        return noise.normal(0, noise.NOISE, rows, self._shape)

    def labels(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return (rows % self._num_classes).astype(np.int64)
