"""CUDA graphs of a micro-batch: its forward and backward pass are recorded once, and launched as one from then on.

A graph repeats kernels: with the same memory, the same shapes, and every number that Python had in hand. So a
micro-batch is copied to where the recorded one lay, and what the passes did besides kernels is done again by hand: main
gradients are told that they were written. Whether they held something before decides between writing and adding, so a
step's first micro-batch has a graph of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_ds.errors import ConfigError

MicroBatch = Mapping[str, Tensor]
Passes = Callable[[MicroBatch, Tensor], Tensor]


class MainGradient(Protocol):
    """Of a parameter; see ``megatron_ds/zero/main_grad.py``."""

    written: bool
    writes: int

    def wrote(self) -> None:
        """A write is done."""


class Recorder(Protocol):
    """Records what a device is given to do."""

    def warm_up(self) -> AbstractContextManager[None]:
        """Inside runs for the first time what is to be recorded: kernels are compiled, handles and workspaces made."""

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        """Call ``run`` without doing its work. What does the work, once a call, and where it leaves the result."""


class CudaRecorder:
    """``torch.cuda.graph`` on a stream of its own; all graphs share one pool of memory, as one runs at a time.

    Raises:
        ConfigError: the device is no GPU.
    """

    def __init__(self, device: torch.device):
        if device.type != "cuda":
            raise ConfigError(f"train.cuda_graphs on {device}: only a GPU has graphs; use --train.no-cuda-graphs")
        self._stream, self._pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    @contextmanager
    def warm_up(self) -> Iterator[None]:
        # On the stream that is recorded: autograd's nodes of parameters keep the stream on which they were made.
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        graph = torch.cuda.CUDAGraph()
        # Of this thread alone: the loader's thread pins memory meanwhile.
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            result = run()
        return graph.replay, result


@dataclass(frozen=True)
class _Graph:
    """``batch``, ``seed`` and ``loss`` are the memory that the kernels read and write."""

    batch: MicroBatch
    seed: Tensor
    replay: Callable[[], object]
    loss: Tensor
    writes: list[tuple[MainGradient, int]]


class MicroBatchGraphs:
    """Runs the passes of a micro-batch: the first time by Python, the second time recorded, from then on as a graph.

    Args:
        main_grads: of all parameters; their buffers stay where they are.
    """

    def __init__(self, main_grads: Iterable[MainGradient], recorder: Recorder):
        self._main_grads, self._recorder = list(main_grads), recorder
        self._graphs: dict[Hashable, _Graph | None] = {}  # None: warmed up

    def __call__(self, passes: Passes, batch: MicroBatch, seed: Tensor) -> Tensor:
        """``passes(batch, seed)``: the loss, 0-d, which the next call overwrites."""
        shapes = tuple((name, tensor.shape, tensor.dtype) for name, tensor in batch.items())
        key = shapes, tuple(main_grad.written for main_grad in self._main_grads)
        if key not in self._graphs:
            self._graphs[key] = None
            with self._recorder.warm_up():
                return passes(batch, seed)
        graph = self._graphs[key]
        if graph is None:
            graph = self._graphs[key] = self._record(passes, batch, seed)
            graph.replay()
            return graph.loss
        for name, tensor in batch.items():
            graph.batch[name].copy_(tensor)
        graph.seed.copy_(seed)
        graph.replay()
        for main_grad, times in graph.writes:
            for _ in range(times):
                main_grad.wrote()
        return graph.loss

    def _record(self, passes: Passes, batch: MicroBatch, seed: Tensor) -> _Graph:
        own, own_seed = {name: tensor.clone() for name, tensor in batch.items()}, seed.clone()
        before = [main_grad.writes for main_grad in self._main_grads]
        replay, loss = self._recorder.record(lambda: passes(own, own_seed))
        writes = [(one, one.writes - count) for one, count in zip(self._main_grads, before) if one.writes > count]
        return _Graph(own, own_seed, replay, loss, writes)
