"""Encoded images by their row, with captions or classes: what every place that keeps images offers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from megatron_ds.errors import DataError

Kind = Literal["folder", "tar", "dataset"]


class ImageSource(Protocol):
    """Images as they are stored, the same rows in the same order on every rank.

    Attributes:
        classes: the names of the classes in the order of their labels; empty where they have none.
        labels: int64 ``[rows]``, or None where images have no class.
        captioned: whether images have captions.
        identity: what tells these images from others, also where a copy of them lies, as JSON values.
        modified: what changes besides whenever a file is written.
    """

    classes: tuple[str, ...]
    labels: npt.NDArray[np.int64] | None
    captioned: bool
    identity: Mapping[str, Any]
    modified: str

    def __len__(self) -> int: ...

    def name(self, row: int) -> str:
        """Of the image, for messages."""
        ...

    def content(self, row: int, most: int | None = None) -> bytes:
        """The image's file, or so many bytes of its beginning at least."""
        ...

    def caption(self, row: int) -> str: ...


def open_images(path: str | Path, kind: Kind | None = None, cache_dir: Path | None = None) -> ImageSource:
    """The images at a path.

    Args:
        kind: a folder of image files, tar shards, or an image set of `datasets`; None: what it looks like.
        cache_dir: a folder to keep indices in, instead of beside the images.

    Raises:
        DataError: there is nothing of the kind, or it is damaged.
    """
    from megatron_ds.data import image_datasets, image_folders, image_tars

    path = Path(path)
    if not path.exists():
        raise DataError(f"{path} does not exist; give a folder of images, tar shards, or an image set of `datasets`")
    tars = image_tars.find_tars(path) if kind in (None, "tar") else []
    if kind == "tar" or tars:
        return image_tars.TarImages(path, tars, cache_dir)
    if kind == "dataset" or (kind is None and image_datasets.is_dataset(path)):
        return image_datasets.DatasetImages(path)
    return image_folders.ImageFolder(path)
