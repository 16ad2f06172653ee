"""Save: every rank writes one file, rank 0 commits.

1. Rank 0 checks the space and makes ``step-N.incomplete/``.
2. Every rank writes ``rank-R.safetensors`` and, beside it, ``rank-R.json``: that file's checksums and contents.
3. Rank 0 merges those into ``manifest.json`` and ``manifest.index``, renames the directory to ``step-N`` and replaces
   ``latest``.

Each step ends when all ranks agree that it succeeded. If it did not, every rank raises the same error, what was
written is removed, and the checkpoints before it and ``latest`` are as they were. A kill at any point leaves at worst
an ``.incomplete`` directory, which no reader accepts and the next save removes.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace as replaced_by
from pathlib import Path
from typing import Any

import torch

from megatron_ds.checkpoint.directory import LATEST, replacing_latest, steps_in
from megatron_ds.checkpoint.index import IndexBuilder
from megatron_ds.checkpoint.manifest import INCOMPLETE, REPLACED, rank_name, step_name, step_of, tensor_key
from megatron_ds.checkpoint.manifest_file import MOST_BYTES, write_manifest
from megatron_ds.checkpoint.safetensors_header import Entry, Layout, dtype_name, layout
from megatron_ds.checkpoint.values import encode
from megatron_ds.checkpoint.writer import ChunkedWriter, FileRecord
from megatron_ds.comm.together import exchange, together, total
from megatron_ds.errors import CheckpointError
from megatron_ds.files import gb, read_json, sync_directory
from megatron_ds.mesh import Axis
from megatron_ds.shard.flat_shards import FlatShard, acquired


def save(
    directory: str | Path,
    step: int,
    flat_shards: Sequence[FlatShard],
    meta: dict[str, Any],
    world: Axis | None = None,
    replace: bool = False,
) -> Path:
    """Write checkpoint ``step`` under ``directory`` (which all ranks must see), durably, and point ``latest`` at it.

    Args:
        directory: the run's checkpoint directory; made if absent.
        step: optimizer steps taken; names the checkpoint.
        flat shards: what this rank holds. Over all ranks every element of every tensor must occur once: leave replicas
            out, or divide them with :func:`~megatron_ds.shard.flat_shards.share_out`. The data must not change during
            the call.
        meta: plain values (configuration, consumed samples, ...), the same on every rank; rank 0's is stored, and comes
            back as it was given. See :mod:`megatron_ds.checkpoint.values`.
        world: the ranks that save together (``mesh.world``); None is one process alone.
        replace: overwrite a checkpoint of the same step instead of refusing.

    Returns:
        The committed directory.

    Raises:
        CheckpointError: the same one on every rank: a value of ``meta`` that would not come back, no space, a write
            that failed on some rank, an existing step, shards that overlap or leave gaps. Nothing that existed before
            has changed then.
    """
    directory, world = Path(directory), world or Axis("world")
    partial = directory / (step_name(step) + INCOMPLETE)
    needed = total(world, sum(flat_shard.data.nbytes for flat_shard in flat_shards))
    try:
        with together(world):
            for name, value in meta.items():
                encode(value, name)  # an error before anything is written
            if world.rank == 0:
                prepare(directory, step, needed, replace)
        with together(world):
            write_rank(partial, world.rank, flat_shards)
        with together(world):
            if world.rank == 0:
                commit(directory, step, world.size, meta, replace)
    except BaseException:
        if world.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return directory / step_name(step)


def check_disk_space(directory: Path, flat_shards: Sequence[FlatShard], world: Axis) -> None:
    """Before the first of a run's checkpoints, which may be hours away: whether one can be written. Leaves nothing.

    Raises:
        CheckpointError: on every rank.
    """
    needed = total(world, sum(flat_shard.data.nbytes for flat_shard in flat_shards))
    existing = directory
    while not existing.exists():
        existing = existing.parent
    with together(world):
        if world.rank == 0:
            check_space(existing, needed, "a checkpoint of this run")
            latest = directory / LATEST
            if latest.exists() and not latest.is_file():
                raise CheckpointError(f"{latest} is no regular file, where one has to be written; remove it")
    if world.size > 1:
        _require_shared(existing, world)


def _require_shared(folder: Path, world: Axis) -> None:
    """Every rank sees what rank 0 writes into ``folder``, by the path that rank 0 uses."""
    probe = Path(exchange(world, str(folder / f".shared-{secrets.token_hex(8)}") if world.rank == 0 else "")[0])
    try:
        with together(world):
            if world.rank == 0:
                probe.touch()
        with together(world):
            if not probe.exists():
                raise CheckpointError(
                    f"{probe.parent} is not the folder that rank 0 writes to; checkpoints need a filesystem that all "
                    "nodes share"
                )
    finally:
        if world.rank == 0:
            probe.unlink(missing_ok=True)


def prepare(directory: Path, step: int, needed: int, replace: bool = False) -> Path:
    """Rank 0, first: the empty directory to write into. ``needed`` is the data's size over all ranks, in bytes."""
    final = directory / step_name(step)
    for moved in directory.glob(f"step-*{REPLACED}"):
        _recover_replaced(moved)
    if final.exists() and not replace:
        raise CheckpointError(
            f"{final} exists already; give this run another checkpoint directory, remove it, or save with replace=True"
        )
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in directory.glob(f"step-*{INCOMPLETE}"):
        shutil.rmtree(leftover)
    check_space(directory, needed, f"checkpoint of step {step}")
    partial = directory / (step_name(step) + INCOMPLETE)
    partial.mkdir()
    return partial


def check_space(directory: Path, needed: int, what: str) -> None:
    """A :class:`CheckpointError` with the numbers if ``directory``'s disk has no room for ``needed`` bytes more."""
    status = os.statvfs(directory)
    free = status.f_bavail * status.f_frsize
    # Headers, manifest and rounding to blocks: 1% and 16 MB hold them with room to spare.
    wanted = needed + needed // 100 + (16 << 20)
    if wanted > free:
        raise CheckpointError(
            f"{what} needs {gb(wanted)}, but {directory} has {gb(free)} free; free space there, keep "
            "fewer checkpoints, or save elsewhere (existing checkpoints are untouched)"
        )


def stage(flat_shards: Sequence[FlatShard]) -> list[FlatShard]:
    """A copy of the flat shards in host memory, made between two steps: training may go on while it is written."""
    staged: list[FlatShard] = []
    for group, held in acquired(flat_shards):
        for flat_shard in group:
            data = flat_shard.tensor(held).detach().to("cpu", copy=True)
            staged.append(replaced_by(flat_shard, data=data, holder=None, offset=0))
    return staged


def write_rank(partial: Path, rank: int, flat_shards: Sequence[FlatShard]) -> FileRecord:
    """Every rank: its safetensors file, on the disk when this returns, and a JSON that describes it to rank 0.

    No process group is used, and of what :func:`stage` gave nothing of the training: a thread of its own may write it.
    """
    if not partial.is_dir():
        raise CheckpointError(
            f"{partial}, made by rank 0, is not visible here; the checkpoint directory must be on a filesystem that "
            "all nodes share"
        )
    ordered = sorted(flat_shards, key=lambda flat_shard: -flat_shard.data.dtype.itemsize)
    planned, tensors, rows = _plan(rank, ordered)
    on_gpu = any(flat_shard.data.is_cuda for flat_shard in flat_shards)
    if on_gpu:
        torch.cuda.synchronize()  # the writer's threads read on another stream than the one that made the data
    with ChunkedWriter(partial / rank_name(rank), planned, pin=on_gpu) as writer:
        for group, held in acquired(ordered):
            if held is not None and held.is_cuda:
                torch.cuda.synchronize()
            for flat_shard in group:
                writer.write(flat_shard.row_major(held))
            if held is not None:
                writer.release_sources()
        file = writer.close()
    sync_directory(partial)
    index = {"size": file.size, "checksums": file.checksums, "tensors": tensors, "rows": rows}
    _index_path(partial, rank).write_text(json.dumps(index))  # only rank 0 reads it, and before this save is durable
    return file


def _plan(rank: int, flat_shards: Sequence[FlatShard]) -> tuple[Layout, list[list[Any]], list[list[int]]]:
    """A rank's file, and what it holds, as :meth:`IndexBuilder.add_parts` takes it; all rows of one width."""
    dims = max((len(flat_shard.global_shape) for flat_shard in flat_shards), default=0)
    entries: list[Entry] = []
    tensors: list[list[Any]] = []
    places: list[tuple[int, ...]] = []
    for flat_shard in flat_shards:
        kind, name, shape, dtype = (
            flat_shard.kind,
            flat_shard.name,
            flat_shard.global_shape,
            dtype_name(flat_shard.data.dtype),
        )
        boxes = flat_shard.boxes()
        filler = dims - len(shape)
        for box in boxes:
            entries.append(Entry(tensor_key(kind, name, shape, box), dtype, box.shape))
            places.append((*box.offset, *(0,) * filler, *box.shape, *(1,) * filler))
        tensors.append([kind, name, shape, dtype, len(boxes)])
    planned = layout(entries, {"format": "pt"})
    return planned, tensors, [[rank, start, *place] for start, place in zip(planned.starts, places)]


def commit(directory: Path, step: int, world_size: int, meta: dict[str, Any], replace: bool = False) -> Path:
    """Rank 0, when every rank has written: the manifest, the rename, and ``latest``."""
    final = directory / step_name(step)
    partial = directory / (step_name(step) + INCOMPLETE)
    paths = [_index_path(partial, rank) for rank in range(world_size)]
    contents = IndexBuilder()
    # A shared filesystem takes about a millisecond for a small file, and this is one of every rank.
    with ThreadPoolExecutor(16) as pool:
        for rank, index in enumerate(pool.map(lambda path: read_json(path, MOST_BYTES), paths)):
            contents.add_file(FileRecord(rank_name(rank), index["size"], index["checksums"]))
            contents.add_parts(index["tensors"], index["rows"])
        write_manifest(partial, step, world_size, meta, contents)
        list(pool.map(Path.unlink, paths))
    sync_directory(partial)
    publish(directory, final, partial, replace)
    return final


def prune(directory: Path, step: int, keep_last: int, unproven: int | None = None) -> None:
    """Remove all but the newest ``keep_last`` of the checkpoints up to ``step``.

    Args:
        unproven: the oldest checkpoint from which no step has been taken yet that changed the weights. The newest one
            before it is kept as well: should this one turn out to be of a run that diverged, that one is left.
    """
    steps = [(number, path) for path in steps_in(directory) if (number := step_of(path)) is not None and number <= step]
    keep = {path for _, path in steps[-keep_last:]}
    if unproven is not None:
        keep |= {path for _, path in [pair for pair in steps if pair[0] < unproven][-1:]}
    for _, old in steps:
        if old not in keep:
            _remove(old)


def publish(directory: Path, final: Path, partial: Path, replace: bool = False) -> None:
    """Make a complete ``partial`` visible as ``final`` and point ``latest`` at it; undone if it fails half-way.

    Whatever happens between any two of its operations, a reader finds a complete checkpoint: while a step is replaced
    :func:`~megatron_ds.checkpoint.directory.in_place` finds the one that was moved aside.
    """
    if final.exists() and not replace:
        raise CheckpointError(f"{final} appeared while this checkpoint was being written; it was left as it is")
    replaced = final.with_name(final.name + REPLACED)
    try:
        with replacing_latest(directory, final.name):
            if final.exists():
                os.rename(final, replaced)
            os.rename(partial, final)
            sync_directory(directory)
    except BaseException:
        if not partial.exists():
            os.rename(final, partial)
        if replaced.exists():
            os.rename(replaced, final)
        raise
    sync_directory(directory)
    if replaced.exists():
        shutil.rmtree(replaced)


def _recover_replaced(moved: Path) -> None:
    """A save with ``replace`` died between its two renames, or before it removed what it had replaced."""
    original = moved.with_name(moved.name.removesuffix(REPLACED))
    if original.exists():
        shutil.rmtree(moved)
    else:
        os.rename(moved, original)


def _remove(old: Path) -> None:
    # Renamed first: a kill inside rmtree must not leave half a checkpoint under a complete one's name.
    doomed = old.with_name(old.name + INCOMPLETE)
    os.rename(old, doomed)
    shutil.rmtree(doomed)


def _index_path(partial: Path, rank: int) -> Path:
    return partial / rank_name(rank).replace(".safetensors", ".json")
