"""The gradients of one step on their way from the backward pass to their sums: the one state machine of all stages.

Up to stage 1 whole gradients add up over the micro-batches, and each bucket is reduced during the last backward pass,
as soon as it is complete. From stage 2 on that is done in each backward pass, and the bucket's memory is given back.

A rank may hold several pipeline stages: each has backward passes of its own, and buckets of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from typing import Any, NoReturn

import torch
from torch import nn

from megatron_ds.zero.buckets import Slot
from megatron_ds.zero.flat import FlatBucket
from megatron_ds.zero.main_grad import MainGradient


class Phase(Enum):
    """Where a step stands. Gradients are only taken between ``start_step`` and ``finish_gradients``."""

    IDLE = "between steps"
    ACCUMULATING = "accumulating gradients"
    REDUCED = "holding reduced gradients"


class BackwardContext:
    """The buckets of one pipeline stage, and how far its present backward pass has come with them.

    Attributes:
        buckets: in the order in which a backward pass of the stage fills them.
        reducing: in a backward pass that is reduced as it goes.
        missing: for each bucket, parameters yet to come in it.
        launched: buckets whose reduction was started.
        deferred: of each micro-batch whose ``W`` action is to come, the writes that its ``B`` action left for it.
    """

    def __init__(self, buckets: Sequence[FlatBucket]):
        self.buckets = list(buckets)
        self.reducing = False
        self.missing = [0] * len(self.buckets)
        self.launched = 0
        self.deferred: dict[int, list[Callable[[], None]]] = {}

    def main_grads(self) -> Iterator[MainGradient]:
        return (main_grad for bucket in self.buckets for main_grad in bucket.main_grads)

    def start_backward(self) -> None:
        for index, bucket in enumerate(self.buckets):
            self.missing[index] = len(bucket.main_grads)
        for main_grad in self.main_grads():
            main_grad.writes = 0
        self.launched = 0
        self.reducing = True


class Reducer:
    """Takes gradients and reduces buckets, in one order on all ranks.

    Args:
        buckets: those with gradients, in the order in which a backward pass fills them.
        overlap: reduce during the backward pass and not after it; the same bits.
        each_backward: reduce in every backward pass and not only in a step's last one.
        window: bytes of reductions under way at one time, where their buffers are to be given back.
        meet: called before a reduction starts and when a backward pass is over, with a name of the place: for ranks
            that take their gradients in another order, so that they start reductions at the same point of theirs.
    """

    def __init__(
        self,
        buckets: Sequence[FlatBucket],
        overlap: bool,
        each_backward: bool,
        window: float,
        meet: Callable[[str], None],
    ):
        self.buckets = list(buckets)
        self.overlap, self.each_backward, self.window = overlap, each_backward, window
        self.phase = Phase.IDLE
        self._meet = meet
        stages = dict.fromkeys(bucket.layout.key.stage for bucket in self.buckets)
        self.contexts = {
            stage: BackwardContext([b for b in self.buckets if b.layout.key.stage == stage]) for stage in stages
        }
        self._waiting: list[FlatBucket] = []  # reductions under way, oldest first
        self._finished: list[FlatBucket] = []  # done here, but perhaps still read by peers
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self.closed = False
        for context in self.contexts.values():
            for index, bucket in enumerate(context.buckets):
                bucket.main_grads = [
                    self._attach(context, index, slot, p) for slot, p in zip(bucket.layout.slots, bucket.tensors)
                ]

    def _attach(self, context: BackwardContext, bucket: int, slot: Slot, parameter: nn.Parameter) -> MainGradient:
        """Give the parameter its main gradient, and a hook that moves what autograd leaves in ``.grad`` there."""
        if "main_grad" in parameter.__dict__:
            raise ValueError(f"{slot.spec.name} already belongs to a ZeroOptimizer; close() that one first")
        main_grad = MainGradient(
            slot.spec.name,
            lambda main_grad: self._before_write(main_grad, context, bucket),
            lambda main_grad: self._on_write(main_grad, context, bucket),
        )
        if context.buckets[bucket].frees_gradients:
            # Known beforehand, so that the very first step frees gradients too: autograd gives each parameter one
            # gradient a backward pass; who writes into the main gradient itself says how often.
            main_grad.expected = parameter.__dict__.get("grad_writes", 1)
        parameter.main_grad = main_grad  # type: ignore[attr-defined]

        def move(parameter: torch.Tensor) -> None:
            if (gradient := parameter.grad) is not None:  # None: the layer wrote into the main gradient itself
                parameter.grad = None
                main_grad.add(gradient)

        trained = parameter.requires_grad
        parameter.requires_grad_(True)  # without which there is no hook; it may be frozen for a while
        self._hooks.append(parameter.register_post_accumulate_grad_hook(move))
        parameter.requires_grad_(trained)
        return main_grad

    def close(self) -> None:
        """No more hooks."""
        self.closed = True
        for hook in self._hooks:
            hook.remove()
        for bucket in self.buckets:
            for parameter in bucket.tensors:
                del parameter.main_grad  # type: ignore[attr-defined]

    def main_grads(self) -> Iterator[MainGradient]:
        return (main_grad for context in self.contexts.values() for main_grad in context.main_grads())

    def start_step(self, step: int, seed: int) -> None:
        """Forget the gradients of the step before. ``step``: updates so far, and ``seed``: the run's, of rounding."""
        for bucket in self.buckets:
            bucket.start_step(step, seed)
        for main_grad in self.main_grads():
            main_grad.written = main_grad.used = False
        for context in self.contexts.values():
            context.reducing = False
            context.deferred.clear()
        for hook in self._hooks:  # after a user's that was registered since, which would find no gradient
            hooks: Any = hook.hooks_dict_ref()
            if len(hooks) > 1 and next(reversed(hooks)) != hook.id:
                hooks[hook.id] = hooks.pop(hook.id)
        self.phase = Phase.ACCUMULATING

    def start_backward(self, last: bool, stage: int) -> None:
        """A backward pass of ``stage`` follows, ``last``: the stage's last one of this step here."""
        context = self.contexts.get(stage)
        self._expect_accumulating(context, "start_backward")
        for bucket in context.buckets if context is not None else ():
            bucket.note_frozen()
        if context is not None and (last or self.each_backward):
            context.start_backward()

    def end_backward(self, stage: int) -> None:
        """The backward pass is over. Where each one is reduced, all its gradients are in their shards now."""
        context = self.contexts.get(stage)
        if context is None or not context.reducing:
            return
        # Before another stage's buckets leave, and whatever else the ranks do next: one order of all on all ranks.
        self._launch_the_rest(context)
        if self.each_backward:
            self._wait_for_all()
            context.reducing = False

    # A backward pass in two actions: B computes the input gradients, W the weight gradients.

    def start_input_backward(self, stage: int, micro_batch: int) -> None:
        """Keep what comes for the stage's parameters until :meth:`add_weight_gradients` of the micro-batch."""
        context = self.contexts.get(stage)
        self._expect_accumulating(context, "start_input_backward")
        if context is not None:
            deferred = context.deferred.setdefault(micro_batch, [])
            for main_grad in context.main_grads():
                main_grad.deferred = deferred

    def end_input_backward(self, stage: int) -> None:
        if stage in self.contexts:
            for main_grad in self.contexts[stage].main_grads():
                main_grad.deferred = None

    @torch.no_grad()
    def add_weight_gradients(self, stage: int, micro_batch: int) -> None:
        """Compute and add the deferred weight gradients of a micro-batch."""
        if stage in self.contexts:
            deferred = self.contexts[stage].deferred.pop(micro_batch)
            while deferred:  # each one's operands are freed as soon as it is computed
                deferred.pop(0)()

    def _expect_accumulating(self, context: BackwardContext | None, method: str) -> None:
        self.expect(Phase.ACCUMULATING, method)
        if context is not None and context.reducing:
            raise self._out_of_order(method, "in a backward pass that is reduced as it goes")

    def _before_write(self, main_grad: MainGradient, context: BackwardContext, bucket: int) -> None:
        """A gradient comes for a bucket without a buffer."""
        if context.reducing and bucket < context.launched:
            self._too_late(main_grad)
        if self.phase is not Phase.ACCUMULATING:
            self._untimely(main_grad)
        context.buckets[bucket].open()

    def _untimely(self, main_grad: MainGradient) -> NoReturn:
        raise RuntimeError(
            f"{main_grad.name} got a gradient {self.phase.value}; call start_step() before the backward pass"
        )

    def _too_late(self, main_grad: MainGradient) -> NoReturn:
        raise RuntimeError(
            f"{main_grad.name} got gradient number {main_grad.writes + 1} of a backward pass after its bucket had "
            f"left, because earlier steps had {main_grad.expected}; set zero.overlap=false for a graph that changes"
        )

    def _on_write(self, main_grad: MainGradient, context: BackwardContext, bucket: int) -> None:
        if self.phase is not Phase.ACCUMULATING:
            self._untimely(main_grad)
        if not context.reducing:
            return
        if bucket < context.launched:
            main_grad.writes -= 1
            self._too_late(main_grad)
        # How often a parameter is written in one backward pass is a property of the graph, learned from the step
        # before; so up to stage 1 the first step reduces everything at its end.
        if main_grad.writes == main_grad.expected:
            context.missing[bucket] -= 1
            if self.overlap:
                # One order on all ranks, whatever the order in which gradients come: collectives match by order.
                while context.launched < len(context.buckets) and context.missing[context.launched] == 0:
                    self._launch(context)

    def _launch(self, context: BackwardContext) -> None:
        """Start the reduction of the next bucket. Of buffers that are to be given back, few are under way at a time."""
        bucket = context.buckets[context.launched]
        self._meet(f"the reduction of the bucket of {bucket.layout.slots[0].spec.name}")
        bucket.start_reduce()
        context.launched += 1
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
        return sum(bucket.layout.gradient_bytes for bucket in (*self._waiting, *self._finished))

    def _finish_oldest(self) -> None:
        bucket = self._waiting.pop(0)
        bucket.finish_reduce()
        self._finished.append(bucket)

    def _launch_the_rest(self, context: BackwardContext) -> None:
        if context.reducing:
            for main_grad in context.main_grads():
                main_grad.expected = max(main_grad.expected, main_grad.writes)
        else:  # the rank had no backward pass of the stage in this step
            context.launched = 0
        while context.launched < len(context.buckets):
            self._launch(context)

    def _wait_for_all(self) -> None:
        self._meet("the end of a backward pass")
        while self._waiting:
            self._finish_oldest()
        for bucket in self._finished:
            bucket.free_gradients()
        self._finished.clear()

    def finish(self) -> None:
        """Reduce what is left and wait; afterwards every slice holds its sum over the global batch."""
        self.expect(Phase.ACCUMULATING, "finish_gradients")
        for context in self.contexts.values():
            if context.deferred:
                raise RuntimeError(
                    f"the weight gradients of micro-batches {sorted(context.deferred)} were never computed; the "
                    "schedule has a W action for each"
                )
            # Where each backward pass is reduced, there is nothing left of a stage that had one.
            if not self.each_backward or any(bucket.lacks_gradients for bucket in context.buckets):
                self._launch_the_rest(context)
        self._wait_for_all()
        for context in self.contexts.values():
            context.reducing = False
        for bucket in self.buckets:
            bucket.sum_over_remaining_axes()
        self.phase = Phase.REDUCED

    def expect(self, phase: Phase, method: str) -> None:
        if self.phase is not phase:
            raise self._out_of_order(method, self.phase.value)

    def _out_of_order(self, method: str, now: str) -> RuntimeError:
        return RuntimeError(
            f"{method}() was called {now}; the order is start_step, for each micro-batch "
            "start_backward and end_backward, finish_gradients, norm_squared, then step or skip"
        )
