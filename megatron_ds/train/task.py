"""What a model family is to the trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from megatron_ds.data.samples import Batch, Sources
from megatron_ds.mesh import Mesh
from megatron_ds.pipeline.stage import Activations, LayerCosts, StageSpan
from megatron_ds.train.step import MicroBatch


class Task(Protocol):
    """One model of a family, as a run trains it: its stages, what they cost, its samples and how they are counted.

    It is made from a run's configuration, a :class:`~megatron_ds.config.BaseRunConfig` with the family's own sections,
    which checks those itself. A *token* is a position that the model computes: of a text, or a patch of an image.

    Attributes:
        num_layers: blocks, which the stages share out.
        costs: of a block, and of what stands before the first and behind the last.
        flops_per_token: forward and backward; the family states its convention.
        tokens_per_sample: positions that the model computes of a sample of the usual size.
        tables: tensors that may gain rows (for new tokens, for longer sequences): a tensor's name to the model setting
            that says how many of its rows are in use.
    """

    @property
    def num_layers(self) -> int: ...

    @property
    def costs(self) -> LayerCosts: ...

    @property
    def flops_per_token(self) -> float: ...

    @property
    def tokens_per_sample(self) -> int: ...

    @property
    def tables(self) -> Mapping[str, str]: ...

    def make_stage(self, span: StageSpan, mesh: Mesh, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """A :class:`~megatron_ds.pipeline.stage.StageModule`; the last stage returns the *sum* of the losses."""

    def activation_shape(self, mesh: Mesh, micro_batch: MicroBatch) -> tuple[int, ...]:
        """Of what flows between stages."""

    def activations(self, span: StageSpan, tp: int, device: str) -> Activations | None:
        """Those of a stage over ``tp`` ranks on a type of device; None: not known."""

    def open_sources(self) -> Sources:
        """Open and check the data that the configuration describes."""

    def count(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """What these add to the number by which the sum of the losses is divided, 0-d."""

    def tokens(self, samples: int, targets: int) -> float:
        """Positions that the model computed of so many samples, for which :meth:`count` was ``targets``."""

    def leave_out(self, batch: Batch, real: npt.NDArray[np.bool_]) -> None:
        """Let the samples that are not ``real`` (bool [b]) add nothing to the loss and to :meth:`count`."""


def largest_activations(task: Task, spans: Sequence[StageSpan], tp: int, device: str) -> Activations | None:
    """Of the one that keeps most, among a rank's stages; None where the family does not know."""
    known = [task.activations(span, tp, device) for span in spans]
    return max((stage for stage in known if stage is not None), key=lambda stage: stage.stored, default=None)
