"""What an engine writes and reads: its checkpoints, and folders for ``from_pretrained``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from megatron_ds.engine import checkpoint, pretrained
from megatron_ds.engine.inspection import Inspection
from megatron_ds.errors import EngineError

if TYPE_CHECKING:
    from megatron_ds.engine.engine import Engine


class Files(Inspection):
    """The methods of an engine for files. Every rank calls each of them alike."""

    def require_between_steps(self, what: str) -> None:
        """Raise EngineError in the middle of a step: its gradients so far are in no checkpoint."""
        if self._done:
            raise EngineError(
                f"{what} after {self._done} of a step's micro-batches, whose gradients no checkpoint holds; finish the "
                "step first, with step(partial=True) if no more micro-batches come"
            )

    def save_checkpoint(
        self,
        directory: str | Path,
        client_state: Mapping[str, Any] | None = None,
        keep_last: int | None = None,
        *,
        within_step: bool = False,
    ) -> Path:
        """Write ``directory/step-N``, which any number of ranks at any stage can load; see ``megatron_ds.checkpoint``.

        Args:
            client_state: plain values, given back as they were by :meth:`load_checkpoint`; others are refused by name.
            keep_last: remove all but the newest this many, and the newest that a step with finite gradients followed.
            within_step: also in the middle of a step, as it began; the gradients so far are lost to who loads it.
        """
        if not within_step:
            self.require_between_steps("save_checkpoint()")
        with self._awaited("save_checkpoint()"):
            return checkpoint.save(cast("Engine", self), directory, dict(client_state or {}), keep_last)

    def load_checkpoint(self, path: str | Path, weights_only: bool = False, strict: bool = True) -> dict[str, Any]:
        """Continue from the latest checkpoint in ``path``, or from one ``step-N``; returns its client state.

        Args:
            weights_only: start anew from the weights alone.
            strict: False, with ``weights_only``: take what has the same name; rank 0 logs what has not.
        """
        self.require_between_steps("load_checkpoint()")
        with self._awaited("load_checkpoint()"):
            return checkpoint.load(cast("Engine", self), path, weights_only, strict)

    def save_pretrained(self, folder: str | Path, average: bool | None = None, masters: bool = False) -> None:
        """Write a folder that the model's ``from_pretrained`` loads, one tensor at a time.

        Args:
            average: the moving average of the weights, or the weights. Default: the average where there is one.
            masters: write what is trained in the dtype of the master weights (fp32). Default: in that of the forward
                pass, whose 8 bits in bf16 cannot hold what few updates at a small rate have changed.

        Raises:
            EngineError: there is no moving average to save.
        """
        if average and not self.keeps_average:
            raise EngineError("there is no moving average of the weights to save; set optimizer.ema_decay")
        tensors = self.tensors(self.keeps_average if average is None else average, masters)
        with self._awaited("save_pretrained()"):
            pretrained.save(self.module, tensors, self.mesh, Path(folder))
