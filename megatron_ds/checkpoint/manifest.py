"""The files of a checkpoint and their names. Which checkpoint to load: `directory.py`.

A run's checkpoint directory::

    latest                          the newest complete checkpoint: its name and a checksum of that name
    step-00000100/
        manifest.json               format, step, meta, every tensor's shape and dtype, the sizes of the index
        manifest.index              every file's size and checksums, every tensor's parts: see `index.py`
        rank-00000.safetensors      what rank 0 held
        ...
    step-00000200.incomplete/       being written, or left by a run that died: never read, removed by the next save
    step-00000100.replaced/         between the two renames of a save that replaces a step: read in that step's place

The first line of a manifest is the xxh3-64 of all bytes after that line, so that it is checked like the rest. Every
rank reads it whole: its size depends on the model alone. Of the index a rank reads what concerns it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ds.checkpoint.index import Index, Key, TensorRecord
from megatron_ds.shard.boxes import Box

FORMAT = "megatron-ds checkpoint"
VERSION = 2
MANIFEST = "manifest.json"
INDEX = "manifest.index"
INCOMPLETE = ".incomplete"
REPLACED = ".replaced"
STEP = re.compile(r"step-\d{8,}")


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds. ``tensors`` is keyed by (kind, name); file number i is called ``rank_name(i)``.

    ``checksum``: of all that is in it, through the index's.
    """

    step: int
    world_size: int
    meta: dict[str, Any]
    tensors: dict[Key, TensorRecord]
    index: Index
    checksum: str


def tensor_key(kind: str, name: str, shape: tuple[int, ...], box: Box) -> str:
    """The key in a safetensors file: ``param/embedding.weight``, with ``@4,0`` after it where the box is a part."""
    whole = box.shape == shape
    return f"{kind}/{name}" if whole else f"{kind}/{name}@{','.join(map(str, box.offset))}"


# --- names ----------------------------------------------------------------------------------------------------


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """The step that a directory's name stands for; None for one that is no checkpoint's."""
    name = path.name.removesuffix(REPLACED)
    return int(name.removeprefix("step-")) if STEP.fullmatch(name) else None


def rank_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"
