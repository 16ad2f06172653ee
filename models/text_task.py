"""What a transformer of text is to the trainer: samples are sequences, and what counts is unmasked target tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from megatron_ds.config import ModelConfig, RunConfig
from megatron_ds.config.sparse import sparse_layout
from megatron_ds.data import gpt_dataset
from megatron_ds.data.gpt_sources import GPTSources, SampleOptions, open_sources
from megatron_ds.mesh import Mesh
from megatron_ds.models.transformer import MicroBatch, StageSettings, Transformer
from megatron_ds.pipeline.stage import Activations, LayerCosts, StageSpan


class TextTask:
    """A :class:`~megatron_ds.train.task.Task`, of the family whose stages are ``stage``."""

    stage: type[Transformer]
    tables = MappingProxyType(
        {
            "embedding.weight": "vocab_size",
            "head.weight": "vocab_size",
            "head.bias": "vocab_size",
            "position.weight": "position_rows",
        }
    )
    leave_out = staticmethod(gpt_dataset.leave_out)

    def __init__(self, config: RunConfig):
        self.config = config
        self.num_layers, self.tokens_per_sample = config.model.num_layers, config.train.sequence_length

    @cached_property
    def costs(self) -> LayerCosts:
        return layer_costs(self.config.model, self.config.train.sequence_length)

    @property
    def flops_per_token(self) -> float:
        return 3.0 * (self.num_layers * self.costs.block + self.costs.head)

    def make_stage(self, span: StageSpan, mesh: Mesh, device: torch.device, dtype: torch.dtype) -> Transformer:
        c = self.config
        settings = StageSettings(
            mesh,
            span,
            sequence_parallel=c.mesh.sequence_parallel,
            recompute=c.recompute,
            label_smoothing=c.train.label_smoothing,
            z_loss=c.train.z_loss,
            dropout_seed=c.seed,
            device=device,
            dtype=dtype,
        )
        return self.stage(c.model, settings)

    def activation_shape(self, mesh: Mesh, micro_batch: MicroBatch) -> tuple[int, ...]:
        batch, length = micro_batch["tokens"].shape
        parts = mesh.tp.size if self.config.mesh.sequence_parallel else 1
        return length // parts, batch, self.config.model.hidden_size

    def activations(self, span: StageSpan, tp: int, device: str) -> Activations | None:
        return None

    def tokens(self, samples: int, targets: int) -> float:
        return samples * self.tokens_per_sample

    def open_sources(self) -> GPTSources:
        data = self.config.data
        common: dict[str, Any] = {
            "split": data.split,
            "sequence_length": self.config.train.sequence_length,
            "vocab_size": self.config.model.vocab_size,
            "seed": self.config.seed,
            "tokenizer": data.tokenizer,
        }
        if data.synthetic:
            return open_sources(**common)
        own = {"train": data.train_blend, "valid": data.valid_blend, "test": data.test_blend}
        return open_sources(
            data.prefix,
            blend=data.blend,
            split_blends=own if data.train_blend else None,
            options=SampleOptions(
                data.document_masking, data.conversations, data.fim.rate, data.fim.spm_rate, data.fim.tokens
            ),
            cache_dir=None if data.cache_dir is None else Path(data.cache_dir),
            **common,
        )

    def count(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """Unmasked target tokens."""
        return torch.stack([batch["loss_mask"].sum() for batch in micro_batches]).sum()


def layer_costs(m: ModelConfig, sequence_length: int) -> LayerCosts:
    """Forward FLOPs a token: 2 a matmul weight, plus ``4 s n d`` for the two attention matmuls a block.

    The convention of the PaLM paper (Chowdhery et al. 2022, appendix B): attention counts the full square although
    it is causal, norms and embedding lookups count nothing. Training costs three times this. Sparse attention counts
    its live blocks, a layer with a window the keys inside it; a block is the average of all layers.
    """
    n, g, d, h = m.num_heads, m.num_kv_heads, m.head_size, m.hidden_size
    sparse = m.attention.sparse
    density = 1.0 if sparse.mode == "none" else sparse_layout(sparse, sequence_length, n, causal=m.causal).density()
    if m.window is not None:
        seen = min(sequence_length, m.window if m.causal else 2 * m.window - 1)
        share = sum(m.has_window(i) for i in range(m.num_layers)) / m.num_layers
        density = share * seen / sequence_length + 1.0 - share
    attention = (n + 2 * g) * d * h + n * d * h
    mlp = (3 if m.gated else 2) * m.ffn_size * h
    return LayerCosts(
        block=2.0 * (attention + mlp) + 4.0 * density * sequence_length * n * d,
        embedding=0.0,
        head=2.0 * (m.vocab_size if m.causal else m.vocab_size + h) * h,
    )
