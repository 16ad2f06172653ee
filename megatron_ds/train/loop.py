"""The training loop: steps, evaluations and checkpoints until the steps are done or somebody asks to stop."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_ds.checkpoint.directory import read_meta
from megatron_ds.checkpoint.load import load
from megatron_ds.checkpoint.save import check_disk_space, save
from megatron_ds.comm.together import together
from megatron_ds.config import BaseRunConfig
from megatron_ds.data.loader import BatchLoader, MicroBatch, to_device
from megatron_ds.errors import CheckpointError, MegatronDSError
from megatron_ds.mesh import Mesh
from megatron_ds.optim.learning_rate import rate_change
from megatron_ds.shard.flat_shards import FlatShard, buffers_with_shards
from megatron_ds.train.build import RankRuntime
from megatron_ds.train.callbacks import Callback
from megatron_ds.train.keeping import Keeper
from megatron_ds.train.metrics import Speedometer
from megatron_ds.train.output import Output, check_data, check_settings
from megatron_ds.train.signals import stop_signals
from megatron_ds.train.step import StepResult
from megatron_ds.zero.replicas import check_replicas

Evaluation = Callable[[], Iterable[Sequence[MicroBatch]]]


class TrainingDivergedError(MegatronDSError):
    """So many steps in a row had NaN or Inf gradients that going on would only burn time."""


class Loop:
    """Runs ``config.train.steps`` steps of ``runtime`` on the loader's batches.

    Args:
        evaluation: makes the validation batches anew for each evaluation; None: there is no validation data.
        data: what the samples are made from (:attr:`Sources.identity`): kept in checkpoints, compared on resuming.
    """

    def __init__(
        self,
        config: BaseRunConfig,
        mesh: Mesh,
        runtime: RankRuntime,
        loader: BatchLoader,
        output: Output,
        speedometer: Speedometer,
        evaluation: Evaluation | None = None,
        callbacks: Sequence[Callback] = (),
        data: Mapping[str, Any] | None = None,
    ):
        self.config, self.mesh, self.runtime, self.loader = config, mesh, runtime, loader
        self.output, self.speedometer, self.evaluation = output, speedometer, evaluation
        self.callbacks = list(callbacks)
        self.data = None if data is None else dict(data)
        self.step = 0
        self.skipped = 0
        self.skipped_in_a_row = 0
        self._put_off = False
        self._untold: list[tuple[int, int]] = []  # steps whose result is to come, each with its samples
        self.keeper = Keeper(
            output.checkpoints, config.checkpoint.keep_last, mesh.world, lambda text: self._call("on_message", text)
        )
        self._asked_to_stop = threading.Event()

    def ask_to_stop(self) -> None:
        """End with the step that starts next, on all ranks, whichever rank asks: in it all of them hear of it."""
        self._asked_to_stop.set()

    def where(self) -> str:
        """What this rank is doing, for a message; may be called from another thread."""
        return f"step {self.step + 1}, {self.runtime.executor.where()}".rstrip(", ")

    def run(self) -> bool:
        """Train to the end; False if the run was asked to stop before it (everything is saved then)."""
        total = self.config.train.steps
        stopped = False
        with stop_signals(self._asked_to_stop):
            for callback in self.callbacks:
                callback.on_start(self.step, total, self.skipped)
            try:
                batches = iter(self.loader)
                self.speedometer.restart()
                while self.step < total and not stopped:
                    step = self.step + 1
                    self._call("before_step", step)
                    with self.speedometer.waiting_for_data():
                        own = next(batches)
                    self._untold.append((step, sum(len(batch["sample_index"]) for batch in own)))
                    run_step = self.runtime.step.queue if self.config.train.late_check else self.runtime.step
                    result = run_step(self._to_device(own), self._asked_to_stop.is_set())
                    self.step = step
                    stopped = self._tell(result)
                    if self.config.train.late_check and (stopped or step == total or any(self._due(step))):
                        stopped |= self._tell(self.runtime.step.queued_result())
                    every = self.config.train.check_replicas_every
                    if every and step % every == 0:
                        check_replicas(self.runtime.optimizer, self.mesh)
                    self._evaluate_and_save(step, total, stopped)
            finally:
                self.loader.close()
                self._call("on_end")
        return self.step >= total

    def _tell(self, result: StepResult | None) -> bool:
        """Tell what the first step did of those that have run and are untold. True if some rank asked to stop."""
        if result is None:
            return False
        step, samples = self._untold.pop(0)
        self.speedometer.add(samples * self.mesh.dp.size, result.targets)
        self._call("on_step", step, result, self.speedometer.read())
        self._count(step, result)
        return result.stop

    def _due(self, step: int) -> tuple[bool, bool]:
        """Whether an evaluation, and whether a checkpoint, follows the step."""
        train, save_every = self.config.train, self.config.checkpoint.save_every
        evaluates = self.evaluation is not None and train.eval_every > 0
        saves = save_every > 0 and (self._put_off or step % save_every == 0)
        return evaluates and (step % train.eval_every == 0 or step == train.steps), saves

    def _count(self, step: int, result: StepResult) -> None:
        """Take note of whether the step was skipped; too many in a row end the run.

        Raises:
            TrainingDivergedError: on every rank.
        """
        self.skipped += result.skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if result.skipped else 0
        if not result.skipped:
            self.keeper.good_step()
        most = self.config.train.max_skipped_steps
        if self.skipped_in_a_row >= most:
            raise TrainingDivergedError(
                f"{self.skipped_in_a_row} steps in a row, up to step {step}, had NaN or Inf gradients "
                f"(train.max_skipped_steps={most}); lower optimizer.lr, or look at the data of these steps; "
                + self.keeper.go_back()
            )

    def _call(self, event: str, *arguments: object) -> None:
        """Tell the callbacks. One that cannot write is left out from then on: that is no reason to lose the run."""
        for callback in list(self.callbacks):
            try:
                getattr(callback, event)(*arguments)
            except OSError as error:
                self.callbacks.remove(callback)
                self._call("on_message", f"{type(callback).__name__} ends, training goes on without it: {error}")

    def _evaluate_and_save(self, step: int, total: int, stopped: bool) -> None:
        at_end = step == total
        evaluates, due = self._due(step)
        if evaluates and self.evaluation is not None:
            loss = self.runtime.step.evaluate(self._to_device(batch) for batch in self.evaluation())
            self._call("on_evaluation", step, loss)
            self.speedometer.restart()
        last = stopped or (at_end and self.config.checkpoint.save_at_end)
        if due and self.skipped_in_a_row and not last:
            # Whether the weights are good shows in a step that is not skipped.
            if not self._put_off:
                self._call("on_message", f"checkpoint of step {step} put off: its gradients are NaN or Inf")
            self._put_off = True
            return
        self._put_off = False
        if due or last:
            try:
                saved = self.save()
            except CheckpointError as error:
                if last:
                    raise
                # A full disk, say: losing one checkpoint is no reason to lose the run.
                self._call("on_message", f"checkpoint of step {step} NOT written, training goes on: {error}")
            else:
                if last:
                    why = "" if at_end else "asked to stop: "
                    how = "" if at_end else "; continue with --checkpoint.resume and the same output"
                    if self.skipped_in_a_row and (good := self.keeper.proven()) is not None:
                        how += (
                            f". Its last {self.skipped_in_a_row} steps had NaN or Inf gradients: should they go on so, "
                            f"--checkpoint.resume-from {good} continues from before them"
                        )
                    self._call("on_message", f"{why}saved step {step} in {saved}{how}")
            self.speedometer.restart()

    # Checkpoints

    def check_disk_space(self) -> None:
        """Refuse to begin where the run could not be saved: that would be seen when its time is spent.

        Raises:
            CheckpointError: on every rank; nothing has been written.
        """
        wanted = self.config.checkpoint
        if self.step < self.config.train.steps and (wanted.save_every or wanted.save_at_end):
            check_disk_space(self.output.checkpoints, self._flat_shards(), self.mesh.world)

    def save(self) -> Path:
        """Write a checkpoint of this moment; the one before stays until this one is complete.

        Returns:
            Its directory.

        Raises:
            CheckpointError: on every rank; the checkpoints before are as they were.
        """
        meta = {
            "config": self.config.to_dict(),
            "step": self.step,
            "skipped_steps": self.skipped,
            "consumed": self.loader.state_dict()["consumed"],
            "optimizer_count": self.runtime.optimizer.count,
            "next_learning_rate": self.runtime.step.next_rate,
            "loss_scaler": self.runtime.scaler.state_dict(),
            "data": self.data,
            "skipped_in_a_row": self.skipped_in_a_row,
            "unproven": self.keeper.unproven,
        }
        flat_shards = self._flat_shards()
        saved = save(self.output.checkpoints, self.step, flat_shards, meta, self.mesh.world, replace=True)
        self.keeper.saved(self.step)
        return saved

    def resume(self, path: Path | None = None) -> list[str]:
        """Continue from the latest checkpoint of the output directory, or from another one.

        Returns:
            What is to be said: of data that changed, and of the learning rate where it is not the one that the run
            would have gone on with.

        Raises:
            CheckpointError: it cannot be loaded. ConfigError: it is of another model, seed or data. On every rank.
        """
        source = self.output.checkpoints if path is None else path
        with together(self.mesh.world):
            before = read_meta(source)
        said = [] if path is None else check_settings(before.get("config", {}), self.config, str(source))
        said += check_data(before.get("data"), self.data, self.config.data.changed)
        meta = load(source, self._flat_shards(for_load=True), self.mesh.world)
        self.runtime.optimizer.count = int(meta["optimizer_count"])
        self.runtime.optimizer.refresh_parameters()
        self.runtime.scaler.load_state_dict(meta["loss_scaler"])
        self.step = int(meta["step"])
        self.skipped = int(meta.get("skipped_steps", 0))
        self.skipped_in_a_row = int(meta.get("skipped_in_a_row", 0))
        self.keeper.started_from(self.step, meta.get("unproven"))
        self.loader.load_state_dict({"consumed": int(meta["consumed"])})
        now = self.runtime.step.next_rate
        ends = _schedule_end(meta["config"]), _schedule_end(self.config.to_dict())
        return [*said, rate_change(float(meta.get("next_learning_rate", now)), now, *ends)]

    def _flat_shards(self, for_load: bool = False) -> list[FlatShard]:
        """What a checkpoint keeps of this rank."""
        buffers = buffers_with_shards(self.runtime.stages.values(), for_load, self.mesh.data.is_first)
        return [*self.runtime.optimizer.flat_shards(for_load), *buffers]

    def _to_device(self, batches: Sequence[MicroBatch]) -> Sequence[MicroBatch]:
        return [to_device(batch, self.mesh.device) for batch in batches]


def _schedule_end(config: Mapping[str, Any]) -> int:
    return int(config["optimizer"]["decay_steps"] or config["train"]["steps"])
