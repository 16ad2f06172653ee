"""The lines that rank 0 prints, and where the time of a step goes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch

from megatron_ds.config.engine import EngineLogConfig
from megatron_ds.mesh import Mesh
from megatron_ds.train.step import StepResult


class Clock:
    """Seconds spent in the parts of a step since the last line.

    ``breakdown`` waits for the GPU at the borders of every part, which takes a little time itself.
    """

    def __init__(self, config: EngineLogConfig, mesh: Mesh, global_batch: int | None):
        self._config, self._mesh, self._global_batch = config, mesh, global_batch
        self._seconds: dict[str, float] = {}
        self._since, self._steps = time.perf_counter(), 0

    @contextlib.contextmanager
    def timing(self, part: str) -> Iterator[None]:
        if not self._config.breakdown:
            yield
            return
        start = self._now()
        yield
        self._seconds[part] = self._seconds.get(part, 0.0) + self._now() - start

    def _now(self) -> float:
        if self._mesh.device.type == "cuda":
            torch.cuda.synchronize(self._mesh.device)
        return time.perf_counter()

    def finished(self, step: int, result: StepResult) -> None:
        self._steps += 1
        if not self._config.every or step % self._config.every:
            return
        elapsed = time.perf_counter() - self._since
        parts = [
            f"step {step}: loss {result.loss:.4f}",
            f"learning rate {result.learning_rate:.3g}",
            f"gradient norm {result.grad_norm:.3g}",
            f"{elapsed / self._steps:.3f} s a step",
        ]
        if result.loss_scale != 1.0:
            parts.append(f"loss scale {result.loss_scale:g}")
        if result.skipped:
            parts.append("skipped")
        if self._global_batch is not None:
            parts.append(f"{self._global_batch * self._steps / max(elapsed, 1e-9):.1f} samples/s")
        parts += [f"{part} {seconds / self._steps:.3f} s" for part, seconds in self._seconds.items()]
        if self._mesh.rank == 0:
            print(", ".join(parts), flush=True)
        self._since, self._steps, self._seconds = time.perf_counter(), 0, {}
