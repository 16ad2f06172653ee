"""Encoded images by their row, with captions or classes: what every place that keeps images offers.

Their sizes are read from the headers of their files once, then kept beside the source.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from megatron_ds.data.cache import cached_arrays
from megatron_ds.data.image_transforms import UndecodableImage, size_of
from megatron_ds.errors import DataError

Kind = Literal["folder", "tar", "dataset"]
OnError = Literal["skip", "fail"]
_SHOWN = 3
_HEADER_BYTES = 64 << 10


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
    """The images at a path: a folder of image files, tar shards, or an image set of `datasets`; ``kind=None``: what it
    looks like. ``cache_dir``: a folder to keep indices in, instead of beside the images."""
    from megatron_ds.data import image_datasets, image_folders, image_tars

    path = Path(path)
    if not path.exists():
        raise DataError(f"{path} does not exist; give a folder of images, tar shards, or an image set of `datasets`")
    tars = image_tars.find_tars(path) if kind in (None, "tar") else []
    if kind is None and path.is_dir() and tars and (image := next(image_folders.find_images(path), None)):
        raise DataError(f"{path} holds tar shards and image files ({tars[0]}, {image}); move one kind of them away")
    if kind == "tar" or tars:
        return image_tars.TarImages(path, tars, cache_dir)
    if kind == "dataset" or (kind is None and image_datasets.is_dataset(path)):
        return image_datasets.DatasetImages(path)
    return image_folders.ImageFolder(path)


def image_sizes(source: ImageSource, path: Path, cache_dir: Path | None = None) -> npt.NDArray[np.int64]:
    """Height and width of each image once it is turned, int64 ``[rows, 2]``; zeros where the file is no image. Kept in
    ``cache_dir``, else beside ``path``, where the source is."""

    def size(row: int) -> tuple[int, int]:
        for most in (_HEADER_BYTES, None):  # few formats say their size further on
            try:
                return size_of(source.content(row, most))
            except UndecodableImage:
                pass
        return 0, 0

    def build() -> dict[str, npt.NDArray]:
        with ThreadPoolExecutor() as pool:
            return {"sizes": np.array(list(pool.map(size, range(len(source)))), np.int64).reshape(-1, 2)}

    beside = path.with_name(f"{path.name}.image-sizes")
    key = {**source.identity, "modified": source.modified, "rows": len(source)}
    return cached_arrays(beside, key, build, cache_dir)["sizes"]


SKIP = "--data.on-error skip (of tools/cache_latents.py: --on-error skip)"
"""The way to leave out images that do not decode."""


def usable_rows(source: ImageSource, sizes: npt.NDArray[np.int64], on_error: OnError) -> npt.NDArray[np.int64]:
    """The rows whose files begin as images do. One must, and with ``on_error="fail"`` all."""
    good = sizes[:, 0] > 0
    count = int((~good).sum())
    if count and (on_error == "fail" or not good.any()):
        names = [source.name(row) for row in np.flatnonzero(~good)[:_SHOWN].tolist()]
        more = f" and {count - len(names)} more" if count > len(names) else ""
        raise DataError(
            f"{count} of {len(source)} images cannot be decoded: {', '.join(names)}{more}; remove or replace them, or "
            f"leave them out with {SKIP}"
        )
    return np.flatnonzero(good)
