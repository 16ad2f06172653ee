"""Checkpoints of a small diffusion transformer whose average differs from its weights, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_ds.checkpoint import Checkpoint
from megatron_ds.checkpoint.load import load
from megatron_ds.checkpoint.save import save
from megatron_ds.config import from_dict
from megatron_ds.config.diffusion import DiffusionRun
from megatron_ds.convert.dit_folder import import_transformer
from megatron_ds.mesh import Mesh
from megatron_ds.models.dit import DiT
from megatron_ds.models.dit_task import DiTTask
from megatron_ds.pipeline.stage import StageSpan
from megatron_ds.shard import spec_of
from megatron_ds.shard.flat_shards import FlatShard


def configuration(objective: dict[str, Any] | None = None, **model: Any) -> DiffusionRun:
    values = {
        "num_layers": 2,
        "hidden_size": 16,
        "num_heads": 2,
        "image_size": 8,
        "channels": 1,
        "num_classes": 1000,
        "zero_init_std": 0.2,
        **model,
    }
    return from_dict(DiffusionRun, {"model": values, "objective": objective or {}}, "test")


def model_of(config: DiffusionRun, seed: int) -> DiT:
    mesh = Mesh.single()
    model = DiTTask(config).make_stage(StageSpan(0, config.model.num_layers), mesh, mesh.device, torch.float32)
    model.initialize(seed)
    return model


def imported(folder: Path, out_dir: Path) -> tuple[Path, DiT]:
    """A model of `diffusers` as a checkpoint, and loaded from it."""
    step = import_transformer(folder, out_dir)
    with Checkpoint(step) as saved:
        model = model_of(from_dict(DiffusionRun, saved.meta["config"], "test"), 9)
    load(step, [FlatShard.of(spec_of(p), "param", p.data) for p in model.parameters()])
    return step, model


def assert_same_bits(checkpoint: Path, other: Path) -> None:
    with Checkpoint(checkpoint) as one, Checkpoint(other) as two:
        assert one.names() == two.names()
        assert all(torch.equal(one.read(name), two.read(name)) for name in one.names())


def write_checkpoint(folder: Path, config: DiffusionRun, average: bool = True) -> Path:
    """Weights from seed 1, their average from seed 2."""
    kinds = {"param": 1, **({"ema": 2} if average else {})}
    shards = [
        FlatShard.of(spec_of(p), kind, p.data)
        for kind, seed in kinds.items()
        for p in model_of(config, seed).parameters()
    ]
    return save(folder, 3, shards, {"config": config.to_dict()})
