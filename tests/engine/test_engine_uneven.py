"""Ranks that do not do the same: modules used by some of them only, and fewer batches; in float64 against DDP."""

from __future__ import annotations

import contextlib
import logging
import re
import tempfile
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import megatron_ds
from megatron_ds.errors import EngineError
from megatron_ds.testing import run_ranks
from megatron_ds.zero.gatherer import FORWARD_END, Gatherer

STEPS = 4


class Routed(nn.Module):
    """Blocks of which each rank uses some, one of them twice, and in an order of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first = nn.Linear(6, 6).double()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 6 + i), nn.Tanh(), nn.Linear(6 + i, 6)).double() for i in (0, 0, 1, 2)
        )
        self.head = nn.Linear(6, 2).double()

    def forward(self, x: Tensor, way: list[int]) -> Tensor:
        hidden: Tensor = self.first(x)
        for number in way:
            hidden = hidden + self.blocks[number](hidden)
        return self.head(hidden).square().mean()


def way_of(rank: int, step: int) -> list[int]:
    return [[0, 1], [1, 0, 1], [], [2], [3, 2, 0], [0, 2, 1]][(rank + 2 * step + rank * step) % 6]


def sample(rank: int, step: int) -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(100 * step + rank), dtype=torch.float64)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def by_ddp() -> dict[str, Tensor]:
    model, rank = Routed(), dist.get_rank()
    optimizer = adam(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    for step in range(STEPS):
        optimizer.zero_grad(set_to_none=False)
        ddp(sample(rank, step), way_of(rank, step)).backward()
        optimizer.step()
    return model.state_dict()


def by_engine(zero: dict[str, Any]) -> dict[str, Tensor]:
    model, rank = Routed(), dist.get_rank()
    engine = megatron_ds.initialize(model, {"zero": {"bucket_mb": 0.0005, **zero}}, adam(model))
    for step in range(STEPS):
        loss = engine(sample(rank, step), way_of(rank, step))
        total = loss.detach().clone()
        dist.all_reduce(total)  # a loop's own, while others may still need what this rank has
        engine.backward(loss)
        engine.step()
        with torch.no_grad():
            engine.module(sample(rank, step), way_of(rank + 1, step))
        dist.barrier()
    state = engine.state_dict()
    engine.close()
    return state


STAGE_3 = {"stage": 3, "persistence_threshold": 0}
ROUTED: list[dict[str, Any]] = [
    {"stage": 2},
    {**STAGE_3, "prefetch": 0},
    {**STAGE_3, "prefetch": 2},
    {**STAGE_3, "keep_whole": True},
    {**STAGE_3, "overlap": False, "offload_parameters": {"device": "cpu"}},
    {**STAGE_3, "prefetch": 2, "offload_parameters": {"device": "nvme", "path": tempfile.gettempdir()}},
]


def routed() -> list[dict[str, Tensor]]:
    return [by_ddp(), *map(by_engine, ROUTED)]


@pytest.mark.parametrize(("ranks", "apart"), [(2, False), (2, True), (3, True)])
def test_modules_used_by_some_ranks_train_as_in_ddp(ranks: int, apart: bool) -> None:
    assert any(way_of(0, step) != way_of(1, step) for step in range(STEPS))
    for want, *found in run_ranks(routed, ranks, apart=apart):
        for zero, state in zip(ROUTED, found, strict=True):
            for name, value in want.items():
                assert (state[name] - value).abs().max() < 1e-12, (zero, name)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 6, bias=False), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 6)).double()
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x.square().mean()


BATCHES = (2, 6, 4)  # of each rank


class Uneven(NamedTuple):
    zero: dict[str, Any]
    accumulation: int = 1
    by_active: bool = False
    whole_batches: bool = False  # train_batch() instead of a loop
    lr: float | Tensor = 1e-2


UNEVEN = [
    Uneven({"stage": 0}),
    Uneven({"stage": 1}, by_active=True, lr=torch.tensor(1e-2, dtype=torch.float64)),
    Uneven({"stage": 2}, accumulation=2),
    Uneven({**STAGE_3, "prefetch": 0}),
    Uneven({**STAGE_3, "keep_whole": True}, accumulation=2, by_active=True),
    Uneven({**STAGE_3, "offload_parameters": {"device": "cpu"}}, accumulation=2, whole_batches=True),
]


def optimizer_and_schedule(model: nn.Module, lr: float | Tensor) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr.clone() if isinstance(lr, Tensor) else lr)
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.8)


def joined_ddp(case: Uneven) -> dict[str, Tensor]:
    model, rank = Normed(), dist.get_rank()
    ddp = DistributedDataParallel(model)
    optimizer, scheduler = optimizer_and_schedule(model, case.lr)
    with ddp.join(divide_by_initial_world_size=not case.by_active):
        for number in range(BATCHES[rank]):
            last = (number + 1) % case.accumulation == 0
            with contextlib.nullcontext() if last else ddp.no_sync():
                (ddp(sample(rank, number)) / case.accumulation).backward()
            if last:
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
    return model.state_dict()


def joined_engine(case: Uneven) -> dict[str, Tensor]:
    model, rank = Normed(), dist.get_rank()
    optimizer, scheduler = optimizer_and_schedule(model, case.lr)
    config = {"zero": {"bucket_mb": 0.0005, **case.zero}, "accumulation": case.accumulation}
    engine = megatron_ds.initialize(model, config, optimizer)
    with engine.join(divide_by_initial_world_size=not case.by_active):
        if case.whole_batches:
            for number in range(0, BATCHES[rank], case.accumulation):
                engine.train_batch((sample(rank, number + i),) for i in range(case.accumulation))
                scheduler.step()
        else:
            for number in range(BATCHES[rank]):
                engine.backward(engine(sample(rank, number)))
                if engine.step() is not None:
                    scheduler.step()
    dist.barrier()
    assert engine.steps == max(BATCHES[: dist.get_world_size()]) // case.accumulation
    state = engine.state_dict()
    engine.backward(engine(sample(rank, 0)))  # and on, without a join
    engine.close()
    return state


def joined() -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    return [(joined_ddp(case), joined_engine(case)) for case in UNEVEN]


@pytest.mark.parametrize(("ranks", "apart"), [(2, False), (3, True)])
def test_ranks_with_fewer_batches_join_as_in_ddp(ranks: int, apart: bool) -> None:
    for rank, results in enumerate(run_ranks(joined, ranks, apart=apart)):
        for case, (want, got) in zip(UNEVEN, results, strict=True):
            for name, value in want.items():
                assert (got[name] - value).abs().max() < 1e-12, (rank, case, name)


def terminated() -> tuple[str, str]:
    model, rank = Normed(), dist.get_rank()
    engine = megatron_ds.initialize(model, {"zero": STAGE_3}, adam(model))

    def loop(differs: bool) -> str:
        try:
            with engine.join(throw_on_early_termination=not differs):
                for number in range(1 + rank):
                    loss = engine(sample(rank, number))
                    if differs and rank == 1:
                        engine.eval()
                    engine.backward(loss)
                    engine.step()
        except (RuntimeError, EngineError) as error:
            return str(error)
        return ""

    return loop(differs=False), loop(differs=True)


def test_a_join_that_cannot_go_on_says_so_on_all_ranks() -> None:
    (first, differs), (second, differs_too) = run_ranks(terminated, 2)
    assert "exhausted all inputs" in first and "at least one rank that exhausted inputs" in second
    assert "did not do the same" in differs and differs == differs_too
    assert "backward on rank 0, buffers on rank 1" in differs


def left_alone(stage: int) -> tuple[str, list[str]]:
    """Rank 1 has a batch less, and waits where rank 0 does not come to. The error and the warnings."""
    model, rank, text = Normed(), dist.get_rank(), ""
    warnings: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megatron_ds.engine.engine").addHandler(handler)
    engine = megatron_ds.initialize(model, {"zero": {"stage": stage}, "timeout": 5.0}, adam(model))
    try:
        for number in range(3 - rank):
            engine.backward(engine(sample(rank, number)))
            engine.step()
    except EngineError as error:
        text = str(error)
    dist.barrier()
    return text, warnings


@pytest.mark.parametrize(("stage", "apart"), [(2, False), (3, True)])
def test_a_rank_that_waits_for_one_without_a_batch_says_so(stage: int, apart: bool) -> None:
    (waited, warnings), (left, none) = run_ranks(left_alone, 2, stage, apart=apart)
    (warning,) = (text for text in warnings if "has waited" in text)
    said = r"rank 0 has waited \d s in the (for|back)ward pass of step 3: rank 1 is after the update of step 2, at .*"
    assert re.match(said, warning) and " left_alone" in warning and "`with engine.join():`" in warning
    assert "rank 1 is after the update of step 2" in waited
    assert (
        not left
        and not none
        and re.match(r"rank 0 waited for others in the (for|back)ward pass of step 3, and they did", waited)
    )
    assert "within timeout=5 s" in waited and "put `with engine.join():` around the loop" in waited


class Failing(Normed):
    fails = False

    def forward(self, x: Tensor) -> Tensor:
        if self.fails:
            raise KeyError("of the user's module")
        return super().forward(x)


def meetings_of(failing: bool) -> list[str]:
    """The places at which a rank meets the others in a forward pass."""
    model, places = Failing(), []
    engine = megatron_ds.initialize(model, {"zero": STAGE_3}, adam(model))
    engine(sample(dist.get_rank(), 0))
    model.fails = failing
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyError):
        patch.setattr(Gatherer, "meet", lambda gatherer, place: places.append(place))
        engine(sample(dist.get_rank(), 0))
    return places


def test_a_forward_that_fails_is_not_followed_by_a_meeting() -> None:
    """The others may wait for a gather that the rank did not come to: they would take its message for their part."""
    assert run_ranks(meetings_of, 2, False, apart=True) == [[FORWARD_END]] * 2
    assert run_ranks(meetings_of, 2, True, apart=True) == [[]] * 2
