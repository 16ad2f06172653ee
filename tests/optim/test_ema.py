"""The moving average of the weights against the one of `diffusers`, and where it is kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import megatron_ds
from megatron_ds.checkpoint import Checkpoint
from megatron_ds.config import OptimizerConfig
from megatron_ds.optim.ema import EMA, averaged
from megatron_ds.optim.factory import ConfigRule, SegmentOptimizer
from megatron_ds.optim.rule import OptimizerSegment
from megatron_ds.testing import run_ranks

STEPS = 12


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def batches() -> list[torch.Tensor]:
    return list(torch.randn(STEPS, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))


def loss_of(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return m(x).square().mean()


def by_diffusers(warmup: bool) -> list[torch.Tensor]:
    """In plain torch; its average starts as the weights after the first step, too."""
    from diffusers.training_utils import EMAModel  # not in the ranks, where it would take seconds

    plain = model()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    # Its other formula, 1 - (1 + n / gamma)^-power, is above 0.8 at once: no warm-up.
    never = {} if warmup else {"use_ema_warmup": True, "inv_gamma": 1e-9}
    ema = EMAModel(plain.parameters(), decay=0.8, **never)
    for x in batches():
        optimizer.zero_grad()
        loss_of(plain, x).backward()
        optimizer.step()
        ema.step(plain.parameters())
    return ema.shadow_params


def by_the_engine(folder: str, stage: int, warmup: bool, own: bool) -> list[torch.Tensor]:
    """Half of the steps, the rest by another engine that goes on from the checkpoint."""
    config = {"zero": {"stage": stage}, "optimizer": {"name": "sgd", "lr": 0.1, "clip_norm": 0, "weight_decay": 0}}
    if own:
        config["optimizer"] = {"clip_norm": 0}
    config["optimizer"] |= {"ema_decay": 0.8, "ema_warmup": warmup}
    config |= {"precision": {"dtype": "fp64"}, "log": {"every": 0}}
    world, rank, averages = dist.get_world_size(), dist.get_rank(), []
    for first, last in ((0, STEPS // 2), (STEPS // 2, STEPS)):
        m = model()
        optimizer = torch.optim.SGD(m.parameters(), lr=0.1) if own else None
        engine = megatron_ds.initialize(m, config, optimizer, loss=loss_of)
        if first:
            engine.load_checkpoint(folder)
        for x in batches()[first:last]:
            engine.train_batch([x.chunk(world)[rank]])
        engine.save_checkpoint(folder)
        averages = [engine.get_optimizer_state(name, "ema") for name, _ in m.named_parameters()]
        engine.close()
    return averages


class WithoutAverage(ConfigRule):
    """Sees the state tensors of its own kinds and no other."""

    def over(self, segments: Sequence[OptimizerSegment]) -> SegmentOptimizer:
        assert all(segment.state.keys() == set(self.group.kinds) for segment in segments)
        return super().over(segments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_scale_that_the_device_alone_knows_averages_too_and_a_skipped_step_does_not(dtype: torch.dtype) -> None:
    config = OptimizerConfig(name="sgd", lr=1.0, momentum=0.0, weight_decay=0.0, ema_decay=0.75, ema_warmup=False)
    rule = averaged(WithoutAverage(config), config)
    assert rule.group_of("w").kinds == (EMA,)
    master = torch.tensor([8.0, -2.0], dtype=dtype)
    segment = OptimizerSegment(master, torch.zeros_like(master), {EMA: torch.zeros_like(master)}, False, "w")
    update, average = rule.over([segment]), None
    for scale in (0.5, 0.25, math.nan, 2.0):
        segment.gradient.copy_(torch.tensor([4.0, 1.0], dtype=dtype))
        before = segment.master.clone(), segment.state[EMA].clone()
        update.step(1.0, torch.tensor(scale, dtype=torch.float64))
        if math.isnan(scale):
            assert torch.equal(segment.master, before[0]) and torch.equal(segment.state[EMA], before[1])
            update.set_count(2)  # as the caller does when it knows
            continue
        weight = before[0] - scale * torch.tensor([4.0, 1.0], dtype=dtype)
        average = weight if average is None else 0.75 * average + 0.25 * weight
        torch.testing.assert_close(segment.master, weight, rtol=0, atol=1e-6)
        torch.testing.assert_close(segment.state[EMA], average, rtol=0, atol=1e-6)


CASES = [(0, True, False), (2, False, True), (3, True, True)]  # stage, warm-up, an optimizer of one's own


def all_cases(folder: str) -> list[list[torch.Tensor]]:
    return [by_the_engine(f"{folder}/{number}", *case) for number, case in enumerate(CASES)]


def test_it_is_that_of_diffusers_and_goes_on_after_a_resume(tmp_path: Path) -> None:
    ranks = run_ranks(all_cases, 2, str(tmp_path))
    for number, (_, warmup, _) in enumerate(CASES):
        want = by_diffusers(warmup)
        for averages in (rank[number] for rank in ranks):
            assert len(averages) == len(want) == 4
            for got, wanted, initial in zip(averages, want, model().parameters()):
                torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9)
                assert (got - initial).abs().max() > 1e-3
        with Checkpoint(tmp_path / str(number)) as saved:
            torch.testing.assert_close(saved.read("0.weight", kind="ema"), want[0], rtol=0, atol=1e-9)
