"""The files of a checkpoint and what they say: their names and the manifest. Which one to load: `directory.py`.

A run's checkpoint directory::

    latest                          the newest complete checkpoint: its name and a checksum of that name
    step-00000100/
        manifest.json               format, step, meta, every file's size and checksums, every tensor's parts
        rank-00000.safetensors      what rank 0 held
        ...
    step-00000200.incomplete/       being written, or left by a run that died: never read, removed by the next save
    step-00000100.replaced/         between the two renames of a save that replaces a step: read in that step's place

The first line of a manifest is the xxh3-64 of all bytes after that line, so that it is checked like the rest.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from megatron_ds.checkpoint.safetensors_header import DTYPES
from megatron_ds.checkpoint.values import encode
from megatron_ds.checkpoint.writer import CHUNK_BYTES, FileRecord
from megatron_ds.errors import CheckpointError
from megatron_ds.shard.boxes import Box, tiles

FORMAT = "megatron-ds checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
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
            "meta": {name: encode(value, name) for name, value in self.meta.items()},
            "chunk_bytes": self.chunk_bytes,
            "files": [file_to_json(file) for file in self.files],
            "tensors": tensors,
        }


def record_to_json(record: TensorRecord) -> dict[str, Any]:
    parts = [
        {"file": part.file, "offset": part.box.offset, "shape": part.box.shape, "start": part.start}
        for part in record.parts
    ]
    return {"shape": record.shape, "dtype": record.dtype, "parts": parts}


def file_to_json(file: FileRecord) -> dict[str, Any]:
    return {"name": file.name, "size": file.size, "checksums": file.checksums}


def tensor_key(kind: str, name: str, shape: tuple[int, ...], box: Box) -> str:
    """The key in a safetensors file: ``param/embedding.weight``, with ``@4,0`` after it where the box is a part."""
    whole = box.shape == shape
    return f"{kind}/{name}" if whole else f"{kind}/{name}@{','.join(map(str, box.offset))}"


def check_complete(tensors: Iterable[TensorRecord]) -> None:
    """Every element of every tensor is in exactly one part."""
    for record in tensors:
        held = sum(part.box.numel for part in record.parts)
        rule = "each element must be saved by exactly one rank"
        if held != prod(record.shape):
            raise CheckpointError(
                f"{record.kind} of {record.name} has {prod(record.shape)} elements (shape {list(record.shape)}), but "
                f"the ranks gave {held} to save; {rule}"
            )
        if not tiles(record.shape, [part.box for part in record.parts]):
            raise CheckpointError(
                f"{record.kind} of {record.name} (shape {list(record.shape)}): two parts hold the same elements, and "
                f"others are in none; {rule}"
            )


# --- names ----------------------------------------------------------------------------------------------------


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """The step that a directory's name stands for; None for one that is no checkpoint's."""
    name = path.name.removesuffix(REPLACED)
    return int(name.removeprefix("step-")) if STEP.fullmatch(name) else None


def rank_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"
