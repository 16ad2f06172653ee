"""Modules and loops that write parameters themselves: the numbers of plain torch at every stage.

All ranks write alike, as under DistributedDataParallel.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import megatron_ds
from megatron_ds.errors import EngineError
from megatron_ds.testing import run_ranks
from megatron_ds.zero import writes
from megatron_ds.zero.writes import EVERYTHING, masters_follow

STEPS, WIDTH = 4, 32


class Written(nn.Module):
    """A block whose forward writes ``weight`` by ``write(weight, of)``."""

    def __init__(self, write: Callable[[nn.Parameter, Tensor], None], trained: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) * 0.1, requires_grad=trained)
        self.linear, self.write = nn.Linear(WIDTH, WIDTH), write

    @torch.no_grad()
    def change(self) -> None:
        self.write(self.weight, self.linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.change()
        return x + torch.tanh(self.linear(x) @ self.weight)


def momentum(weight: nn.Parameter, of: Tensor) -> None:
    weight.mul_(0.5).add_(of, alpha=0.5)


def by_data(weight: nn.Parameter, of: Tensor) -> None:
    weight.data.mul_(0.5).add_(of, alpha=0.5)


def replaced(weight: nn.Parameter, of: Tensor) -> None:
    weight.data = weight.data * 0.5 + of.data * 0.5


def normalised(weight: nn.Parameter, of: Tensor) -> None:
    weight.copy_(nn.functional.normalize(weight, dim=1))


def one_row(weight: nn.Parameter, of: Tensor) -> None:
    weight.data[7].copy_(of[3])


WRITES: dict[str, tuple[Callable[..., None], bool]] = {
    "momentum": (momentum, False),
    "by data": (by_data, False),
    "replaced": (replaced, False),
    "momentum, trained": (momentum, True),
    "normalised": (normalised, True),
    "one row": (one_row, True),
}


class Net(nn.Module):
    """Blocks that write; and a parameter of one that the whole model writes, and that the loop clips."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Written(write, trained) for write, trained in WRITES.values()])
        self.outer = Written(lambda weight, of: None, True)
        self.head = nn.Linear(WIDTH, 1)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.outer.weight.data[5].copy_(self.outer.linear.weight[4])
        for block in self.blocks:
            x = block(x)
        return self.head(self.outer(x)).square().mean()


def batch(step: int) -> Tensor:
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def clip(net: Net) -> None:
    net.outer.linear.bias.data.clamp_(-0.05, 0.05)


def plain(dtype: torch.dtype, lr: float) -> dict[str, Tensor]:
    net = Net(dtype)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=lr, momentum=0.9)
    for step in range(STEPS):
        net.train()
        net(batch(step).to(dtype)).backward()
        optimizer.step()
        optimizer.zero_grad()
        clip(net)
        with torch.no_grad():
            net.eval()(batch(9).to(dtype))
    return {name: p.detach() for name, p in net.named_parameters()}


def trained(stage: int, precision: str, lr: float, offload: str | None) -> dict[str, Tensor]:
    dtype = {"fp64": torch.float64, "bf16": torch.bfloat16}[precision]
    zero: dict[str, Any] = {"stage": stage, "bucket_mb": 0.01}
    if stage == 3:
        zero["persistence_threshold"] = WIDTH + 1  # biases are whole
    if offload is not None:
        zero["offload_parameters"] = zero["offload_optimizer"] = {"device": "nvme", "path": offload}
    net = Net(dtype)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=lr, momentum=0.9)
    config = {"zero": zero, "precision": {"dtype": precision}}
    engine = megatron_ds.initialize(net, config, optimizer)
    axis = engine.mesh.data
    for step in range(STEPS):
        engine.train()
        engine.backward(engine(batch(step).to(dtype).chunk(axis.size)[axis.rank]))
        engine.step()
        clip(net)
        with torch.no_grad():
            engine.eval()(batch(9).to(dtype))
    state = engine.state_dict()
    with engine.gathered():
        for name, parameter in net.named_parameters():
            assert torch.equal(parameter, state[name]), name
    engine.close()
    return state


ROWS = [(0, False), (1, False), (2, True), (3, False), (3, True)]


@pytest.mark.parametrize(("stage", "apart"), ROWS)
def test_what_is_written_holds(stage: int, apart: bool) -> None:
    want = plain(torch.float64, lr=0.02)
    for state in run_ranks(trained, 2, stage, "fp64", 0.02, None, apart=apart):
        for name, value in want.items():
            assert (state[name] - value).abs().max() < 1e-12, name


@pytest.mark.parametrize(("stage", "apart"), ROWS)
def test_what_is_written_holds_in_half_precision(stage: int, apart: bool) -> None:
    """Without an update every write has one right value, to the bit."""
    want = plain(torch.bfloat16, lr=0.0)
    for state in run_ranks(trained, 2, stage, "bf16", 0.0, None, apart=apart):
        for name, value in want.items():
            assert torch.equal(state[name], value), name


def test_what_is_written_holds_where_parameters_are_offloaded(tmp_path: Path) -> None:
    want = plain(torch.float64, lr=0.02)
    for state in run_ranks(trained, 2, 3, "fp64", 0.02, str(tmp_path)):
        for name, value in want.items():
            assert (state[name] - value).abs().max() < 1e-12, name
    want = plain(torch.bfloat16, lr=0.0)
    for state in run_ranks(trained, 2, 3, "bf16", 0.0, str(tmp_path)):
        for name, value in want.items():
            assert torch.equal(state[name], value), name


def written_beside(stage: int) -> bool:
    """A master weight has the digits that its parameter lacks, also after another one of its bucket was written. What
    is written may be other memory, and trains on."""
    net = Net(torch.bfloat16).eval()
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1e-3)
    zero = {"stage": stage} if stage < 3 else {"stage": stage, "persistence_threshold": 1}
    config = {"zero": zero, "precision": {"dtype": "bf16"}}
    engine = megatron_ds.initialize(net, config, optimizer, unit_classes=[Net])
    engine.backward(engine(batch(0).bfloat16()))
    engine.step()
    before = engine.get_parameter("outer.weight")
    with engine.gathered(write=True):
        net.outer.linear.bias.data.fill_(0.5)
    assert (engine.get_parameter("outer.linear.bias") == 0.5).all()
    after = engine.get_parameter("outer.weight")
    bias = net.outer.linear.bias
    with engine.gathered([bias], write=True):
        bias.data = bias.data + (1.0 if engine.mesh.rank == 0 else 2.0)  # other memory, at any stage
    assert (engine.get_parameter("outer.linear.bias") == 1.5).all()
    net.train()
    engine(batch(1).bfloat16())  # of a loss that nobody needs
    net.eval()
    with engine.gathered([bias], write=True):
        bias.data += 1.0
    assert (engine.get_parameter("outer.linear.bias") == 2.5).all()
    engine.backward(engine(batch(1).bfloat16()))
    with pytest.raises(EngineError, match=r"gathered\(write=True\) after 1 of a step's micro-batches.*finish the step"):
        engine.gathered([bias], write=True).__enter__()
    engine.step()
    with engine.gathered():
        assert torch.equal(bias.float(), engine.get_parameter("outer.linear.bias").bfloat16().float())
    return torch.equal(before, after) and not torch.equal(after, after.bfloat16().float())


@pytest.mark.parametrize("stage", [1, 3])
def test_a_write_leaves_the_other_master_weights_as_they_are(stage: int) -> None:
    assert run_ranks(written_beside, 2, stage) == [True, True]


@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("place", [0, 15, 16, 20])
@pytest.mark.parametrize("chunk", [8, 1 << 19])
def test_a_written_element_is_found_wherever_it_lies(
    place: int, offset: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight bytes are compared as one: whole words, the elements behind the last one, memory that begins within one.
    And a large shard in parts."""
    monkeypatch.setattr(writes, "_CHUNK_CPU", chunk)
    master = torch.linspace(1.0, 2.0, 32)[offset : offset + 21]
    before, shard = master.clone(), torch.empty(32, dtype=torch.bfloat16)[offset : offset + 21].copy_(master)
    assert not masters_follow(master, shard, EVERYTHING)
    shard[place] = 7.0
    assert masters_follow(master, shard, EVERYTHING)
    before[place] = 7.0
    assert torch.equal(master, before)


@pytest.mark.parametrize("first", [0, 4])
def test_an_element_that_is_written_after_every_step_holds(first: int) -> None:
    """From the start, when updates look at everything, or later, when each looks at a part: then in the part's turn."""
    net = nn.Linear(64, 64, bias=False)
    config = {"precision": {"dtype": "bf16"}, "zero": {"bucket_mb": 0.002}, "cast_inputs": True}
    engine = megatron_ds.initialize(net, config, loss=lambda call, x: call(x).float().square().mean())
    for step in range(18):
        engine.train_batch([torch.ones(2, 64)])
        if step >= first:
            net.weight.data.view(-1)[3001] = 7.0 + step  # another one than the master weight has taken
    engine.train_batch([torch.ones(2, 64)])
    assert net.weight.view(-1)[3001] > 23.5
    engine.close()


def test_a_look_sees_its_part_and_some_elements_of_all_others() -> None:
    master = torch.linspace(1.0, 2.0, 4096)
    for place, look, seen in ((5, None, False), (5, slice(0, 8), True), (5, slice(8, 16), False), (1018, None, True)):
        kept, shard = master.clone(), master.bfloat16()
        shard[place] = shard[7] = 7.0
        assert masters_follow(kept, shard, look) == seen
        written = torch.tensor([place, 7])
        assert torch.equal(kept[written], torch.full((2,), 7.0) if seen else master[written])
