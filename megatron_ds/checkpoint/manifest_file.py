"""The files ``manifest.json`` and ``manifest.index``: written with checksums, believed only after they were checked.

The checksums find damage. A file that somebody made, or a defect wrote, has right ones: so each field is taken with its
type and range here, and the rows of the index are checked as they are used (:mod:`megatron_ds.checkpoint.index`).
"""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from megatron_ds.checkpoint.fields import a_checksum, an_object, integer, shape_and_dtype, take
from megatron_ds.checkpoint.index import (
    BlockFile,
    Index,
    IndexBuilder,
    IndexSizes,
    Key,
    TensorRecord,
    blocks_bytes,
    check_complete,
    write_blocks,
)
from megatron_ds.checkpoint.manifest import FORMAT, INCOMPLETE, INDEX, MANIFEST, VERSION, Manifest, step_of
from megatron_ds.checkpoint.values import decode, encode
from megatron_ds.checkpoint.writer import CHUNK_BYTES
from megatron_ds.errors import CheckpointError, RaisedAs
from megatron_ds.files import checksum, parse_json, read_bytes, write_text_durably
from megatron_ds.files.direct_io import ALIGNMENT

MOST_BYTES = 1 << 30  # of a manifest
MOST_CHUNK_BYTES = 64 << 20  # a reader's thread holds one chunk
MOST_DIMS = 64
_FIELDS = ("format", "version", "step", "world_size", "meta", "chunk_bytes", "index", "tensors")


def write_manifest(directory: Path, step: int, world_size: int, meta: dict[str, Any], contents: IndexBuilder) -> None:
    """Write and fsync both files.

    Raises:
        CheckpointError: the parts of a tensor overlap or leave a gap.
    """
    records, sizes, words = contents.build()
    check_complete(records.values(), sizes, words)
    tensors: dict[str, dict[str, Any]] = {}
    for (kind, name), record in records.items():
        tensors.setdefault(kind, {})[name] = {"shape": record.shape, "dtype": record.dtype, "parts": record.count}
    value = {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "world_size": world_size,
        "meta": {name: encode(part, name) for name, part in meta.items()},
        "chunk_bytes": CHUNK_BYTES,
        "index": {"checksum": write_blocks(directory / INDEX, words), **vars(sizes)},
        "tensors": tensors,
    }
    body = json.dumps(value, separators=(",", ":"))[1:]
    write_text_durably(directory / MANIFEST, f'{{"checksum":"{checksum(body.encode())}",\n{body}')


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a step directory.

    Raises:
        CheckpointError: it is not there, damaged, malformed, of another format, or of another step than its directory.
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
    with RaisedAs(CheckpointError, f"{path} is malformed", ValueError):
        value = an_object(parse_json(b"{" + body), "it")
        version = value.get("version")
        if value.get("format") != FORMAT or type(version) is not int or version != VERSION:
            raise CheckpointError(
                f"{path} has format {value.get('format')!r} version {version}; this library reads {FORMAT!r} "
                f"version {VERSION}: use the megatron-ds that wrote it"
            )
        manifest = _from_json(value, directory, checksum(body))
    if step_of(directory) not in (None, manifest.step):
        raise CheckpointError(
            f"{directory} holds step {manifest.step}: it was copied or renamed; give it the name of its own step"
        )
    return manifest


def _from_json(value: dict[str, Any], directory: Path, digest: str) -> Manifest:
    _, _, step, world_size, meta, chunk_bytes, listed, tensors = take(value, _FIELDS, "the manifest")
    step, world_size = integer(step, "step"), integer(world_size, "world_size", least=1)
    meta = {name: decode(part) for name, part in an_object(meta, "meta").items()}
    chunk_bytes = integer(chunk_bytes, "chunk_bytes", ALIGNMENT, MOST_CHUNK_BYTES)
    if chunk_bytes % ALIGNMENT:
        raise ValueError(f"chunk_bytes is {chunk_bytes}, not a multiple of {ALIGNMENT}")
    records, index = _read_index(listed, tensors, chunk_bytes, directory / INDEX)
    return Manifest(step, world_size, meta, records, index, digest)


def _read_index(value: Any, tensors: Any, chunk_bytes: int, path: Path) -> tuple[dict[Key, TensorRecord], Index]:
    digest, *counts = take(value, ("checksum", "files", "checksums", "parts", "dims"), "the index")
    a_checksum(digest, "the index")
    files, checksums, parts = (integer(count, "a size of the index", most=1 << 48) for count in counts[:3])
    sizes = IndexSizes(files, checksums, parts, integer(counts[3], "the dims of the index", most=MOST_DIMS))
    records = _tensors(tensors, sizes)
    check_size(path, blocks_bytes(sizes.words))
    return records, Index(path, sizes, chunk_bytes, BlockFile(path, sizes.words, digest))


def _tensors(value: Any, sizes: IndexSizes) -> dict[Key, TensorRecord]:
    records: dict[Key, TensorRecord] = {}
    first = 0
    for kind, named in an_object(value, "tensors").items():
        for name, tensor in an_object(named, f"tensors {kind!r}").items():
            what = f"{kind} of {name!r}"
            shape, dtype, count = take(tensor, ("shape", "dtype", "parts"), what)
            shape, dtype = shape_and_dtype(shape, dtype, what)
            if len(shape) > sizes.dims:
                raise ValueError(f"{what} has shape {list(shape)}, and the parts of the index {sizes.dims} dims")
            count = integer(count, f"the parts of {what}", most=sizes.parts - first)
            records[kind, name] = TensorRecord(kind, name, shape, dtype, first, count)
            first += count
    if first != sizes.parts:
        raise ValueError(f"its tensors have {first} parts, and the index {sizes.parts}")
    return records


def check_size(path: Path, size: int) -> None:
    """A :class:`CheckpointError` unless this is a regular file of that size."""
    try:
        status = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path} is missing: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} is not a regular file")
    if status.st_size != size:
        raise CheckpointError(f"{path} has {status.st_size} bytes instead of {size}: it was truncated or replaced")
