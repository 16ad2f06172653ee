"""The files of a checkpoint and what they say: names, the manifest, the pointer to the latest.

A run's checkpoint directory::

    latest                          the newest complete checkpoint: its name and a checksum of that name
    step-00000100/
        manifest.json               format, step, meta, every file's size and checksums, every tensor's parts
        rank-00000.safetensors      what rank 0 held
        ...
    step-00000200.incomplete/       being written, or left by a run that died: never read, removed by the next save

The first line of a manifest is the xxh3-64 of all bytes after that line, so that it is checked like the rest.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from megatron_ds.checkpoint.boxes import Box
from megatron_ds.checkpoint.safetensors_header import DTYPES
from megatron_ds.checkpoint.writer import CHUNK_BYTES, FileRecord, checksum
from megatron_ds.errors import CheckpointError

FORMAT = "megatron-ds checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
LATEST = "latest"
INCOMPLETE = ".incomplete"
REPLACED = ".replaced"
STEP = re.compile(r"step-\d{8,}")


@dataclass(frozen=True)
class Part:
    """A box of a tensor: which file holds it, and at which byte of that file it starts."""

    file: int
    box: Box
    start: int


@dataclass(frozen=True)
class TensorRecord:
    """One tensor of a checkpoint. ``dtype`` is safetensors' name of it; ``parts`` tile the tensor without overlap."""

    kind: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds. ``tensors`` is keyed by (kind, name)."""

    step: int
    world_size: int
    meta: dict[str, Any]
    files: tuple[FileRecord, ...]
    tensors: dict[tuple[str, str], TensorRecord]
    chunk_bytes: int = CHUNK_BYTES

    def to_json(self) -> dict[str, Any]:
        tensors: dict[str, dict[str, Any]] = {}
        for record in self.tensors.values():
            tensors.setdefault(record.kind, {})[record.name] = record_to_json(record)
        return {
            "format": FORMAT,
            "version": VERSION,
            "step": self.step,
            "world_size": self.world_size,
            "meta": self.meta,
            "chunk_bytes": self.chunk_bytes,
            "files": [file_to_json(file) for file in self.files],
            "tensors": tensors,
        }

    @staticmethod
    def from_json(value: dict[str, Any]) -> Manifest:
        tensors = {
            (kind, name): record_from_json(kind, name, record)
            for kind, named in value["tensors"].items()
            for name, record in named.items()
        }
        return Manifest(
            step=value["step"],
            world_size=value["world_size"],
            meta=value["meta"],
            files=tuple(file_from_json(file) for file in value["files"]),
            tensors=tensors,
            chunk_bytes=value["chunk_bytes"],
        )


def record_to_json(record: TensorRecord) -> dict[str, Any]:
    parts = [
        {"file": part.file, "offset": part.box.offset, "shape": part.box.shape, "start": part.start}
        for part in record.parts
    ]
    return {"shape": record.shape, "dtype": record.dtype, "parts": parts}


def record_from_json(kind: str, name: str, value: dict[str, Any]) -> TensorRecord:
    parts = tuple(
        Part(part["file"], Box(tuple(part["offset"]), tuple(part["shape"])), part["start"]) for part in value["parts"]
    )
    return TensorRecord(kind, name, tuple(value["shape"]), value["dtype"], parts)


def file_to_json(file: FileRecord) -> dict[str, Any]:
    return {"name": file.name, "size": file.size, "checksums": file.checksums}


def file_from_json(value: dict[str, Any]) -> FileRecord:
    return FileRecord(value["name"], value["size"], tuple(value["checksums"]))


def tensor_key(kind: str, name: str, shape: tuple[int, ...], box: Box) -> str:
    """The key in a safetensors file: ``param/embedding.weight``, with ``@4,0`` after it where the box is a part."""
    whole = box.shape == shape
    return f"{kind}/{name}" if whole else f"{kind}/{name}@{','.join(map(str, box.offset))}"


def check_complete(tensors: Iterable[TensorRecord]) -> None:
    """Every element of every tensor is in exactly one part, as far as counting shows."""
    for record in tensors:
        held = sum(part.box.numel for part in record.parts)
        if held != prod(record.shape):
            raise CheckpointError(
                f"{record.kind} of {record.name} has {prod(record.shape)} elements (shape {list(record.shape)}), but "
                f"the ranks gave {held} to save; each element must be saved by exactly one rank"
            )


# --- names and small files ------------------------------------------------------------------------------------


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def rank_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def steps_in(directory: Path) -> list[Path]:
    """The checkpoints under ``directory`` that were committed, oldest step first."""
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if STEP.fullmatch(path.name)]
    return sorted(found, key=step_of)


def write_text_durably(path: Path, text: str) -> None:
    """Write and fsync a small file (its directory entry is made durable by :func:`sync_directory`)."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_manifest(directory: Path, manifest: Manifest) -> None:
    body = json.dumps(manifest.to_json(), separators=(",", ":"))[1:]
    write_text_durably(directory / MANIFEST, f'{{"checksum":"{checksum(body.encode())}",\n{body}')


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a step directory.

    Raises:
        CheckpointError: it is not there, damaged, or of a newer format.
    """
    path = directory / MANIFEST
    if directory.name.endswith(INCOMPLETE):
        raise CheckpointError(f"{directory} was never completed: the run that wrote it died or is still writing")
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        what = "has no manifest.json" if directory.is_dir() else "does not exist"
        raise CheckpointError(f"{directory} is not a checkpoint: it {what}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    first, _, body = raw.partition(b"\n")
    if first != f'{{"checksum":"{checksum(body)}",'.encode():
        raise CheckpointError(f"{path} is damaged: its text does not match its checksum")
    value = json.loads(b"{" + body)
    if value.get("format") != FORMAT or value.get("version", 0) > VERSION:
        raise CheckpointError(
            f"{path} has format {value.get('format')!r} version {value.get('version')}; this library reads {FORMAT!r} "
            f"up to version {VERSION}: use a newer megatron-ds"
        )
    try:
        manifest = Manifest.from_json(value)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is malformed: {type(error).__name__}: {error}") from error
    for file in manifest.files:
        if Path(file.name).name != file.name:
            raise CheckpointError(f"{path} names the file {file.name!r}, which is not inside the checkpoint")
    return manifest


def prepare_latest(directory: Path, name: str) -> Path:
    """A durable file that says `the latest is name`, to be moved over ``latest`` with ``os.replace``.

    So a reader sees the old pointer or the new one and nothing between, and a full disk is met before the move.
    """
    temporary = directory / f"{LATEST}.tmp"
    write_text_durably(temporary, f"{name} {checksum(name.encode())}\n")
    return temporary


def read_latest(directory: Path) -> str:
    """The step name that ``latest`` holds; a :class:`CheckpointError` if it is damaged."""
    path = directory / LATEST
    try:
        text = path.read_bytes().decode()
        name, digest = text.split()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if digest != checksum(name.encode()):
        raise CheckpointError(f"{path} is damaged: {name!r} does not match its checksum")
    return name


def why_unusable(directory: Path) -> str | None:
    """What a quick look (manifest, and the presence and size of each file) finds wrong, or None."""
    try:
        manifest = read_manifest(directory)
        for file in manifest.files:
            check_size(directory, file)
    except CheckpointError as error:
        return str(error)
    return None


def check_size(directory: Path, file: FileRecord) -> None:
    path = directory / file.name
    try:
        size = path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{path} is missing: {error.strerror}") from None
    if size != file.size:
        raise CheckpointError(f"{path} has {size} bytes instead of {file.size}: it was truncated or replaced")


def last_good(directory: Path, besides: Path | None = None) -> str:
    """A sentence that names the newest checkpoint under ``directory`` that a quick look finds whole."""
    for path in reversed(steps_in(directory)):
        if path != besides and why_unusable(path) is None:
            return f"; the last good checkpoint there is {path}: load that one by its own path"
    return "; there is no other good checkpoint there"


def resolve(path: str | Path) -> Path:
    """The step directory that ``path`` means: itself, or the one that its ``latest`` points to.

    Raises:
        CheckpointError: there is none, or the latest is damaged or incomplete (naming the last good one).
    """
    path = Path(path)
    if (path / MANIFEST).exists() or STEP.match(path.name):
        problem = why_unusable(path)
        if problem is not None:
            raise CheckpointError(problem + last_good(path.parent, besides=path))
        return path
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist")
    if not (path / LATEST).exists():
        if steps_in(path):
            raise CheckpointError(f"{path} has no file `latest`" + last_good(path))
        raise CheckpointError(f"{path} holds no checkpoint: no manifest.json, no `latest`, no step-* directory")
    try:
        step = path / read_latest(path)
        problem = why_unusable(step)
    except CheckpointError as error:
        step, problem = path, str(error)
    if problem is not None:
        raise CheckpointError(problem + last_good(path, besides=step))
    return step


def read_meta(path: str | Path) -> dict[str, Any]:
    """The ``meta`` that was given to ``save``, of the checkpoint that ``path`` means (see :func:`resolve`)."""
    return read_manifest(resolve(path)).meta
