"""From samples to micro-batches of torch tensors, read ahead by a thread.

A global batch is ``global_batch`` consecutive samples of the run's order. Micro-batch ``j`` of data-parallel rank
``r`` holds its offsets ``(j * dp_size + r) * micro_batch`` to ``+ micro_batch``, so that the global batch is the
same set of samples, each at the same place of the run, for every number of ranks. A rank reads only its own.

The state of a loader is one integer, the number of samples consumed by the whole job.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from megatron_ds.data.samples import Batch, SampleSource
from megatron_ds.errors import DataError, multiples_around

MicroBatch = dict[str, torch.Tensor]
"""The arrays of a :data:`~megatron_ds.data.samples.Batch` as tensors, and ``sample_index`` int64 [b]: each
sample's place in the run's order, the same on every mesh (it keys dropout)."""
BatchSize = int | Callable[[int], int]


def rank_offsets(global_batch: int, micro_batch: int, dp_rank: int, dp_size: int) -> npt.NDArray[np.int64]:
    """Offsets into the global batch that a data-parallel rank reads: int64 [num_micro_batches, micro_batch]."""
    if not 0 <= dp_rank < dp_size or micro_batch < 1:
        raise DataError(f"dp_rank={dp_rank} of dp_size={dp_size}, micro_batch={micro_batch}: not a rank's share")
    together = micro_batch * dp_size
    if global_batch < 1 or global_batch % together:
        raise DataError(
            f"global_batch={global_batch} cannot be divided into micro-batches: micro_batch={micro_batch} x "
            f"dp_size={dp_size} = {together} does not divide it; use {multiples_around(max(global_batch, 1), together)}"
        )
    return np.arange(global_batch, dtype=np.int64).reshape(-1, dp_size, micro_batch)[:, dp_rank]


@dataclass(frozen=True)
class BatchRamp:
    """A global batch that grows: from ``start`` to ``final`` by ``increment``, each size for an equal part of the first
    ``samples`` samples.

    A function of the samples consumed and of nothing else, so a run resumes inside it wherever it was stopped. The
    size changes between two steps: at the first that begins at or after the end of a part.
    """

    start: int
    increment: int
    samples: int
    final: int

    def __call__(self, consumed: int) -> int:
        """Samples of the step that begins after ``consumed`` samples."""
        parts = (self.final - self.start) // self.increment
        return min(self.final, self.start + self.increment * (consumed * parts // self.samples))

    def sizes(self) -> list[int]:
        """All global batches that may occur, in order."""
        return list(range(self.start, self.final + 1, self.increment))


class BatchLoader:
    """An endless iterator over steps; each step is a list of this rank's micro-batches.

    Args:
        dataset: where samples come from.
        global_batch: samples a step over all ranks, or a function from samples consumed to that (batch ramp-up).
        micro_batch: samples a micro-batch.
        dp_rank, dp_size: this rank's place among the data-parallel ranks.
        consumed: samples consumed before the first step: 0, or what :meth:`state_dict` said when the run stopped.
        prefetch: steps read ahead by a background thread; 0 reads in the caller's thread.
        pin_memory: page-locked tensors, for asynchronous copies to a GPU; None: if CUDA is available.

    Raises:
        DataError: a global batch that ``micro_batch * dp_size`` does not divide; any error of the dataset, in the
            caller's thread.
    """

    def __init__(
        self,
        dataset: SampleSource,
        global_batch: BatchSize,
        micro_batch: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        consumed: int = 0,
        prefetch: int = 2,
        pin_memory: bool | None = None,
    ):
        self.dataset = dataset
        self.global_batch: Callable[[int], int] = global_batch if callable(global_batch) else lambda _: global_batch
        self.micro_batch, self.dp_rank, self.dp_size = micro_batch, dp_rank, dp_size
        self.consumed = consumed
        self.prefetch = prefetch
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        rank_offsets(self.global_batch(consumed), micro_batch, dp_rank, dp_size)  # fail here, not in a thread
        self._steps: Iterator[tuple[list[MicroBatch], int]] | None = None

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        return self

    def __next__(self) -> list[MicroBatch]:
        if self._steps is None:
            steps = self._read(self.consumed)
            self._steps = _ReadAhead(steps, self.prefetch) if self.prefetch > 0 else steps
        try:
            micro_batches, self.consumed = next(self._steps)
        except BaseException:
            self.close()  # asked again, it reads the same step again
            raise
        return micro_batches

    def _read(self, consumed: int) -> Iterator[tuple[list[MicroBatch], int]]:
        """The steps after ``consumed`` samples, each with the count of samples consumed once it is done."""
        while True:
            global_batch = self.global_batch(consumed)
            places = consumed + rank_offsets(global_batch, self.micro_batch, self.dp_rank, self.dp_size)
            consumed += global_batch
            yield [to_tensors(self.dataset.batch(p), p, self.pin_memory) for p in places], consumed

    def state_dict(self) -> dict[str, int]:
        """``{"consumed": samples of all steps handed out so far}``; what was only read ahead does not count."""
        return {"consumed": self.consumed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.close()
        self.consumed = int(state["consumed"])

    def close(self) -> None:
        """Stop reading ahead. The loader can be used again and goes on where it was."""
        if isinstance(self._steps, _ReadAhead):
            self._steps.close()
        self._steps = None

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def evaluation_batches(
    dataset: SampleSource,
    num_samples: int,
    micro_batch: int,
    leave_out: Callable[[Batch, npt.NDArray[np.bool_]], None],
    dp_rank: int = 0,
    dp_size: int = 1,
    pin_memory: bool | None = None,
) -> Iterator[MicroBatch]:
    """The first ``num_samples`` rows (at most ``len(dataset)``) in stored order: the same ones at each evaluation.

    Every rank gets the same number of micro-batches; places past the end repeat row 0 with ``sample_index`` -1, and
    ``leave_out`` makes these count nothing (it gets True for the others), so that sums are the same for every
    ``dp_size``.
    """
    if pin_memory is None:
        pin_memory = torch.cuda.is_available()
    count = min(num_samples, len(dataset))
    if count < 1:
        return
    together = micro_batch * dp_size
    for places in rank_offsets(-(-count // together) * together, micro_batch, dp_rank, dp_size):
        real = places < count
        batch = dataset.rows(np.where(real, places, 0))
        leave_out(batch, real)
        yield to_tensors(batch, np.where(real, places, -1), pin_memory)


def to_tensors(batch: Batch, sample_index: npt.NDArray[np.int64], pin_memory: bool = False) -> MicroBatch:
    """The arrays of a batch as tensors that share their memory (copied only to pin them), with ``sample_index``."""
    tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
    tensors["sample_index"] = torch.from_numpy(np.ascontiguousarray(sample_index))
    return {name: tensor.pin_memory() for name, tensor in tensors.items()} if pin_memory else tensors


def to_device(batch: MicroBatch, device: torch.device) -> MicroBatch:
    """Start the copy of a micro-batch from the host to a GPU; on a CPU the batch itself.

    With ``document_ids [b, s]`` come ``document_bounds``, which stay on the host: int32 [documents + 1], where the
    documents (runs of equal ids in a row) begin and end, row after row. Their number and the longest of them decide
    how attention is launched, and nothing may wait for the GPU to know them.
    """
    if device.type == "cpu":
        return batch
    moved = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    if (ids := batch.get("document_ids")) is not None:
        first = torch.ones_like(ids, dtype=torch.bool)
        first[:, 1:] = ids[:, 1:] != ids[:, :-1]
        begins = first.flatten().nonzero().squeeze(1)
        moved["document_bounds"] = torch.cat((begins, torch.tensor([ids.numel()]))).to(torch.int32)
    return moved


class _ReadAhead(Iterator[tuple[list[MicroBatch], int]]):
    """Runs an iterator in a thread, at most ``depth`` items ahead; its exceptions appear in the consumer."""

    def __init__(self, items: Iterator[tuple[list[MicroBatch], int]], depth: int):
        self._items = items
        self._queue: queue.SimpleQueue[tuple[list[MicroBatch], int] | BaseException] = queue.SimpleQueue()
        self._room, self._stopped = threading.Semaphore(depth), False
        # A daemon: a training process that ends by an exception must not wait for its reader.
        self._thread = threading.Thread(target=self._run, name="data-read-ahead", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for item in self._items:
                self._room.acquire()
                if self._stopped:
                    return
                self._queue.put(item)
        except BaseException as error:
            self._queue.put(error)

    def __next__(self) -> tuple[list[MicroBatch], int]:
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        self._room.release()
        return item

    def close(self) -> None:
        self._stopped = True
        self._room.release()
        self._thread.join(timeout=10)
