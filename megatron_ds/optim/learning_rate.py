"""Learning rate as a pure function of the step, and torch's schedulers."""

from __future__ import annotations

import math
from inspect import signature
from typing import Any

from megatron_ds.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """The learning rate of update number ``step``, counted from 1.

    With ``W = warmup_steps`` and ``D = decay_steps`` (default ``total_steps``):

    - warm-up, ``step <= W``: ``lr * step / W``, so that update ``W`` is the first at the peak.
    - afterwards, with progress ``x = (step - W) / (D - W)`` cut to ``[0, 1]``:

      ============  ====================================================================
      constant      ``lr``
      linear        ``min + (lr - min) * (1 - x)``
      cosine        ``min + (lr - min) * (1 + cos(pi x)) / 2``
      inverse_sqrt  ``max(min, lr * sqrt(max(W, 1) / step))``
      wsd           ``lr`` until ``(1 - f) D`` with ``f = wsd_decay_fraction``, but not before ``W``; then linear to
                    ``min`` at ``D``
      ============  ====================================================================

    Past ``D`` the last three values of the decay stay at ``min``; constant and inverse_sqrt know no end.

    Raises:
        ValueError: ``step`` is not positive.
    """
    if step < 1:
        raise ValueError(f"step={step}: updates are counted from 1")
    warmup = config.warmup_steps
    if step <= warmup:
        return config.lr * step / warmup
    end = config.decay_steps or total_steps
    fall = config.lr - config.min_lr
    match config.schedule:
        case "constant":
            return config.lr
        case "inverse_sqrt":
            return max(config.min_lr, config.lr * math.sqrt(max(warmup, 1) / step))
        case "linear":
            return config.min_lr + fall * (1.0 - _progress(step, warmup, end))
        case "cosine":
            return config.min_lr + fall * 0.5 * (1.0 + math.cos(math.pi * _progress(step, warmup, end)))
        case "wsd":
            start = max(float(warmup), (1.0 - config.wsd_decay_fraction) * end)
            return config.min_lr + fall * (1.0 - _progress(step, start, end))


def rate_change(before: float, now: float, end_before: int, end_now: int) -> str:
    """What to say of a run that goes on under another schedule; empty where the next update has the rate it had.

    Args:
        before, now: the learning rate of the next update by the schedule of before and by that of now.
        end_before, end_now: the update at which the schedules end (``decay_steps``, else the run's steps).
    """
    if math.isclose(before, now, rel_tol=1e-9):
        return ""
    text = f"the learning rate goes from {before:.3g} to {now:.3g}"
    if end_before == end_now:
        return text
    return (
        f"{text}, as its schedule ends at step {end_now} where it ended at {end_before} "
        f"(--optimizer.decay-steps {end_before} keeps that)"
    )


def _progress(step: int, start: float, end: int) -> float:
    """How far ``step`` is from ``start`` to ``end``, in [0, 1]; 1 from ``end`` on, whatever ``start`` is."""
    if step >= end:
        return 1.0
    return max(0.0, (step - start) / (end - start))


class SchedulerSteps:
    """Steps a torch scheduler that needs nothing for it. ``ReduceLROnPlateau`` takes a metric: the loop steps it.

    Attributes:
        twice: somebody else has stepped it too, between each two of the last steps here.
    """

    def __init__(self) -> None:
        self._seen: int | None = None  # the scheduler's own count after the last step
        self._others = 0

    @property
    def twice(self) -> bool:
        return self._others > 1

    def __call__(self, scheduler: Any) -> None:
        step = getattr(scheduler, "step", None)
        if step is None or not all(
            p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
            for p in signature(step).parameters.values()
        ):
            return
        count = getattr(scheduler, "_step_count", None)
        self._others = self._others + 1 if self._seen is not None and count == self._seen + 1 else 0
        step()
        self._seen = getattr(scheduler, "_step_count", None)
