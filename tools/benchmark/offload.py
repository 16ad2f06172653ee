"""How fast offloaded state leaves for the disk and comes back: NvmeStore beside what one would write without it.

Each contestant keeps the same fp32 regions. "write" counts until the bytes are durable (fsync), "read" starts with the
files dropped from the page cache, and "swap" is what an optimizer step does: read every region, change it, write it
back. Repeats are interleaved; the median is shown. CPU is this process's own seconds for a GB of state swapped: what is
taken from the training beside it.

    python tools/benchmark/offload.py --gigabytes 1 --repeats 3
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from megatron_ds.checkpoint.writer import CHUNK_BYTES
from megatron_ds.files import checksum
from megatron_ds.files.direct_io import aligned_buffer
from megatron_ds.zero.store import NvmeStore
from megatron_ds.zero.store.blocks import BlockPool

Update = Callable[[torch.Tensor], object]


@dataclass
class Options:
    gigabytes: float = 1.0
    """State of one rank, in 1e9 bytes."""
    region_mb: float = 48.0
    """MB of one region: what is read, updated and written at a time."""
    repeats: int = 3
    """Runs of each; the median is shown."""
    directory: Path | None = None
    """Where to write; it must be on the disk to be measured. Default: the temporary directory."""


class Contestant(Protocol):
    def write(self, value: float) -> None:
        """Fill every region with ``value``; durable at the end."""

    def drop_cache(self) -> None: ...

    def read(self) -> float:
        """Read every region; the sum of their first elements."""

    def swap(self, update: Update) -> None:
        """Read, update and write every region; durable at the end."""

    def close(self) -> None: ...


class Ours:
    """NvmeStore with three staging buffers; the others hold one region."""

    def __init__(self, folder: Path, count: int, numel: int):
        self.store = NvmeStore(folder, torch.device("cpu"), 3 * BlockPool.cost(4 * numel))
        self.regions = [self.store.allocate(f"region {i}", numel, torch.float32) for i in range(count)]

    def each(self) -> Iterator[tuple[Any, torch.Tensor]]:
        coming = self.regions[0].read_start()
        for i, region in enumerate(self.regions):
            tensor = coming.wait()
            if i + 1 < len(self.regions):
                coming = self.regions[i + 1].read_start()
            yield region, tensor

    def write(self, value: float) -> None:
        self.swap(lambda tensor: tensor.fill_(value))  # the first time nothing is read

    def read(self) -> float:
        total = 0.0
        for region, tensor in self.each():
            total += float(tensor[0])
            region.release()
        return total

    def swap(self, update: Update) -> None:
        for region, tensor in self.each():
            update(tensor)
            region.write_start()
        self.store.drain()
        os.fdatasync(self.store._file.fd)

    def drop_cache(self) -> None:
        pass  # it was never in the cache

    def close(self) -> None:
        self.store.close()


class Files:
    """One file a region, read and written whole; how is up to the subclasses."""

    def __init__(self, folder: Path, count: int, numel: int):
        folder.mkdir()
        self.paths, self.numel = [folder / str(i) for i in range(count)], numel
        self.buffer = torch.zeros(numel)

    def load(self, path: Path) -> torch.Tensor:
        raise NotImplementedError

    def save(self, path: Path, tensor: torch.Tensor) -> None:
        raise NotImplementedError

    def write(self, value: float) -> None:
        self.buffer.fill_(value)
        for path in self.paths:
            self.save(path, self.buffer)
        self.sync()

    def read(self) -> float:
        return sum(float(self.load(path)[0]) for path in self.paths)

    def swap(self, update: Update) -> None:
        for path in self.paths:
            tensor = self.load(path)
            update(tensor)
            self.save(path, tensor)
        self.sync()

    def sync(self) -> None:
        for path in self.paths:
            fd = os.open(path, os.O_RDONLY)
            os.fdatasync(fd)
            os.close(fd)

    def drop_cache(self) -> None:
        for path in self.paths:
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)

    def close(self) -> None:
        pass


class Memmap(Files):
    """``np.memmap``, updated through a copy as a device would need it."""

    def load(self, path: Path) -> torch.Tensor:
        self.buffer.numpy()[:] = np.memmap(path, dtype=np.float32, mode="r")
        return self.buffer

    def save(self, path: Path, tensor: torch.Tensor) -> None:
        mapped = np.memmap(path, dtype=np.float32, mode="r+" if path.exists() else "w+", shape=(self.numel,))
        mapped[:] = tensor.numpy()


class Buffered(Files):
    """One thread through the page cache."""

    def load(self, path: Path) -> torch.Tensor:
        with open(path, "rb", buffering=0) as file:
            file.readinto(self.buffer.numpy().data.cast("B"))
        return self.buffer

    def save(self, path: Path, tensor: torch.Tensor) -> None:
        with open(path, "r+b" if path.exists() else "wb", buffering=0) as file:
            file.write(tensor.numpy().data.cast("B"))


class Safetensors(Files):
    """``safetensors.torch``: a file written and mapped each time."""

    def load(self, path: Path) -> torch.Tensor:
        self.buffer.copy_(load_file(path)["region"])
        return self.buffer

    def save(self, path: Path, tensor: torch.Tensor) -> None:
        save_file({"region": tensor}, path)


CONTESTANTS: dict[str, Callable[[Path, int, int], Any]] = {
    "NvmeStore": Ours,
    "NvmeStore without checksums": Ours,
    "buffered, one thread": Buffered,
    "numpy memmap": Memmap,
    "safetensors": Safetensors,
}


def main(options: Options) -> None:
    torch.set_num_threads(1)
    numel = round(options.region_mb * 1e6 / 4)
    count = max(2, round(options.gigabytes * 1e9 / (4 * numel)))
    gigabytes = count * numel * 4 / 1e9
    folder = Path(tempfile.mkdtemp(prefix="offload-benchmark-", dir=options.directory))
    seconds: dict[tuple[str, str], list[float]] = {}
    try:
        for repeat in range(options.repeats):
            for name, make in CONTESTANTS.items():
                with mock.patch(
                    "megatron_ds.zero.store.nvme.checksum", (lambda data: "") if "out" in name else checksum
                ):
                    run(make(folder / f"{repeat}-{name}", count, numel), count, seconds, name)
                shutil.rmtree(folder / f"{repeat}-{name}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    show(options, gigabytes, count, seconds)


def run(contestant: Any, count: int, seconds: dict[tuple[str, str], list[float]], name: str) -> None:
    def timed(what: str, function: Callable[[], Any]) -> Any:
        os.sync()
        wall, cpu = time.perf_counter(), time.process_time()
        result = function()
        seconds.setdefault((name, what), []).append(time.perf_counter() - wall)
        seconds.setdefault((name, f"{what} cpu"), []).append(time.process_time() - cpu)
        return result

    timed("write", lambda: contestant.write(2.0))
    contestant.drop_cache()
    if timed("read", contestant.read) != 2.0 * count:
        raise AssertionError(f"{name} did not read what it wrote")
    contestant.drop_cache()
    timed("swap", lambda: contestant.swap(lambda tensor: tensor.add_(1.0)))
    contestant.drop_cache()
    if contestant.read() != 3.0 * count:
        raise AssertionError(f"{name} did not keep what it swapped")
    contestant.close()


def show(options: Options, gigabytes: float, count: int, seconds: dict[tuple[str, str], list[float]]) -> None:
    table = Table(
        title=f"{count} regions of {options.region_mb:g} MB, GB/s, median of {options.repeats} (lowest-highest)"
    )
    columns = ("write", "read", "swap")
    for column in ("", "write, new file", "read, cold", "swap (read + write)", "CPU s a GB swapped"):
        table.add_column(column, justify="left" if not column else "right")
    for name in CONTESTANTS:
        cells = []
        for what in columns:
            moved = gigabytes * (2 if what == "swap" else 1)
            rates = sorted(moved / each for each in seconds[name, what])
            cells.append(f"{statistics.median(rates):.2f} ({rates[0]:.2f}-{rates[-1]:.2f})")
        cells.append(f"{statistics.median(seconds[name, 'swap cpu']) / gigabytes:.2f}")
        table.add_row(name, *cells)
    console = Console(width=120)
    console.print(table)
    chunk = aligned_buffer(CHUNK_BYTES).fill_(1).numpy().data
    start = time.perf_counter()
    for _ in range(64):
        checksum(chunk)
    console.print(f"checksum alone: {64 * CHUNK_BYTES / 1e9 / (time.perf_counter() - start):.1f} GB/s a core")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
