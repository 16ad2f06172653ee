"""The one train step: the sole owner of loss normalisation, loss scaling, clipping and the decision to skip.

The loss of a step is a sum over the *global* batch divided by a count. What counts, the task says (a language model's
unmasked target tokens); for a user's own model (``megatron_ds.engine``) the sum is of the micro-batches' losses and the
count is of micro-batches. Each rank counts before the forward pass, the counts are summed over the data axis, and the
gradient that seeds every backward pass is ``loss_scale / count``. Everything after that is a sum: over micro-batches,
over tensor-parallel ranks, over replicas. Nothing is ever averaged, so no mean of means can arise.

A step is :meth:`TrainStep.begin`, the backward passes, :meth:`TrainStep.finish`: in one call where the executor runs
the micro-batches, apart where the user does. The host waits for the device once, in ``finish``, to know the gradient
norm. :meth:`TrainStep.queue` leaves clipping and skipping to the device and reads the norm in the step that follows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ds import comm
from megatron_ds.mesh import Mesh
from megatron_ds.optim.clip import clip_coefficient
from megatron_ds.optim.loss_scaler import LossScaler
from megatron_ds.pipeline.executor import Executor
from megatron_ds.zero.optimizer import ZeroOptimizer
from megatron_ds.zero.placeholder import explained

MicroBatch = Mapping[str, Tensor]


@dataclass(frozen=True)
class StepResult:
    """What one step did; the same on every rank.

    Attributes:
        loss: the global batch's sum divided by ``targets``.
        grad_norm: global L2 norm before clipping (NaN or Inf when the step was skipped).
        targets: what the loss was divided by: what the task counts of the global batch, or micro-batches of an Engine.
        skipped: gradients were not finite, and no weight changed.
        stop: some rank asked to stop after this step.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    targets: int
    loss_scale: float
    skipped: bool
    stop: bool


class _HostCopy:
    """A copy of a tensor of the device to the host, behind what has been queued so far."""

    def __init__(self, tensor: Tensor):
        self._on_host = tensor.to("cpu", non_blocking=True)  # into pinned memory
        self._copied = torch.cuda.current_stream(tensor.device).record_event() if tensor.is_cuda else None

    def wait(self) -> list[float]:
        """Wait for the copy alone, and for nothing that was queued after it."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._on_host.tolist()


class TrainStep:
    """Composes executor, optimizer and mesh into one optimizer step; holds no state of its own but the loss scale.

    Args:
        clip_norm: largest global gradient norm; 0 turns clipping off.
        rate: learning rate of an update, from its number (the first is 1). A skipped step is no update: a warm-up
            that meets the overflows of a high loss scale is as long as it was asked to be.
        count: what a rank's micro-batches add to the number by which the loss is divided, 0-d.
        weights_fixed: a context around the executor's micro-batches, in which no weight changes.

    Attributes:
        clip_value: bound of each element of the gradients, instead of ``clip_norm``; None for none.
        asks: whether this rank wants all ranks to talk after the step. heard: whether any did so in the last one.
        averaged_over: number of ranks. A backward pass begins with the gradient of the rank's own mean loss, as in DDP;
            the update divides the sum over ranks by this number.
        before_update: called before an update that is not skipped; :meth:`queue` has none.
        after_first: what is called once, after the next step.
        timed: measure ``seconds``, from the first forward pass to the end of the last backward pass. Waits for a GPU.
    """

    def __init__(
        self,
        executor: Executor,
        optimizer: ZeroOptimizer,
        mesh: Mesh,
        scaler: LossScaler,
        *,
        clip_norm: float,
        rate: Callable[[int], float],
        count: Callable[[Sequence[MicroBatch]], Tensor],
        weights_fixed: Callable[[], AbstractContextManager[None]] = nullcontext,
    ):
        self.executor, self.optimizer, self.mesh, self.scaler = executor, optimizer, mesh, scaler
        self.clip_norm, self.rate, self.count = clip_norm, rate, count
        self.weights_fixed = weights_fixed
        self.clip_value: float | None = None
        self.averaged_over: Callable[[], int] = lambda: 1
        self.before_update: Callable[[], None] = lambda: None
        self.after_first: Callable[[], None] | None = None
        self.asks: Callable[[], bool] = lambda: False
        self.heard = False
        self.timed, self.seconds = False, math.inf
        self._seeded = torch.ones((), dtype=torch.float64)
        self._reduced = False
        self._begun = 0.0
        self._queued: tuple[_HostCopy, float] | None = None  # a step's sums, and its learning rate

    @property
    def next_rate(self) -> float:
        """Learning rate of the next update."""
        return self.rate(self.optimizer.count + 1)

    def __call__(self, micro_batches: Sequence[MicroBatch], stop: bool = False) -> StepResult:
        """Run a step on this rank's micro-batches of the global batch.

        ``stop``: this rank wants the run to end; all ranks learn of it in this step's one metrics message.
        """
        return self.finish(*self._run(micro_batches), stop)

    def queue(self, micro_batches: Sequence[MicroBatch], stop: bool = False) -> StepResult | None:
        """Run a step without waiting for the device; what the step before did, None if that is known.

        The device clips, and leaves weights and optimizer state alone where the norm is not finite. The host reads the
        norm of the step before when this step's backward passes are queued, and before it queues this step's update:
        so learning rate and bias correction count the same updates, and weights are those of calls that wait, bit for
        bit. The loss scale has to be a fixed one, as the next step begins before its overflow is known.
        """
        assert not self.scaler.dynamic and self.clip_value is None
        sums = self._sums(*self._run(micro_batches), stop)
        on_host = _HostCopy(sums)
        before = self.queued_result()
        self._queued = on_host, self.next_rate
        self.optimizer.step(self.next_rate, self._factor(sums))
        self._after()
        return before

    def queued_result(self) -> StepResult | None:
        """Wait for the step that was queued last: what it did, None if that is known."""
        if self._queued is None:
            return None
        (on_host, rate), self._queued = self._queued, None
        result = self._result(on_host.wait(), rate)
        if result.skipped:
            self.optimizer.take_back()
        return result

    def _run(self, micro_batches: Sequence[MicroBatch]) -> tuple[Tensor, Tensor]:
        """Forward and backward passes; the sum of this rank's losses, and what the loss is divided by."""
        count = comm.all_reduce(self.count(micro_batches).double(), self.mesh.data)  # exact up to 2^53
        with explained(), self.weights_fixed():
            loss_sum = self.executor.run(micro_batches, self.begin(count))
        return loss_sum, count

    def begin(self, count: Tensor) -> Tensor:
        """Start a step whose loss will be divided by ``count`` (0-d float64); the gradient that seeds its backwards."""
        self.optimizer.start_step()
        count = count.clamp(min=1)
        self._seeded = count / ranks if (ranks := self.averaged_over()) > 1 else count
        self._reduced, self._begun = False, time.perf_counter()
        return self.scaler.scale / self._seeded

    def reduce(self) -> None:
        """Make the gradients whole; :meth:`finish` does so too, and once is enough."""
        if not self._reduced:
            self.optimizer.finish_gradients()
            self._reduced = True

    def excess(self, count: Tensor) -> Tensor:
        """The factor by which gradients are too large, loss scale apart: ``averaged_over`` and a count that changed."""
        return count.clamp(min=1) / self._seeded

    def finish(self, loss_sum: Tensor, count: Tensor, stop: bool = False) -> StepResult:
        """Reduce, clip and update, or skip, after the last backward pass.

        Args:
            loss_sum: sum of this rank's losses, 0-d.
            count: what the loss is divided by after all, if it was not known when the step began.
        """
        # All that the host needs to know of the device, in its one wait for it: the update runs on behind the host.
        known = self._sums(loss_sum, count, stop).tolist()
        scale, factor = self.scaler.scale * known[-1], self._factor(torch.tensor(known, dtype=torch.float64)).item()
        result = self._result(known, self.next_rate)
        if result.skipped:
            self.optimizer.skip()
        else:
            if self.clip_value is not None:
                self._clip_elements(self.clip_value * scale)
            self.before_update()
            self.optimizer.step(result.learning_rate, factor)
        self._after()
        return result

    def _after(self) -> None:
        if self.after_first is not None:
            self.after_first()
            self.after_first = None

    def _sums(self, loss_sum: Tensor, count: Tensor, stop: bool) -> Tensor:
        """``[6]`` float64, on the device: squared norm and loss sum, both as they are, ranks that ask to stop, ranks
        that want to talk, count, and by how much the count is another one than when the step began."""
        if self.timed:
            if self.mesh.device.type == "cuda":
                torch.cuda.synchronize(self.mesh.device)
            self.seconds = time.perf_counter() - self._begun
        self.reduce()
        summed = self._sum_over_world(self.optimizer.norm_squared(), loss_sum, stop)
        return torch.stack([*summed, count.double(), self.excess(count).double()])

    def _factor(self, sums: Tensor) -> Tensor:
        """0-d float64: what the update multiplies gradients with, to unscale and clip; NaN if the norm is infinite."""
        scale = self.scaler.scale * sums[5]
        norm_squared = sums[0] / (scale * scale)
        factor = clip_coefficient(norm_squared, self.clip_norm) / scale
        return factor.masked_fill(~norm_squared.isfinite(), math.nan)

    def _result(self, sums: Sequence[float], rate: float) -> StepResult:
        norm_squared, loss, stopping, asking, counted, difference = sums
        self.heard = asking > 0
        loss_scale = self.scaler.scale
        scale = loss_scale * difference
        norm_squared /= scale * scale
        skipped = not math.isfinite(norm_squared)
        self.scaler.update(found_inf=skipped)
        norm = norm_squared if skipped else math.sqrt(norm_squared)
        return StepResult(loss / max(counted, 1), norm, rate, int(counted), loss_scale, skipped, stopping > 0)

    def _clip_elements(self, bound: float) -> None:
        """Every element of the reduced gradients to ``[-bound, bound]``, wherever it is kept."""
        gradients = [flat_shard.data for flat_shard in self.optimizer.gradient_shards()]
        if gradients:
            torch._foreach_clamp_min_(gradients, -bound)
            torch._foreach_clamp_max_(gradients, bound)

    def evaluate(self, batches: Iterable[Sequence[MicroBatch]]) -> float:
        """The losses' sum over all batches divided by their count, without label smoothing, z-loss and dropout."""
        modes = [(module, module.training) for stage in self.executor.stages.values() for module in stage.modules()]
        for stage in self.executor.stages.values():
            stage.eval()
        try:
            total = torch.zeros(2, dtype=torch.float64, device=self.mesh.device)
            with self.weights_fixed():
                for micro_batches in batches:
                    total[0] += self._own_loss(self.executor.run_forward(micro_batches))
                    total[1] += self._own_loss(self.count(micro_batches))
            loss, count = comm.all_reduce(total, self.mesh.world).tolist()
        finally:
            for module, training in modes:
                module.training = training
        return loss / max(count, 1)

    def _own_loss(self, value: Tensor) -> Tensor:
        """``value`` on the one rank that speaks for its sequences, zero elsewhere: the last stage's first tp rank."""
        speaks = self.executor.has_last_stage and self.mesh.tp.is_first
        return value if speaks else torch.zeros_like(value)

    def _sum_over_world(self, norm_squared: Tensor, loss_sum: Tensor, stop: bool) -> Tensor:
        """``[4]`` float64: the step's one message between all ranks."""
        # Filled on the device: copying a number there would wait for all that is queued.
        flags = [
            torch.full((), float(flag), dtype=torch.float64, device=self.mesh.device) for flag in (stop, self.asks())
        ]
        packed = torch.stack([norm_squared.double(), self._own_loss(loss_sum).double(), *flags])
        return comm.all_reduce(packed, self.mesh.world)
