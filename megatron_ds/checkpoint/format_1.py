"""Checkpoints of format 1, whose manifest lists every file and every part as JSON: read into the same index."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_ds.checkpoint.fields import a_checksum, a_list, an_object, integer, integers, shape_and_dtype, take
from megatron_ds.checkpoint.index import Index, IndexBuilder, Key, TensorRecord
from megatron_ds.checkpoint.manifest import rank_name
from megatron_ds.checkpoint.writer import FileRecord

FIELDS = ("files", "tensors")


def read_index(files: Any, tensors: Any, chunk_bytes: int, path: Path) -> tuple[dict[Key, TensorRecord], Index]:
    """The tensors, and the index in memory: all of it was checked.

    Raises:
        ValueError: a field that cannot be right. CheckpointError: fields that contradict each other.
    """
    builder = IndexBuilder()
    for number, file in enumerate(a_list(files, "files")):
        builder.add_file(_file(number, file))
    for kind, named in an_object(tensors, "tensors").items():
        for name, record in an_object(named, f"tensors {kind!r}").items():
            shape, dtype, rows = _tensor(f"{kind} of {name!r}", record)
            builder.add_parts([(kind, name, shape, dtype, len(rows))], rows)
    records, sizes, words = builder.build()
    index = Index(path, sizes, chunk_bytes, lambda first, last: words[first:last])
    index.check(records.values())
    return records, index


def _file(number: int, value: Any) -> FileRecord:
    name, size, checksums = take(value, ("name", "size", "checksums"), "a file")
    if name != rank_name(number):
        raise ValueError(f"it names the file {name!r}, which is not the {rank_name(number)} of this place")
    sums = tuple(a_checksum(text, name) for text in a_list(checksums, f"checksums of {name}"))
    return FileRecord(name, integer(size, f"the size of {name}"), sums)


def _tensor(what: str, value: Any) -> tuple[tuple[int, ...], str, list[list[int]]]:
    """Shape, dtype and, of each part with elements, file, start, offset and shape."""
    shape, dtype, parts = take(value, ("shape", "dtype", "parts"), what)
    sizes, dtype = shape_and_dtype(shape, dtype, what)
    rows = []
    for part in a_list(parts, f"parts of {what}"):
        file, offset, extent, start = take(part, ("file", "offset", "shape", "start"), f"a part of {what}")
        offset, extent = integers(offset, f"an offset of {what}"), integers(extent, f"the shape of a part of {what}")
        if not len(offset) == len(extent) == len(sizes):
            raise ValueError(
                f"{what} of shape {list(sizes)} has a part at {list(offset)} of shape {list(extent)}, which is not "
                "inside it"
            )
        file, start = integer(file, f"a file of {what}"), integer(start, f"a start of {what}")
        if all(extent):
            rows.append([file, start, *offset, *extent])
    return sizes, dtype, rows
