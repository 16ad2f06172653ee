"""An image set of `datasets` on disk: what ``save_to_disk`` wrote, or Parquet files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ds.data.dataset_files import files_identity
from megatron_ds.errors import DataError

_CAPTIONS, _LABELS = ("text", "caption"), ("label", "labels")
_STATE, _DICT = "state.json", "dataset_dict.json"


def is_dataset(path: Path) -> bool:
    return any((path / name).is_file() for name in (_STATE, _DICT)) or bool(_parquet(path))


def _parquet(path: Path) -> list[Path]:
    if path.is_file():
        return [path] if path.suffix == ".parquet" else []
    return sorted(file for file in path.rglob("*.parquet") if file.is_file())


class DatasetImages:
    """An :class:`~megatron_ds.data.image_source.ImageSource`: the one column of images, with ``text`` or ``caption``,
    ``label`` or ``labels``."""

    def __init__(self, path: Path):
        import datasets

        self._path = path
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
        self.labels = None
        if label is not None:
            try:
                self.labels = _class_numbers(table[label][:])
            except (TypeError, ValueError) as error:
                raise DataError(
                    f"{path}: the column {label} holds no class numbers ({error}); use datasets.ClassLabel, or "
                    "another name"
                ) from None
        names = getattr(table.features[label], "names", None) if label is not None else None
        self.classes: tuple[str, ...] = tuple(names or ())
        self.identity: Mapping[str, Any] = {"images": "dataset", **files_identity(files)}
        self.modified = ""  # the identity has a checksum

    def __len__(self) -> int:
        return len(self._table)

    def name(self, row: int) -> str:
        return f"{self._path}: row {row}"

    def content(self, row: int, most: int | None = None) -> bytes:
        try:
            image = self._table[row][self._image] or {}
            if (content := image.get("bytes")) is None:
                content = Path(image["path"]).read_bytes()
        except (OSError, KeyError, TypeError) as error:
            raise DataError(f"{self.name(row)} has no image, neither its bytes nor a file: {error}") from None
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
            return datasets.load_from_disk(str(path)), sorted(path.rglob("*.arrow"))
        if files := _parquet(path):
            return datasets.Dataset.from_parquet([str(file) for file in files]), files
    except Exception as error:  # of pyarrow and of `datasets`: there is no common class
        raise DataError(f"{path} cannot be read by `datasets`: {error}") from None
    raise DataError(f"{path} is no image set of `datasets`: neither save_to_disk nor Parquet files")
