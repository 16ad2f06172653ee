"""Where a run's advice gets its numbers: estimates against measurements, and what rank 0 is told when."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_ds.config import RunConfig, ZeroConfig, from_dict
from megatron_ds.mesh import Axis, Mesh, MeshShape
from megatron_ds.models.gpt import gpt_model
from megatron_ds.optim.loss_scaler import LossScaler
from megatron_ds.pipeline.stage import StageSpan
from megatron_ds.train.advice import RunAdvice, activation_bytes, known_beforehand
from megatron_ds.train.step import StepResult
from megatron_ds.zero.estimate import ModelSize


def config(**sections: dict[str, Any]) -> RunConfig:
    base: dict[str, dict[str, Any]] = {
        "model": {"hidden_size": 64, "num_heads": 4, "vocab_size": 256, "max_positions": 64},
        "train": {"sequence_length": 64, "micro_batch": 2, "global_batch": 8},
        "data": {"synthetic": True},
    }
    return from_dict(RunConfig, {n: {**base.get(n, {}), **sections.get(n, {})} for n in base | sections}, "test")


def saved(run: RunConfig) -> int:
    """Bytes that autograd keeps of one micro-batch's forward, parameters left out."""
    mesh = Mesh.create(MeshShape(), torch.device("cpu"))
    model = gpt_model(run)
    span = StageSpan(0, run.model.num_layers)
    stage = model.make_stage(run, span, mesh.tp, torch.device("cpu"), torch.float32)
    stage.initialize(1)
    known = {p.untyped_storage().data_ptr() for p in stage.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    tokens = torch.zeros(run.train.micro_batch, run.train.sequence_length, dtype=torch.int64)
    positions = torch.arange(run.train.sequence_length).expand_as(tokens)
    batch = {
        "tokens": tokens,
        "position_ids": positions,
        "labels": tokens,
        "loss_mask": torch.ones(tokens.shape, dtype=torch.bool),
    }
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        stage(batch)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("mode", ["none", "full"])
def test_activations_are_what_autograd_keeps(mode: str) -> None:
    sizes = {}
    for layers in (2, 6):
        run = config(model={"num_layers": layers}, recompute={"mode": mode})
        sizes[layers] = (saved(run), activation_bytes(run, layers, 4)[mode != "none"])
    measured, estimated = (sizes[6][i] - sizes[2][i] for i in (0, 1))
    assert measured == pytest.approx(estimated, rel=0.03)


def zero_of(**settings: Any) -> Any:
    """A billion bf16 parameters over eight ranks, as far as advice asks."""
    places = {kind: {"device": 0, "host": 10**9, "disk": 0} for kind in ("parameters", "master", "optimizer")}
    return SimpleNamespace(
        config=ZeroConfig(**settings),
        size=ModelSize(10**9),
        shard=Axis("shard", 0, 8),
        replicate=Axis("replicate"),
        bytes_by_store=lambda: places,
    )


def result(skipped: bool = False) -> StepResult:
    return StepResult(1.0, 1.0, 1e-3, 8, 1.0, skipped, False)


@pytest.mark.parametrize(("free", "told"), [(80, 1), (1, 0)])
def test_rank_0_is_told_of_the_stage_once_after_the_second_step(
    free: int, told: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_ds.train.advice.free_host_memory", lambda: free * 10**9)
    monkeypatch.setattr("megatron_ds.train.advice.peak_memory_bytes", lambda device: 5 * 10**9)
    mesh, said = Mesh.create(MeshShape(), torch.device("cpu")), []
    advice = RunAdvice(zero_of(stage=3), LossScaler(), mesh, 4, said.append)
    advice.after_step(result())
    assert said == []
    for _ in range(5):
        advice.after_step(result())
    assert len(said) == told and all("use zero.stage=1" in text for text in said)


def test_rank_0_is_told_of_a_loss_scale_at_its_floor() -> None:
    mesh, said = Mesh.create(MeshShape(), torch.device("cpu")), []
    scaler = LossScaler(scale=1.0, dynamic=True, hysteresis=1, min_scale=1.0)
    advice = RunAdvice(zero_of(), scaler, mesh, 1, said.append)
    for _ in range(3):
        scaler.update(True)
        advice.after_step(result(skipped=True))
    assert len(said) == 1 and "min_loss_scale=1" in said[0]


def test_a_run_is_told_beforehand_of_transfers_and_recomputation() -> None:
    run = config(zero={"offload_optimizer": {"device": "cpu"}}, recompute={"mode": "full"})
    zero = zero_of(stage=1, offload_optimizer={"device": "cpu"})
    found = known_beforehand(run, zero, 4, 1, 12, flops=1e12, peak_tflops=1000.0, ranks_sharing=8)
    recompute, transfer = found
    # 2 GB at 25 GB/s are 80 ms; 1 TFLOP at 40% of 1,000 TFLOP/s is 2.5.
    assert transfer is not None and "0.08 s at 25 and 25 GB/s" in transfer.message and "0.0025 s" in transfer.message
    assert recompute is not None and "with 4 micro-batches a step" in recompute.message
    assert known_beforehand(run, zero, 4, 1, 12, flops=1e14, peak_tflops=1000.0, ranks_sharing=8)[1] is None
    assert len(known_beforehand(run, zero, 4, 1, 12, flops=1e12, peak_tflops=None, ranks_sharing=8)) == 1
    assert known_beforehand(run, zero, 1, 1, 12, flops=1e14, peak_tflops=1000.0, ranks_sharing=8)[0] is None
