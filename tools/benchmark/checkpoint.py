"""How fast a checkpoint reaches the disk and comes back: ours, torch's DCP and ``safetensors.save_file``, interleaved.

Every rank holds its half of the same fp32 tensors. A save counts from a barrier until every rank's bytes are durable
(fsync) and, where the format has one, the checkpoint is committed. A cold load starts with the files dropped from the
page cache, a warm one follows at once. "disk" is the same bytes written with direct I/O from four threads and nothing
else: the rate to aim at. Beside each rate stand the CPU seconds of all ranks for 1 GB (what the kernel's own threads do
is not in them): they decide the order where the disk is fast or the cores are busy.

    python tools/benchmark/checkpoint.py --gigabytes 1 --ranks 2 --repeats 3
"""

from __future__ import annotations

import itertools
import os
import shutil
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import tyro
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, Shard, init_device_mesh

from megatron_ds.checkpoint import FlatShard, load, save
from megatron_ds.mesh import Axis
from megatron_ds.shard import ShardedDim, ShardSpec
from megatron_ds.testing import run_ranks

KINDS = ("save", "load, cold", "load, warm")
COLUMNS = 1024
TENSOR_ROWS = 4096  # 16 MB a tensor in fp32: about a layer's matrix of a 1B model


@dataclass
class Options:
    gigabytes: float = 1.0
    """Size of the whole checkpoint, in 1e9 bytes."""
    ranks: int = 2
    """Processes that save together (gloo)."""
    repeats: int = 3
    """Runs of each; the median is shown."""
    directory: Path | None = None
    """Where to write; it must be on the disk to be measured. Default: the temporary directory."""


def main(options: Options) -> None:
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-benchmark-", dir=options.directory))
    try:
        results = run_ranks(measure, options.ranks, str(folder), options.gigabytes, options.repeats, timeout=1200.0)[0]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    table = Table(
        title=f"{options.gigabytes:g} GB from {options.ranks} ranks, GB/s, median of {options.repeats} (lowest-highest)"
    )
    for column in ("", *KINDS):
        table.add_column(column, justify="left" if not column else "right")
    for name in METHODS:
        table.add_row(name, *(_cell(results.get((name, what), []), options.gigabytes) for what in KINDS))
    Console(width=112).print(table)


def _cell(runs: list[tuple[float, float]], gigabytes: float) -> str:
    """``runs``: wall-clock and CPU seconds."""
    if not runs:
        return ""
    rates = sorted(gigabytes / wall for wall, _ in runs)
    cpu = statistics.median(cpu for _, cpu in runs) / gigabytes
    return f"{statistics.median(rates):.2f} ({rates[0]:.2f}-{rates[-1]:.2f}), {cpu:.2f} s"


def measure(folder: str, gigabytes: float, repeats: int) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """On every rank: all methods, interleaved. Wall-clock and CPU seconds by method and one of :data:`KINDS`."""
    warnings.simplefilter("ignore")
    rank, world = dist.get_rank(), dist.get_world_size()
    count = max(1, round(gigabytes * 1e9 / (4 * COLUMNS * TENSOR_ROWS)))
    rows = round(gigabytes * 1e9 / count / 4 / COLUMNS / world)
    generator = torch.Generator().manual_seed(rank)
    state = {f"layers.{i}.weight": torch.randn(rows, COLUMNS, generator=generator) for i in range(count)}
    seconds: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for repeat in range(repeats):
        for name, (saver, loader) in METHODS.items():
            path = Path(folder) / f"{name.replace(' ', '-')}-{repeat}"
            os.sync()
            seconds.setdefault((name, "save"), []).append(timed(lambda: saver(path, state)))  # noqa: B023
            if loader is not None:
                drop_from_page_cache(path)
                target = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
                for kind in KINDS[1:]:
                    seconds.setdefault((name, kind), []).append(timed(lambda: loader(path, target)))  # noqa: B023
                if not all(torch.equal(target[key], state[key]) for key in state):
                    raise AssertionError(f"{name} did not load what it saved")
            dist.barrier()
            if rank == 0:
                shutil.rmtree(path)
    return seconds


def timed(function: Callable[[], None]) -> tuple[float, float]:
    """Seconds until all ranks are done, and CPU seconds of all ranks."""
    dist.barrier()
    start, cpu = time.perf_counter(), time.process_time()
    function()
    spent = torch.tensor([time.process_time() - cpu])
    dist.all_reduce(spent)
    return time.perf_counter() - start, float(spent)


def drop_from_page_cache(path: Path) -> None:
    dist.barrier()
    for file in path.rglob("*"):
        if file.is_file():
            fd = os.open(file, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def flat_shards(state: dict[str, torch.Tensor]) -> list[FlatShard]:
    rank, world = dist.get_rank(), dist.get_world_size()
    return [
        FlatShard.of(
            ShardSpec(key, (tensor.shape[0] * world, tensor.shape[1]), (ShardedDim(0, "tp", rank, world),)),
            "param",
            tensor,
        )
        for key, tensor in state.items()
    ]


def world_axis() -> Axis:
    return Axis("world", dist.get_rank(), dist.get_world_size(), dist.group.WORLD)


def save_ours(path: Path, state: dict[str, torch.Tensor]) -> None:
    save(path, 1, flat_shards(state), {}, world_axis())


def load_ours(path: Path, state: dict[str, torch.Tensor]) -> None:
    load(path, flat_shards(state), world_axis())


def distributed(state: dict[str, torch.Tensor]) -> dict[str, DTensor]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {key: DTensor.from_local(tensor, mesh, [Shard(0)]) for key, tensor in state.items()}


def save_dcp(path: Path, state: dict[str, torch.Tensor]) -> None:
    dcp.save(distributed(state), checkpoint_id=path)  # its writer calls fsync by default


def load_dcp(path: Path, state: dict[str, torch.Tensor]) -> None:
    dcp.load(distributed(state), checkpoint_id=path)


def save_safetensors(path: Path, state: dict[str, torch.Tensor]) -> None:
    path.mkdir(exist_ok=True)
    file = path / f"{dist.get_rank()}.safetensors"
    save_file(state, file)
    fd = os.open(file, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def load_safetensors(path: Path, state: dict[str, torch.Tensor]) -> None:
    for key, tensor in load_file(path / f"{dist.get_rank()}.safetensors").items():
        state[key].copy_(tensor)


def write_raw(path: Path, state: dict[str, torch.Tensor]) -> None:
    path.mkdir(exist_ok=True)
    size = sum(tensor.nbytes for tensor in state.values())
    chunk = 8 << 20
    fd = os.open(path / str(dist.get_rank()), os.O_CREAT | os.O_WRONLY | os.O_DIRECT)
    os.posix_fallocate(fd, 0, size)
    base = np.ones(chunk + 4096, dtype=np.uint8)
    aligned = base[-base.ctypes.data % 4096 :][:chunk].data
    chunks = itertools.count()

    def write() -> None:
        while (offset := next(chunks) * chunk) < size:
            os.pwrite(fd, aligned, offset)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.fsync(fd)
    os.close(fd)


METHODS: dict[str, tuple[Callable[..., None], Callable[..., None] | None]] = {
    "disk": (write_raw, None),
    "ours": (save_ours, load_ours),
    "DCP": (save_dcp, load_dcp),
    "safetensors": (save_safetensors, load_safetensors),
}

if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
