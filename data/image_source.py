"""Encoded images by their row, with captions or classes: what every place that keeps images offers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megatron_ds.errors import DataError


class ImageSource(Protocol):
    """Images as they are stored, the same rows in the same order on every rank.

    Attributes:
        classes: the names of the classes in the order of their labels; empty where there are none.
        labels: int64 ``[rows]``, or None where images have no class.
        captioned: whether images have captions.
        identity: what tells these images from others, as JSON values.
    """

    classes: tuple[str, ...]
    labels: npt.NDArray[np.int64] | None
    captioned: bool
    identity: Mapping[str, Any]

    def __len__(self) -> int: ...

    def name(self, row: int) -> str:
        """Of the image, for messages."""
        ...

    def content(self, row: int) -> bytes:
        """The image's file."""
        ...

    def caption(self, row: int) -> str: ...


def open_images(path: str | Path, cache_dir: Path | None = None) -> ImageSource:
    """The images of a folder."""
    from megatron_ds.data.image_folders import ImageFolder

    folder = Path(path)
    if folder.is_dir():
        return ImageFolder(folder)
    raise DataError(f"{folder} is no folder of images")
