"""What a diffusion transformer is to the trainer: samples are images, and what counts is their elements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_ds.config.diffusion import DiffusionRun, DiTConfig
from megatron_ds.data.image_samples import DiffusionSamples, Digits, Images, SyntheticImages
from megatron_ds.data.samples import Batch, Sources
from megatron_ds.mesh import Mesh
from megatron_ds.models.dit import TIME_CHANNELS, DiT, MicroBatch
from megatron_ds.models.transformer import StageSettings
from megatron_ds.pipeline.stage import Activations, LayerCosts, StageSpan


class DiTTask:
    """A :class:`~megatron_ds.train.task.Task`."""

    tables: Mapping[str, str] = MappingProxyType({})

    def __init__(self, config: DiffusionRun):
        self.config = config
        self.num_layers, self.tokens_per_sample = config.model.num_layers, config.model.tokens

    @cached_property
    def costs(self) -> LayerCosts:
        return layer_costs(self.config.model)

    @property
    def flops_per_token(self) -> float:
        return 3.0 * (self.num_layers * self.costs.block + self.costs.embedding + self.costs.head)

    def make_stage(self, span: StageSpan, mesh: Mesh, device: torch.device, dtype: torch.dtype) -> DiT:
        c = self.config
        settings = StageSettings(
            mesh,
            span,
            sequence_parallel=c.mesh.sequence_parallel,
            recompute=c.recompute,
            device=device,
            dtype=dtype,
        )
        return DiT(c.model, c.objective, settings)

    def activation_shape(self, mesh: Mesh) -> tuple[int, ...]:
        parts = mesh.tp.size if self.config.mesh.sequence_parallel else 1
        return self.config.model.tokens // parts + 1, self.config.train.micro_batch, self.config.model.hidden_size

    def activations(self, span: StageSpan, tp: int, device: str) -> Activations | None:
        return None

    def open_sources(self) -> Sources:
        data, m = self.config.data, self.config.model
        if data.source == "digits":
            train, valid = Digits(data.valid), self._samples(Digits(0, data.valid))
            return Sources(self._samples(train), valid, identity={"images": "digits", "number": len(train)})
        made_up = SyntheticImages((m.channels, m.image_size, m.image_size), m.num_classes)
        return Sources(self._samples(made_up), identity={"images": "synthetic"})

    def _samples(self, images: Images) -> DiffusionSamples:
        c = self.config
        return DiffusionSamples(images, c.seed, c.model.num_classes, c.objective.condition_dropout)

    def count(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """Elements of the images, or of their latents."""
        elements = self.config.model.channels * self.config.model.image_size**2
        return torch.stack([batch["counts"].sum() for batch in micro_batches]).sum() * elements

    def leave_out(self, batch: Batch, real: npt.NDArray[np.bool_]) -> None:
        batch["counts"] &= real


def layer_costs(m: DiTConfig) -> LayerCosts:
    """Forward FLOPs a token, 2 a multiply-add: matmul weights, the two attention matmuls, and what a sample's condition
    costs shared by its tokens."""
    h = m.hidden_size
    return LayerCosts(
        block=2.0 * (4 * h * h + 2 * h * m.ffn_size) + 4.0 * m.tokens * h + 12.0 * h * h / m.tokens,
        embedding=2.0 * m.patch_elements * h + 2.0 * (TIME_CHANNELS * h + h * h) / m.tokens,
        head=2.0 * m.patch_elements * h + 4.0 * h * h / m.tokens,
    )
