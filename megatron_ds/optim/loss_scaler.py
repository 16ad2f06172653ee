"""Loss scaling for fp16: keep small gradients above the format's smallest number (Micikevicius et al. 2018)."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ds.config import PrecisionConfig


@dataclass
class LossScaler:
    """A loss scale that halves on overflow and doubles after a run of good steps; or, not ``dynamic``, a fixed one.

    The loss is multiplied by :attr:`scale` before the backward pass, and the gradients by its inverse afterwards.
    Every rank must give :meth:`update` the same verdict, so that all keep the same scale.

    Args:
        scale: current factor, a power of two for exactness.
        window: good steps in a row after which the scale doubles.
        wait: good steps at the start and after an overflow that do not count towards the window.
        hysteresis: overflowing steps that are tolerated before the scale halves: with 2, the first overflow only
            uses up the tolerance and the second halves, and so does each further one until the scale next doubles,
            which restores the tolerance.
        min_scale: the scale never falls below this.
        max_scale: nor rises above this; a scale near fp32's largest number would overflow the loss itself.
    """

    scale: float = 1.0
    dynamic: bool = False
    window: int = 1000
    hysteresis: int = 2
    min_scale: float = 1.0
    max_scale: float = 2.0**40
    wait: int = 0
    good_steps: int | None = None
    tolerance: int | None = None

    def __post_init__(self) -> None:
        if self.good_steps is None:
            self.good_steps = -self.wait
        if self.tolerance is None:
            self.tolerance = self.hysteresis

    @staticmethod
    def from_config(config: PrecisionConfig) -> LossScaler:
        """Dynamic for fp16 unless ``loss_scale`` fixes it; a constant 1 for every other dtype."""
        if config.dtype != "fp16":
            return LossScaler()
        if config.loss_scale is not None:
            return LossScaler(scale=config.loss_scale)
        return LossScaler(
            scale=config.initial_loss_scale,
            dynamic=True,
            window=config.loss_scale_window,
            wait=config.loss_scale_wait,
            hysteresis=config.loss_scale_hysteresis,
            min_scale=config.min_loss_scale,
        )

    def update(self, found_inf: bool) -> None:
        """Take note of a finished step: ``found_inf`` if its gradients overflowed and it was skipped."""
        if not self.dynamic:
            return
        assert self.tolerance is not None and self.good_steps is not None
        if found_inf:
            self.good_steps = -self.wait
            self.tolerance = max(0, self.tolerance - 1)
            if self.tolerance == 0:
                self.scale = max(self.scale / 2.0, self.min_scale)
            return
        self.good_steps += 1
        if self.good_steps >= self.window:
            self.good_steps = 0
            self.tolerance = self.hysteresis
            self.scale = min(self.scale * 2.0, self.max_scale)

    @property
    def at_floor(self) -> bool:
        """Whether an overflow could no longer lower the scale: the gradients themselves are not finite."""
        return self.dynamic and self.scale <= self.min_scale

    def state_dict(self) -> dict[str, float | int]:
        """Plain numbers for a JSON checkpoint."""
        assert self.tolerance is not None and self.good_steps is not None
        return {
            "scale": self.scale,
            "good_steps": self.good_steps,
            "tolerance": self.tolerance,
            "dynamic": self.dynamic,
        }

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        """Continue from :meth:`state_dict`, within the limits of the configuration, which may be other ones now.

        A fixed scale stays what the configuration says, and so does a dynamic one where the state is of a fixed one:
        a run that was in bf16 would begin fp16 with a scale of 1, and lose its small gradients.
        """
        if self.dynamic and state.get("dynamic", True):
            self.scale = max(float(state["scale"]), self.min_scale)
            self.good_steps = int(state["good_steps"])
            self.tolerance = min(int(state["tolerance"]), self.hysteresis)
