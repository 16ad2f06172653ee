"""What DeepSpeed does where a file is silent, and its schedulers update by update, here and in DeepSpeed itself.

The closed forms are written from the schedulers' descriptions, over places ``i`` of update ``i + 1``. Where the peers'
environment of the benchmark is there, DeepSpeed is asked as well.
"""

from __future__ import annotations

import functools
import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_table import MEANINGS
from engine_more import message
from torch import nn

import megatron_ds
from megatron_ds.config.engine import EngineConfig
from megatron_ds.deepspeed_json import from_deepspeed
from megatron_ds.deepspeed_json.keys import ALIASES, CPU_OFFLOAD
from megatron_ds.errors import ConfigError

ROOT = Path(__file__).parents[2]
PEERS = ROOT / ".venv-bench/bin/python"
LR, UPDATES = 0.02, 45
ZERO = "zero_optimization"


def log_up(i: int, steps: int) -> float:
    """Of a warm-up whose scheduler stands at ``i - 1``."""
    return 0.0 if i < 1 else min(1.0, math.log(i) / math.log(steps)) if i - 1 < steps else 1.0


def linear_up(i: int, steps: int) -> float:
    return min(1.0, max(0, i - 1) / steps)


def triangle(i: int, up: int, down: int) -> float:
    return i / up if i <= up else max(0.0, (up + down - i) / down)


def cosine(i: int) -> float:
    if i < 1:
        return 0.0
    if i - 1 < 5:
        return LR * (0.1 + 0.9 * (i - 1) / 5)
    return LR * (0.25 + 0.75 * (1 + math.cos(math.pi * min(1.0, (i - 5) / 15))) / 2)


def stairs(i: int) -> float:
    part = i / 6 if i <= 6 else max(0.0, (16 - i) / 10)
    return math.floor(part * (3 if i <= 6 else 2) + 1e-9) / (3 if i <= 6 else 2)


CASES: dict[str, tuple[str, dict[str, Any], Any]] = {
    "the optimizer's rate": ("WarmupLR", {"warmup_num_steps": 5}, lambda i: LR * log_up(i, 5)),
    "all defaults": ("WarmupLR", {}, lambda i: LR * log_up(i, 1000)),
    "one update": ("WarmupLR", {"warmup_num_steps": 1}, lambda i: LR * log_up(i, 2)),
    "linear": (
        "WarmupLR",
        {"warmup_type": "linear", "warmup_num_steps": 5, "warmup_min_lr": 0.01, "warmup_max_lr": 0.03},
        lambda i: 0.01 + 0.02 * linear_up(i, 5),
    ),
    "a rate of its own": (
        "WarmupDecayLR",
        {"warmup_num_steps": 5, "total_num_steps": 20},
        lambda i: 1e-3 * (log_up(i, 5) if i - 1 < 5 else max(0.0, (21 - i) / 15)),
    ),
    "cosine": (
        "WarmupCosineLR",
        {"warmup_num_steps": 5, "total_num_steps": 20, "warmup_type": "linear", "warmup_min_ratio": 0.1,
         "cos_min_ratio": 0.25},
        cosine,
    ),
    "cosine to the default floor": (
        "WarmupCosineLR",
        {"warmup_num_steps": 5, "total_num_steps": 20},
        lambda i: LR * log_up(i, 5)
        if i - 1 < 5
        else LR * (1e-4 + (1 - 1e-4) * (1 + math.cos(math.pi * min(1.0, (i - 5) / 15))) / 2),
    ),
    "a cycle": (
        "OneCycle",
        {"cycle_min_lr": 0.01, "cycle_max_lr": 0.05, "cycle_first_step_size": 7},
        lambda i: 0.01 + 0.04 * triangle(i, 7, 7),
    ),
    "a cycle in stairs": (
        "OneCycle",
        {"cycle_min_lr": 0.01, "cycle_max_lr": 0.05, "cycle_first_step_size": 6, "cycle_second_step_size": 10,
         "cycle_first_stair_count": 3, "cycle_second_stair_count": 2},
        lambda i: 0.01 + 0.04 * stairs(i),
    ),
    "a cycle and a decay": (
        "OneCycle",
        {"cycle_min_lr": 0.01, "cycle_max_lr": 0.05, "cycle_first_step_size": 6, "cycle_second_step_size": 4,
         "decay_step_size": 5, "decay_lr_rate": 0.5, "decay_mom_rate": 0.01, "cycle_min_mom": 0.7,
         "cycle_max_mom": 0.95},
        lambda i: 0.01 + 0.04 * triangle(i, 6, 4) if i <= 10 else 0.01 / (1 + 0.5 * (i - 10) / 5),
    ),
    "a cycle up alone": (
        "OneCycle",
        {"cycle_min_lr": 0.01, "cycle_max_lr": 0.05, "cycle_first_step_size": 6, "cycle_second_step_size": 0,
         "cycle_momentum": False},
        lambda i: 0.01 + 0.04 * (i / 6 if i < 6 else 0.0),
    ),
    "a range": ("LRRangeTest", {}, lambda i: 1e-3 * (1 + i / 2000)),
    "a range in stairs": (
        "LRRangeTest",
        {"lr_range_test_min_lr": 0.01, "lr_range_test_step_size": 7, "lr_range_test_step_rate": 3.0,
         "lr_range_test_staircase": True},
        lambda i: 0.01 * (1 + 3 * (i // 7)),
    ),
}  # fmt: skip


def of_engine(kind: str, params: dict[str, Any], optimizer: Any = None) -> tuple[list[float], list[Any]]:
    """Rates and betas that an engine's updates run at."""
    values: dict[str, Any] = {"scheduler": {"type": kind, "params": params}}
    net = nn.Linear(2, 1)
    own = optimizer(net.parameters()) if optimizer is not None else None
    if own is None:
        values["optimizer"] = {"type": "AdamW", "params": {"lr": LR}}
    engine = megatron_ds.initialize(net, values, own, loss=lambda net, batch: net(batch).mean())
    rates, betas = [], []
    for _ in range(UPDATES):
        result = engine.train_batch([torch.ones(1, 2)])
        rates.append(result.learning_rate)
        group = engine.optimizer.param_groups[0] if engine.optimizer is not None else {}
        betas.append(list(group.get("betas", [])))
        assert not group or group["lr"] == result.learning_rate
    engine.close()
    return rates, betas


@pytest.mark.parametrize("case", CASES)
def test_a_schedule_has_its_closed_form(case: str) -> None:
    kind, params, form = CASES[case]
    want = [form(i) for i in range(UPDATES)]
    assert of_engine(kind, params)[0] == pytest.approx(want, rel=1e-9, abs=1e-15)
    adagrad = of_engine(kind, params, lambda p: torch.optim.Adagrad(p, lr=LR))[0]
    assert adagrad == pytest.approx(want, rel=1e-9, abs=1e-15)


def test_a_cycle_moves_beta1_against_the_rate_unless_told_not_to() -> None:
    kind, params, _ = CASES["a cycle and a decay"]
    for optimizer in (None, lambda p: torch.optim.AdamW(p, lr=LR)):
        betas = of_engine(kind, params, optimizer)[1]
        want = [
            0.95 - 0.25 * triangle(i, 6, 4) if i <= 10 else 0.95 * (1 + 0.01 * (i - 10) / 5) for i in range(1, UPDATES)
        ]
        assert [beta[0] for beta in betas] == pytest.approx([0.7, *want])
        assert {beta[1] for beta in betas} == {0.99}
    still = of_engine(kind, {**params, "cycle_momentum": False}, lambda p: torch.optim.AdamW(p, lr=LR))[1]
    assert all(beta == [0.9, 0.999] for beta in still)


def test_each_group_has_its_own_rate_to_rise_to() -> None:
    net = nn.Linear(2, 1)
    optimizer = torch.optim.SGD([{"params": [net.weight], "lr": 0.5}, {"params": [net.bias], "lr": 0.25}])
    values = {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 2}}}
    engine = megatron_ds.initialize(net, values, optimizer, loss=lambda net, batch: net(batch).mean())
    for _ in range(4):
        engine.train_batch([torch.ones(1, 2)])
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.25]
    engine.close()


def test_a_function_of_the_step_sets_the_rate_of_an_optimizer_of_torch() -> None:
    net = nn.Linear(2, 1, bias=False).double()
    begin = net.weight.detach().clone()
    config = {"torch_optimizer": {"name": "SGD", "params": {"lr": 1.0}}}
    engine = megatron_ds.initialize(
        net, config, None, lambda step: 0.5 / step, loss=lambda net, batch: net(batch).mean()
    )
    for _ in range(2):
        engine.train_batch([torch.ones(1, 2, dtype=torch.float64)])
    assert torch.allclose(net.weight, begin - 0.75, atol=1e-12)
    engine.close()


class Halving(torch.optim.Optimizer):
    """Without a learning rate."""

    def __init__(self, parameters: Any):
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(parameter.grad, alpha=0.5)


def test_a_schedule_needs_a_rate_to_set() -> None:
    net = nn.Linear(2, 1)
    for config, scheduler in (({}, lambda step: 0.1), ({"scheduler": {"type": "WarmupLR", "params": {}}}, None)):
        said = message(megatron_ds.initialize, net, config, Halving(net.parameters()), scheduler)
        assert "group 0 of Halving has no 'lr' that a schedule could set; give it one, or remove" in said
    megatron_ds.initialize(net, {}, Halving(net.parameters())).close()


def config_of(optimizer: dict[str, Any] | None = None, **rest: Any) -> EngineConfig:
    return from_deepspeed({**({"optimizer": optimizer} if optimizer else {}), **rest})[0]


def test_where_a_file_is_silent_their_defaults_hold() -> None:
    for kind in ("Adam", "AdamW"):
        section = config_of({"type": kind}).optimizer
        assert (section.lr, section.beta1, section.beta2, section.eps) == (1e-3, 0.9, 0.999, 1e-8)
        assert section.weight_decay == 0.0
        assert config_of({"type": kind, "params": {"torch_adam": True}}).optimizer.weight_decay == 0.01
    amsgrad = config_of({"type": "AdamW", "params": {"amsgrad": True}}).torch_optimizer
    assert amsgrad is not None and amsgrad.params["weight_decay"] == 0.0
    assert config_of().optimizer.clip_norm == 1.0
    assert config_of(gradient_clipping=0.0).optimizer.clip_norm == 0.0
    assert from_deepspeed({}, {"gradient_clipping": 0.5})[0].optimizer.clip_norm == 0.5
    fp16 = config_of(fp16={"enabled": True}).precision
    assert (fp16.initial_loss_scale, fp16.loss_scale_window, fp16.loss_scale_hysteresis) == (2.0**16, 1000, 2)
    assert fp16.min_loss_scale == 1.0 and fp16.loss_scale is None and config_of().zero.stage == 0


@functools.cache
def theirs() -> dict[str, Any]:
    sections = json.dumps([{"type": kind, "lr": LR, "params": params} for kind, params, _ in CASES.values()])
    program = [str(PEERS), str(Path(__file__).with_name("deepspeed_defaults.py"))]
    done = subprocess.run(program, input=sections, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


needs_peers = pytest.mark.skipif(not PEERS.exists(), reason="DeepSpeed is in .venv-bench, which `make bench` makes")


@needs_peers
@pytest.mark.parametrize("case", CASES)
def test_deepspeed_itself_gives_the_same_rates(case: str) -> None:
    kind, params, _ = CASES[case]
    place = list(CASES).index(case)
    rates, betas = of_engine(kind, params, lambda p: torch.optim.AdamW(p, lr=LR))
    assert rates == pytest.approx(theirs()["rates"][place], rel=1e-9, abs=1e-15)
    assert betas == [pytest.approx(pair) for pair in theirs()["betas"][place]]


@needs_peers
def test_deepspeed_itself_has_the_same_defaults() -> None:
    found = theirs()["defaults"]
    adam, silent, fp16 = config_of({"type": "Adam"}).optimizer, config_of(), config_of(fp16={"enabled": True}).precision
    for name in ("FusedAdam", "DeepSpeedCPUAdam"):
        assert [adam.lr, [adam.beta1, adam.beta2], adam.eps, adam.weight_decay, True] == [
            found[f"{name}.{key}"] for key in ("lr", "betas", "eps", "weight_decay", "bias_correction")
        ]
    assert silent.optimizer.clip_norm == found["gradient_clipping"]
    assert silent.zero.stage == found["zero_optimization.stage"]
    assert fp16.initial_loss_scale == 2.0 ** found["fp16.initial_scale_power"]
    assert [fp16.loss_scale_window, fp16.loss_scale_hysteresis, fp16.min_loss_scale, fp16.loss_scale or 0] == [
        found[f"fp16.{key}"] for key in ("loss_scale_window", "hysteresis", "min_loss_scale", "loss_scale")
    ]


@needs_peers
def test_deepspeed_itself_has_the_keys_of_the_table_and_no_others() -> None:
    theirs_by_key = theirs()["keys"]
    known = MEANINGS.keys() | ALIASES.keys() | CPU_OFFLOAD.keys()
    assert not theirs_by_key.keys() - known
    # Of the last two the defaults are no values of JSON: torch.float16, and an object that means nothing is given.
    computed = {f"{ZERO}.leaf_module.classes", "steps_per_print", "tensor_parallel.dtype", "expert_parallel.expert_w3"}
    for key, (kind, default) in theirs_by_key.items():
        if key in MEANINGS:
            mine = MEANINGS[key]
            assert default == mine.default or key in computed, (key, default)
            assert kind in ("", mine.type), (key, kind)
    sections = ("fp16.", "bf16.", ZERO, "compile.", "flops_profiler.", "comms_logger.", "tensorboard.", "csv_monitor.")
    sections += ("wandb.", "comet.", "autotuning.", "hybrid_engine.", "tensor_parallel.", "expert_parallel.", "aio.")
    assert not [key for key in MEANINGS if key.startswith(sections) and key not in theirs_by_key]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": 1}}}, "needs scheduler.params.cycle_max_lr"),
        ({"scheduler": {"type": "OneCycle", "params": {"cycle_first_step_size": 0}}}, "must be a whole number above 0"),
        ({"scheduler": {"type": "Cycle"}}, "use one of WarmupLR, WarmupDecayLR, WarmupCosineLR, OneCycle, LRRangeTest"),
        (
            {"optimizer": {"type": "Adam", "params": {"bias_correction": False}}},
            "the update is another; give initialize() optimizer=megatron_ds.integrations.deepspeed.ops.adam.FusedAdam",
        ),
    ],
)
def test_what_a_schedule_needs_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        from_deepspeed(values)
    assert message in str(refused.value)
