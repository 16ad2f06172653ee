"""The estimate of a diffusion transformer's activations against what autograd keeps of a real forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from kept_bytes import kept_bytes

from megatron_ds.config import from_dict, validate
from megatron_ds.config.diffusion import DiffusionRun
from megatron_ds.data.loader import to_tensors
from megatron_ds.mesh import Mesh
from megatron_ds.models.dit_task import DiTTask
from megatron_ds.pipeline.stage import StageSpan
from megatron_ds.testing import run_ranks

TEXT = {"condition": "text", "text_size": 48, "text_tokens": 32, "pooled_size": 40}
ALL = {"qk_norm": True, "positions": "rope", "activation": "swiglu"}
MIDDLE, ENDS = StageSpan(1, 4, embedding=False, head=False), StageSpan(0, 5)


def configuration(model: dict[str, Any], mode: str, dtype: str, mesh: dict[str, Any] | None = None) -> DiffusionRun:
    values = {
        "model": {"num_layers": 5, "hidden_size": 64, "num_heads": 4, "image_size": 16, "channels": 4, **model},
        "mesh": mesh or {},
        "recompute": {"mode": mode},
        "precision": {"dtype": dtype},
        "train": {"micro_batch": 2, "global_batch": 2},
    }
    return from_dict(DiffusionRun, values, "test")


def stored(config: DiffusionRun, span: StageSpan) -> int:
    world = dist.get_world_size() if dist.is_initialized() else 1
    mesh, task = Mesh.create(validate(config, world), torch.device("cpu")), DiTTask(config)
    made_up = task.open_sources().train.batch(range(config.train.micro_batch))
    return kept_bytes(task, config, span, mesh, to_tensors(made_up, made_up["counts"]), repeat=True)


@pytest.mark.parametrize("span", [MIDDLE, ENDS], ids=["middle", "whole"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    "model",
    [{}, {"qk_norm": True}, {"positions": "rope"}, {"learned_variance": True}, ALL, TEXT, {**TEXT, **ALL}],
    ids=["plain", "qk norm", "rope", "variance", "all", "text", "text all"],
)
def test_the_estimate_is_what_autograd_keeps(model: dict[str, Any], dtype: str, span: StageSpan) -> None:
    for mode in ("none", "selective", "full", "every_n"):
        config = configuration(model, mode, dtype)
        estimate = DiTTask(config).activations(span, 1, "cpu")
        assert stored(config, span) == pytest.approx(estimate.stored, rel=0.03), mode
        assert mode != "none" or (estimate.stored, estimate.recompute_peak) == (estimate.no_recompute, 0)


def kept_by_each(configs: list[DiffusionRun]) -> list[int]:
    return [stored(config, MIDDLE) for config in configs]


def test_tensor_and_sequence_parallelism_divide_what_they_say() -> None:
    meshes = [{"tp": 2, "sequence_parallel": parallel} for parallel in (True, False)]
    configs = [configuration(model, "none", "fp32", mesh) for mesh in meshes for model in ({}, {**TEXT, **ALL})]
    for measured in run_ranks(kept_by_each, 2, configs):
        for config, size in zip(configs, measured):
            assert size == pytest.approx(DiTTask(config).activations(MIDDLE, 2, "cpu").stored, rel=0.03)
