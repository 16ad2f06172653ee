"""A family that the library does not know trains through the trainer as it is, on every mesh to the same numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mixer import VALID, Digits, MixerRun, MixerTask, main
from started_ranks import started
from torch import Tensor

from megatron_ds.checkpoint import Checkpoint
from megatron_ds.config import from_dict, validate
from megatron_ds.errors import ConfigError
from megatron_ds.mesh import Mesh
from megatron_ds.pipeline.stage import StageSpan
from megatron_ds.train.dry_run import dry_run

STEPS, BATCH, RATE = 4, 16, 0.05
RUN = [
    *("--train.steps", str(STEPS), "--train.global-batch", str(BATCH), "--train.micro-batch", "2"),
    *("--train.eval-every", "2", "--optimizer.name", "sgd", "--optimizer.lr", str(RATE), "--optimizer.clip-norm", "0"),
    *("--optimizer.schedule", "constant", "--optimizer.weight-decay", "0", "--precision.dtype", "fp64"),
    *("--device", "cpu", "--threads", "1", "--log.no-tensorboard"),
]


def trained(folder: Path, world: int, *more: str) -> tuple[list[dict[str, Any]], list[float], dict[str, Tensor]]:
    """Metrics of the steps, validation losses, and the weights at the end."""
    arguments = [*RUN, *more, "--output", str(folder / "run")]
    with started(folder, [arguments] * world, main=main) as ranks:
        assert ranks.wait(300) == [0] * world, ranks.everything()
    lines = [
        [json.loads(line) for line in (folder / "run" / name).read_text().splitlines()]
        for name in ("metrics.jsonl", "evaluation.jsonl")
    ]
    with Checkpoint(folder / "run" / "checkpoints") as saved:
        return lines[0], [line["loss"] for line in lines[1]], {name: saved.read(name) for name in saved.names()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return trained(tmp_path_factory.mktemp("whole"), 1)


def test_eight_ranks_train_what_one_does(tmp_path: Path, whole: Any) -> None:
    mesh = ("--mesh.tp", "2", "--mesh.pp", "2", "--zero.stage", "2")
    steps, evaluated, weights = trained(tmp_path, 8, *mesh)
    assert len(steps) == STEPS and len(evaluated) == STEPS // 2
    for ours, other in zip(whole[0], steps):
        assert ours["targets"] == other["targets"] < BATCH
        assert other["loss"] == pytest.approx(ours["loss"], rel=1e-9)
        assert other["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-9)
        assert other["tokens_per_s"] * other["seconds"] == pytest.approx(16 * BATCH)
    assert evaluated == pytest.approx(whole[1], rel=1e-9)
    assert weights.keys() == whole[2].keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, whole[2][name], rtol=0, atol=1e-9, msg=name)


def loss_of(weights: dict[str, Tensor], batch: dict[str, Any], layers: int) -> tuple[Tensor, int]:
    """In plain torch: the sum of the losses and what they are divided by."""

    def affine(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].t() + weights[f"{name}.bias"]

    def mlp(x: Tensor, name: str) -> Tensor:
        return affine(F.gelu(affine(x, f"{name}.up")), f"{name}.down")

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    x = affine(torch.from_numpy(batch["patches"]), "embed")  # [b, s, h]
    for i in range(layers):
        x = x + mlp(norm(x, f"layers.{i}.patch_norm").transpose(1, 2), f"layers.{i}.patches").transpose(1, 2)
        x = x + mlp(norm(x, f"layers.{i}.channel_norm"), f"layers.{i}.channels")
    counts = torch.from_numpy(batch["counts"])
    losses = F.cross_entropy(affine(x.mean(1), "classify"), torch.from_numpy(batch["digits"]), reduction="none")
    return losses[counts].sum(), int(counts.sum())


def test_one_rank_trains_what_plain_torch_does(whole: Any) -> None:
    config = from_dict(MixerRun, {"precision": {"dtype": "fp64"}}, "test")
    span, mesh = StageSpan(0, config.model.num_layers), Mesh.single()
    stage = MixerTask(config).make_stage(span, mesh, mesh.device, torch.float64)
    stage.initialize(config.seed)
    weights = {name: p.detach().clone().requires_grad_() for name, p in stage.named_parameters()}
    samples = Digits(VALID, 1797, config.seed)
    for step in range(STEPS):
        batch = samples.batch(np.arange(step * BATCH, (step + 1) * BATCH))
        total, count = loss_of(weights, batch, config.model.num_layers)
        assert whole[0][step]["loss"] == pytest.approx(total.item() / count, rel=1e-9)
        for weight, gradient in zip(weights.values(), torch.autograd.grad(total / count, list(weights.values()))):
            weight.data -= RATE * gradient
        if step % 2:
            total, count = loss_of(weights, Digits(0, VALID, 0).rows(np.arange(VALID)), config.model.num_layers)
            assert whole[1][step // 2] == pytest.approx(total.item() / count, rel=1e-9)
    assert whole[2].keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(whole[2][name], weight.detach(), rtol=0, atol=1e-9, msg=name)


def test_its_own_section_is_checked_and_a_rank_can_be_tried_without_others() -> None:
    config = from_dict(MixerRun, {"mesh": {"tp": 3}}, "test")
    with pytest.raises(ConfigError, match=r"^model\.features=20 cannot be split over mesh\.tp=3; tp may be 1, 2, 4, 5"):
        validate(config, 3)
    with pytest.raises(ConfigError, match=r"unknown key .model\.num_heads."):
        from_dict(MixerRun, {"model": {"num_heads": 2}}, "test")
    fits = from_dict(MixerRun, {"mesh": {"tp": 2, "pp": 2}}, "test")
    assert "stage 1: layers 2 to 3 with head" in str(dry_run(fits, MixerTask(fits), 8, 7))
