"""Parameters frozen and unfrozen between steps, as adapters that take turns: the numbers of plain torch, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_more import message
from optimizer_cases import LayerWise
from torch import Tensor, nn

import megatron_ds
from megatron_ds.engine import Engine
from megatron_ds.testing import run_ranks

TURNS = ["a", "a", "b", "a b", "b", "a", "", "a b"]
LATE_TURNS = ["a", "a", "a body", "b body", "a b body", "b", "a b body"]
RESUMED_AT = 4
OPTIMIZERS: dict[str, Any] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9, weight_decay=0.1),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-2),
}
CASES = [(stage, name) for stage in (0, 1, 2, 3) for name in (None, "AdamW")] + [(1, "NAdam"), (3, "SGD")]
LATE_CASES: list[tuple[int, str | None, str]] = [
    (0, "AdamW", "none"),
    (1, None, "cpu"),
    (1, "NAdam", "none"),
    (2, "AdamW", "nvme"),
    (2, "groups", "none"),
    (3, None, "none"),
    (3, "SGD", "nvme"),
    (3, "groups", "cpu"),
    (3, "LayerWise", "none"),
]


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
            adapter.requires_grad_(name in names.split())
        for parameter in self.body.parameters():
            parameter.requires_grad = "body" in names.split()


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


def add_unfrozen(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """A group of its own for what is unfrozen, as gradual unfreezing is often written."""
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if new := [p for p in trained(model) if id(p) not in known]:
        optimizer.add_param_group({"params": new, "lr": 3e-2})


def late_turns(
    engine: Engine | None, model: Adapted, optimizer: torch.optim.Optimizer | None, numbers: range, adds: bool
) -> dict[str, Tensor]:
    """The moving average of plain torch, of all parameters, also of those that are frozen."""
    average: dict[str, Tensor] = {}
    for number in numbers:
        model.set_adapters(LATE_TURNS[number])
        if adds and optimizer is not None:
            add_unfrozen(optimizer, model)
        if engine is not None:
            axis = engine.mesh.data
            engine.backward(engine(samples(number).chunk(axis.size)[axis.rank]))
            engine.step()
            assert not engine._model_guard.strays
        elif optimizer is not None:
            optimizer.zero_grad()
            model(samples(number)).backward()
            optimizer.step()
            decay = min(0.25, (1 + number) / (10 + number)) if number else 0.0
            for key, value in model.state_dict().items():
                average[key] = decay * average.get(key, value) + (1 - decay) * value
    return average


def late_optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    made: torch.optim.Optimizer
    if name == "groups":
        made = torch.optim.AdamW(trained(model), lr=1e-2, weight_decay=0.1)
    elif name == "LayerWise":
        made = LayerWise(model.parameters())
    else:
        made = OPTIMIZERS[name](model.parameters())
    return made


def late_engine(stage: int, name: str | None, offload: str, seed: int, folder: str) -> Engine:
    model = Adapted(seed)
    model.set_adapters(LATE_TURNS[0])
    place = {"device": offload, **({"path": folder} if offload == "nvme" else {})}
    zero: dict[str, Any] = {"stage": stage, "bucket_mb": 0.0005}
    if stage == 3:
        zero |= {"persistence_threshold": 0, "offload_parameters": place}
    config: dict[str, Any] = {"zero": {**zero, "offload_optimizer": place} if offload != "none" else zero}
    config["optimizer"] = {"ema_decay": 0.25}
    if offload == "none":
        config["zero"].pop("offload_parameters", None)
    if name is None:
        config["optimizer"] |= {"lr": 1e-2, "beta2": 0.999, "weight_decay": 0.1}
        config["decay"] = "all"
        return megatron_ds.initialize(model, config)
    return megatron_ds.initialize(model, config, late_optimizer(name, model))


def with_average(engine: Engine) -> dict[str, Tensor]:
    return engine.state_dict() | {f"average {key}": value for key, value in engine.state_dict(average=True).items()}


def same(some: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, others[key]) for key, value in some.items())


def late_run(stage: int, name: str | None, offload: str, folder: str) -> dict[str, Tensor]:
    engine = late_engine(stage, name, offload, 1, folder)
    assert same(engine.state_dict(average=True), engine.state_dict())
    before = engine.bytes_report()
    late_turns(engine, engine.module, engine.optimizer, range(RESUMED_AT), name == "groups")
    assert engine.bytes_report()["gradients"] > before["gradients"]
    engine.save_checkpoint(folder)
    saved = with_average(engine)
    late_turns(engine, engine.module, engine.optimizer, range(RESUMED_AT, len(LATE_TURNS)), name == "groups")
    state = with_average(engine)
    engine.close()
    again = late_engine(stage, name, offload, 9, folder)
    if name == "groups":  # as plain torch wants it: the same groups before their state is loaded
        model = again.module
        for turn in LATE_TURNS[:RESUMED_AT]:
            model.set_adapters(turn)
            add_unfrozen(again.optimizer, model)
        model.set_adapters(LATE_TURNS[0])
    again.load_checkpoint(folder)
    late_turns(again, again.module, again.optimizer, range(RESUMED_AT, len(LATE_TURNS)), name == "groups")
    assert same(with_average(again), state)
    again(samples(0))  # which nobody needs
    again.load_checkpoint(folder, weights_only=True)
    assert same(with_average(again), saved)
    again.close()
    return state


def all_late_runs(folder: str) -> dict[Any, dict[str, Tensor]]:
    return {case: late_run(*case, f"{folder}/{'-'.join(map(str, case))}") for case in LATE_CASES}


def late_plain(name: str) -> dict[str, Tensor]:
    model = Adapted()
    model.set_adapters(LATE_TURNS[0])
    optimizer = late_optimizer(name, model)
    average = late_turns(None, model, optimizer, range(len(LATE_TURNS)), name == "groups")
    return model.state_dict() | {f"average {key}": value for key, value in average.items()}


@pytest.mark.parametrize(("ranks", "apart"), [(1, False), (2, False), (2, True)])
def test_what_is_unfrozen_late_trains_as_in_plain_torch(ranks: int, apart: bool, tmp_path: Path) -> None:
    want = {name: late_plain(name) for name in {name or "AdamW" for _, name, _ in LATE_CASES}}
    for found in run_ranks(all_late_runs, ranks, str(tmp_path), apart=apart):
        for (stage, name, offload), state in found.items():
            for key, value in want[name or "AdamW"].items():
                assert (state[key] - value).abs().max() < 1e-9, (ranks, stage, name, offload, key)


def test_a_checkpoint_between_unfreezing_and_the_first_step_goes_on(tmp_path: Path) -> None:
    states = []
    for seed in (1, 9):
        model = Adapted(seed)
        model.body.requires_grad_(seed == 9)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        engine = megatron_ds.initialize(model, {}, optimizer, loss=lambda model, x: model(x))
        if seed == 1:
            engine.train_batch([samples(0)])
            model.body.requires_grad_(True)
            engine.save_checkpoint(tmp_path)
        else:
            engine.load_checkpoint(tmp_path)
        engine.train_batch([samples(1)])
        states.append(engine.state_dict())
        engine.close()
    plain = Adapted()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    for step in range(2):
        plain.body.requires_grad_(step == 1)
        plain(samples(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for key, value in plain.state_dict().items():
        assert all((state[key] - value).abs().max() < 1e-12 for state in states), key


def test_what_is_unfrozen_in_the_middle_of_a_step_is_named() -> None:
    model = Adapted()
    engine = megatron_ds.initialize(model, {"accumulation": 2}, torch.optim.SGD(model.parameters()))
    engine.backward(engine(samples(0)))
    model.body.requires_grad_(True)
    engine.backward(engine(samples(1)))
    assert "body.weight was unfrozen in the middle of a step, of which it got a part" in message(engine.step)
    engine.close()
