"""A tensor-parallel model of ours on the engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import megatron_ds
from megatron_ds.config import RunConfig, from_dict
from megatron_ds.data.gpt_dataset import SyntheticDataset
from megatron_ds.errors import ConfigError
from megatron_ds.mesh import Mesh, MeshShape
from megatron_ds.models.gpt import GPTTask
from megatron_ds.pipeline.stage import StageSpan
from megatron_ds.testing import device_of_rank

S, SAMPLES = 8, 4
SECTIONS: dict[str, Any] = {
    "model": {
        "num_layers": 2,
        "hidden_size": 16,
        "num_heads": 4,
        "vocab_size": 61,
        "max_positions": S,
        "init_std": 0.1,
    },
    "train": {"sequence_length": S, "global_batch": SAMPLES},
    "data": {"synthetic": True},
}


def batch_of(step: int) -> dict[str, Tensor]:
    rows = range(step * SAMPLES, (step + 1) * SAMPLES)
    return {name: torch.from_numpy(array) for name, array in SyntheticDataset(61, S, seed=1).batch(rows).items()}


def trained(tp: int, stage: int, folder: str) -> tuple[list[float], list[float], dict[str, Tensor]]:
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if world > 1 else 0
    mesh = Mesh.create(MeshShape(dp=world // tp, tp=tp), device_of_rank(rank, world))
    config = from_dict(RunConfig, SECTIONS, "test")
    span = StageSpan(0, config.model.num_layers)
    net: Any = GPTTask(config).make_stage(span, mesh, mesh.device, torch.float64)
    net.initialize(config.seed)
    engine = megatron_ds.initialize(
        net,
        {"zero": {"stage": stage}, "optimizer": {"lr": 1e-2, "clip_norm": 0.5}},
        mesh=mesh,
        loss=lambda call, batch: call(batch) / batch["loss_mask"].sum(),
    )
    losses, norms = [], []

    def take(step: int) -> None:
        own = {name: t.chunk(mesh.dp.size)[mesh.dp.rank].to(mesh.device) for name, t in batch_of(step).items()}
        result = engine.train_batch([own])
        losses.append(result.loss)
        norms.append(result.grad_norm)

    for step in range(3):
        if step == 2:
            engine.save_checkpoint(folder)
        take(step)
    state = engine.state_dict()
    name = next(name for name in state if name.endswith("qkv.weight"))
    assert torch.equal(engine.get_parameter(name).cpu(), state[name])
    engine.load_checkpoint(folder)  # and the last step once more
    take(2)
    assert (losses.pop(), norms.pop()) == (losses[-1], norms[-1])
    assert all(torch.equal(value, state[name]) for name, value in engine.state_dict().items())
    engine.zero.close()
    return losses, norms, state


def refused(shape: MeshShape) -> str:
    """What initialize() says of a mesh that it cannot train on."""
    mesh = Mesh.create(shape, torch.device("cpu"))
    with pytest.raises(ConfigError) as caught:
        megatron_ds.initialize(torch.nn.Linear(2, 2), mesh=mesh)
    return str(caught.value)
