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
from megatron_ds.config.sparse import sparse_layout
from megatron_ds.data.samples import Batch, Sources
from megatron_ds.mesh import Mesh
from megatron_ds.models.conditions import TIME_CHANNELS
from megatron_ds.models.diffusion_sources import open_diffusion_sources
from megatron_ds.models.dit import DiT, activation_shape
from megatron_ds.models.dit_activations import dit_activations
from megatron_ds.models.transformer import MicroBatch, StageSettings
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
        every = self.num_layers * self.costs.block + self.costs.embedding + self.costs.head
        return 3.0 * (every - unused_flops(self.config.model))

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

    def activation_shape(self, mesh: Mesh, micro_batch: MicroBatch) -> tuple[int, ...]:
        parts = mesh.tp.size if self.config.mesh.sequence_parallel else 1
        return activation_shape(self.config.model, parts, micro_batch)

    def activations(self, span: StageSpan, tp: int, device: str) -> Activations:
        return dit_activations(self.config, span, tp, device)

    def open_sources(self) -> Sources:
        return open_diffusion_sources(self.config)

    def count(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """Elements of the images, or of their latents, whose size is a micro-batch's own."""
        return torch.stack([batch["counts"].sum() * batch["images"][0].numel() for batch in micro_batches]).sum()

    def tokens(self, samples: int, targets: int) -> float:
        """Of images of any size, but for those that count nothing."""
        m = self.config.model
        return targets / m.patch_elements + samples * (m.tokens - m.patches)

    def leave_out(self, batch: Batch, real: npt.NDArray[np.bool_]) -> None:
        batch["counts"] &= real


def layer_costs(m: DiTConfig) -> LayerCosts:
    """Forward FLOPs a token, 2 a multiply-add: matmul weights, the two attention matmuls (of sparse attention its live
    blocks), and what a sample's condition costs shared by its tokens."""
    h, streams, sparse = m.hidden_size, 1 + m.has_text, m.attention.sparse
    density = 1.0 if sparse.mode == "none" else sparse_layout(sparse, m.tokens, m.num_heads, causal=False).density()
    mlp = (3 if m.activation == "swiglu" else 2) * h * m.ffn_size
    condition = TIME_CHANNELS * h + h * h + m.has_text * (m.pooled_size * h + h * h)
    ends = m.patches * m.patch_elements * h
    return LayerCosts(
        block=2.0 * (4 * h * h + mlp) + 4.0 * density * m.tokens * h + streams * 12.0 * h * h / m.tokens,
        embedding=2.0 * (ends + m.has_text * m.text_tokens * m.text_size * h + condition) / m.tokens,
        head=(2.0 * ends * m.out_channels / m.channels + 4.0 * h * h) / m.tokens,
    )


def unused_flops(m: DiTConfig) -> float:
    """Of :func:`layer_costs`, a token: what the last joint block does not compute, since nobody reads its text."""
    if not m.has_text:
        return 0.0
    h = m.hidden_size
    mlp = (3 if m.activation == "swiglu" else 2) * h * m.ffn_size
    return (2.0 * m.text_tokens * (h * h + mlp) + 8.0 * h * h) / m.tokens
