"""The file ``manifest.json``: written with a checksum, and believed only after every number in it was checked.

The checksum finds damage. A file that somebody made, or a defect wrote, has a right checksum: so each field is taken
with its type and range, each part must lie in its tensor and its file, no two parts may share a byte, and the parts of
a tensor must tile it. What was read can be acted on without another look.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ds.checkpoint.manifest import FORMAT, INCOMPLETE, MANIFEST, VERSION, Manifest, Part, TensorRecord, step_of
from megatron_ds.checkpoint.safetensors_header import DTYPES
from megatron_ds.checkpoint.values import decode
from megatron_ds.checkpoint.writer import FileRecord
from megatron_ds.errors import CheckpointError
from megatron_ds.files import checksum, parse_json, read_bytes, write_text_durably
from megatron_ds.files.direct_io import ALIGNMENT
from megatron_ds.shard.boxes import Box, tiles

MOST_BYTES = 1 << 30  # of a manifest: some ten million parts
MOST_CHUNK_BYTES = 64 << 20  # a reader's thread holds one chunk
_MOST = (1 << 63) - 1
_CHECKSUM = re.compile(r"[0-9a-f]{16}")
_FIELDS = ("format", "version", "step", "world_size", "meta", "chunk_bytes", "files", "tensors")


def write_manifest(directory: Path, manifest: Manifest) -> None:
    body = json.dumps(manifest.to_json(), separators=(",", ":"))[1:]
    write_text_durably(directory / MANIFEST, f'{{"checksum":"{checksum(body.encode())}",\n{body}')


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a step directory.

    Raises:
        CheckpointError: it is not there, damaged, malformed, of a newer format, or of another step than its directory.
    """
    path = directory / MANIFEST
    if directory.name.endswith(INCOMPLETE):
        raise CheckpointError(f"{directory} was never completed: the run that wrote it died or is still writing")
    try:
        raw = read_bytes(path, MOST_BYTES)
    except FileNotFoundError:
        what = "has no manifest.json" if directory.is_dir() else "does not exist"
        raise CheckpointError(f"{directory} is not a checkpoint: it {what}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    first, _, body = raw.partition(b"\n")
    if first != f'{{"checksum":"{checksum(body)}",'.encode():
        raise CheckpointError(f"{path} is damaged: its text does not match its checksum")
    try:
        value = _object(parse_json(b"{" + body), "it")
        version = value.get("version")
        if value.get("format") != FORMAT or type(version) is not int or version > VERSION:
            raise CheckpointError(
                f"{path} has format {value.get('format')!r} version {version}; this library reads {FORMAT!r} "
                f"up to version {VERSION}: use a newer megatron-ds"
            )
        manifest = manifest_from_json(value)
    except ValueError as error:
        raise CheckpointError(f"{path} is malformed: {error}") from None
    if step_of(directory) not in (None, manifest.step):
        raise CheckpointError(
            f"{directory} holds step {manifest.step}: it was copied or renamed; give it the name of its own step"
        )
    return manifest


def manifest_from_json(value: dict[str, Any]) -> Manifest:
    """The checked manifest; a ``ValueError`` that names the first field that cannot be right."""
    _, _, step, world_size, meta, chunk_bytes, files, tensors = _take(value, _FIELDS, "the manifest")
    manifest = Manifest(
        step=_integer(step, "step"),
        world_size=_integer(world_size, "world_size", least=1),
        meta={name: decode(part) for name, part in _object(meta, "meta").items()},
        files=tuple(file_from_json(file) for file in _list(files, "files")),
        tensors={
            (kind, name): record_from_json(kind, name, record)
            for kind, named in _object(tensors, "tensors").items()
            for name, record in _object(named, f"tensors {kind!r}").items()
        },
        chunk_bytes=_integer(chunk_bytes, "chunk_bytes", ALIGNMENT, MOST_CHUNK_BYTES),
    )
    if manifest.chunk_bytes % ALIGNMENT:
        raise ValueError(f"chunk_bytes is {manifest.chunk_bytes}, not a multiple of {ALIGNMENT}")
    _check_files(manifest)
    _check_places(manifest)
    return manifest


def record_from_json(kind: str, name: str, value: Any) -> TensorRecord:
    """One tensor whose parts lie inside it and tile it, if all of them are here."""
    what = f"{kind} of {name!r}"
    shape, dtype, parts = _take(value, ("shape", "dtype", "parts"), what)
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{what} has dtype {_shown(dtype)}, not one of {', '.join(DTYPES)}")
    sizes = _integers(shape, f"the shape of {what}")
    if prod(size or 1 for size in sizes) > _MOST >> 3:
        raise ValueError(f"{what} has shape {_shown(sizes)}: more elements than can be counted")
    found = []
    for part in _list(parts, f"parts of {what}"):
        file, offset, extent, start = _take(part, ("file", "offset", "shape", "start"), f"a part of {what}")
        box = Box(_integers(offset, f"an offset of {what}"), _integers(extent, f"the shape of a part of {what}"))
        inside = len(box.offset) == len(box.shape) == len(sizes) and all(
            o + s <= size for o, s, size in zip(box.offset, box.shape, sizes)
        )
        if not inside:
            raise ValueError(
                f"{what} of shape {list(sizes)} has a part at {list(box.offset)} of shape {list(box.shape)}, which is "
                "not inside it"
            )
        found.append(Part(_integer(file, f"a file of {what}"), box, _integer(start, f"a start of {what}")))
    return TensorRecord(kind, name, sizes, dtype, tuple(found))


def file_from_json(value: Any) -> FileRecord:
    name, size, checksums = _take(value, ("name", "size", "checksums"), "a file")
    if not isinstance(name, str) or not name or name in (".", "..") or "/" in name or "\0" in name:
        raise ValueError(f"it names the file {_shown(name)}, which is not inside the checkpoint")
    sums = _list(checksums, f"checksums of {name}")
    wrong = [text for text in sums if not (isinstance(text, str) and _CHECKSUM.fullmatch(text))]
    if wrong:
        raise ValueError(f"{name} has the checksum {_shown(wrong[0])}, not 16 hexadecimal digits")
    return FileRecord(name, _integer(size, f"the size of {name}"), tuple(sums))


def _check_files(manifest: Manifest) -> None:
    names = [file.name for file in manifest.files]
    if len(set(names)) < len(names):
        raise ValueError(f"it lists a file twice among {', '.join(names[:8])}")
    for file in manifest.files:
        chunks = -(-file.size // manifest.chunk_bytes)
        if len(file.checksums) != chunks:
            raise ValueError(
                f"{file.name} of {file.size} bytes is {chunks} chunks of {manifest.chunk_bytes}, but has "
                f"{len(file.checksums)} checksums"
            )


def _check_places(manifest: Manifest) -> None:
    """The parts tile their tensors, and their bytes lie in their files, each byte in one part."""
    places: list[tuple[int, int, int]] = []
    for record in manifest.tensors.values():
        width = DTYPES[record.dtype].itemsize
        what = f"{record.kind} of {record.name!r}"
        if not tiles(record.shape, [part.box for part in record.parts]):
            raise ValueError(f"the parts of {what} of shape {list(record.shape)} overlap or leave a gap")
        for part in record.parts:
            if part.file >= len(manifest.files):
                raise ValueError(f"{what} is in file {part.file}, but only {len(manifest.files)} are listed")
            file, stop = manifest.files[part.file], part.start + part.box.numel * width
            if stop > file.size or part.start % width:
                raise ValueError(f"{what} is at bytes {part.start}-{stop} of {file.name}, which has {file.size}")
            if part.box.numel:
                places.append((part.file, part.start, stop))
    table = np.array(places, np.int64).reshape(-1, 3)
    table = table[np.lexsort((table[:, 1], table[:, 0]))]
    shared = np.flatnonzero((table[1:, 0] == table[:-1, 0]) & (table[1:, 1] < table[:-1, 2]))
    if shared.size:
        file, start, _ = table[int(shared[0]) + 1].tolist()
        raise ValueError(f"two parts lie at byte {start} of {manifest.files[file].name}")


# --- one field at a time --------------------------------------------------------------------------------------


def _take(value: Any, names: Iterable[str], what: str) -> list[Any]:
    """The values of exactly these fields, in this order."""
    fields, names = _object(value, what), tuple(names)
    if set(fields) != set(names):
        lacks = [name for name in names if name not in fields]
        unknown = [name for name in fields if name not in names]
        raise ValueError(f"{what} lacks {_shown(lacks)}" if lacks else f"{what} has the unknown {_shown(unknown)}")
    return [fields[name] for name in names]


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{what} is {_shown(value)}, not an object")
    return dict(value)


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{what}: {_shown(value)}, not a list")
    return list(value)


def _integers(value: Any, what: str) -> tuple[int, ...]:
    return tuple(_integer(item, what) for item in _list(value, what))


def _integer(value: Any, what: str, least: int = 0, most: int = _MOST) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{what} is {_shown(value)}, not a whole number from {least} to {most}")
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."
