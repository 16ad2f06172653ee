"""What happens around the steps: progress bar, TensorBoard, metrics file, timelines. The loop itself is `loop.py`."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from megatron_ds.advice.rules import Advice
from megatron_ds.advice.run_advice import RunAdvice
from megatron_ds.config import BaseRunConfig
from megatron_ds.host import peak_memory_bytes
from megatron_ds.mesh import Mesh
from megatron_ds.pipeline.executor import Executor
from megatron_ds.pipeline.timeline import Timeline
from megatron_ds.train.metrics import MeanSpeed
from megatron_ds.train.output import Output
from megatron_ds.train.step import StepResult

LOG_SECONDS = 10.0  # between lines in place of a bar: a run of a million steps would fill its log

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Callback:
    """Override what is of interest. Every method is called on every rank.

    An ``OSError`` after ``on_start`` (a full disk, a closed terminal) ends the callback and not the run.
    """

    def on_start(self, step: int, total_steps: int, skipped: int) -> None:
        """Before the first step. ``step`` and ``skipped`` steps were done before, in a run that is resumed."""

    def before_step(self, step: int) -> None: ...

    def on_step(self, step: int, result: StepResult, speed: Mapping[str, float]) -> None: ...

    def on_evaluation(self, step: int, loss: float) -> None: ...

    def on_message(self, text: str) -> None: ...

    def on_end(self) -> None: ...


class Messages(Callback):
    """What the run has to say, line by line, on stderr."""

    def on_evaluation(self, step: int, loss: float) -> None:
        self.on_message(f"step {step}: validation loss {loss:.4f}")

    def on_message(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr)


class LossLines(Messages):
    """Loss, learning rate, gradient norm, speed and time left in a line every few steps, and after the last one.

    Args:
        every: steps from one line to the next.
        seconds: at least so many pass from one line to the next.
    """

    def __init__(self, every: int, seconds: float = 0.0):
        self.every, self.seconds = every, seconds
        self.total = self.shown = 0
        self.speed = MeanSpeed()
        self._shown_at = -math.inf

    def on_start(self, step: int, total_steps: int, skipped: int) -> None:
        self.total, self.shown = total_steps, step

    def on_step(self, step: int, result: StepResult, speed: Mapping[str, float]) -> None:
        self.speed.add(speed)
        now = time.monotonic()
        if step == self.total or (step % self.every == 0 and now - self._shown_at >= self.seconds):
            mean = self.speed.read()
            left = mean["seconds"] / (step - self.shown) * (self.total - step)
            rates = f"learning rate {result.learning_rate:.3g}, gradient norm {result.grad_norm:.3g}"
            self.on_message(
                f"step {step} of {self.total}: {_shown(result, mean)}, {rates}, {timedelta(seconds=round(left))} left"
            )
            self.shown, self._shown_at = step, now


class ProgressBar(Messages):
    """Loss, tokens/s and time left on one line of rank 0's terminal."""

    def __init__(self) -> None:
        self.bar: tqdm[Any] | None = None

    def on_start(self, step: int, total_steps: int, skipped: int) -> None:
        self.bar = tqdm(total=total_steps, initial=step, desc="train", unit="step", mininterval=0.2, dynamic_ncols=True)

    def on_step(self, step: int, result: StepResult, speed: Mapping[str, float]) -> None:
        assert self.bar is not None
        self.bar.set_postfix_str(_shown(result, speed), refresh=False)
        self.bar.update()

    def on_end(self) -> None:
        if self.bar is not None:
            self.bar.close()


class MetricsFile(Callback):
    """One JSON line a step, written at once: the numbers in full precision, for plots and for comparing runs.

    What is not finite, of a step that was skipped, is null: JSON knows no NaN.
    Where the disk is full, lines wait in memory for the next step: there is never half a line in a file. A file that
    was deleted, with its directory or without, is begun anew. Either is said.
    """

    def __init__(self, path: Path, warn: Callable[[str], None]):
        self.path, self.warn = path, warn
        self._waiting: dict[Path, list[bytes]] = {path: [], path.with_name("evaluation.jsonl"): []}
        self._exists: set[Path] = set()
        self._stuck: set[Path] = set()

    def on_start(self, step: int, total_steps: int, skipped: int) -> None:
        self.path.touch()  # a directory that cannot be written is an error now
        self._exists.add(self.path)

    def on_step(self, step: int, result: StepResult, speed: Mapping[str, float]) -> None:
        self._write("metrics.jsonl", {"step": step, **vars(result), **speed})

    def on_evaluation(self, step: int, loss: float) -> None:
        self._write("evaluation.jsonl", {"step": step, "loss": loss})

    def _write(self, name: str, values: Mapping[str, Any]) -> None:
        path = self.path.with_name(name)
        # NaN and Inf, of a step that was skipped, are not JSON.
        known = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._waiting[path].append(json.dumps(known, allow_nan=False).encode() + b"\n")
        try:
            self._flush(path)
            self._stuck.discard(path)
        except OSError as error:
            if path not in self._stuck:
                self._tell(f"{path} cannot be written, its lines wait in memory: {error}")
            self._stuck.add(path)

    def _flush(self, path: Path) -> None:
        lines = b"".join(self._waiting[path])
        if path in self._exists and not path.exists():
            self._exists.remove(path)
            self._tell(f"{path} was deleted during the run; a new one begins with the step that follows")
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab", buffering=0) as file:
            self._exists.add(path)
            before, written = file.tell(), 0
            try:
                written = file.write(lines)
            finally:
                if written < len(lines):
                    file.truncate(before)
        if written < len(lines):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._waiting[path] = []

    def on_end(self) -> None:
        for path, lines in self._waiting.items():
            try:
                if lines:
                    self._flush(path)
            except OSError as error:
                self._tell(f"{len(lines)} lines of {path} are lost, it cannot be written: {error}")

    def _tell(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a closed terminal
            self.warn(text)


class TensorBoard(Callback):
    """Loss, learning rate, gradient norm, tokens/s, targets/s, TFLOP/s a rank, MFU where known, share of the time spent
    waiting for data, memory, skipped steps. Speed is the mean since the last point."""

    def __init__(self, folder: Path, mesh: Mesh, every: int):
        self.folder, self.mesh, self.every = folder, mesh, every
        self.writer: SummaryWriter | None = None
        self.skipped = 0
        self.speed = MeanSpeed()

    def on_start(self, step: int, total_steps: int, skipped: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.skipped = skipped
        self.writer = SummaryWriter(str(self.folder), purge_step=step + 1)

    def on_step(self, step: int, result: StepResult, speed: Mapping[str, float]) -> None:
        self.skipped += result.skipped
        self.speed.add(speed)
        if step % self.every:
            return
        assert self.writer is not None
        values = {
            "train/loss": result.loss,
            "train/learning_rate": result.learning_rate,
            "train/gradient_norm": result.grad_norm,
            "train/loss_scale": result.loss_scale,
            "train/skipped_steps": self.skipped,
            "memory/peak_gb": peak_memory_bytes(self.mesh.device) / 1e9,
            **{f"speed/{name}": value for name, value in self.speed.read().items()},
        }
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def on_evaluation(self, step: int, loss: float) -> None:
        assert self.writer is not None
        self.writer.add_scalar("valid/loss", loss, step)

    def on_end(self) -> None:
        if self.writer is not None:
            self.writer.close()


class TimelineRecorder(Callback):
    """Writes when each pipeline action ran, one file a pipeline rank, for ``tools/show_schedule.py --recorded``."""

    def __init__(self, folder: Path, executor: Executor, steps: tuple[int, ...]):
        self.folder, self.executor, self.steps = folder, executor, frozenset(steps)

    def before_step(self, step: int) -> None:
        self.executor.recorded = [] if step in self.steps else None

    def on_step(self, step: int, result: StepResult, speed: Mapping[str, float]) -> None:
        if self.executor.recorded is None:
            return
        folder = self.folder / f"step-{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        Timeline(tuple(self.executor.recorded)).to_json_file(folder / f"rank-{self.executor.pp.rank:05d}.json")
        self.executor.recorded = None


class AdviceCallback(Callback):
    """Gives advice while the run is under way; ``known``: what is known when it starts."""

    def __init__(self, advice: RunAdvice, known: list[Advice | None]):
        self.advice, self.known = advice, known

    def on_start(self, step: int, total_steps: int, skipped: int) -> None:
        self.advice.before(self.known)

    def on_step(self, step: int, result: StepResult, speed: Mapping[str, float]) -> None:
        self.advice.after_step(result.skipped)


def default_callbacks(config: BaseRunConfig, mesh: Mesh, executor: Executor, output: Output) -> list[Callback]:
    """The callbacks that the configuration asks for on this rank."""
    callbacks: list[Callback] = []
    if config.log.record_steps and mesh.dp.is_first and mesh.cp.is_first and mesh.tp.is_first:
        callbacks.append(TimelineRecorder(output.timeline, executor, config.log.record_steps))
    if mesh.rank == 0:
        messages = _messages(config)
        callbacks.append(MetricsFile(output.metrics, messages.on_message))
        if config.log.tensorboard:
            callbacks.append(TensorBoard(output.tensorboard, mesh, config.log.every))
        callbacks.append(messages)
    return callbacks


def _messages(config: BaseRunConfig) -> Messages:
    """A bar on a terminal; into a file, lines that can be searched."""
    if config.log.progress and sys.stderr.isatty():
        return ProgressBar()
    return LossLines(config.log.every, LOG_SECONDS if config.log.progress else 0.0)


def _shown(result: StepResult, speed: Mapping[str, float]) -> str:
    tokens, targets = speed["tokens_per_s"], speed["targets_per_s"]
    own = "" if targets == tokens else f" ({targets:,.0f} targets/s)"
    return f"loss {result.loss:.4f}, {tokens:,.0f} tok/s{own}" + ", SKIPPED" * result.skipped
