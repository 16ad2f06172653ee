"""Which checkpoints of a run are kept, and which one it goes back to when it has diverged.

A step with NaN or Inf in its gradients is skipped, so weights that were ruined by the update before it stay as they
are. A checkpoint is therefore *proven* by the first step after it whose gradients were finite. Until then the newest
proven one before it is kept, whatever ``checkpoint.keep_last`` says.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_ds.checkpoint.directory import point_latest, steps_in
from megatron_ds.checkpoint.manifest import step_of
from megatron_ds.checkpoint.save import prune
from megatron_ds.comm.together import exchange
from megatron_ds.errors import CheckpointError
from megatron_ds.mesh import Axis


class Keeper:
    """Removes old checkpoints on rank 0, and remembers which ones are not proven.

    Args:
        warn: told of an old checkpoint that could not be removed; that ends no run.

    Attributes:
        unproven: the first checkpoint after which no step had finite gradients yet.
    """

    def __init__(self, directory: Path, keep_last: int | None, world: Axis, warn: Callable[[str], None]):
        if keep_last is not None and keep_last < 1:
            raise CheckpointError(f"keep_last={keep_last} would remove the checkpoint being saved; use 1 or more")
        self.directory, self.keep_last, self.world, self.warn = directory, keep_last, world, warn
        self.unproven: int | None = None
        self._newest: int | None = None

    def started_from(self, step: int, unproven: int | None) -> None:
        """The run continues from this checkpoint, in which ``unproven`` was written down. Removes nothing yet."""
        self.unproven, self._newest = step if unproven is None else unproven, step

    def saved(self, step: int) -> None:
        """The checkpoint of this step was written."""
        self.unproven = step if self.unproven is None else self.unproven
        self._newest = step
        self._prune()

    def good_step(self) -> None:
        """A step changed the weights: the gradients of the weights that were saved are finite."""
        if self.unproven is not None:
            self.unproven = None
            self._prune()

    def proven(self) -> int | None:
        """The newest checkpoint that is proven; those of earlier runs count, since a run that diverges adds none."""
        steps = [step_of(path) or 0 for path in steps_in(self.directory)]
        return max((step for step in steps if self.unproven is None or step < self.unproven), default=None)

    def go_back(self) -> str:
        """Every rank, once the run has diverged: make the newest proven checkpoint the latest; a sentence on it."""
        text = ""
        if self.world.rank == 0:
            try:
                text = self._go_back()
            except OSError as error:
                text = f"the checkpoints cannot be looked through: {error}"
        return exchange(self.world, text)[0]

    def _go_back(self) -> str:
        good, bad = self.proven(), self.unproven
        if good is None and bad is None:
            return "there is no checkpoint"
        if good is None:
            return f"there is no checkpoint from before these steps but that of step {bad}, after which they all failed"
        if bad is None:
            return f"--checkpoint.resume continues from step {good}, after which gradients were finite"
        path = next(path for path in steps_in(self.directory) if step_of(path) == good)
        point_latest(self.directory, path.name)
        return (
            f"--checkpoint.resume continues from step {good}, since no step after the checkpoint of step {bad} had "
            f"finite gradients (--checkpoint.resume-from {bad} takes that one all the same)"
        )

    def _prune(self) -> None:
        if self.world.rank == 0 and self.keep_last is not None and self._newest is not None:
            try:
                prune(self.directory, self._newest, self.keep_last, self.unproven)
            except OSError as error:
                self.warn(f"an old checkpoint cannot be removed, training goes on: {error}")
