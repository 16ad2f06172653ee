"""Parameters frozen and unfrozen between steps, as adapters that take turns: the numbers of plain torch, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_more import message
from torch import Tensor, nn

import megatron_ds
from megatron_ds.engine import Engine
from megatron_ds.testing import run_ranks

TURNS = ["a", "a", "b", "a b", "b", "a", "", "a b"]
RESUMED_AT = 4
OPTIMIZERS: dict[str, Any] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9, weight_decay=0.1),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-2),
}
CASES = [(stage, name) for stage in (0, 1, 2, 3) for name in (None, "AdamW")] + [(1, "NAdam"), (3, "SGD")]


class Adapted(nn.Module):
    """A frozen body, a head that is always trained, and adapters of which those that are not frozen take part."""

    def __init__(self, seed: int = 1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Linear(6, 8).double().requires_grad_(False)
        self.adapters = nn.ModuleDict({name: nn.Linear(8, 8, bias=False).double() for name in "ab"})
        self.head = nn.Linear(8, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.body(x)
        for adapter in self.adapters.values():
            if adapter.weight.requires_grad:  # type: ignore[union-attr]
                hidden = hidden + adapter(torch.tanh(hidden))
        return self.head(hidden).square().mean()

    def set_adapters(self, names: str) -> None:
        for name, adapter in self.adapters.items():
            adapter.requires_grad_(name in names)


def samples(step: int) -> Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def engine_of(stage: int, optimizer: str | None, seed: int = 1) -> Engine:
    model = Adapted(seed)
    zero = {"stage": stage, "bucket_mb": 0.0005, **({"persistence_threshold": 0} if stage == 3 else {})}
    config: dict[str, Any] = {"zero": zero}
    if optimizer is None:
        config |= {"optimizer": {"lr": 1e-2, "beta2": 0.999, "weight_decay": 0.1}, "decay": "all"}
        return megatron_ds.initialize(model, config)
    return megatron_ds.initialize(model, config, OPTIMIZERS[optimizer](trained(model)))


def turns(engine: Engine, numbers: range) -> None:
    axis, model = engine.mesh.data, engine.module
    assert isinstance(model, Adapted)
    for number in numbers:
        model.set_adapters(TURNS[number])
        engine.backward(engine(samples(number).chunk(axis.size)[axis.rank]))
        engine.step()


def run(stage: int, optimizer: str | None, folder: str) -> dict[str, Tensor]:
    engine = engine_of(stage, optimizer)
    turns(engine, range(RESUMED_AT))
    engine.save_checkpoint(folder)
    turns(engine, range(RESUMED_AT, len(TURNS)))
    state = engine.state_dict()
    engine.close()
    again = engine_of(stage, optimizer, seed=9)
    again.load_checkpoint(folder)
    turns(again, range(RESUMED_AT, len(TURNS)))
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())
    again.close()
    return state


def all_runs(folder: str) -> dict[Any, dict[str, Tensor]]:
    return {case: run(*case, f"{folder}/{case[0]}{case[1]}") for case in CASES}


def plain(name: str) -> dict[str, Tensor]:
    model = Adapted()
    optimizer = OPTIMIZERS[name](trained(model))
    for number, turn in enumerate(TURNS):
        model.set_adapters(turn)
        optimizer.zero_grad()
        model(samples(number)).backward()
        optimizer.step()
    return model.state_dict()


def test_adapters_take_turns_as_in_plain_torch(tmp_path: Path) -> None:
    want = {name: plain(name) for name in OPTIMIZERS}
    for ranks in (1, 2):
        for found in run_ranks(all_runs, ranks, str(tmp_path / str(ranks))):
            for (stage, name), state in found.items():
                for key, value in want[name or "AdamW"].items():
                    assert (state[key] - value).abs().max() < 1e-9, (ranks, stage, name, key)


@pytest.mark.parametrize("stage", [1, 3])
def test_what_was_frozen_from_the_start_is_named_where_the_optimizer_has_it(stage: int) -> None:
    model = Adapted()
    engine = megatron_ds.initialize(model, {"zero": {"stage": stage}}, torch.optim.SGD(model.parameters()))
    turns(engine, range(1))
    model.body.requires_grad_(True)
    said = message(engine.train_batch, [samples(0)])
    assert "body.weight requires a gradient now and is the optimizer's, but was frozen at initialize()" in said
    assert "unfreeze it before initialize() and freeze it again right after" in said
    engine.close()
