"""The gradients of one step on their way from the backward pass to their sums: the one state machine of all stages.

Up to stage 1 whole gradients add up over the micro-batches, and each bucket is reduced during the last backward pass,
as soon as it is complete. From stage 2 on that is done in each backward pass, and the bucket's memory is given back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import Enum
from typing import NoReturn

import torch
from torch import nn

from megatron_ds.zero.buckets import Slot
from megatron_ds.zero.flat import FlatBucket
from megatron_ds.zero.memory import TransientGradients
from megatron_ds.zero.sink import GradSink

WINDOW = 2
"""Bytes of reductions under way, in units of ``zero.bucket_mb``, before the oldest is waited for and given back."""


class Phase(Enum):
    """Where a step stands. Gradients are only taken between ``start_step`` and ``finish_gradients``."""

    IDLE = "between steps"
    ACCUMULATING = "accumulating gradients"
    REDUCING = "in a backward pass that is reduced as it goes"
    REDUCED = "holding reduced gradients"


class Reducer:
    """Takes gradients and reduces buckets, in one order on all ranks.

    Args:
        buckets: those with gradients, in the order in which a backward pass fills them.
        overlap: reduce during the backward pass and not after it; the same bits.
        each_backward: reduce in every backward pass and not only in a step's last one.
        window: bytes of reductions under way at one time, where their buffers are to be given back.
    """

    def __init__(self, buckets: Sequence[FlatBucket], overlap: bool, each_backward: bool, window: float):
        self.buckets = list(buckets)
        self.overlap, self.each_backward, self.window = overlap, each_backward, window
        self.phase = Phase.IDLE
        self._missing = [0] * len(self.buckets)  # for each bucket, parameters yet to come in the backward pass
        self._launched = 0
        self._waiting: list[FlatBucket] = []  # reductions under way, oldest first
        self._finished: list[FlatBucket] = []  # done here, but perhaps still read by peers
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        for index, bucket in enumerate(self.buckets):
            bucket.sinks = [self._attach(index, slot, p) for slot, p in zip(bucket.layout.slots, bucket.tensors)]

    def _attach(self, bucket: int, slot: Slot, parameter: nn.Parameter) -> GradSink:
        """Give the parameter its sink, and a hook that moves what autograd leaves in ``.grad`` there."""
        if "grad_sink" in parameter.__dict__:
            raise ValueError(f"{slot.spec.name} already belongs to a ZeroOptimizer; close() that one first")
        sink = GradSink(
            slot.spec.name, lambda sink: self._before_write(sink, bucket), lambda sink: self._on_write(sink, bucket)
        )
        if isinstance(self.buckets[bucket].gradients, TransientGradients):
            # Known beforehand, so that the very first step frees gradients too: autograd gives each parameter one
            # gradient a backward pass; who writes into the sink itself says how often.
            sink.expected = parameter.__dict__.get("grad_writes", 1)
        parameter.grad_sink = sink  # type: ignore[attr-defined]

        def move(parameter: torch.Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None:  # None: the layer wrote into the sink itself
                sink.add(gradient)

        self._hooks.append(parameter.register_post_accumulate_grad_hook(move))
        return sink

    def close(self) -> None:
        """No more hooks."""
        for hook in self._hooks:
            hook.remove()
        for bucket in self.buckets:
            for parameter in bucket.tensors:
                del parameter.grad_sink  # type: ignore[attr-defined]

    def sinks(self) -> Iterator[GradSink]:
        return (sink for bucket in self.buckets for sink in bucket.sinks)

    def start_step(self) -> None:
        """Forget the gradients of the step before."""
        for bucket in self.buckets:
            bucket.start_step()
        for sink in self.sinks():
            sink.written = False
            sink.writes = 0
        self._launched = 0
        self.phase = Phase.ACCUMULATING

    def start_backward(self, last: bool) -> None:
        """A backward pass follows, ``last``: the last one of this step here."""
        self.expect(Phase.ACCUMULATING, "start_backward")
        if not last and not self.each_backward:
            return
        for index, bucket in enumerate(self.buckets):
            self._missing[index] = len(bucket.sinks)
            for sink in bucket.sinks:
                sink.writes = 0
        self._launched = 0
        self.phase = Phase.REDUCING

    def end_backward(self) -> None:
        """The backward pass is over. Where each one is reduced, all its gradients are in their shards now."""
        if self.phase is Phase.REDUCING and self.each_backward:
            self._reduce_the_rest()
            self.phase = Phase.ACCUMULATING

    def _before_write(self, sink: GradSink, bucket: int) -> None:
        """A gradient comes for a bucket without a buffer."""
        if self.phase is Phase.REDUCING and bucket < self._launched:
            self._too_late(sink)
        if self.phase in (Phase.ACCUMULATING, Phase.REDUCING):
            self.buckets[bucket].open()
        else:
            self._untimely(sink)

    def _untimely(self, sink: GradSink) -> NoReturn:
        raise RuntimeError(f"{sink.name} got a gradient {self.phase.value}; call start_step() before the backward pass")

    def _too_late(self, sink: GradSink) -> NoReturn:
        raise RuntimeError(
            f"{sink.name} got gradient number {sink.writes + 1} of a backward pass after its bucket had left, "
            f"because earlier steps had {sink.expected}; set zero.overlap=false for a graph that changes"
        )

    def _on_write(self, sink: GradSink, bucket: int) -> None:
        if self.phase is Phase.ACCUMULATING:
            return
        if self.phase is not Phase.REDUCING:
            self._untimely(sink)
        if bucket < self._launched:
            sink.writes -= 1
            self._too_late(sink)
        # How often a parameter is written in one backward pass is a property of the graph, learned from the step
        # before; so up to stage 1 the first step reduces everything at its end.
        if sink.writes == sink.expected:
            self._missing[bucket] -= 1
            if self.overlap:
                # One order on all ranks, whatever the order in which gradients come: collectives match by order.
                while self._launched < len(self.buckets) and self._missing[self._launched] == 0:
                    self._launch()

    def _launch(self) -> None:
        """Start the reduction of the next bucket. Of buffers that are to be given back, few are under way at a time."""
        bucket = self.buckets[self._launched]
        bucket.start_reduce()
        self._launched += 1
        self._waiting.append(bucket)
        if self.each_backward:
            # By sizes alone, so that all ranks do the same. What is done here may still be read by peers: a wait for
            # them comes as late as it can.
            while self._in_flight() > self.window and (self._waiting or self._finished):
                if self._finished and len(self._finished) >= len(self._waiting):
                    self._finished.pop(0).free_gradients()
                else:
                    self._finish_oldest()

    def _in_flight(self) -> int:
        return sum(bucket.gradient_bytes for bucket in (*self._waiting, *self._finished))

    def _finish_oldest(self) -> None:
        bucket = self._waiting.pop(0)
        bucket.finish_reduce()
        self._finished.append(bucket)

    def _reduce_the_rest(self) -> None:
        if self.phase is Phase.REDUCING:
            for sink in self.sinks():
                sink.expected = max(sink.expected, sink.writes)
        else:  # the rank had no backward pass in this step
            self._launched = 0
        while self._launched < len(self.buckets):
            self._launch()
        while self._waiting:
            self._finish_oldest()
        for bucket in self._finished:
            bucket.free_gradients()
        self._finished.clear()

    def finish(self) -> None:
        """Reduce what is left and wait; afterwards every slice holds its sum over the global batch."""
        if self.phase is Phase.ACCUMULATING and self.each_backward:
            if any(g.empty for b in self.buckets if isinstance(g := b.gradients, TransientGradients)):
                self._reduce_the_rest()  # no backward pass at all
        else:
            if self.phase is not Phase.ACCUMULATING:
                self.expect(Phase.REDUCING, "finish_gradients")
            self._reduce_the_rest()
        for bucket in self.buckets:
            bucket.sum_over_remaining_axes()
        self.phase = Phase.REDUCED

    def expect(self, phase: Phase, method: str) -> None:
        if self.phase is not phase:
            raise RuntimeError(
                f"{method}() was called {self.phase.value}; the order is start_step, for each micro-batch "
                "start_backward and end_backward, finish_gradients, norm_squared, then step or skip"
            )
