"""Learning rates, loss scales and clipping against closed forms and torch's own; updates against torch's plain loop."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megatron_ds.config import OptimizerConfig, PrecisionConfig
from megatron_ds.optim.clip import clip_coefficient
from megatron_ds.optim.factory import ConfigRule
from megatron_ds.optim.learning_rate import learning_rate, rate_change
from megatron_ds.optim.loss_scaler import LossScaler
from megatron_ds.optim.rule import OptimizerSegment


def rates(total: int, **options: Any) -> list[float]:
    config = OptimizerConfig(lr=1.0, **options)
    return [learning_rate(config, step, total) for step in range(1, total + 1)]


def torch_rates(scheduler: Any, steps: int) -> list[float]:
    values = []
    for _ in range(steps):
        values.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    return values


def test_cosine_and_linear_equal_torch_schedulers() -> None:
    sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, T_max=40, eta_min=0.1)
    # torch counts finished steps, so that its first value is ours at the end of the warm-up.
    want = torch_rates(cosine, 41)
    assert rates(50, schedule="cosine", min_lr=0.1, warmup_steps=10)[9:] == pytest.approx(want, abs=1e-12)
    sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    linear = torch.optim.lr_scheduler.LinearLR(sgd, start_factor=1.0, end_factor=0.25, total_iters=40)
    want = torch_rates(linear, 41)
    assert rates(50, schedule="linear", min_lr=0.25, warmup_steps=10)[9:] == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "inverse_sqrt", "wsd"])
def test_warm_up_is_linear_and_reaches_the_peak(schedule: str) -> None:
    values = rates(100, schedule=schedule, warmup_steps=8)
    assert values[:8] == pytest.approx([step / 8 for step in range(1, 9)])
    assert max(values) == 1.0


def test_constant_inverse_sqrt_and_wsd_have_their_closed_forms() -> None:
    assert rates(20, schedule="constant", warmup_steps=5)[5:] == [1.0] * 15
    values = rates(400, schedule="inverse_sqrt", warmup_steps=100, min_lr=0.6)
    assert values[143] == pytest.approx(math.sqrt(100 / 144)) and values[-1] == 0.6
    values = rates(100, schedule="wsd", warmup_steps=10, wsd_decay_fraction=0.2, min_lr=0.5)
    assert values[9:80] == [1.0] * 71
    assert values[80:] == pytest.approx([1.0 - 0.5 * k / 20 for k in range(1, 21)])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_the_end_is_min_lr_and_stays_there(schedule: str) -> None:
    values = rates(30, schedule=schedule, decay_steps=20, min_lr=0.125, warmup_steps=4)
    assert values[18] > 0.125 and values[19:] == [0.125] * 11


def test_no_warm_up_starts_near_the_peak_and_warm_up_may_take_all_steps() -> None:
    assert rates(10, schedule="linear")[0] == 0.9
    assert rates(10, schedule="wsd", wsd_decay_fraction=1.0)[0] == 0.9
    assert rates(10, schedule="cosine", warmup_steps=10)[-1] == 1.0
    with pytest.raises(ValueError, match="step=0: updates are counted from 1"):
        learning_rate(OptimizerConfig(), 0, 10)


def test_a_rate_that_jumps_is_said_and_where_its_schedule_ends_if_that_is_why() -> None:
    assert rate_change(0.1, 0.1 * (1 + 1e-12), 5, 9) == ""
    assert rate_change(0.1, 0.2, 9, 9) == "the learning rate goes from 0.1 to 0.2"
    text = rate_change(0.1, 0.2, 5, 9)
    assert "ends at step 9 where it ended at 5" in text and "--optimizer.decay-steps 5 keeps that" in text


def test_loss_scaler_equals_torchs_with_a_hysteresis_of_one() -> None:
    generator = torch.Generator().manual_seed(2)
    overflows = (torch.rand(300, generator=generator) < 0.15).tolist()
    scaler = LossScaler(scale=2.0**12, dynamic=True, window=5, hysteresis=1, min_scale=2.0**-40)
    scale, growth = torch.tensor(2.0**12), torch.tensor(0, dtype=torch.int32)
    for found_inf in overflows:
        scaler.update(found_inf)
        torch._amp_update_scale_(scale, growth, torch.tensor(float(found_inf)), 2.0, 0.5, 5)
        assert (scaler.scale, scaler.good_steps) == (scale.item(), growth.item())


def test_hysteresis_tolerates_overflows_until_the_scale_grows_again() -> None:
    scaler = LossScaler.from_config(
        PrecisionConfig(
            dtype="fp16",
            initial_loss_scale=1024.0,
            loss_scale_window=3,
            loss_scale_hysteresis=3,
            min_loss_scale=128.0,
        )
    )
    trace = []
    for found_inf in [True, False, True, True, False, False, False, True, True, True, True, True, True]:
        scaler.update(found_inf)
        trace.append(scaler.scale)
    assert trace == [1024, 1024, 1024, 512, 512, 512, 1024, 1024, 1024, 512, 256, 128, 128]
    assert scaler.at_floor


def test_good_steps_that_do_not_count_put_the_doubling_off() -> None:
    scaler = LossScaler.from_config(PrecisionConfig(dtype="fp16", loss_scale_window=2, loss_scale_wait=1))
    trace = []
    for found_inf in [False] * 5 + [True] * 2 + [False] * 5:
        scaler.update(found_inf)
        trace.append(scaler.scale / 65536)
    assert trace == [1, 1, 2, 2, 4, 4, 2, 2, 2, 4, 4, 8]


def test_loss_scaler_resumes_exactly() -> None:
    config = PrecisionConfig(dtype="fp16", loss_scale_window=4, initial_loss_scale=256.0)
    whole, first = LossScaler.from_config(config), LossScaler.from_config(config)
    pattern = [False, True, False, False, True, True, False, False, False, False, True]
    for found_inf in pattern[:5]:
        whole.update(found_inf)
        first.update(found_inf)
    second = LossScaler.from_config(config)
    second.load_state_dict(first.state_dict())
    for found_inf in pattern[5:]:
        whole.update(found_inf)
        second.update(found_inf)
    assert second == whole and whole.scale != 256.0


@pytest.mark.parametrize("before", [{"dtype": "bf16"}, {"dtype": "fp32"}, {"dtype": "fp16", "loss_scale": 4.0}])
def test_a_dynamic_scale_starts_at_its_beginning_where_there_was_a_fixed_one(before: dict[str, Any]) -> None:
    scaler = LossScaler.from_config(PrecisionConfig(dtype="fp16", initial_loss_scale=256.0))
    scaler.load_state_dict(LossScaler.from_config(PrecisionConfig(**before)).state_dict())
    assert scaler == LossScaler.from_config(PrecisionConfig(dtype="fp16", initial_loss_scale=256.0))


def test_a_resumed_loss_scale_keeps_to_the_limits_of_now() -> None:
    before = LossScaler(scale=4.0, dynamic=True, window=1000, hysteresis=3)
    for _ in range(500):
        before.update(found_inf=False)
    scaler = LossScaler(scale=64.0, dynamic=True, window=100, hysteresis=1, min_scale=16.0)
    scaler.load_state_dict(before.state_dict())
    trace = []
    for found_inf in (False, *[False] * 100, True):
        scaler.update(found_inf)
        trace.append(scaler.scale)
    # Of 500 good steps more than the window are over; then 100 more; then an overflow that is not tolerated.
    assert trace == [32.0] * 100 + [64.0, 32.0]


@pytest.mark.parametrize(
    ("precision", "scale"), [({"dtype": "bf16"}, 1.0), ({"dtype": "fp16", "loss_scale": 64.0}, 64.0)]
)
def test_a_fixed_scale_never_moves(precision: dict[str, Any], scale: float) -> None:
    scaler = LossScaler.from_config(PrecisionConfig(**precision))
    for found_inf in (True, True, *[False] * 2000):
        scaler.update(found_inf)
    assert scaler.scale == scale and not scaler.at_floor


def test_clip_coefficient() -> None:
    gradient = torch.tensor([3.0, 4.0], dtype=torch.float64)
    squared = gradient.square().sum()
    for limit in (0.5, 1.0, 5.0, 7.0):
        weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
        weight.grad = gradient.clone()
        torch.nn.utils.clip_grad_norm_([weight], limit)
        assert torch.equal(gradient * clip_coefficient(squared, limit), weight.grad)
    assert clip_coefficient(squared, 7.0) == 1 and clip_coefficient(squared, 0.0) == 1
    assert clip_coefficient(torch.zeros((), dtype=torch.float64), 1.0) == 1
    assert clip_coefficient(torch.tensor(float("nan")), 1.0).isnan()
    with pytest.raises(ValueError, match=r"clip_norm=-1\.0 is negative"):
        clip_coefficient(squared, -1.0)


UNFUSED: dict[str, Any] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.8, 0.9), eps=1e-6, foreach=False),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.7, foreach=False),
    "plain_sgd": lambda p: torch.optim.SGD(p, lr=0.1, foreach=False),
}


@pytest.mark.parametrize("scale", [1.0, 0.3, "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", UNFUSED)
def test_updates_equal_torchs_plain_loop(name: str, dtype: torch.dtype, scale: float | str) -> None:
    config = OptimizerConfig(
        name="adamw" if name == "adamw" else "sgd",
        lr=1.0,
        beta1=0.8,
        beta2=0.9,
        eps=1e-6,
        momentum=0.7 if name == "sgd" else 0.0,
        weight_decay=0.2,
    )
    rule = ConfigRule(config)
    generator = torch.Generator().manual_seed(4)
    segments, want = [], []
    for numel, decay in ((3, True), (1, False), (100, False), (40, True)):
        master = torch.randn(numel, generator=generator).to(dtype)
        state = {kind: torch.zeros_like(master) for kind in rule.group.kinds}
        segments.append(OptimizerSegment(master, torch.empty_like(master), state, decay))
        want.append(torch.nn.Parameter(master.clone()))
    groups = [
        {"params": [p for p, s in zip(want, segments) if s.weight_decay == decay], "weight_decay": 0.2 * decay}
        for decay in (True, False)
    ]
    reference = UNFUSED[name](groups)
    optimizer = rule.over(segments)
    factor = 0.3 if scale == "tensor" else float(scale)
    for step in range(4):
        for segment, parameter in zip(segments, want):
            gradient = torch.randn(parameter.shape, generator=generator).to(dtype)
            segment.gradient.copy_(gradient)
            parameter.grad = gradient * factor
        for group in reference.param_groups:
            group["lr"] = 0.1 * (step + 1)
        reference.step()
        optimizer.step(0.1 * (step + 1), torch.tensor(0.3, dtype=torch.float64) if scale == "tensor" else float(scale))
    tolerance = 1e-14 if dtype == torch.float64 else 3e-6
    for segment, parameter in zip(segments, want):
        torch.testing.assert_close(segment.master, parameter.detach(), rtol=tolerance, atol=tolerance)
