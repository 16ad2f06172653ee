"""The engine's own configuration: batch sizes that give each other, contradictions, defaults, warm-up."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import megatron_ds
from megatron_ds.config.engine import EngineConfig, batch_sizes, engine_faults, validate_engine
from megatron_ds.config.read import from_dict
from megatron_ds.engine import read_config
from megatron_ds.errors import ConfigError
from megatron_ds.optim.learning_rate import learning_rate

BATCHES = [
    ({}, 4, (None, None, 1)),
    ({"micro_batch": 2}, 4, (8, 2, 1)),
    ({"micro_batch": 2, "accumulation": 3}, 4, (24, 2, 3)),
    ({"global_batch": 24}, 4, (24, 6, 1)),
    ({"global_batch": 24, "micro_batch": 2}, 4, (24, 2, 3)),
    ({"global_batch": 24, "accumulation": 2}, 4, (24, 3, 2)),
    ({"global_batch": 24, "micro_batch": 2, "accumulation": 3}, 4, (24, 2, 3)),
]


@pytest.mark.parametrize(("values", "dp", "sizes"), BATCHES, ids=str)
def test_two_batch_sizes_give_the_third(
    values: dict[str, Any], dp: int, sizes: tuple[int | None, int | None, int]
) -> None:
    found = batch_sizes(EngineConfig(**values), dp)
    assert (found.global_batch, found.micro_batch, found.accumulation) == sizes


@pytest.mark.parametrize(
    ("values", "dp", "message"),
    [
        (
            {"global_batch": 32, "micro_batch": 4, "accumulation": 2},
            3,
            "global_batch=32 is not micro_batch=4 x accumulation=2 x dp=3 = 24; use global_batch=24",
        ),
        (
            {"global_batch": 32, "micro_batch": 4, "accumulation": 2},
            2,
            "leave one of the three unset (accumulation=4 would make it 32)",
        ),
        (
            {"global_batch": 32, "micro_batch": 4},
            3,
            "global_batch=32 is not a multiple of micro_batch=4 x dp=3 = 12; use 24 or 36",
        ),
        ({"optimizer": {"schedule": "cosine"}}, 1, "set steps or optimizer.decay_steps"),
        ({"torch_optimizer": {"name": "SGD"}, "optimizer": {"lr": 1.0}}, 1, "are two optimizers"),
        ({"schedule": {"name": "WarmupDecayLR"}}, 1, "needs schedule.total_num_steps"),
        ({"zero": {"stage": 2, "offload_parameters": {"device": "cpu"}}}, 1, "at stage 3 only"),
        ({"precision": {"dtype": "bf16", "loss_scale": 2.0}}, 1, "precision.loss_scale=2.0 does nothing"),
    ],
    ids=str,
)  # fmt: skip
def test_what_does_not_fit_together_is_refused(values: dict[str, Any], dp: int, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        validate_engine(from_dict(EngineConfig, values, "test"), dp)
    assert message in str(refused.value)


def test_an_unknown_key_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'zero\.bucket_md'; did you mean 'zero\.bucket_mb'"):
        read_config({"zero": {"bucket_md": 1}})


def test_the_defaults_are_plain_torchs_but_only_where_nothing_is_said() -> None:
    assert EngineConfig().optimizer.clip_norm == 0.0 and EngineConfig().optimizer.schedule == "constant"
    said = EngineConfig(optimizer={"lr": 1e-3, "clip_norm": 2.0, "schedule": "linear"}, steps=10)  # type: ignore[arg-type]
    assert said.optimizer.clip_norm == 2.0 and learning_rate(said.optimizer, 10, 10) == 0.0


CYCLE = {"name": "OneCycle", "cycle_min_lr": 0.05, "cycle_max_lr": 0.1, "cycle_first_step_size": 3}


@pytest.mark.parametrize("rule", [{}, {"name": "sgd"}, {"ema_decay": 0.5}, {"schedule": CYCLE}], ids=str)
@pytest.mark.parametrize("decay", ["matrices", "all"])
def test_biases_and_norms_decay_only_where_that_is_asked_for(rule: dict[str, Any], decay: str) -> None:
    """Of gradients that are zero an update is the decay alone."""
    net = nn.Sequential(nn.Conv1d(2, 3, 2), nn.LayerNorm(4), nn.Linear(4, 2)).double()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    schedule = {key: rule[key] for key in rule.keys() & {"schedule"}}
    own = {key: rule[key] for key in rule.keys() - {"schedule"}}
    config = {"optimizer": {"lr": 0.1, "weight_decay": 0.5, **own}, "decay": decay, **schedule}
    engine = megatron_ds.initialize(net, config, loss=lambda call, x: 0 * call(x).sum())
    factor = 1.0
    for _ in range(2):
        factor *= 1 - 0.5 * engine.train_batch([torch.ones(1, 2, 5, dtype=torch.float64)]).learning_rate
    for name, parameter in net.named_parameters():
        decays = decay == "all" or name in ("0.weight", "2.weight")
        torch.testing.assert_close(parameter, before[name] * (factor if decays else 1.0), rtol=1e-12, atol=0)
    engine.close()


@pytest.mark.parametrize("config", [7, 1.5, [], [("zero", {})], {1, 2}, b"run.toml"])
def test_what_is_no_configuration_is_refused(config: Any) -> None:
    with pytest.raises(ConfigError, match="give an EngineConfig, a dictionary, or a path of a TOML"):
        read_config(config)


@pytest.mark.parametrize("suffix", [".toml", ".json"])
def test_what_is_no_configuration_file_is_refused(tmp_path: Path, suffix: str) -> None:
    for name, make in (("directory", os.mkdir), ("FIFO", os.mkfifo)):
        make(tmp_path / f"{name}{suffix}")
        with pytest.raises(ConfigError, match=f"cannot be read: it is a {name}, not a regular file"):
            read_config(tmp_path / f"{name}{suffix}")
    (tmp_path / f"deep{suffix}").write_text(("x = " if suffix == ".toml" else "") + "[" * 200_000)
    with pytest.raises(ConfigError, match="not valid"):
        read_config(str(tmp_path / f"deep{suffix}"))


@pytest.mark.parametrize("section", [{"precision": {"fp8": "rowwise"}}, {"optimizer": {"name": "muon"}}], ids=str)
def test_what_is_for_our_own_models_is_refused(section: Any) -> None:
    assert ["own models" in fault for fault in engine_faults(EngineConfig(**section), 1)] == [True]
