"""Show what a checkpoint holds, and check every byte of it.

python tools/inspect_checkpoint.py runs/first/checkpoints
python tools/inspect_checkpoint.py runs/first/checkpoints/step-00000100 --kind exp_avg --layers --no-verify
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from math import prod
from pathlib import Path

import tyro
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from tqdm import tqdm

from megatron_ds.checkpoint import Checkpoint
from megatron_ds.checkpoint.values import encode
from megatron_ds.data.cli import run
from megatron_ds.errors import CheckpointError


@dataclass(frozen=True)
class Inspect:
    checkpoint: tyro.conf.Positional[Path]
    """A run's checkpoint directory (its latest is meant) or one step's directory."""
    kind: str = "param"
    """Which tensors to list: param, exp_avg, exp_avg_sq, ..."""
    layers: bool = False
    """List every layer's tensors; default: layers that are alike share a row."""
    meta: bool = False
    """Print the meta (configuration, position in the data) as JSON."""
    verify: bool = True
    """Read everything and compare with the checksums."""


def main(options: Inspect) -> None:
    console = Console()
    with Checkpoint(options.checkpoint) as checkpoint:
        index = checkpoint.manifest.index
        size = sum(index.file_sizes(0, index.sizes.files))
        console.print(
            f"{checkpoint.directory}: step {checkpoint.step}, saved by {checkpoint.world_size} "
            f"rank{'s' * (checkpoint.world_size != 1)}, {index.sizes.files} files, {decimal(size)}"
        )
        console.print(_kinds(checkpoint))
        console.print(_tensors(checkpoint, options.kind, options.layers))
        if options.meta:
            console.print_json(json.dumps({name: encode(value, name) for name, value in checkpoint.meta.items()}))
        if options.verify:
            _verify(checkpoint, size, console)


def _kinds(checkpoint: Checkpoint) -> Table:
    table = Table("kind", "tensors", "elements", "size", "dtype")
    for kind in checkpoint.kinds():
        records = [checkpoint.record(name, kind) for name in checkpoint.names(kind)]
        count = sum(prod(record.shape) for record in records)
        dtypes = ", ".join(sorted({record.dtype for record in records}))
        table.add_row(kind, str(len(records)), f"{count:,}", decimal(sum(record.nbytes for record in records)), dtypes)
    return table


def _tensors(checkpoint: Checkpoint, kind: str, every_layer: bool) -> Table:
    if kind not in checkpoint.kinds():
        raise CheckpointError(f"{checkpoint.directory} holds no {kind}; it holds {', '.join(checkpoint.kinds())}")
    rows: dict[tuple[str, str, str], list[int]] = {}
    for name in checkpoint.names(kind):
        record = checkpoint.record(name, kind)
        # Layers differ in a number between dots.
        shown = name if every_layer else re.sub(r"\.\d+\.", ".*.", name)
        key = (shown, " x ".join(map(str, record.shape)) or "scalar", record.dtype)
        counts = rows.setdefault(key, [0, 0, 0])
        counts[0] += 1
        counts[1] += prod(record.shape)
        counts[2] += record.count
    table = Table("tensor", "shape", "dtype", "tensors", "elements", "parts")
    table.columns[0].overflow = "fold"  # a name cut short is no name
    for key, counts in rows.items():
        table.add_row(*key, *(f"{count:,}" for count in counts))
    return table


def _verify(checkpoint: Checkpoint, size: int, console: Console) -> None:
    with tqdm(total=size, desc="verifying", unit="B", unit_scale=True) as bar:
        problems = checkpoint.check_everything(bar.update)
    if problems:
        raise CheckpointError("\n".join(problems))
    console.print("every checksum is right")


if __name__ == "__main__":
    run(main, Inspect, __doc__)
