"""Tar shards as WebDataset has them: ``key.jpg`` with ``key.txt`` or ``key.cls`` or ``key.json``, read at random.

Each member's place is looked up once and kept beside the shards. A caption is the text of ``key.txt``, or ``caption``
or ``text`` of ``key.json``; a class is the number in ``key.cls``, or ``label`` of ``key.json``.

A caption or class whose image is missing is a row without one, behind all others: it is counted and named as a file
that is no image, and the rows of images are the same with it and without.
"""

from __future__ import annotations

import tarfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ds.data.cache import cached_arrays
from megatron_ds.data.dataset_files import files_identity
from megatron_ds.data.folders import files_below
from megatron_ds.data.image_source import ANY_NAME, FIRST_BYTES, LAST_BYTES, SUFFIXES, ImageSource, require_one_split
from megatron_ds.errors import DataError, RaisedAs
from megatron_ds.files import parse_json

_NONE = (-1, -1, -1)
_MOST_TEXT = 1 << 20
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


@dataclass
class _Sample:
    """``image`` and ``text``: number of the tar, offset and size; offset 0, where no content begins, is no image.
    ``other``: an image's file of a longer suffix."""

    key: str
    image: tuple[int, int, int] = _NONE
    text: tuple[int, int, int] = _NONE
    label: int = -1
    other: str = ""


def find_tars(path: Path) -> list[Path]:
    """The shards of a folder, or the one that ``path`` is.

    Raises:
        DataError: some of them are compressed.
    """
    if path.is_file():
        return [path] if path.suffix == ".tar" else []
    files = files_below(path, lambda file: file.name.endswith((".tar", *_COMPRESSED)))
    tars = [file for file in files if file.suffix == ".tar"]
    if tars and len(tars) < len(files):
        packed = next(file for file in files if file not in tars)
        raise DataError(f"{packed} is compressed and cannot be read at random; decompress it, or move it away")
    return tars


class TarImages(ImageSource):
    """Images in the order of the shards' names and members. All of them have captions, or none; and so with classes.

    Raises:
        DataError: no tar, a compressed or damaged one, no image in them, or captions or classes of some alone.
    """

    def __init__(self, path: Path, tars: Sequence[Path], cache_dir: Path | None):
        super().__init__(path, cache_dir)
        if not tars:
            raise DataError(f"{path} holds no .tar; compressed ones cannot be read at random: decompress them")
        require_one_split(path, (tar.relative_to(path) for tar in tars))
        self._tars = list(tars)
        self.identity = {"images": "tar", **files_identity(tars)}
        index = cached_arrays(self.beside("image-index"), {"version": 2, **self.identity}, self._index, cache_dir)
        self._images, self._texts, self._names, self._ends = (index[n] for n in ("image", "text", "names", "ends"))
        there = self._images[:, 1] > 0
        if not there.any():
            raise DataError(f"{path}: the tars hold no image ({', '.join(sorted(SUFFIXES))})")
        captioned, classed = self._texts[there, 0] >= 0, index["labels"][there] >= 0
        for what, kept in (("caption", captioned), ("class", classed)):
            if kept.any() and not kept.all():
                raise DataError(
                    f"{int((~kept).sum())} of the {len(kept)} images in {path} have no {what}, "
                    f"{self.name(int(kept.argmin()))} first; give all one, or none"
                )
        self.captioned = bool(captioned.all())
        self.labels = index["labels"] if classed.all() else None

    def _index(self) -> dict[str, npt.NDArray]:
        with ThreadPoolExecutor() as pool:
            found = list(pool.map(_samples, range(len(self._tars)), self._tars))
        images, lone = (list(chain.from_iterable(part)) for part in zip(*found))
        for sample in lone:  # a class that there is, as it is never seen
            sample.label = images[0].label if images else -1
        samples = [*images, *lone]
        names = [sample.key.encode(errors=ANY_NAME) for sample in samples]
        return {
            "image": np.array([sample.image for sample in samples], np.int64).reshape(-1, 3),
            "text": np.array([sample.text for sample in samples], np.int64).reshape(-1, 3),
            "labels": np.array([sample.label for sample in samples], np.int64),
            "names": np.frombuffer(b"".join(names), np.uint8),
            "ends": np.cumsum([len(name) for name in names], dtype=np.int64),
        }

    def __len__(self) -> int:
        return len(self._ends)

    def name(self, row: int) -> str:
        start = int(self._ends[row - 1]) if row else 0
        key = self._names[start : int(self._ends[row])].tobytes().decode(errors=ANY_NAME)
        return f"{self._tars[int(self._images[row, 0])]}: {key}{'' if self._images[row, 1] else ' (no image)'}"

    def content(self, row: int) -> bytes:
        number, offset, size = self._images[row].tolist()
        return _member(self._tars[number], offset, size)

    def ends(self, row: int) -> tuple[bytes, bytes]:
        number, offset, size = self._images[row].tolist()
        tar, last = self._tars[number], min(size, LAST_BYTES)
        return _member(tar, offset, min(size, FIRST_BYTES)), _member(tar, offset + size - last, last)

    def caption(self, row: int) -> str:
        if not self.captioned:
            return ""
        number, offset, size = self._texts[row].tolist()
        with RaisedAs(DataError, f"the caption of {self.name(row)} cannot be read", UnicodeDecodeError):
            return _caption(_member(self._tars[number], offset, size))


def _member(tar: Path, offset: int, size: int) -> bytes:
    with RaisedAs(DataError, f"{tar} cannot be read", OSError), tar.open("rb") as file:
        file.seek(offset)
        content = file.read(size)
    if len(content) != size:
        raise DataError(f"{tar} is cut off: it ends before a member that it had when it was indexed")
    return content


def _samples(number: int, path: Path) -> tuple[list[_Sample], list[_Sample]]:
    """The images of a shard in the order of their first members, and captions and classes without an image."""
    found: dict[str, _Sample] = {}
    cannot = RaisedAs(DataError, f"{path} cannot be read as an uncompressed tar", OSError, tarfile.TarError)
    with cannot, tarfile.open(path, "r:") as tar:
        for member in tar:
            folder, _, file = member.name.rpartition("/")
            base, _, suffix = file.partition(".")
            if member.isreg() and base:
                key = f"{folder}/{base}" if folder else base
                _add(found.setdefault(key, _Sample(key)), suffix.lower(), number, path, member)
    if lost := next((sample for sample in found.values() if sample.other and sample.image == _NONE), None):
        raise DataError(
            f"{path}: {lost.other} would never be seen: a key ends at the first dot of a name, and {lost.key} has no "
            "image; give it a name with one dot"
        )
    lone = [s for s in found.values() if s.image == _NONE and (s.text != _NONE or s.label >= 0)]
    for sample in lone:
        sample.image = (number, 0, 0)
    return [sample for sample in found.values() if sample.image[1] > 0], lone


def _add(sample: _Sample, suffix: str, number: int, path: Path, member: tarfile.TarInfo) -> None:
    place = (number, member.offset_data, member.size)
    if f".{suffix}" in SUFFIXES:
        if sample.image != _NONE:
            raise DataError(
                f"{path}: {member.name} is a second image of {sample.key}, of which one would never be seen; give each "
                "image a name of its own before its first dot"
            )
        sample.image = place
        return
    if f".{suffix.rpartition('.')[2]}" in SUFFIXES:
        sample.other = member.name
        return
    if suffix not in ("txt", "cls", "json") or member.size > _MOST_TEXT:
        return
    content = _member(path, member.offset_data, member.size)
    with RaisedAs(DataError, f"{path}: {member.name} cannot be read", ValueError, AttributeError):
        if suffix == "txt":
            sample.text = place
        elif suffix == "cls":
            sample.label = int(content)
        else:
            described = parse_json(content)
            if sample.text == _NONE and _described(described) is not None:
                sample.text = place
            if sample.label < 0 and isinstance(described.get("label"), int):
                sample.label = described["label"]


def _described(values: Mapping[str, Any]) -> str | None:
    text = values.get("caption", values.get("text"))
    return text if isinstance(text, str) else None


def _caption(content: bytes) -> str:
    """Of a text file, or of a JSON object."""
    text = content.decode("utf-8-sig").strip()
    if text.startswith("{"):
        try:
            described = _described(parse_json(content))
        except (ValueError, AttributeError):
            return text
        return text if described is None else described.strip()
    return text
