"""ZeRO settings that contradict each other or do nothing are refused, each by name with what would work."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_ds.config import RunConfig, ZeroConfig, from_dict, validate, zero_faults
from megatron_ds.errors import ConfigError

CPU, NVME = {"device": "cpu"}, {"device": "nvme", "path": "/swap"}

# dp, settings, the whole message.
REFUSED: list[tuple[int, dict[str, Any], str]] = [
    (8, {"shard_size": 3}, "zero.shard_size=3 does not divide dp=8; it may be 1, 2, 4 or 8"),
    (8, {"shard_size": 16}, "zero.shard_size=16 does not divide dp=8; it may be 1, 2, 4 or 8"),
    (
        8,
        {"stage": 0, "shard_size": 4},
        "zero.shard_size=4 does nothing: zero.stage=0 shards nothing; use stage 1, 2 or 3",
    ),
    (
        1,
        {"stage": 1, "keep_whole": True},
        "zero.keep_whole does nothing: with zero.stage=1 gradients are whole anyway; use stage 2 or 3",
    ),
    (
        1,
        {"stage": 2, "prefetch": 2},
        "zero.prefetch=2 does nothing: with zero.stage=2 parameters stay whole; use stage 3",
    ),
    (
        1,
        {"stage": 1, "persistence_threshold": 0},
        "zero.persistence_threshold=0 does nothing: with zero.stage=1 parameters stay whole; use stage 3",
    ),
    (
        2,
        {"stage": 2, "offload_parameters": CPU},
        "zero.offload_parameters.device='cpu' with zero.stage=2: parameters are sharded, and can leave the device, at "
        "stage 3 only; use zero.stage=3, or zero.offload_optimizer for master weights and optimizer state",
    ),
    (
        2,
        {"stage": 0, "offload_optimizer": CPU},
        "zero.offload_optimizer.device='cpu' with zero.stage=0: every rank would offload all of the state, dp times "
        "the same; use zero.stage=1, 2 or 3",
    ),
    (
        1,
        {"offload_optimizer": {"device": "nvme"}},
        "zero.offload_optimizer.device='nvme' needs zero.offload_optimizer.path, a folder on a local disk of each "
        "node, e.g. /local_nvme/swap",
    ),
    (
        1,
        {"stage": 3, "offload_parameters": {"device": "cpu", "path": "/swap"}},
        "zero.offload_parameters.path='/swap' does nothing with zero.offload_parameters.device='cpu'; use "
        "device='nvme'",
    ),
    (
        1,
        {"offload_optimizer": {"ratio": 0.5}},
        "zero.offload_optimizer.ratio=0.5 does nothing with zero.offload_optimizer.device='none'; use device='cpu' or "
        "'nvme'",
    ),
    (
        1,
        {"offload_optimizer": {"pin_memory": False}},
        "zero.offload_optimizer.pin_memory=False does nothing with zero.offload_optimizer.device='none'; use "
        "device='cpu' or 'nvme'",
    ),
    (
        1,
        {"host_memory_mb": 512},
        "zero.host_memory_mb=512 does nothing: nothing is offloaded; set zero.offload_optimizer.device or "
        "zero.offload_parameters.device",
    ),
]


@pytest.mark.parametrize(("dp", "settings", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_a_refusal_names_value_rule_and_way_out(dp: int, settings: dict[str, Any], message: str) -> None:
    assert list(zero_faults(ZeroConfig(**settings), dp)) == [message]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"stage": 0},
        {"stage": 2, "keep_whole": True, "shard_size": 4},
        {"stage": 3, "prefetch": 0, "persistence_threshold": 0, "shard_size": 1},
        {"stage": 1, "offload_optimizer": {**CPU, "ratio": 0.4, "pin_memory": False}, "host_memory_mb": 100},
        {"stage": 3, "offload_optimizer": NVME, "offload_parameters": {**NVME, "ratio": 0.0}},
    ],
    ids=str,
)
def test_what_is_legal_passes(settings: dict[str, Any]) -> None:
    assert list(zero_faults(ZeroConfig(**settings), 8)) == []


def test_a_run_is_refused_with_them() -> None:
    config = {"data": {"synthetic": True}, "zero": {"shard_size": 3, "offload_optimizer": {"device": "nvme"}}}
    with pytest.raises(ConfigError) as refused:
        validate(from_dict(RunConfig, config, "test"), 8)
    assert "zero.shard_size=3 does not divide dp=8" in str(refused.value)
    assert "needs zero.offload_optimizer.path" in str(refused.value)
