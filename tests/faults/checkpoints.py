"""Checkpoints of a small state whose values tell the step, saved and loaded without process groups."""

from __future__ import annotations

from pathlib import Path

import torch
from damage import files_of

from megatron_ds.checkpoint import FlatShard, load
from megatron_ds.checkpoint.save import commit, prepare, write_rank

SHAPES = {"embedding.weight": (40, 6), "norm.weight": (7,), "layers.0.mlp.weight": (300, 5), "scale": ()}
KINDS = ("param", "exp_avg")


def values(step: int, name: str, kind: str) -> torch.Tensor:
    """Different at every step, in every element."""
    count = int(torch.Size(SHAPES[name]).numel())
    return ((torch.arange(count) * 7 + 1000 * step + 13 * len(name) + len(kind)) % 5003).float().reshape(SHAPES[name])


def flat_shards(step: int, rank: int = 0, ranks: int = 1) -> list[FlatShard]:
    """A rank's part of the state of a step."""
    shards = []
    for name, shape in SHAPES.items():
        count = int(torch.Size(shape).numel())
        start, stop = count * rank // ranks, count * (rank + 1) // ranks
        for kind in KINDS:
            data = values(step, name, kind).flatten()[start:stop].clone()
            shards.append(FlatShard(name, kind, shape, (0,) * len(shape), shape, start, stop, data))
    return shards


def save(directory: Path, step: int, ranks: int = 2) -> None:
    partial = prepare(directory, step, needed=0, replace=True)
    for rank in range(ranks):
        write_rank(partial, rank, flat_shards(step, rank, ranks))
    commit(directory, step, ranks, {"step": step, "data": [1.5, "text"]}, replace=True)


def loaded(path: Path) -> int:
    """The step of what loads, every value of which is right."""
    shards = flat_shards(0)
    step = load(path, shards)["step"]
    for shard in shards:
        assert torch.equal(shard.data, values(step, shard.name, shard.kind).flatten()), (step, shard.name, shard.kind)
    return int(step)


def same(one: Path, other: Path) -> bool:
    """Whether a step's files are still those of before."""
    return one.is_dir() and all(
        (one / path.name).is_file() and (one / path.name).read_bytes() == path.read_bytes() for path in files_of(other)
    )
