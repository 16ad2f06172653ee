"""The sizes of all images of a source, from the headers of their files: read once, then kept beside the source."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from megatron_ds.data.cache import cached_arrays
from megatron_ds.data.image_source import ImageSource
from megatron_ds.data.image_transforms import UndecodableImage, size_of
from megatron_ds.errors import DataError

OnError = Literal["skip", "fail"]
_SHOWN = 3
_HEADER_BYTES = 64 << 10


def image_sizes(source: ImageSource, path: Path, cache_dir: Path | None = None) -> npt.NDArray[np.int64]:
    """Height and width of each image once it is turned, int64 ``[rows, 2]``; zeros where the file is no image.

    Args:
        path: where the source is; the result is kept beside it.
        cache_dir: a folder to keep it in instead.
    """

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
    return cached_arrays(beside, {**source.identity, "modified": source.modified}, build, cache_dir)["sizes"]


def usable_rows(source: ImageSource, sizes: npt.NDArray[np.int64], on_error: OnError) -> npt.NDArray[np.int64]:
    """The rows whose files begin as images do.

    Raises:
        DataError: none does; or one does not, and ``on_error`` is ``"fail"``.
    """
    good = sizes[:, 0] > 0
    count = int((~good).sum())
    if count and (on_error == "fail" or not good.any()):
        names = [source.name(row) for row in np.flatnonzero(~good)[:_SHOWN].tolist()]
        more = f" and {count - len(names)} more" if count > len(names) else ""
        raise DataError(
            f"{count} of {len(source)} images cannot be decoded: {', '.join(names)}{more}; remove or replace them, or "
            "leave them out with on_error=skip"
        )
    return np.flatnonzero(good)
