"""A folder of image files: a class for each subfolder, or captions beside the images.

Captions are in ``x.txt`` beside ``x.jpg``, or in ``metadata.jsonl`` with ``file_name`` and ``text`` (as in the image
folders of `datasets`: in any subfolder, names relative to it). What is hidden is left alone, as `datasets` does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megatron_ds.errors import DataError
from megatron_ds.files import open_regular, parse_json, read_bytes, read_text

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"))
METADATA, _UNREAD = "metadata.jsonl", ("metadata.csv", "metadata.parquet")
_MOST_BYTES = 1 << 30  # of one image


def find_images(folder: Path) -> Iterator[Path]:
    """The image files of a folder and its subfolders, in any order, but none that is hidden."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    return (path for path in found if not _is_hidden(path.relative_to(folder)))


def _is_hidden(path: Path) -> bool:
    """Such as ``.ipynb_checkpoints/x-checkpoint.png`` of Jupyter, or ``__MACOSX/x.jpg`` of a Mac's zip."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


class ImageFolder:
    """An :class:`~megatron_ds.data.image_source.ImageSource`, sorted by path. All images have captions, or none."""

    def __init__(self, folder: Path):
        self._folder = folder
        paths = sorted(path.relative_to(folder) for path in find_images(folder))
        if not paths:
            raise DataError(f"{folder} holds no image file ({', '.join(sorted(SUFFIXES))})")
        self._paths = [str(path) for path in paths]
        self._captions = _captions(folder, paths)
        self.captioned = self._captions is not None
        parents = {path.parts[0] for path in paths if len(path.parts) > 1}
        in_classes = not self.captioned and all(len(path.parts) > 1 for path in paths)
        self.classes = tuple(sorted(parents)) if in_classes else ()
        numbers = {name: number for number, name in enumerate(self.classes)}
        self.labels = np.array([numbers[path.parts[0]] for path in paths], np.int64) if in_classes else None
        # Reading every byte of a million files would take an hour.
        listing, times = xxhash.xxh3_128(), xxhash.xxh3_128()
        for row, path in enumerate(self._paths):
            status = (folder / path).stat()
            listing.update(f"{path}\0{status.st_size}\0{self.caption(row)}\0".encode())
            times.update(f"{status.st_mtime_ns}\0".encode())
        self.identity: Mapping[str, Any] = {
            "images": "folder",
            "number": len(self),
            "listing": listing.hexdigest(),
        }
        self.modified = times.hexdigest()

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, row: int) -> str:
        return str(self._folder / self._paths[row])

    def content(self, row: int, most: int | None = None) -> bytes:
        try:
            with open_regular(self._folder / self._paths[row]) as file:
                return file.read(_MOST_BYTES if most is None else most)
        except OSError as error:
            raise DataError(f"{self.name(row)} cannot be read: {error}") from None

    def caption(self, row: int) -> str:
        return "" if self._captions is None else self._captions[row]


def _captions(folder: Path, paths: list[Path]) -> list[str] | None:
    """Of each image; None where there are none at all."""
    listed: dict[str, str] = {}
    for parent in sorted({parent for path in paths for parent in path.parents}):  # that of a subfolder comes later
        metadata = folder / parent / METADATA
        if metadata.is_file():
            listed |= {str(parent / name): text for name, text in _read_metadata(metadata).items()}
        elif unread := next((name for name in _UNREAD if (folder / parent / name).is_file()), None):
            raise DataError(
                f"{folder / parent / unread} is not read: write its rows to {METADATA} beside it, each a JSON object "
                'such as {"file_name": "0001.png", "text": "a cat"}, or move it away'
            )
    beside = {path: (folder / path).with_suffix(".txt") for path in paths}
    found = [
        listed[str(path)] if str(path) in listed else _read_caption(beside[path]) if beside[path].is_file() else None
        for path in paths
    ]
    missing = [path for path, caption in zip(paths, found) if caption is None]
    if len(missing) == len(paths):
        return None
    if missing:
        raise DataError(
            f"{len(missing)} of the {len(paths)} images in {folder} have no caption, {missing[0]} first: write one to "
            f"{missing[0].with_suffix('.txt')} beside it or to {METADATA} (an empty one counts), or move the image away"
        )
    return [caption for caption in found if caption is not None]


def _read_caption(path: Path) -> str:
    try:
        return read_text(path).strip()
    except (OSError, ValueError) as error:
        raise DataError(f"the caption {path} cannot be read: {error}") from None


def _read_metadata(path: Path) -> dict[str, str]:
    """File name to caption."""
    try:
        lines = read_bytes(path).splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    captions = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
            name, text = record["file_name"], record["text"]
            if not isinstance(name, str) or not isinstance(text, str):
                raise TypeError("file_name and text are not both texts")
        except (ValueError, LookupError, TypeError) as error:
            raise DataError(
                f"{path}, line {number}: {type(error).__name__} {error}; each line is a JSON object such as "
                '{"file_name": "0001.png", "text": "a cat"}'
            ) from None
        captions[str(Path(name))] = text
    return captions
