"""Small models for the tests of inference, and what they say when everything is computed anew."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ds.config import ModelConfig
from megatron_ds.inference import served_model
from megatron_ds.inference.batching import Batcher
from megatron_ds.inference.block_pool import BlockPool
from megatron_ds.inference.detokenizer import TextEnds
from megatron_ds.inference.model_runner import CacheSize, ModelRunner
from megatron_ds.inference.serving_engine import ServingEngine
from megatron_ds.mesh import Mesh, MeshShape
from megatron_ds.models.gpt import GPT
from megatron_ds.models.transformer import StageSettings, Transformer
from megatron_ds.pipeline.layer_split import split_layers
from megatron_ds.pipeline.stage import stage_spans

VOCAB = 67

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"norm": "rmsnorm", "position": "rope", "activation": "swiglu", "bias": False, "kv_heads": 2},
    "gpt2": {"position": "learned", "max_positions": 96},
    "bloom": {"position": "alibi", "embedding_norm": True},
    "falcon-rw": {"position": "alibi", "alibi": "rounded", "window": 9},
    "gemma": {"norm": "rmsnorm", "position": "rope", "window": 7, "window_every": 2, "attention_softcap": 3.0,
              "logit_softcap": 5.0, "bias": False, "kv_heads": 2},
}  # fmt: skip


def config_of(family: str) -> ModelConfig:
    settings = {key: value for key, value in FAMILIES[family].items() if key in ModelConfig.model_fields}
    return ModelConfig(
        num_layers=4, hidden_size=32, num_heads=4, vocab_size=VOCAB, vocab_multiple=8, init_std=0.2, **settings
    )


def stage_of(config: ModelConfig, mesh: Mesh, dtype: torch.dtype = torch.float64) -> Transformer:
    span = stage_spans(split_layers(config.num_layers, mesh.pp.size))[mesh.pp.rank]
    model = GPT(config, StageSettings(mesh, span, dtype=dtype))
    model.initialize(7)
    return model.eval().requires_grad_(False)


def engine_of(
    model: Transformer,
    mesh: Mesh | None = None,
    blocks: int = 64,
    size: int = 4,
    seats: int = 8,
    budget: int = 64,
    share: bool = True,
    ends: TextEnds | None = None,
    longest: int = 90,
    drafts: int = 0,
) -> ServingEngine:
    mesh = mesh or Mesh.single()
    pool = BlockPool(blocks, size, share)
    dtype = next(model.parameters()).dtype
    runner = ModelRunner(model, mesh, CacheSize(blocks, size, dtype))
    return ServingEngine(runner, Batcher(pool, seats, budget, drafts), mesh, longest, None, ends)


@torch.no_grad()
def whole_logits(model: Transformer, tokens: Sequence[int]) -> Tensor:
    """``[s, v]`` by the trainer's own forward pass over the whole text."""
    ids = torch.tensor([list(tokens)])
    batch = {"tokens": ids, "position_ids": torch.arange(ids.shape[1]).unsqueeze(0)}
    return model.logits(batch)[0]


@torch.no_grad()
def folder_logits(folder: Path, tokens: Tensor, tp: int = 1) -> Tensor:
    """``[1, s, v]`` of a folder's model, split over ``tp`` ranks, for ``tokens [1, s]``."""
    mesh = Mesh.create(MeshShape(tp=tp), torch.device("cpu")) if tp > 1 else Mesh.single()
    source = served_model.find(folder)
    model = served_model.build(source, mesh, source.dtype)
    return model.logits({"tokens": tokens, "position_ids": torch.arange(tokens.shape[1]).unsqueeze(0)})
