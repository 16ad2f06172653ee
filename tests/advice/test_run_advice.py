"""Where a run's advice gets its numbers: estimates against measurements, and what rank 0 is told when."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import planted_faults
import pytest
import torch
from started_ranks import TINY, started

from megatron_ds.advice.run_advice import RunAdvice, known_beforehand
from megatron_ds.config import RunConfig, ZeroConfig, from_dict
from megatron_ds.mesh import Mesh, MeshShape
from megatron_ds.optim.loss_scaler import LossScaler
from megatron_ds.optim.rule import RuleGroup
from megatron_ds.pipeline.stage import Activations
from megatron_ds.shard import ShardSpec
from megatron_ds.zero.buckets import ParameterInfo
from megatron_ds.zero.layout import ZeroLayout


def config(**sections: dict[str, Any]) -> RunConfig:
    base: dict[str, dict[str, Any]] = {
        "model": {"hidden_size": 64, "num_heads": 4, "vocab_size": 256, "max_positions": 64},
        "train": {"sequence_length": 64, "micro_batch": 2, "global_batch": 8},
        "data": {"synthetic": True},
    }
    return from_dict(RunConfig, {n: {**base.get(n, {}), **sections.get(n, {})} for n in base | sections}, "test")


def zero_of(parameters: int = 10**9, **settings: Any) -> Any:
    """So many bf16 parameters over eight ranks, as far as advice asks."""
    places = {kind: {"device": 0, "host": 10**9, "disk": 0} for kind in ("parameters", "master", "optimizer")}
    adamw = RuleGroup(kinds=("exp_avg", "exp_avg_sq"))
    info = ParameterInfo(
        ShardSpec("w", (parameters,)), torch.bfloat16, unit=0 if settings.get("stage") == 3 else None, rule=adamw
    )
    zero = ZeroConfig(**settings)
    return SimpleNamespace(
        config=zero, layout=ZeroLayout.plan([info], zero, {(): (8, 1)}), bytes_by_store=lambda: places
    )


@pytest.mark.parametrize(("free", "told"), [(80, 1), (1, 0)])
def test_rank_0_is_told_of_the_stage_once_after_the_second_step(
    free: int, told: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_ds.advice.run_advice.free_host_memory", lambda: free * 10**9)
    monkeypatch.setattr("megatron_ds.advice.run_advice.peak_memory_bytes", lambda device: 5 * 10**9)
    mesh, said = Mesh.create(MeshShape(), torch.device("cpu")), []
    advice = RunAdvice(zero_of(stage=3), LossScaler(), mesh, 4, said.append)
    advice.after_step(False)
    assert said == []
    for _ in range(5):
        advice.after_step(False)
    assert len(said) == told and all("use zero.stage=1" in text for text in said)


def test_rank_0_is_told_of_a_loss_scale_at_its_floor() -> None:
    mesh, said = Mesh.create(MeshShape(), torch.device("cpu")), []
    scaler = LossScaler(scale=1.0, dynamic=True, hysteresis=1, min_scale=1.0)
    advice = RunAdvice(zero_of(), scaler, mesh, 1, said.append)
    for _ in range(3):
        scaler.update(True)
        advice.after_step(skipped=True)
    assert len(said) == 1 and "min_loss_scale=1" in said[0]


def test_a_run_is_told_beforehand_of_transfers_and_recomputation() -> None:
    zero = zero_of(stage=1, offload_optimizer={"device": "cpu"})
    full = Activations(no_recompute=10**9, stored=5 * 10**8, recompute_peak=10**8)
    found = known_beforehand(zero, 4, 1, full, flops=1e12, peak_tflops=1000.0, ranks_sharing=8)
    recompute, transfer, nothing = found
    # 2 GB at 25 GB/s are 80 ms; 1 TFLOP at 40% of 1,000 TFLOP/s is 2.5.
    assert transfer is not None and "0.08 s at 25 and 25 GB/s" in transfer.message and "0.0025 s" in transfer.message
    assert nothing is None
    assert recompute is not None and "with 4 micro-batches a step" in recompute.message
    assert known_beforehand(zero, 4, 1, full, flops=1e14, peak_tflops=1000.0, ranks_sharing=8)[1] is None
    assert len(known_beforehand(zero, 4, 1, full, flops=1e12, peak_tflops=None, ranks_sharing=8)) == 1
    assert known_beforehand(zero, 1, 1, full, flops=1e14, peak_tflops=1000.0, ranks_sharing=8)[0] is None
    small = zero_of(stage=1, offload_optimizer={"device": "cpu"}, parameters=10**6)
    few = Activations(no_recompute=10**6, stored=10**5, recompute_peak=10**5)
    assert known_beforehand(small, 4, 1, few, flops=1e12, peak_tflops=None, ranks_sharing=8) == [None]
    no_recompute = Activations(no_recompute=10**9, stored=10**9, recompute_peak=0)
    assert known_beforehand(zero, 4, 1, no_recompute, flops=1e12, peak_tflops=None, ranks_sharing=8) == [None]


def test_a_small_run_is_told_nothing_of_its_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_ds.advice.run_advice.free_host_memory", lambda: 80 * 10**9)
    mesh, said = Mesh.create(MeshShape(), torch.device("cpu")), []
    for parameters, told in ((10**7, 0), (10**8, 1)):  # 180 MB and 1.8 GB of parameters, gradients and state
        advice = RunAdvice(zero_of(stage=3, parameters=parameters), LossScaler(), mesh, 4, said.append)
        for _ in range(3):
            advice.after_step(False)
        assert len(said) == told


@pytest.mark.parametrize("lowered", [True, False])
def test_a_real_run_says_it_once_or_not_at_all(tmp_path: Path, lowered: bool) -> None:
    """Two ranks at stage 3 with recomputation, of a model that every stage holds: told with the numbers by rank 0,
    and as it is a small model only if that is made to count."""
    arguments = [*TINY, "--output", str(tmp_path / "run"), "--zero.stage", "3", "--recompute.mode", "full"]
    size = ["--model.vocab-size", "4096", "--model.hidden-size", "64"]
    fault = planted_faults.advises_small_runs if lowered else None
    with started(tmp_path, [[*arguments, *size]] * 2, fault) as ranks:
        assert ranks.wait() == [0, 0], ranks.everything()
        said, others = ranks.output(0), ranks.output(1)
    for text in ("use zero.stage=1", "use recompute.mode='none'"):
        assert said.count(text) == lowered, said
        assert text not in others
