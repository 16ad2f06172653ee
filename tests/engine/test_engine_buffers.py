"""Buffers that a training forward writes: on every rank what DistributedDataParallel makes of them, in float64."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import megatron_ds
from megatron_ds import comm
from megatron_ds.engine import buffer_sync
from megatron_ds.testing import run_ranks

STEPS = 4


class Net(nn.Module):
    """BatchNorm, and buffers written in place, through ``.data``, anew, from step 2 on, and on one rank only."""

    data_written: Tensor
    center: Tensor
    late: Tensor
    sometimes: Tensor
    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.norm, self.output = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)
        self.frozen_norm = nn.BatchNorm1d(8, affine=False)
        for name in ("data_written", "center", "late", "sometimes", "table"):
            self.register_buffer(name, torch.ones(8))
        self.register_buffer("empty", torch.ones(0))
        self.register_buffer("temporary", torch.zeros(3, dtype=torch.bool), persistent=False)
        self.calls = 0
        self.double()

    def forward(self, samples: Tensor) -> Tensor:
        x = self.frozen_norm(self.norm(torch.tanh(self.inputs(samples)))) * self.table
        if self.training:
            self.calls += 1
            mean = x.detach().mean(0)
            self.data_written.data.mul_(0.9).add_(mean, alpha=0.1)
            self.center = self.center * 0.5 + mean
            if self.calls > 2:
                self.late.add_(mean)
            if mean[0] > 0:
                self.sometimes += mean
        x = x + self.data_written - 0.1 * self.center + 0.01 * self.late * self.sometimes
        return self.output(x).square().mean()


def batches(step: int, accumulation: int) -> list[Tensor]:
    whole = torch.randn(36, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return list(whole.chunk(dist.get_world_size())[dist.get_rank()].chunk(accumulation))


def state(net: nn.Module, losses: list[float]) -> dict[str, Tensor]:
    """What this rank has after a step."""
    own = {name: b.detach().clone() for name, b in net.named_buffers()}
    return {**own, "losses": torch.tensor(losses, dtype=torch.float64)}


def by_ddp(accumulation: int, look: bool) -> list[dict[str, Tensor]]:
    torch.manual_seed(0)
    ddp, found = DistributedDataParallel(Net()), []
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    for step in range(STEPS):
        ddp.train()
        losses = []
        for number, batch in enumerate(batches(step, accumulation)):
            with ddp.no_sync() if number < accumulation - 1 else nullcontext():
                loss = ddp(batch) / accumulation
                loss.backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        found.append(state(ddp.module, losses))
        if look and step == 1:  # in training mode, so that it writes
            with torch.no_grad():
                ddp(batches(9, 1)[0])
    ddp.eval()
    with torch.no_grad():
        found.append(state(ddp.module, [ddp(batches(8, 1)[0]).item()]))
    return found


def by_engine(accumulation: int, look: bool, in_one_call: bool) -> list[dict[str, Tensor]]:
    torch.manual_seed(0)
    net, found = Net(), []
    config = {"accumulation": accumulation, "zero": {"stage": 1}}
    engine = megatron_ds.initialize(net, config, torch.optim.SGD(net.parameters(), lr=0.1))
    for step in range(STEPS):
        engine.train()
        losses: list[float] = []
        if in_one_call:
            hook = net.register_forward_hook(lambda *a, losses=losses: losses.append(a[2].item() / accumulation))
            assert not engine.train_batch([(batch,) for batch in batches(step, accumulation)]).stop
            hook.remove()
        else:
            for batch in batches(step, accumulation):
                losses.append(engine.backward(engine(batch)).item() / accumulation)
                engine.step()
        found.append(state(net, losses))
        if look and step == 1:
            with torch.no_grad():
                engine(batches(9, 1)[0])
    engine.eval()
    with torch.no_grad():
        found.append(state(net, [engine(batches(8, 1)[0]).item()]))
    engine.close()
    return found


def both(accumulation: int, look: bool, in_one_call: bool) -> tuple[Any, Any]:
    return by_engine(accumulation, look, in_one_call), by_ddp(accumulation, look)


@pytest.mark.parametrize(
    ("accumulation", "look", "in_one_call"), [(1, True, False), (3, False, False), (3, True, True)]
)
def test_buffers_are_those_of_ddp_on_every_rank(accumulation: int, look: bool, in_one_call: bool) -> None:
    ranks = run_ranks(both, 2, accumulation, look, in_one_call)
    for rank, (engine, ddp) in enumerate(ranks):
        for step, (got, want) in enumerate(zip(engine, ddp, strict=True)):
            assert got.keys() == want.keys()
            for name, value in want.items():
                assert torch.allclose(got[name], value, rtol=0, atol=1e-12), (rank, step, name, got[name], value)
    first, second = (ddp for _, ddp in ranks)
    assert not torch.equal(first[0]["center"], second[0]["center"])  # there is something to broadcast


class Constant(nn.Module):
    def __init__(self, rank: int) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 1)
        self.register_buffer("table", torch.ones(6))
        self.register_buffer("mask", torch.full((3,), float("nan")))
        self.rank = rank

    def forward(self, samples: Tensor) -> Tensor:
        return (self.linear(samples * self.table)).square().mean()


def sent() -> tuple[list[int], list[int]]:
    """Bytes of each broadcast of the buffers, and what a state_dict of rank 1 has of a buffer that differs there."""
    rank = dist.get_rank()
    net = Constant(rank)
    engine = megatron_ds.initialize(net, {}, torch.optim.SGD(net.parameters(), lr=0.1))
    sizes: list[int] = []

    def counted(tensor: Tensor, axis: Any, source: int) -> Tensor:
        sizes.append(tensor.nbytes)
        return broadcast(tensor, axis, source)

    broadcast = comm.broadcast
    with patch.object(buffer_sync.comm, "broadcast", counted):
        for step in range(4):
            engine.backward(engine(batches(step, 1)[0].float()))
            engine.step()
        until_written = list(sizes)
        if rank == 1:
            net.table.add_(1)
        for step in range(2):
            engine.backward(engine(batches(step, 1)[0].float()))
            engine.step()
    return until_written, sizes


def test_what_nobody_writes_is_not_sent() -> None:
    for until_written, sizes in run_ranks(sent, 2):
        assert until_written == [48], "once, as long as it is not known what is written"
        assert sizes == [48, 32], "the table alone, after one rank has written it"


def kept() -> list[float]:
    """A buffer after a training forward that wrote another value on each rank."""
    torch.manual_seed(0)
    net = Net()
    engine = megatron_ds.initialize(net, {"zero": {"stage": 1}}, torch.optim.SGD(net.parameters(), lr=0.1))
    engine.backward(engine(batches(0, 1)[0]))
    engine.step()
    mean = net.norm.running_mean
    assert mean is not None
    before = mean.clone()
    saved = engine.state_dict()["norm.running_mean"]
    return [float(before[0]), float(saved[0])]


def test_a_state_dict_has_rank_0s_buffers_on_every_rank() -> None:
    (zero, first), (one, second) = run_ranks(kept, 2)
    assert zero == first == second != one


class Placed(nn.Module):
    """Looks places up in a constant buffer, which autograd keeps for the backward pass, as BERT does."""

    places: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(4, 3)
        self.register_buffer("places", torch.arange(4))
        self.double()

    def forward(self, samples: Tensor) -> Tensor:
        return (self.table(self.places[: len(samples)]) * samples).square().mean()


def three_passes(model: Any, step: int) -> Tensor:
    samples = torch.randn(3, 4, 3, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return sum((model(rows) for rows in samples), torch.zeros((), dtype=torch.float64))


def compared() -> Tensor:
    """The table after a step of two micro-batches."""
    model = Placed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = megatron_ds.initialize(model, {"accumulation": 2}, optimizer)
    for micro_batch in range(2):
        engine.backward(three_passes(engine, 2 * micro_batch + dist.get_rank()))
        engine.step()
    table = engine.get_parameter("table.weight")
    engine.close()
    return table


def test_constant_buffers_are_not_written_between_the_forward_passes_of_a_step() -> None:
    model = Placed()
    (sum(three_passes(model, step) for step in range(4)) / 4).backward()
    want = model.table.weight - 0.1 * model.table.weight.grad
    for found in run_ranks(compared, 2):
        torch.testing.assert_close(found, want, rtol=0, atol=1e-12)
