"""What a rank reads of a checkpoint before its own bytes, counted from 8 ranks to 16,384: none of it is on a disk."""

from __future__ import annotations

import functools
import gc
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from itertools import accumulate, product
from math import prod
from pathlib import Path

import pytest
import torch

from megatron_ds.checkpoint import load, save
from megatron_ds.checkpoint.directory import look_at
from megatron_ds.checkpoint.index import BLOCK, BlockFile, IndexBuilder
from megatron_ds.checkpoint.manifest import rank_name
from megatron_ds.checkpoint.manifest_file import write_manifest
from megatron_ds.checkpoint.safetensors_header import dtype_name
from megatron_ds.checkpoint.writer import FileRecord
from megatron_ds.shard import ShardedDim, ShardSpec
from megatron_ds.shard.flat_shards import FlatShard

KINDS = ("param", "exp_avg", "exp_avg_sq")
LAYERS = 8
H = 1024
TENSORS: dict[str, tuple[tuple[int, ...], int | None]] = {
    "embedding.weight": ((32768, H), 0),
    **{
        f"layers.{layer}.{name}": what
        for layer in range(LAYERS)
        for name, what in {
            "attention_norm.weight": ((H,), None),
            "attention.qkv.weight": ((3 * H, H), 0),
            "attention.output.weight": ((H, H), 1),
            "mlp_norm.weight": ((H,), None),
            "mlp.experts.up": ((4, 2 * H, H), 1),
            "mlp.experts.down": ((4, H, 2 * H), 2),
        }.items()
    },
}


@functools.cache
def specs_of(tp_rank: int, tp: int) -> tuple[list[ShardSpec], list[int]]:
    """What a tensor-parallel rank has, and where each ends if they lie end to end."""
    specs = [
        ShardSpec(name, shape, () if dim is None else (ShardedDim(dim, "tp", tp_rank, tp),))
        for name, (shape, dim) in TENSORS.items()
        if dim is not None or tp_rank == 0
    ]
    return specs, list(accumulate(prod(spec.local_shape) for spec in specs))


def held_by(rank: int, ranks: int, tp: int = 8) -> Iterator[FlatShard]:
    """The parameters of a rank, ZeRO over ranks / tp: its share of what a tensor-parallel rank has, laid end to end."""
    specs, ends = specs_of(rank % tp, tp)
    first, last = (ends[-1] * (rank // tp + more) // (ranks // tp) for more in (0, 1))
    for number in range(bisect_right(ends, first), bisect_left(ends, last) + 1):
        begin = ends[number - 1] if number else 0
        start, stop = max(first, begin) - begin, min(last, ends[number]) - begin
        yield FlatShard.of(specs[number], "param", torch.empty(stop - start, device="meta"), start, stop)


def save_without_data(directory: Path, ranks: int) -> IndexBuilder:
    """The manifest and the index of a checkpoint of so many ranks, as ``commit`` makes them of what the ranks wrote."""
    directory.mkdir()
    contents = IndexBuilder()
    for rank in range(ranks):
        tensors, rows, at = [], [], 4096
        for shard in held_by(rank, ranks):
            boxes = shard.boxes()
            pad = 3 - len(shard.global_shape)
            for kind in KINDS:
                for box in boxes:
                    rows.append([rank, at, *box.offset, *[0] * pad, *box.shape, *[1] * pad])
                    at += 4 * box.numel
                tensors.append((kind, shard.name, shard.global_shape, dtype_name(torch.float32), len(boxes)))
        contents.add_file(FileRecord(rank_name(rank), at, ("0" * 16,) * -(-at // (8 << 20))))
        contents.add_parts(tensors, rows)
    write_manifest(directory, 1, ranks, {"step": 1}, contents)
    return contents


def cost(directory: Path, rank: int, ranks: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What ``rank`` reads and looks for to load what it held: bytes, numbers and objects, files."""
    looked_for: list[Path] = []
    monkeypatch.setattr("megatron_ds.checkpoint.directory.check_size", lambda path, size: looked_for.append(path))
    manifest = look_at(directory, (rank, ranks))
    numbers = 0
    touched = set()
    for shard in held_by(rank, ranks):
        for kind, box in product(KINDS, shard.boxes()):
            found = manifest.index.parts(manifest.tensors[kind, shard.name], box)
            numbers += len(found) * manifest.index.sizes.row
            touched |= {part.file for part, _ in found}
            for part, _ in found:
                manifest.index.checksum(part.file, part.start // manifest.index.chunk_bytes)
    assert touched == {rank}
    blocks = manifest.index._read
    assert isinstance(blocks, BlockFile)
    return {
        "manifest": (directory / "manifest.json").stat().st_size,
        "index": len(blocks.blocks) * BLOCK * 8,
        "objects": len(manifest.tensors) + numbers,
        "files": len(looked_for),
    }


def test_a_ranks_cost_does_not_grow_with_the_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    costs: dict[int, dict[str, int]] = {}
    for ranks in (8, 1024, 16384):
        save_without_data(tmp_path / str(ranks), ranks)
        each = [cost(tmp_path / str(ranks), rank, ranks, monkeypatch) for rank in (0, ranks // 2 + 1, ranks - 1)]
        costs[ranks] = {what: max(one[what] for one in each) for what in each[0]}
        costs[ranks]["whole index"] = (tmp_path / str(ranks) / "manifest.index").stat().st_size
    few, many = costs[8], costs[16384]
    print(costs)
    assert many["whole index"] > 50 * few["whole index"]
    assert many["manifest"] < 1.2 * few["manifest"]  # numbers of more digits
    assert many["index"] <= 2 * few["index"]
    assert many["objects"] <= few["objects"]
    assert many["files"] == few["files"] == 1


def test_a_tensor_costs_few_objects(tmp_path: Path) -> None:
    """Each collection of the youngest generation stands for so many objects; each of the oldest takes 0.1 s."""
    count = 1000
    shards = [FlatShard.whole(f"layers.{i}.weight", "param", torch.ones(4)) for i in range(count)]
    collections = 0

    def counted(phase: str, info: dict[str, int]) -> None:
        nonlocal collections
        collections += phase == "start"

    gc.collect()
    gc.callbacks.append(counted)
    try:
        save(tmp_path, 1, shards, {})
        saved, collections = collections, 0
        load(tmp_path, shards)
    finally:
        gc.callbacks.remove(counted)
    for objects in (saved * gc.get_threshold()[0] / count, collections * gc.get_threshold()[0] / count):
        assert objects < 24
