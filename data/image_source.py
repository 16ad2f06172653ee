"""Encoded images by their row, with captions or classes: what every place that keeps images offers; folders of image
files, and image sets of `datasets`. Tar shards are in :mod:`.image_tars`.

Their sizes are read once, from both ends of their files, then kept beside the source.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import xxhash

from megatron_ds.data.cache import cached_arrays
from megatron_ds.data.dataset_files import files_identity
from megatron_ds.data.folders import files_below
from megatron_ds.data.image_transforms import UndecodableImage, size_of_whole
from megatron_ds.errors import DataError, RaisedAs
from megatron_ds.files import open_regular, parse_json, read_text

Kind = Literal["folder", "tar", "dataset"]
OnError = Literal["skip", "fail"]
_SHOWN = 3
FIRST_BYTES, LAST_BYTES = 64 << 10, 64
_ROWS = 256
"""Images that a thread measures at once: the pool's account of a task takes 2 KB, of a million images 2 GB."""
ANY_NAME = "surrogatepass"
"""How names of files are encoded, which need not be UTF-8."""
SKIP = "--data.on-error skip (of tools/cache_latents.py: --on-error skip)"
"""The way to leave out images that do not decode."""
SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"))
METADATA, _UNREAD = "metadata.jsonl", ("metadata.csv", "metadata.parquet")
_MOST_BYTES = 1 << 30  # of one image
_CAPTIONS, _LABELS = ("text", "caption"), ("label", "labels")
_STATE, _DICT = "state.json", "dataset_dict.json"
_SPLITS = (
    ("train", "train training"),
    ("valid", "validation valid val dev"),
    ("test", "test testing eval evaluation"),
)
_SPLIT_OF = MappingProxyType({word: split for split, words in _SPLITS for word in words.split()})


class ImageSource(ABC):
    """Images as they are stored, the same rows in the same order on every rank.

    Attributes:
        path: where they are. cache_dir: a folder to keep indices in, instead of beside them.
        classes: the names of the classes in the order of their labels; empty where they have none.
        labels: int64 ``[rows]``, or None where images have no class.
        captioned: whether images have captions.
        identity: what tells these images from others, also where a copy of them lies, as JSON values.
        modified: what changes besides whenever a file is written; empty where the identity has a checksum of it.
    """

    classes: tuple[str, ...] = ()
    labels: npt.NDArray[np.int64] | None = None
    captioned = False
    identity: Mapping[str, Any]
    modified = ""

    def __init__(self, path: Path, cache_dir: Path | None):
        self.path, self.cache_dir = path, cache_dir

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, row: int) -> str:
        """Of the image, for messages."""

    @abstractmethod
    def content(self, row: int) -> bytes:
        """The image's file."""

    def ends(self, row: int) -> tuple[bytes, bytes]:
        """The first and the last bytes of the image's file."""
        content = self.content(row)
        return content[:FIRST_BYTES], content[-LAST_BYTES:]

    @abstractmethod
    def caption(self, row: int) -> str:
        """Of the image; empty without captions."""

    def beside(self, suffix: str) -> Path:
        """A file beside the images, to keep what was read of them in."""
        path = Path(os.path.abspath(self.path))  # "." has no name
        return path.with_name(f"{path.name}.{suffix}")

    @cached_property
    def sizes(self) -> npt.NDArray[np.int64]:
        """Height and width of each image once it is turned, int64 ``[rows, 2]``; zeros where the file is no image, or
        was cut off."""

        def size(row: int) -> tuple[int, int]:
            try:
                return size_of_whole(*self.ends(row), partial(self.content, row))
            except UndecodableImage:
                return 0, 0

        def of_rows(start: int) -> npt.NDArray[np.int64]:
            return np.array([size(row) for row in range(start, min(start + _ROWS, len(self)))], np.int64)

        def build() -> dict[str, npt.NDArray]:
            with ThreadPoolExecutor() as pool:
                return {"sizes": np.concatenate(list(pool.map(of_rows, range(0, len(self), _ROWS))))}

        key = {**self.identity, "modified": self.modified, "rows": len(self), "ends": LAST_BYTES}
        return cached_arrays(self.beside("image-sizes"), key, build, self.cache_dir)["sizes"]

    def usable_rows(self, on_error: OnError) -> npt.NDArray[np.int64]:
        """The rows whose files begin and end as images do. One must, and with ``on_error="fail"`` all."""
        good = self.sizes[:, 0] > 0
        count = int((~good).sum())
        if count and (on_error == "fail" or not good.any()):
            names = [self.name(row) for row in np.flatnonzero(~good)[:_SHOWN].tolist()]
            more = f" and {count - len(names)} more" if count > len(names) else ""
            raise DataError(
                f"{count} of {len(self)} images cannot be decoded: {', '.join(names)}{more}; remove or replace them, "
                f"or leave them out with {SKIP}"
            )
        return np.flatnonzero(good)


def open_images(path: str | Path, kind: Kind | None = None, cache_dir: Path | None = None) -> ImageSource:
    """The images at a path.

    Args:
        kind: a folder of image files, tar shards, or an image set of `datasets`; None: what it looks like.
        cache_dir: a folder to keep indices in, instead of beside the images.

    Raises:
        DataError: there is nothing of the kind, or it is damaged.
    """
    from megatron_ds.data import image_tars

    path = Path(path)
    if not path.exists():
        raise DataError(f"{path} does not exist; give a folder of images, tar shards, or an image set of `datasets`")
    tars = image_tars.find_tars(path) if kind in (None, "tar") else []
    if kind is None and path.is_dir() and tars and (images := find_images(path)):
        raise DataError(f"{path} holds tar shards and image files ({tars[0]}, {images[0]}); move one kind of them away")
    if kind == "tar" or tars:
        return image_tars.TarImages(path, tars, cache_dir)
    if kind == "dataset" or (kind is None and is_dataset(path)):
        return DatasetImages(path, cache_dir)
    return ImageFolder(path, cache_dir)


def require_one_split(path: Path, names: Iterable[Path]) -> None:
    """Raise DataError where files or folders of ``path`` are of several splits: what a model is tested on would be
    trained on. ``names``, relative to ``path``, tell it by the words that `datasets` looks for in them."""
    found: dict[str, Path] = {}
    for name in names:
        of_parts = [re.split("[-._ 0-9]+", part.lower()) for part in reversed(name.parts)]
        split = next((_SPLIT_OF[word] for part in of_parts for word in part if word in _SPLIT_OF), None)
        if split is not None:
            found.setdefault(split, name)
    if len(found) > 1:
        raise DataError(
            f"{path} holds several splits, {' and '.join(str(name) for name in found.values())} among them, of which "
            "all would be trained on; give one: its file, or a folder with its files alone"
        )


# --- folders of image files ----------------------------------------------------------------------------------------


def find_images(folder: Path) -> list[Path]:
    """The image files of a folder and its subfolders, sorted, but none that is hidden."""
    return files_below(folder, lambda path: path.suffix.lower() in SUFFIXES)


class ImageFolder(ImageSource):
    """Image files, sorted by path: a class for each subfolder, or captions beside the images; all have them, or none.

    Captions are in ``x.txt`` beside ``x.jpg``, or in ``metadata.jsonl`` with ``file_name`` and ``text`` (as in the
    image folders of `datasets`: in any subfolder, names relative to it). What is hidden is left alone, as there.

    Raises:
        DataError: no image in it; some images with captions and others without; a damaged ``metadata.jsonl``.
    """

    def __init__(self, folder: Path, cache_dir: Path | None):
        super().__init__(folder, cache_dir)
        paths = [path.relative_to(folder) for path in find_images(folder)]
        if not paths:
            raise DataError(f"{folder} holds no image file ({', '.join(sorted(SUFFIXES))})")
        self._paths = [str(path) for path in paths]
        self._captions = _captions(folder, paths)
        self.captioned = self._captions is not None
        parents = {path.parts[0] for path in paths if len(path.parts) > 1}
        if all(name.lower() in _SPLIT_OF for name in parents):  # and no class, such as that of pictures of trains
            require_one_split(folder, map(Path, sorted(parents)))
        in_classes = not self.captioned and all(len(path.parts) > 1 for path in paths)
        self.classes = tuple(sorted(parents)) if in_classes else ()
        numbers = {name: number for number, name in enumerate(self.classes)}
        self.labels = np.array([numbers[path.parts[0]] for path in paths], np.int64) if in_classes else None
        # Reading every byte of a million files would take an hour.
        listing, times = xxhash.xxh3_128(), xxhash.xxh3_128()
        for row, path in enumerate(self._paths):
            status = (folder / path).stat()
            listing.update(f"{path}\0{status.st_size}\0{self.caption(row)}\0".encode(errors=ANY_NAME))
            times.update(f"{status.st_mtime_ns}\0".encode())
        self.identity = {"images": "folder", "number": len(self), "listing": listing.hexdigest()}
        self.modified = times.hexdigest()

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, row: int) -> str:
        return str(self.path / self._paths[row])

    def content(self, row: int) -> bytes:
        return self._read(row, _MOST_BYTES, 0)[0]

    def ends(self, row: int) -> tuple[bytes, bytes]:
        return self._read(row, FIRST_BYTES, LAST_BYTES)

    def _read(self, row: int, first: int, last: int) -> tuple[bytes, bytes]:
        path = self.path / self._paths[row]
        with RaisedAs(DataError, f"{path} cannot be read", OSError), open_regular(path) as file:
            beginning, size = file.read(first), file.seek(0, os.SEEK_END)
            file.seek(max(size - last, 0))
            return beginning, file.read(last)

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
    there = set(map(str, paths))
    if lost := [name for name in listed if name not in there and Path(name).suffix.lower() in SUFFIXES]:
        raise DataError(
            f"{METADATA} of {folder} lists {len(lost)} images that are not there, {lost[0]!r} first: copy them there, "
            "or take them off the list"
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
    with RaisedAs(DataError, f"the caption {path} cannot be read", OSError, ValueError):
        return read_text(path).strip()


def _read_metadata(path: Path) -> dict[str, str]:
    """File name to caption."""
    captions: dict[str, str] = {}
    with RaisedAs(DataError, f"{path} cannot be read", OSError), open_regular(path) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = parse_json(line)
                name, text = record["file_name"], record["text"]
                if not isinstance(name, str) or not isinstance(text, str):
                    raise TypeError("file_name and text are not both texts")
                if captions.setdefault(name := str(Path(name)), text) != text:
                    raise ValueError(f"{name} has had another caption before")
            except (ValueError, LookupError, TypeError) as error:
                raise DataError(
                    f"{path}, line {number}: {type(error).__name__} {error}; each line is a JSON object such as "
                    '{"file_name": "0001.png", "text": "a cat"}'
                ) from None
    return captions


# --- image sets of `datasets` --------------------------------------------------------------------------------------


def is_dataset(path: Path) -> bool:
    return any((path / name).is_file() for name in (_STATE, _DICT)) or bool(_parquet(path))


def _parquet(path: Path) -> list[Path]:
    if path.is_file():
        return [path] if path.suffix == ".parquet" else []
    return files_below(path, lambda file: file.suffix == ".parquet")


class DatasetImages(ImageSource):
    """What ``save_to_disk`` of `datasets` wrote, or Parquet files: the one column of images, with ``text`` or
    ``caption``, ``label`` or ``labels``.

    Raises:
        DataError: nothing that `datasets` reads, several splits, or no column of images.
    """

    def __init__(self, path: Path, cache_dir: Path | None):
        import datasets

        super().__init__(path, cache_dir)
        table, files = _load(path)
        images = [name for name, kind in table.features.items() if isinstance(kind, datasets.Image)]
        if len(images) != 1 or not len(table):
            raise DataError(
                f"{path} has {len(table)} rows and {len(images)} columns of images among {', '.join(table.features)}; "
                "use a set with one: cast_column(name, datasets.Image())"
            )
        self._table = table.cast_column(images[0], datasets.Image(decode=False))
        self._image = images[0]
        texts = (name for name in _CAPTIONS if getattr(table.features.get(name), "dtype", "") == "string")
        self._caption = next(texts, None)
        self.captioned = self._caption is not None
        if self._caption is not None and (missing := table[self._caption][:].count(None)):
            raise DataError(
                f"{missing} of the {len(table)} images in {path} have no {self._caption}; an empty one counts, or "
                "filter them out"
            )
        label = next((name for name in _LABELS if name in table.features), None)
        if label is not None:
            try:
                self.labels = _class_numbers(table[label][:])
            except (TypeError, ValueError) as error:
                raise DataError(
                    f"{path}: the column {label} holds no class numbers ({error}); use datasets.ClassLabel, or "
                    "another name"
                ) from None
        names = getattr(table.features[label], "names", None) if label is not None else None
        self.classes = tuple(names or ())
        self.identity = {"images": "dataset", **files_identity(files)}

    def __len__(self) -> int:
        return len(self._table)

    def name(self, row: int) -> str:
        return f"{self.path}: row {row}"

    def content(self, row: int) -> bytes:
        what = f"{self.name(row)} has no image, neither its bytes nor a file"
        with RaisedAs(DataError, what, OSError, KeyError, TypeError):
            image = self._table[row][self._image] or {}
            if (content := image.get("bytes")) is None:
                content = Path(image["path"]).read_bytes()
        return bytes(content)

    def caption(self, row: int) -> str:
        return "" if self._caption is None else str(self._table[row][self._caption])


def _class_numbers(values: Sequence[Any]) -> npt.NDArray[np.int64]:
    """Raises ValueError or TypeError: not a whole number for each row."""
    numbers = np.array(values, np.int64)
    if numbers.ndim > 1:
        raise ValueError(f"row 0 has {values[0]}")
    if (fractions := np.flatnonzero(numbers != np.array(values, float))).size:
        raise ValueError(f"row {fractions[0]} has {values[int(fractions[0])]}")
    return numbers


def _load(path: Path) -> tuple[Any, list[Path]]:
    import datasets

    if (path / _DICT).is_file():
        splits = sorted(folder.name for folder in path.iterdir() if (folder / _STATE).is_file())
        raise DataError(f"{path} holds several splits; give one: {', '.join(str(path / split) for split in splits)}")
    try:
        if (path / _STATE).is_file():
            return datasets.load_from_disk(str(path)).with_format(None), sorted(path.rglob("*.arrow"))
        if files := _parquet(path):
            require_one_split(path, (file.relative_to(path) for file in files))
            return datasets.Dataset.from_parquet([str(file) for file in files]), files
    except DataError:
        raise
    except Exception as error:  # of pyarrow and of `datasets`: there is no common class
        raise DataError(f"{path} cannot be read by `datasets`: {error}") from None
    raise DataError(f"{path} is no image set of `datasets`: neither save_to_disk nor Parquet files")
