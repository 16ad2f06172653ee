"""The engine: a user's model in a user's loop, on any number of ranks."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from megatron_ds.advice.engine_advice import EngineAdvice
from megatron_ds.config.engine import BatchSizes, EngineConfig
from megatron_ds.engine.buffer_sync import BufferSync
from megatron_ds.engine.checkpoint import begin_average
from megatron_ds.engine.clock import Clock
from megatron_ds.engine.files import Files
from megatron_ds.engine.generation import generate_together
from megatron_ds.engine.gradients import Placeholders
from megatron_ds.engine.join import JoinableEngine, Mode, UnevenInputs
from megatron_ds.engine.late_ranks import LateRanks
from megatron_ds.engine.loss_stage import LossStage, to_device
from megatron_ds.engine.model_guard import ModelGuard, require_trainable_dtype
from megatron_ds.engine.optimizer_hooks import OptimizerHooks
from megatron_ds.errors import EngineError
from megatron_ds.mesh import Mesh
from megatron_ds.optim.learning_rate import SchedulerSteps
from megatron_ds.optim.rule import Update
from megatron_ds.optim.torch_rule import TorchRule
from megatron_ds.pipeline.run_backward import run_backward
from megatron_ds.shard import spec_of
from megatron_ds.train.keeping import Keeper
from megatron_ds.train.step import StepResult, TrainStep
from megatron_ds.zero.main_grad import OwnBackward
from megatron_ds.zero.optimizer import ZeroOptimizer
from megatron_ds.zero.placeholder import explained

log = logging.getLogger(__name__)


class Engine(JoinableEngine, Files):
    """Trains ``module``; made by :func:`megatron_ds.initialize`.

    Either whole batches, ``engine.train_batch(micro_batches)``, or a loop of one's own::

        for batch in loader:
            loss = engine(**batch).loss
            engine.backward(loss)
            engine.step()                 # updates after config.accumulation micro-batches

    The semantics are DDP's: ``loss`` is the micro-batch's mean, and gradients are averaged over accumulation and ranks.
    Every rank calls every method alike.

    Attributes:
        module: the model. config: its configuration. mesh: the ranks.
        optimizer: the torch optimizer whose update rule is used, with its ``param_groups``; None for the
            configuration's own.
        zero: holds master weights, gradients and optimizer state.
        steps: optimizer steps taken, those skipped for NaN or Inf included; skipped: how many of them.
        last: what the last step did.
    """

    def __init__(
        self,
        module: nn.Module,
        config: EngineConfig,
        sizes: BatchSizes,
        mesh: Mesh,
        zero: ZeroOptimizer,
        train_step: TrainStep,
        optimizer: Optimizer | None,
        rule: TorchRule | None,
        lr_scheduler: Any,
        ranks_sharing: int = 1,
    ):
        super().__init__()
        self.module, self.config, self.sizes, self.mesh, self.zero = module, config, sizes, mesh, zero
        self.optimizer, self.rule, self.lr_scheduler = optimizer, rule, lr_scheduler
        self.train_step, self._schedule = train_step, SchedulerSteps()
        self.steps = self.skipped = 0
        self.keeper = Keeper(Path(), None, mesh.world, log.warning)
        self.last: StepResult | None = None
        (stage,) = train_step.executor.stages.values()
        assert isinstance(stage, LossStage)
        self._stage = stage
        self._seed: Tensor | None = None  # of the backward passes of the step that is under way
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=mesh.device)
        self._done = 0  # micro-batches of that step
        self._complete = False  # its last one has been
        self._deferred = False
        self._postponed = False  # step() was called since the last backward pass, and only accumulated
        self._own = OwnBackward()
        self.look_at_model()
        keeps_state = rule is not None and rule.keeps_state
        self._hooks = OptimizerHooks(optimizer, keeps_state, lambda: self._placeholders.put())
        train_step.averaged_over = lambda: self._uneven.divisor
        train_step.before_update = self._hooks.before_update
        self._buffers = BufferSync(module, mesh.data)
        self._uneven = UnevenInputs(self)
        self._late = LateRanks(mesh.world, config.timeout, log.warning)
        train_step.asks = self._buffers.news
        self._clock = Clock(config.log, mesh, sizes.global_batch)
        self._advice = EngineAdvice(
            zero, train_step.scaler, mesh, sizes.accumulation, log.warning, module, ranks_sharing
        )
        stage.observer, train_step.timed = self._advice.observer, self._advice.times_steps
        if rule is not None:
            rule.serve_modes(self.change_weights)
        generate_together(module, zero)

    def look_at_model(self) -> None:
        """What is kept of the parameters that are trained."""
        self._placeholders = Placeholders(self.module.parameters())
        for main_grad in self.zero.reducer.main_grads():
            main_grad.own = self._own
        self._model_guard = ModelGuard(self.module, self.zero, self.optimizer)

    def train_also(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Give gradients and state to what was frozen so far; a step does so with what it finds unfrozen.

        Between two steps, on all ranks alike.
        """
        self.require_between_steps("unfreezing")
        for name, parameter in parameters.items():
            require_trainable_dtype(name, parameter)
        if self.rule is not None:
            self.rule.train_also(list(parameters), {spec_of(p).name: p for p in self.module.parameters()})
        self.zero.train_also(parameters.values())
        begin_average(self, parameters)
        self.look_at_model()

    # Training

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self.forward(*arguments, **keywords)

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        """The model's own forward."""
        self._notice_zeroing()
        self._placeholders.remove()
        mode = Mode.of(self.module.training, torch.is_grad_enabled(), self._next_is_last)
        with self._awaited("forward pass"):
            self._uneven.announce("forward", mode)
            self._before_forward(mode)
            with self._clock.timing("forward"):
                return self._stage.call(*arguments, **keywords)

    @property
    def _next_is_last(self) -> bool:
        """Whether the next micro-batch is the last one of the step."""
        return not self._deferred and self._done + 1 >= self.sizes.accumulation

    def _before_forward(self, mode: Mode) -> None:
        if mode >= Mode.TRAINING:
            self._buffers.before_forward(mode == Mode.LAST)
        if mode >= Mode.WITH_GRADIENTS:
            self._begin()

    def _begin(self) -> Tensor:
        if self._seed is None:
            self._require_ready()
            self._seed = self.train_step.begin(self._count(self.sizes.accumulation))
        return self._seed

    def _count(self, micro_batches: int) -> Tensor:
        """What a step's loss is divided by, over all ranks."""
        each = micro_batches if self.config.losses == "mean" else 1
        # Filled on the device: copying a number there would wait for the update of the step before.
        return torch.full((), float(each * self._uneven.divisor), dtype=torch.float64, device=self.mesh.device)

    def backward(self, loss: Tensor, retain_graph: bool = False) -> Tensor:
        """Gradients of a micro-batch. With the step's last one they are reduced over the ranks meanwhile.

        Args:
            loss: 0-d, the micro-batch's mean on this rank.
            retain_graph: as in ``Tensor.backward``, for another pass through the same graph.
        """
        if loss.dim() != 0:
            raise EngineError(f"backward() takes a 0-d loss, not one of shape {list(loss.shape)}; call .mean() on it")
        self._notice_zeroing()
        _raise(self._own.fault())
        if self._complete:
            raise EngineError(
                f"backward() was called after the last of accumulation={self.sizes.accumulation} micro-batches; "
                "call step() first; losses of one micro-batch add up in one pass, backward(a + b), and in passes of "
                "their own with losses='sum' and no_sync() (accelerator.no_sync(model)) around all but the last"
            )
        self._placeholders.remove()
        last = self._next_is_last
        self._uneven.announce("backward", last)
        self._backward(last, lambda seed: run_backward(loss, seed.to(loss.dtype), retain_graph))
        self._loss_sum += loss.detach()
        self._placeholders.put()
        return loss

    def _backward(self, last: bool, compute: Callable[[Tensor], None]) -> None:
        seed = self._begin()
        self._complete = last
        self.zero.start_backward(last)
        with self._clock.timing("backward"), self._awaited("backward pass"), explained(), self._own.running():
            compute(seed)
            self.zero.end_backward()
        self._done += 1
        self._postponed = False

    @property
    def is_boundary(self) -> bool:
        """Whether the next :meth:`step` will update: the last micro-batch of the step has been."""
        return self._complete

    @property
    def has_gradients(self) -> bool:
        """Whether backward passes of this step have left gradients."""
        return self._done > 0

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes in here are not the last of a step, whatever their number; the next one outside is."""
        before, self._deferred = self._deferred, True
        try:
            yield
        finally:
            self._deferred = before

    def step(self, partial: bool = False) -> StepResult | None:
        """Update the model if the step's last micro-batch has been; otherwise do nothing and return None.

        Args:
            partial: update now, with the mean over the micro-batches that there have been (the rest of an epoch).
        """
        if callable(partial):
            raise EngineError("step() takes no closure: sharded gradients are computed once, by backward()")
        self._notice_zeroing()
        _raise(self._own.fault())
        if self._done == 0:
            raise EngineError("step() without a backward pass; call engine.backward(loss), not loss.backward()")
        if not (self._complete or partial):
            self._postponed = True
            return None
        self._uneven.announce("step")
        return self._update()

    def _update(self, stop: bool = False) -> StepResult:
        self._check_guard()
        with self._clock.timing("step"), self._awaited("update"):
            result = self.train_step.finish(self._loss_sum, self._count(self._done), stop)
        return self._finished(result)

    def train_batch(self, micro_batches: Iterable[Any], stop: bool = False) -> StepResult:
        """One optimizer step on the next ``accumulation`` of this rank's micro-batches, of an iterator or a list.

        ``stop``: this rank wants the loop to end; in the result's ``stop`` all ranks learn of it.
        """
        self._notice_zeroing()
        if self._done:
            raise EngineError(f"train_batch() in the middle of a step of {self._done} micro-batches; call step() first")
        wanted = self.sizes.accumulation
        taken = [to_device(batch, self.mesh.device) for batch, _ in zip(micro_batches, range(wanted))]
        if len(taken) < wanted:
            raise EngineError(f"train_batch() got {len(taken)} micro-batches where accumulation={wanted}")
        if self._seed is not None or self._own.failed:  # by a forward pass that nobody needed, or a step that failed
            self._drop_gradients()
        _raise(self._own.fault())
        self.module.train()
        if self._join_config.enable:  # by parts, which ranks without a batch follow
            for batch in taken:
                self.backward(self._stage.loss(self, batch))
            self._uneven.announce("step")
            return self._update(stop)
        self._require_ready()
        self._buffers.before_forward(last=True)
        with self._clock.timing("step"), self._awaited("train_batch()"), self._own.running():
            return self._finished(self.train_step(taken, stop))

    def _require_ready(self) -> None:
        self.take_unfrozen()
        self._check_guard()

    def take_unfrozen(self) -> None:
        """What was unfrozen since the last step is trained from now on; within a step it is left."""
        if self._seed is None and (late := self._model_guard.late()):
            for parameter in late.values():
                parameter.grad = None  # of a backward pass that no step took
            self.train_also(late)

    def _check_guard(self) -> None:
        _raise(self._model_guard.fault() or self._hooks.fault())

    def change_weights(self, first: Callable[[], None], change: Callable[[Update], None]) -> None:
        """What an optimizer does to the weights between two steps, as Schedule-Free's ``eval()``."""
        self.require_between_steps("a change of the weights by their optimizer")
        first()
        self.zero.change(change)

    def _finished(self, result: StepResult) -> StepResult:
        if not result.skipped:
            self._hooks.after_update()
        self._begin_anew()
        if self.train_step.heard:
            self._buffers.agree()
        self.steps += 1
        self.skipped += result.skipped
        self.last = result
        if self.optimizer is not None:
            self.optimizer._opt_called = True  # type: ignore[attr-defined]  # or schedulers warn that it never steps
        if not result.skipped:
            self.keeper.good_step()
            self._schedule(self.lr_scheduler)
        self._clock.finished(self.steps, result)
        self._advice.scheduled_twice = self._schedule.twice
        self._advice.after(result.skipped, result.learning_rate, self.train_step.seconds, self._model_guard.strays)
        self._stage.observer, self.train_step.timed = self._advice.observer, self._advice.times_steps
        return result

    @torch.no_grad()
    def eval_batch(self, micro_batches: Any) -> float:
        """Mean loss of a micro-batch, or of a list of them, over all ranks; in evaluation mode."""
        batches = micro_batches if isinstance(micro_batches, list) else [micro_batches]
        self._share_buffers()
        with self._awaited("evaluation"):
            return self.train_step.evaluate([[to_device(batch, self.mesh.device) for batch in batches]])

    def train(self, mode: bool = True) -> Engine:
        if not mode:
            self._share_buffers()
        self.module.train(mode)
        return self

    def eval(self) -> Engine:
        """Evaluation mode, with rank 0's buffers (running statistics) on every rank, as DDP has them."""
        return self.train(False)

    @property
    def training(self) -> bool:
        return self.module.training

    @property
    def learning_rate(self) -> float:
        """Of the next update."""
        return self.train_step.next_rate

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients that there are: of this step's micro-batches, and what other backward passes left here.

        After a :meth:`step` that only accumulated, the micro-batches of before stay: so a loop of zero_grad, forward,
        backward and step accumulates. ``optimizer.zero_grad()`` and ``module.zero_grad()`` drop the former alone. On
        all ranks alike, as gradients may be under way between them.
        """
        self._own.strays.clear()
        if self._own.failed or (self._done and not self._postponed):
            self._drop_gradients()

    def _notice_zeroing(self) -> None:
        if self._placeholders.zeroed() and not self._postponed:
            self._drop_gradients()

    def _drop_gradients(self) -> None:
        self._uneven.announce("zero_grad")
        self._drop()

    def _drop(self) -> None:
        self.train_step.reduce()
        self.zero.skip()
        self._begin_anew()

    def _begin_anew(self) -> None:
        """The next forward or backward pass is the first of a step."""
        self._placeholders.remove()
        self._seed, self._done, self._complete, self._postponed = None, 0, False, False
        self._own.failed = False
        self._loss_sum = torch.zeros_like(self._loss_sum)

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.module.parameters()

    def _share_buffers(self) -> None:
        if self._done == 0:
            self._uneven.announce("buffers")
            self._buffers.share()

    def close(self) -> None:
        """Let go of the model, whose parameters are whole and stay; it may be given to another engine. On all ranks."""
        if self.zero.reducer.closed:  # the model may have another engine by now
            return
        self._placeholders.remove()
        self._hooks.close()
        self._late.close()
        self.zero.close()


def _raise(fault: str | None) -> None:
    if fault is not None:
        raise EngineError(fault)
