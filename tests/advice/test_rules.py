"""The rules of advice: each on a case that calls for it and one that does not."""

from __future__ import annotations

import torch
from test_layout import layout_of

from megatron_ds.advice.rules import (
    Advice,
    Adviser,
    Link,
    LossScaleWatch,
    missing_masters,
    offload_outlasts_compute,
    recomputation_saves_little,
    stage_too_high,
)
from megatron_ds.optim.loss_scaler import LossScaler

GB = 10**9


def test_stage_3_where_a_lower_one_fits() -> None:
    layout = layout_of(3, 8, 1 * GB)
    advice = stage_too_high(layout, 2, free=80 * GB, activations=10 * GB)
    # Stage 1: 2 + 4 + 12 / 8 = 7.5 GB; sends (4 + 2) * 7/8. Stage 3: (2 * 4 + 4 * 2) * 7/8.
    assert advice == Advice(
        "stage",
        "zero.stage=3 sends 14.00 GB a rank and step; stage 1 would send 5.25 GB, and its 7.50 GB of parameters, "
        "gradients and optimizer state a rank with 10.00 GB of activations fit into 80.00 GB",
        "use zero.stage=1",
    )
    assert "zero.stage=2" in str(stage_too_high(layout, 2, free=17 * GB, activations=10 * GB)), "stage 2 fits: 4 GB"
    assert stage_too_high(layout, 2, free=13 * GB, activations=10 * GB) is None, "nothing lower fits"
    assert stage_too_high(layout_of(1, 8, GB), 1, free=80 * GB, activations=0) is None
    assert stage_too_high(layout_of(3, 1, GB), 1, free=80 * GB, activations=0) is None, "one rank sends nothing"
    assert stage_too_high(layout_of(2, 8, GB), 1, free=80 * GB, activations=0) is None, "moves no more than stage 1"
    assert stage_too_high(layout_of(2, 8, GB), 2, free=80 * GB, activations=0) is not None


def test_transfers_longer_than_compute() -> None:
    link, disk = Link(25e9, 20e9, duplex=True), Link(25e9, 20e9, duplex=False)
    advice = offload_outlasts_compute(100 * GB, 100 * GB, 0.8, 2.0, link)
    assert advice is not None and str(advice) == (
        "zero.offload_optimizer.ratio=0.8 moves 100.00 GB in and 100.00 GB out a rank and step, 5 s at 25 and 20 GB/s "
        "for 1 rank(s), but a step computes for 2 s; use a ratio of at most 0.32 if the rest fits on the device, or 3 "
        "times the micro-batches a step"
    )
    assert offload_outlasts_compute(39 * GB, 39 * GB, 0.8, 2.0, link) is None
    assert offload_outlasts_compute(39 * GB, 39 * GB, 0.8, 2.0, disk) is not None  # 39 / 25 + 39 / 20 = 3.51 s
    assert offload_outlasts_compute(39 * GB, 39 * GB, 0.8, 2.0, link, ranks_sharing=2) is not None
    # The ratio that is advised is one at which the rule is silent.
    assert offload_outlasts_compute(40 * GB, 40 * GB, 0.32, 2.0, link) is None
    # More micro-batches would fetch parameters more often.
    of_parameters = offload_outlasts_compute(100 * GB, 10 * GB, 1.0, 3.0, link, of_parameters=True)
    assert of_parameters is not None and of_parameters.rule == "zero.offload_parameters.ratio"
    assert "100.00 GB in and 10.00 GB out" in of_parameters.message and "4 s at 25 and 20" in of_parameters.message
    assert of_parameters.action.endswith("or 2 times the samples a micro-batch")


def test_recomputation_under_accumulation() -> None:
    """A 1 B model at stage 1: 4 GB of whole gradients and 8 GB of the rest, whatever recomputation does."""
    sizes = {
        "no_recompute": 1 * GB,
        "stored": GB // 10,
        "recompute_peak": GB // 2,
        "gradients": 4 * GB,
        "other": 8 * GB,
    }
    advice = recomputation_saves_little(micro_batches=8, in_flight=1, whole_gradients=True, **sizes)
    assert advice is not None and str(advice) == (
        "recomputation takes 0.90 GB off the activations, but the peak only from 13.00 GB to 12.60 GB: with 8 "
        "micro-batches a step it is 4.00 GB gradients, 8.00 GB parameters and state, 0.60 GB activations; use "
        "recompute.mode='none', or free the gradients instead: zero.stage=2 keeps a rank's share of them between "
        "micro-batches"
    )
    assert recomputation_saves_little(1, 1, whole_gradients=True, **sizes) is None, "nothing accumulates"
    assert recomputation_saves_little(8, 8, whole_gradients=True, **sizes) is None, "eight in flight: 7 GB saved"
    sizes["stored"] = sizes["no_recompute"]
    assert recomputation_saves_little(8, 1, whole_gradients=True, **sizes) is None, "nothing is recomputed"
    logits = {"no_recompute": 20 * GB, "stored": 1 * GB, "recompute_peak": 18 * GB, "gradients": 0, "other": 1 * GB}
    found = recomputation_saves_little(8, 1, whole_gradients=False, **logits)
    assert found is not None and "a smaller micro-batch" in found.action


def test_low_precision_without_masters_says_what_torch_does() -> None:
    advice = missing_masters(8, masters=False, lr=1e-4)
    assert advice is not None and str(advice) == (
        "bf16 parameters without fp32 master weights: an update below 0.002 of a weight rounds to nothing, and "
        "lr=0.0001 moves a weight of 0.02 by about 0.005 of it, those above 0.051 not at all; keep fp32 master weights "
        "(ZeroOptimizer does), at 4 bytes a parameter over the shard's ranks"
    )
    lost = torch.arange(0.0513, 2.0, 0.01).bfloat16()
    assert torch.equal(lost - torch.tensor(1e-4, dtype=torch.bfloat16), lost), "those above 0.051 do not move"
    kept = torch.tensor(0.02).bfloat16()
    assert not torch.equal(kept - torch.tensor(1e-4, dtype=torch.bfloat16), kept)
    assert missing_masters(8, masters=True, lr=1e-4) is None
    assert missing_masters(24, masters=False, lr=1e-4) is None


def watch(scaler: LossScaler, overflows: list[bool]) -> list[Advice | None]:
    look, found = LossScaleWatch(), []
    for overflow in overflows:
        scaler.update(overflow)
        found.append(look(scaler, overflow))
    return found


def test_a_loss_scale_at_its_floor() -> None:
    scaler = LossScaler(scale=4.0, dynamic=True, window=10, hysteresis=1, min_scale=1.0)
    found = watch(scaler, [True] * 3)
    assert found[0] is None and found[1] is not None and found[1].rule == "loss scale floor"
    assert "precision.min_loss_scale=1" in found[1].message and "bf16" in found[1].action
    recovering = LossScaler(scale=4.0, dynamic=True, window=10, hysteresis=1, min_scale=1.0)
    assert not any(watch(recovering, [True] + [False] * 30 + [True]))
    assert not any(watch(LossScaler(scale=1.0), [True] * 3)), "a fixed scale has no floor"


def test_a_loss_scale_that_never_grows() -> None:
    scaler = LossScaler(scale=2.0**16, dynamic=True, window=10, hysteresis=100)
    found = watch(scaler, ([False] * 8 + [True]) * 5)  # never ten good ones in a row
    assert all(advice is None for advice in found[:39]) and found[40] is not None
    assert found[40].rule == "loss scale growth"
    assert "is 65536 and has not grown for 41 steps: 4 of them overflowed" in found[40].message
    assert "precision.loss_scale_window below 8" in found[40].action
    every_second = watch(LossScaler(scale=2.0**16, dynamic=True, window=10, hysteresis=100), [True, False] * 25)
    advised = next(advice for advice in every_second if advice is not None)
    assert advised.action == "use precision.dtype='bf16', which needs no scale", "no window is below 1"
    growing = LossScaler(scale=2.0**16, dynamic=True, window=10, hysteresis=1)
    assert not any(watch(growing, ([False] * 11 + [True]) * 10))
    top = LossScaler(scale=2.0**24, dynamic=True, window=10, max_scale=2.0**24)
    assert not any(watch(top, [False] * 100)), "it is as high as it may be"


def test_each_rule_is_said_once() -> None:
    said: list[str] = []
    tell = Adviser(said.append)
    first, second = Advice("a", "x is 1", "use 2"), Advice("b", "y is 1", "use 3")
    tell([first, None])
    tell([first, second])
    assert said == ["x is 1; use 2", "y is 1; use 3"]
