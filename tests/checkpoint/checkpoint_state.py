"""A small model's state on any mesh, for the checkpoint tests: no process group, any rank of any mesh at will."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path

import torch

from megatron_ds.checkpoint.manifest import step_name
from megatron_ds.checkpoint.save import commit, prepare, write_rank
from megatron_ds.shard import ShardedDim, ShardSpec
from megatron_ds.shard.flat_shards import FlatShard

# name -> (shape, dim that tensor parallelism cuts or None)
TENSORS: dict[str, tuple[tuple[int, ...], int | None]] = {
    "embedding.weight": ((24, 6), 0),
    "layers.0.attention.qkv.weight": ((4, 3, 2, 6), 0),
    "layers.0.mlp.gate_up.weight": ((2, 8, 6), 1),
    "layers.0.mlp.down.weight": ((6, 8), 1),
    "layers.0.norm.weight": ((7,), None),
    "scale": ((), None),
    "empty": ((0, 5), None),
}
KINDS = ("param", "exp_avg", "exp_avg_sq")


def whole(name: str, kind: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The tensor's values: different in every element of every tensor, and exact in bfloat16."""
    shape = TENSORS[name][0]
    salt = 1 + list(TENSORS).index(name) + 10 * KINDS.index(kind)
    return ((torch.arange(prod(shape)) * 7 + salt * 13) % 251 - 125).to(dtype).reshape(shape)


def shards_of_rank(
    tp: int,
    tp_rank: int,
    zero: int,
    zero_rank: int,
    fill: Callable[[str, str, torch.dtype], torch.Tensor] | None = whole,
    dtype: torch.dtype = torch.float32,
    kinds: tuple[str, ...] = KINDS,
    replicas: bool = False,
) -> list[FlatShard]:
    """What rank (tp_rank, zero_rank) holds: its box, cut flat into ``zero`` shards. ``fill`` None gives NaN.

    With ``replicas`` tensor-parallel ranks other than 0 hold the tensors that are not cut as well.
    """
    flat_shards = []
    for name, (shape, dim) in TENSORS.items():
        if dim is None:
            if tp_rank and not replicas:
                continue
            spec = ShardSpec(name, shape)
        else:
            spec = ShardSpec(name, shape, (ShardedDim(dim, "tp", tp_rank, tp),))
        size = prod(spec.local_shape)
        start, stop = size * zero_rank // zero, size * (zero_rank + 1) // zero
        for kind in kinds:
            if fill is None:
                data = torch.full((stop - start,), float("nan"), dtype=dtype)
            else:
                data = spec.slice_of(fill(name, kind, dtype)).flatten()[start:stop].clone()
            flat_shards.append(FlatShard.of(spec, kind, data, start, stop))
    return flat_shards


def save_virtually(directory: Path, step: int, tp: int = 2, zero: int = 3, dtype: torch.dtype = torch.float32) -> Path:
    """Save the state from tp x zero ranks in this one process, through the same three phases as the real ones."""
    partial = prepare(directory, step, needed=0)
    for rank in range(tp * zero):
        write_rank(partial, rank, shards_of_rank(tp, rank % tp, zero, rank // tp, dtype=dtype))
    meta = {"consumed_samples": step * 8}
    final = commit(directory, step, tp * zero, meta)
    assert final == directory / step_name(step)
    return final


def wrong_shards(flat_shards: list[FlatShard], dtype: torch.dtype = torch.float32) -> list[str]:
    """The flat shards that do not hold exactly their part of the state."""
    wrong = []
    for flat_shard in flat_shards:
        end = [o + s for o, s in zip(flat_shard.box_offset, flat_shard.box_shape)]
        box = tuple(slice(o, e) for o, e in zip(flat_shard.box_offset, end))
        want = whole(flat_shard.name, flat_shard.kind, dtype)[box].flatten()[flat_shard.start : flat_shard.stop]
        if not torch.equal(flat_shard.data, want.to(flat_shard.data.dtype)):
            wrong.append(f"{flat_shard.kind} of {flat_shard.name} [{flat_shard.start}, {flat_shard.stop})")
    return wrong
