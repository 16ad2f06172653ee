"""Saving and loading with real ranks: any world size, and one rank's failure is every rank's, word for word."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from checkpoint_state import shards_of_rank, wrong_shards

from megatron_ds.checkpoint import FlatShard, load, save
from megatron_ds.checkpoint.save import commit, prepare, stage, write_rank
from megatron_ds.errors import CheckpointError
from megatron_ds.mesh import Axis
from megatron_ds.testing import run_ranks


def world_axis() -> Axis:
    return Axis("world", dist.get_rank(), dist.get_world_size(), dist.group.WORLD)


def my_shards(tp: int, fill: bool) -> list[FlatShard]:
    rank, zero = dist.get_rank(), dist.get_world_size() // tp
    flat_shards = shards_of_rank(tp, rank % tp, zero, rank // tp, **({} if fill else {"fill": None, "replicas": True}))
    if torch.cuda.is_available() and dist.get_backend() == "nccl":
        flat_shards = [FlatShard(**{**vars(flat_shard), "data": flat_shard.data.cuda()}) for flat_shard in flat_shards]
    return flat_shards


def save_on_ranks(directory: str, step: int, tp: int) -> str:
    return str(save(directory, step, my_shards(tp, fill=True), {"step": step}, world_axis()))


def load_on_ranks(directory: str, tp: int) -> tuple[list[str], dict[str, int]]:
    flat_shards = my_shards(tp, fill=False)
    meta = load(directory, flat_shards, world_axis())
    return wrong_shards(
        [FlatShard(**{**vars(flat_shard), "data": flat_shard.data.cpu()}) for flat_shard in flat_shards]
    ), meta


def test_another_number_of_ranks_loads_the_same(tmp_path: Path) -> None:
    saved = run_ranks(save_on_ranks, 4, str(tmp_path), 3, 2)
    assert saved == [str(tmp_path / "step-00000003")] * 4
    for world_size, tp in [(1, 1), (2, 2), (3, 1), (4, 4)]:
        assert run_ranks(load_on_ranks, world_size, str(tmp_path), tp) == [([], {"step": 3})] * world_size


def write_without_a_group(directory: str) -> bool:
    """Stage, go on training, end the process group; then write from a thread."""
    partial, rank = Path(directory) / "step-00000005.incomplete", dist.get_rank()
    if rank == 0:
        prepare(Path(directory), 5, needed=0)
    flat_shards = my_shards(2, fill=True)
    staged = stage(flat_shards)
    for flat_shard in flat_shards:
        flat_shard.data.fill_(-1)
    dist.barrier()
    dist.destroy_process_group()
    thread = threading.Thread(target=write_rank, args=(partial, rank, staged))
    thread.start()
    thread.join()
    return not dist.is_initialized()


def test_what_is_staged_is_written_without_the_training(tmp_path: Path) -> None:
    assert run_ranks(write_without_a_group, 2, str(tmp_path)) == [True, True]
    commit(tmp_path, 5, 2, {"step": 5})
    target = shards_of_rank(1, 0, 1, 0, fill=None)
    assert load(tmp_path, target) == {"step": 5} and wrong_shards(target) == []


def message_of(function: Callable[[], object]) -> str:
    try:
        function()
    except CheckpointError as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def save_with_a_full_disk(directory: str, culprit: int, patched: str) -> str:
    real = getattr(os, patched)

    def full(*args: object, **kwargs: object) -> object:
        if patched != "pwrite" or args[2]:  # the disk fills up after the first chunk
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    if dist.get_rank() == culprit:
        setattr(os, patched, full)
    big = FlatShard.whole(f"big.{dist.get_rank()}", "param", torch.zeros(5_000_000))
    return message_of(lambda: save(directory, 2, [big], {}, world_axis()))


@pytest.mark.parametrize(
    ("culprit", "patched"), [(1, "pwrite"), (0, "pwrite"), (2, "fsync"), (0, "rename"), (0, "replace"), (0, "statvfs")]
)
def test_one_ranks_failure_is_every_ranks(tmp_path: Path, culprit: int, patched: str) -> None:
    run_ranks(save_on_ranks, 3, str(tmp_path), 1, 1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    messages = run_ranks(save_with_a_full_disk, 3, str(tmp_path), culprit, patched)
    assert messages == [f"rank {culprit}: OSError: [Errno 28] No space left on device"] * 3
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before
    assert not list(tmp_path.glob("step-00000002*"))


def save_of_a_bad_dtype(directory: str) -> str:
    bad = torch.zeros(2, dtype=torch.complex64 if dist.get_rank() == 1 else torch.float32)
    return message_of(lambda: save(directory, 1, [FlatShard.whole("w", "param", bad)], {}, world_axis()))


def test_a_defect_keeps_its_type_where_it_happened(tmp_path: Path) -> None:
    zero, one = run_ranks(save_of_a_bad_dtype, 2, str(tmp_path))
    assert one.startswith("TypeError: safetensors has no torch.complex64")
    assert zero == f"rank 1: {one}"
    assert list(tmp_path.iterdir()) == []


def load_something_else(directory: str) -> str:
    """Rank 0 asks for a name that is not there, rank 1 for another shape; each differs, all must hear of both."""
    flat_shards = my_shards(1, fill=False)
    if dist.get_rank() == 0:
        flat_shards = [p for p in flat_shards if p.name != "scale"] + [
            FlatShard.whole("extra", "param", torch.zeros(1))
        ]
    elif dist.get_rank() == 1:
        flat_shards = [p for p in flat_shards if p.name != "scale"] + [
            FlatShard.whole("scale", "param", torch.zeros(3))
        ]
    else:
        flat_shards = [p for p in flat_shards if p.name != "scale"]
    return message_of(lambda: load(directory, flat_shards, world_axis()))


def test_a_mismatch_is_the_same_message_everywhere(tmp_path: Path) -> None:
    run_ranks(save_on_ranks, 2, str(tmp_path), 1, 1)
    messages = run_ranks(load_something_else, 3, str(tmp_path))
    assert len(set(messages)) == 1
    assert "missing from the checkpoint: extra" in messages[0]
    assert "in the checkpoint but not in the model: exp_avg of scale, exp_avg_sq of scale" in messages[0]
    assert "of another shape: scale: [] in the checkpoint, [3] in the model" in messages[0]


def load_damaged(directory: str) -> str:
    return message_of(lambda: load(directory, my_shards(2, fill=False), world_axis()))


def test_damage_that_one_rank_meets_is_every_ranks(tmp_path: Path) -> None:
    run_ranks(save_on_ranks, 2, str(tmp_path), 1, 2)
    path = tmp_path / "step-00000001" / "rank-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    messages = run_ranks(load_damaged, 2, str(tmp_path))
    assert len(set(messages)) == 1
    assert messages[0].startswith(f"rank 1: {path} is damaged")
    path.unlink()
    messages = run_ranks(load_damaged, 2, str(tmp_path))
    assert len(set(messages)) == 1 and "is missing" in messages[0] and "no other checkpoint there" in messages[0]
