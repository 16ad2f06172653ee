"""Parameters keep their layout in memory, channels-last or any other dense one; files hold all of them row-major."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import megatron_ds
from megatron_ds.checkpoint import Checkpoint
from megatron_ds.shard import ShardSpec, memory_order
from megatron_ds.shard.boxes import Box
from megatron_ds.shard.flat_shards import FlatShard
from megatron_ds.testing import run_ranks

STEPS = 3
LAST = torch.channels_last


class Net(nn.Module):
    """Convolutions, one of them frozen, and a weight that is the transpose of what lies in memory."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convs = nn.ModuleList([nn.Conv2d(3, 5, 3), nn.Conv2d(5, 7, 2), nn.Conv2d(7, 3, 1)])
        self.turned = nn.Parameter(torch.randn(4, 3).t())
        self.convs[1].weight.requires_grad_(False)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = conv(x).tanh()
        return (x.mean((2, 3)) @ self.turned).square().mean()


def batch(step: int, rank: int, world: int) -> Tensor:
    images = torch.randn(4, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
    return images.chunk(world)[rank].to(memory_format=LAST)


def by_torch(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> dict[str, Tensor]:
    for step in steps:
        net(batch(step, 0, 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def adam(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)


def layouts(net: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.stride()) for name, p in net.named_parameters()}


def by_engine(stage: int, offload: str, folder: str) -> tuple[dict[str, Tensor], dict[str, Tensor], Any]:
    """After STEPS steps; the same after half of them, a checkpoint and the rest in a row-major net; layouts."""
    zero: dict[str, Any] = {"stage": stage, "bucket_mb": 0.0005, "offload_optimizer": {"device": offload}}
    if offload == "nvme":
        zero["offload_optimizer"]["path"] = f"{folder}-swap"
    rank, world = dist.get_rank(), dist.get_world_size()
    net = Net().to(memory_format=LAST)
    before = layouts(net)
    by_torch(net, optimizer := adam(net), range(1))  # its state is taken over
    if rank:
        net.convs[0].weight.data = net.convs[0].weight.data.contiguous()  # rank 0's layout counts, as its values do
    engine = megatron_ds.initialize(net, {"zero": zero}, optimizer, loss=lambda model, x: model(x))
    for step in range(1, STEPS):
        if step == STEPS - 1:
            engine.save_checkpoint(folder)
        engine.train_batch([batch(step, rank, world)])
    with engine.gathered():
        after = layouts(net)
    whole = engine.state_dict()
    momentum = engine.get_optimizer_state("convs.0.weight", "exp_avg")
    engine.set_optimizer_state("convs.0.weight", "exp_avg", momentum)
    assert torch.equal(engine.get_optimizer_state("convs.0.weight", "exp_avg"), momentum)
    engine.close()
    other = Net()
    engine = megatron_ds.initialize(other, {"zero": zero}, adam(other), loss=lambda model, x: model(x))
    engine.load_checkpoint(folder)
    engine.train_batch([batch(STEPS - 1, rank, world)])
    resumed = engine.state_dict()
    engine.close()
    return whole, resumed, (before, after)


CASES = [(0, "none"), (1, "none"), (2, "nvme"), (3, "none"), (3, "cpu")]


def every_case(folder: str) -> list[Any]:
    return [by_engine(*case, f"{folder}/{number}") for number, case in enumerate(CASES)]


@pytest.mark.parametrize("apart", [False, True])
def test_layouts_stay_and_numbers_are_those_of_torch(tmp_path: Path, apart: bool) -> None:
    net = Net()
    want = by_torch(net, adam(net), range(STEPS))
    for of_rank in run_ranks(every_case, 2, str(tmp_path), apart=apart):
        for case, (whole, resumed, (before, after)) in zip(CASES, of_rank):
            assert before == after and before["convs.0.weight"] == (27, 1, 9, 3) and before["turned"] == (1, 3), case
            for name, value in want.items():
                assert (whole[name] - value).abs().max() < 1e-12, (case, name)
                assert (resumed[name] - value).abs().max() < 1e-12, (case, name)
    with Checkpoint(tmp_path / "0") as saved:
        assert torch.equal(saved.read("convs.1.weight"), Net().convs[1].weight), "frozen, and row-major in the file"


def test_the_order_of_dims_in_memory() -> None:
    x = torch.randn(2, 3, 4, 5)
    assert memory_order(x) == () and memory_order(x.to(memory_format=LAST)) == (0, 2, 3, 1)
    assert memory_order(x[:, :2]) == () and memory_order(x[0, 0].t()) == (1, 0)
    assert (
        memory_order(torch.randn(3, 2, 1, 1)) == memory_order(torch.randn(3, 1)) == memory_order(torch.ones(())) == ()
    )
    assert memory_order(torch.randn(3, 2, 1, 1).to(memory_format=LAST)) == (0, 2, 3, 1), "by its strides"


@pytest.mark.parametrize("order", [(), (0, 2, 3, 1), (3, 1, 0, 2)])
@pytest.mark.parametrize(("start", "stop"), [(0, 120), (7, 95), (30, 31), (50, 50)])
def test_parts_of_a_flat_range_are_where_it_says(order: tuple[int, ...], start: int, stop: int) -> None:
    whole = torch.arange(120).view(2, 3, 4, 5)
    memory = (whole.permute(order) if order else whole).flatten()
    shard = FlatShard.of(ShardSpec("x", (2, 3, 4, 5), order=order), "param", memory[start:stop], start, stop)
    parts = list(shard.parts())
    assert [box for box, _ in parts] == shard.boxes() and all(isinstance(box, Box) for box, _ in parts)
    for box, part in parts:
        assert torch.equal(part, whole[box.slices])
    assert sum(part.numel() for _, part in parts) == stop - start
    assert torch.equal(torch.cat([part.flatten() for _, part in parts]) if parts else memory[:0], shard.row_major())
    assert torch.equal(shard.row_major().sort().values, memory[start:stop].sort().values)
