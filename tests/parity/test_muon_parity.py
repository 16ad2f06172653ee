"""Muon where a mesh cuts a weight between matrices, within them, or holds it several times: one process's numbers."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from parity_rows import Mesh3, Row, config_of, reference_config
from parity_run import Outcome, assert_parity, one_process, steps_of, train_task

from megatron_ds.config import RunConfig, from_dict, validate
from megatron_ds.mesh import Mesh
from megatron_ds.models.families import task_of
from megatron_ds.optim.muon import MOMENTUM
from megatron_ds.testing import run_ranks
from megatron_ds.train.build import build


def config(mesh: Mesh3, heads: bool, kv_heads: int) -> RunConfig:
    """Four query heads."""
    row = Row(mesh, architecture="llama", tied=False, optimizer="muon", muon_heads=heads, zero=min(mesh[2], 2))
    values = config_of(row).to_dict()
    values["model"] |= {"num_heads": 4, "kv_heads": kv_heads}
    return from_dict(RunConfig, values, str(row))


RUNS = {
    "heads, two a rank": ((2, 1, 1), True, 2),
    "heads over replicas": ((2, 1, 2), True, 2),
    "queries, keys and values of each rank's groups": ((2, 1, 1), False, 2),
    "fewer key/value heads than ranks": ((2, 1, 1), False, 1),
    "and each head": ((2, 1, 1), True, 1),
}


def on_this_rank(configs: list[RunConfig]) -> list[Outcome]:
    mesh = Mesh.create(validate(configs[0], torch.distributed.get_world_size()), torch.device("cpu"))
    return [train_task(config, mesh, task_of(config), steps_of(config, mesh)) for config in configs]


@cache
def job(mesh: Mesh3) -> dict[str, list[Outcome]]:
    names = [name for name, run in RUNS.items() if run[0] == mesh]
    ranks = run_ranks(on_this_rank, mesh[0] * mesh[1] * mesh[2], [config(*RUNS[name]) for name in names])
    return {name: [outcomes[i] for outcomes in ranks] for i, name in enumerate(names)}


@pytest.mark.parametrize("name", RUNS)
def test_same_numbers_as_one_process(name: str) -> None:
    want = one_process(reference_config(config(*RUNS[name])).model_dump_json())
    assert_parity(job(RUNS[name][0])[name], want)
    if RUNS[name][1]:
        plain = one_process(reference_config(config(RUNS[name][0], False, RUNS[name][2])).model_dump_json())
        assert plain.scalars[-1] != want.scalars[-1], "heads are other matrices"


def test_an_overflow_in_half_precision_leaves_the_momentum_as_it_was() -> None:
    """A step that is taken first, so that there is some; then one whose loss scale overflows."""
    mesh, values = Mesh.single(), config((1, 1, 1), False, 2).to_dict()
    values["precision"] = {"dtype": "fp16", "initial_loss_scale": 8.0}
    half = from_dict(RunConfig, values, "the test")
    parts, batches = build(half, mesh, task_of(half)), steps_of(half, mesh)
    assert not any(parts.step(batch).skipped for batch in batches[:2])  # the first has a learning rate of 0
    before = {(s.kind, s.name): s.data.clone() for s in parts.optimizer.flat_shards()}
    parts.scaler.scale = 2.0**40
    assert parts.step(batches[2]).skipped
    after = {(s.kind, s.name): s.data for s in parts.optimizer.flat_shards()}
    assert {kind for kind, _ in before} == {"param", MOMENTUM, "exp_avg", "exp_avg_sq"}
    assert any(data.any() for (kind, _), data in before.items() if kind == MOMENTUM)
    assert all(torch.equal(after[key], data) for key, data in before.items())
    parts.scaler.scale = 8.0
    assert not parts.step(batches[2]).skipped
    assert all(data.isfinite().all() for data in after.values()), "and nothing of it is left"
