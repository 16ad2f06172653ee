"""State on a local disk, through aligned staging buffers and direct I/O on a few threads.

Chunks of 8 MB of every region are read, checked and (CUDA) sent to the device by worker threads, so that the next
region is read while the current one is updated and the one before is written. Host memory is the staging buffers
alone. A read waits for a buffer where none is free and starts by itself when one is given back, and one that was made
too early gives its buffer to one that is waited for, so that a small bound costs overlap and nothing else.

One swap file holds all regions of a rank, at multiples of 4096 bytes: a file each would run into the limit on open
files (1,024 on most systems) at some ten billion parameters a rank. The file has no name, so that the kernel removes
it with the process, however that ends.

Every chunk's xxh3 checksum is taken when it is written and compared when it is read; both are kept in memory, so that
not even a stale block of an earlier write passes. After a failure every further wait raises it: what is in memory and
on disk no longer belongs together, and only a checkpoint helps.
"""

from __future__ import annotations

import errno
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from functools import partial
from pathlib import Path

import torch

from megatron_ds.checkpoint.writer import CHUNK_BYTES, THREADS
from megatron_ds.comm import Pending
from megatron_ds.errors import OffloadError
from megatron_ds.files import checksum, gb
from megatron_ds.files.direct_io import DirectFile, aligned_up
from megatron_ds.zero.store.blocks import Block, BlockPool, Event, Streams


class Phase(Enum):
    """Where a region is."""

    STORED = "on disk"
    READING = "being read"
    READY = "read, not waited for"
    IN_USE = "in use"
    WRITING = "being written"


class NvmeRegion:
    """A range of the swap file; see :class:`megatron_ds.zero.store.base.Region`."""

    tensor = None

    def __init__(self, store: NvmeStore, name: str, numel: int, dtype: torch.dtype, offset: int):
        self.name, self.numel, self.dtype = name, numel, dtype
        self.size = numel * dtype.itemsize
        self.offset = offset
        self.checksums: list[str | None] = [None] * -(-self.size // store.chunk)  # None: never written, zeros
        self.phase = Phase.STORED
        self.block: Block | None = None
        self.jobs = 0  # chunks under way
        self._store = store

    def read_start(self) -> Pending:
        self._store.start_read(self)
        return Pending(lambda: self._store.finish_read(self))

    def write_start(self) -> None:
        self._store.start_write(self)

    def release(self) -> None:
        self._store.release(self)


class NvmeStore:
    """Regions in an unnamed swap file below ``folder``.

    Args:
        folder: on a local disk; made if it is not there.
        device: where regions are computed with. On a CPU that is the staging buffer itself.
        host_bytes: bound on the staging buffers. Three times what is read at once gives full overlap, once is the
            least that works.
        pin: page-lock the staging buffers (CUDA only).

    Raises:
        OffloadError: the folder cannot be used. Also from :meth:`allocate` (no room), from waits and from
            :meth:`drain` (whatever failed on a worker thread before).
    """

    def __init__(
        self,
        folder: str | Path,
        device: torch.device,
        host_bytes: int,
        pin: bool = True,
        threads: int = THREADS,
        chunk: int = CHUNK_BYTES,
    ):
        self.device, self.chunk = device, chunk
        self.folder = Path(folder)
        self._file = make_swap_file(self.folder)
        self._size = 0
        self._streams = Streams(device) if device.type == "cuda" else None
        self._blocks = BlockPool(device, True, pin and self._streams is not None, host_bytes)
        self._host_bytes = host_bytes
        # A thread of its own starts on the first GPU: page-locking there would open a context on it for every rank.
        begin = None if self._streams is None else partial(torch.cuda.set_device, self._streams.up.device)
        self._pool = ThreadPoolExecutor(threads, "nvme-store", begin)
        # Guards everything below, the pool of blocks and the regions' fields; told whenever a job ends.
        self._changed = threading.Condition()
        self._waiting: list[NvmeRegion] = []  # reads without a buffer, in order
        self._ready: list[NvmeRegion] = []  # read, and not waited for
        self._jobs = 0
        self._failure: Exception | None = None

    def allocate(self, name: str, numel: int, dtype: torch.dtype) -> NvmeRegion:
        region = NvmeRegion(self, name, numel, dtype, self._size)
        size = aligned_up(region.size)
        if BlockPool.cost(size) > self._host_bytes:
            raise OffloadError(
                f"{name} is swapped as a whole and takes {BlockPool.cost(size)} bytes, but the staging buffers may "
                f"take {self._host_bytes} in all; raise zero.host_memory_mb or lower zero.bucket_mb"
            )
        try:
            self._file.reserve(self._size, size)
        except OSError as error:
            raise self._explain(error, region, 0, size, "reserved") from error
        self._size += size
        return region

    def drain(self) -> None:
        """Wait until no transfer is under way; raise what failed."""
        with self._changed:
            while self._jobs:
                self._changed.wait()
            self._raise_failure()

    def close(self) -> None:
        """End the threads, after the chunks they are at, and free the buffers and the disk space."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self._streams is not None:
            torch.cuda.synchronize(self.device)  # chunks that no thread waits for any more
        with self._changed:
            self._failure = self._failure or RuntimeError("the store is closed")
            self._blocks.clear()
            self._blocks.total = self._size = self._jobs = 0
        self._file.close()

    # What regions ask for, on the caller's thread.

    def start_read(self, region: NvmeRegion) -> None:
        with self._changed:
            if region in self._waiting or region.phase not in (Phase.STORED, Phase.WRITING):
                raise RuntimeError(f"{region.name} is {region.phase.value}; write_start() or release() it first")
            self._waiting.append(region)
            self._serve_waiting()

    def finish_read(self, region: NvmeRegion) -> torch.Tensor:
        with self._changed:
            while region.phase is not Phase.READY:
                self._raise_failure()
                if self._jobs == 0:
                    self._serve_alone(region)
                else:
                    self._changed.wait()
            self._raise_failure()
            self._ready.remove(region)
            region.phase = Phase.IN_USE
            block = region.block
        assert block is not None
        if self._streams is not None and region.size:
            self._streams.wait_loaded(block)
        return block.bytes[: region.size].view(region.dtype)

    def start_write(self, region: NvmeRegion) -> None:
        block = self._held(region, "write_start")
        region.phase = Phase.WRITING
        host = _host(block)
        copied: list[Event | None] = [None] * len(region.checksums)
        if self._streams is not None:
            now = self._streams.now()
            for index in range(len(copied)):
                start, stop = self._span(region, index)
                copied[index] = self._streams.store(block, host[start:stop], start, now)
        self._submit(region, lambda index: self._write_chunk(region, host, index, copied[index]))

    def release(self, region: NvmeRegion) -> None:
        if region.phase is not Phase.IN_USE:
            if region.phase is Phase.STORED and region not in self._waiting:
                raise RuntimeError(f"release() of {region.name}, which is not read")
            self.finish_read(region)
        block = self._held(region, "release")
        if self._streams is not None:
            block.free = self._streams.now()
        with self._changed:
            self._give_back(region)

    def _held(self, region: NvmeRegion, method: str) -> Block:
        if region.phase is not Phase.IN_USE or region.block is None:
            raise RuntimeError(f"{method}() of {region.name}, which is {region.phase.value}; read it first")
        return region.block

    # Under the lock.

    def _serve_alone(self, region: NvmeRegion) -> None:
        """Nothing is under way, so that no buffer will come free: start this read before all others, or fail."""
        if region not in self._waiting:
            raise RuntimeError(f"{region.name} is {region.phase.value}; read_start() comes before each wait()")
        self._waiting.remove(region)
        self._waiting.insert(0, region)
        self._serve_waiting()
        while region in self._waiting and self._ready:
            self._put_off(self._ready[-1])
        if region in self._waiting:
            self._waiting.remove(region)
            raise OffloadError(
                f"no staging buffer can come free for {region.name} ({region.size} bytes): what is in use at once "
                f"takes all of the {self._host_bytes} bytes; raise zero.host_memory_mb or lower zero.bucket_mb"
            )

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure.with_traceback(None)

    def _serve_waiting(self) -> None:
        """Start the reads for which there is a buffer, in the order in which they were asked for."""
        for region in list(self._waiting):
            if region.phase is Phase.WRITING:
                continue  # its turn comes when it is written
            block = self._blocks.take(region.size)
            if block is None:
                return
            self._waiting.remove(region)
            region.phase, region.block = Phase.READING, block
            self._submit(region, self._reader(region, block))

    def _put_off(self, region: NvmeRegion) -> None:
        """Take the buffer of a read that nobody has waited for yet; it starts anew when there is one again."""
        assert region.block is not None
        self._ready.remove(region)
        region.block.free = region.block.loaded
        self._waiting.append(region)
        self._give_back(region)

    def _submit(self, region: NvmeRegion, job: Callable[[int], None]) -> None:
        """Run ``job(index)`` for every chunk on the worker threads; what follows the last is done by it."""
        with self._changed:
            region.jobs = len(region.checksums)
            self._jobs += region.jobs
            if region.jobs == 0:
                self._finished(region)
        for index in range(len(region.checksums)):
            self._pool.submit(self._run, region, index, job)

    def _finished(self, region: NvmeRegion) -> None:
        if region.phase is Phase.READING:
            region.phase = Phase.READY
            self._ready.append(region)
        else:
            self._give_back(region)

    def _give_back(self, region: NvmeRegion) -> None:
        assert region.block is not None
        self._blocks.give(region.block)
        region.block, region.phase = None, Phase.STORED
        self._serve_waiting()

    # On the worker threads.

    def _run(self, region: NvmeRegion, index: int, job: Callable[[int], None]) -> None:
        failure: Exception | None = None
        try:
            if self._failure is None:
                job(index)
        except OSError as error:
            doing = "written" if region.phase is Phase.WRITING else "read"
            start, stop = self._span(region, index)
            failure = self._explain(error, region, start, stop, doing)
            failure.__cause__ = error
        except Exception as error:
            failure = error
        with self._changed:
            self._failure = self._failure or failure
            region.jobs -= 1
            self._jobs -= 1
            try:
                if region.jobs == 0:
                    self._finished(region)
            except Exception as error:  # no memory for the next buffer
                self._failure = self._failure or error
            finally:
                self._changed.notify_all()

    def _reader(self, region: NvmeRegion, block: Block) -> Callable[[int], None]:
        host, free = _host(block), block.free

        def read(index: int) -> None:
            if free is not None:
                free.synchronize()  # the device still reads what the buffer held before
            start, stop = self._span(region, index)
            self._read_chunk(region, index, host[start : start + aligned_up(stop - start)], stop - start)
            if self._streams is not None:
                self._streams.load(block, host[start:stop], start)

        return read

    def _read_chunk(self, region: NvmeRegion, index: int, buffer: torch.Tensor, size: int) -> None:
        expected = region.checksums[index]
        if expected is None:
            buffer[:size].zero_()
            return
        start, stop = self._span(region, index)
        filled = self._file.read(buffer.numpy().data, region.offset + start)
        if filled < size:
            raise OffloadError(
                f"{self._place(region, start, stop)} are cut short: only {filled} of {size} came back; "
                f"nothing else may touch the swap file. {_WAY_OUT}"
            )
        if checksum(buffer[:size].numpy().data) != expected:
            raise OffloadError(
                f"{self._place(region, start, stop)} are damaged: their checksum is not the one they were written "
                f"with. {_WAY_OUT}"
            )

    def _write_chunk(self, region: NvmeRegion, host: torch.Tensor, index: int, copied: Event | None) -> None:
        if copied is not None:
            copied.synchronize()
        start, stop = self._span(region, index)
        region.checksums[index] = checksum(host[start:stop].numpy().data)
        self._file.write(host[start : aligned_up(stop)].numpy().data, region.offset + start)

    # Messages.

    def _span(self, region: NvmeRegion, index: int) -> tuple[int, int]:
        """The bytes of a chunk within its region."""
        return index * self.chunk, min((index + 1) * self.chunk, region.size)

    def _place(self, region: NvmeRegion, start: int, stop: int) -> str:
        first, last = region.offset + start, region.offset + stop
        return f"offloaded state of {region.name}: bytes {first}-{last} of the swap file {self._file.path}"

    def _explain(self, error: OSError, region: NvmeRegion, start: int, stop: int, doing: str) -> OffloadError:
        text = f"{self._place(region, start, stop)} cannot be {doing}: {error.strerror}. "
        try:
            free = shutil.disk_usage(self.folder).free
        except OSError:
            text += f"The folder is gone: is {self.folder} on a disk that stays? "
        else:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                text += (
                    f"In {self.folder} this rank's swap file takes {gb(self._size)} and {gb(free)} "
                    "are free; make room, or use another folder, a smaller offload ratio or more ranks. "
                )
        return OffloadError(text.rstrip() if doing == "reserved" else text + _WAY_OUT)


def make_swap_file(folder: Path, direct: bool = True) -> DirectFile:
    """An empty file without a name in ``folder``, which is made if it is not there.

    Raises:
        OffloadError: that cannot be done there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return DirectFile.scratch(folder, "megatron-ds-swap", direct)
    except OSError as error:
        at = "" if error.filename in (None, str(folder)) else f" ({error.filename})"
        why = "it is a file" if isinstance(error, FileExistsError | NotADirectoryError) else error.strerror
        raise OffloadError(
            f"no swap file can be made in {folder}: {why}{at}; give a folder on a local disk that this user may write "
            "to"
        ) from error


_WAY_OUT = "Resume from the last checkpoint."


def _host(block: Block) -> torch.Tensor:
    assert block.host is not None
    return block.host.tensor
