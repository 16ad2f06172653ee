"""Weights of one model in another, and a learning rate that follows a metric."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_more import message
from torch import Tensor, nn

import megatron_ds
from megatron_ds.engine import Engine
from megatron_ds.testing import run_ranks


class Model(nn.Module):
    """A body with a buffer, and heads by name."""

    body_seen: Tensor

    def __init__(self, seed: int, heads: dict[str, int], frozen_body: bool = False):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Linear(6, 8).double()
        self.register_buffer("body_seen", torch.full((3,), float(seed), dtype=torch.float64))
        self.heads = nn.ModuleDict({name: nn.Linear(8, outputs).double() for name, outputs in heads.items()})
        self.body.requires_grad_(not frozen_body)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(x))
        return torch.stack([head(hidden).square().mean() for head in self.heads.values()]).sum()


def samples(step: int) -> Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def engine_of(model: nn.Module, stage: int) -> Engine:
    zero = {"stage": stage, **({"persistence_threshold": 0} if stage == 3 else {})}
    return megatron_ds.initialize(model, {"zero": zero}, adamw(model))


def step(engine: Engine, number: int) -> None:
    axis = engine.mesh.data
    engine.backward(engine(samples(number).chunk(axis.size)[axis.rank]))
    engine.step()


class Log(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def transferred(folder: str, stage: int) -> dict[str, Any]:
    """What a checkpoint of a frozen body with one head says and gives to models of other heads and of more to train."""
    log, found = Log(), {}
    logging.getLogger("megatron_ds.checkpoint.load").addHandler(log)
    source = engine_of(Model(1, {"a": 2}, frozen_body=True), stage)
    step(source, 0)
    source.save_checkpoint(folder)
    found["source"] = source.state_dict()
    source.close()
    targets = {
        "added": Model(2, {"a": 2, "b": 3}),
        "replaced": Model(2, {"b": 3}),
        "unfrozen": Model(2, {"a": 2}),
        "of another shape": Model(2, {"a": 4}),
        "strange": nn.Sequential(nn.Linear(6, 2).double()),
    }
    for name, model in targets.items():
        engine = engine_of(model, stage)
        before = engine.state_dict()
        found[name] = [message(engine.load_checkpoint, folder), message(engine.load_checkpoint, folder, strict=False)]
        assert all(torch.equal(value, before[key]) for key, value in engine.state_dict().items())
        log.texts.clear()
        found[name].append(message(engine.load_checkpoint, folder, weights_only=True, strict=False))
        found[name] += [list(log.texts), before, engine.state_dict()]
        if name != "strange":
            step(engine, 1)
        engine.close()
    return found


@pytest.mark.parametrize("stage", [1, 3])
def test_weights_go_by_name_into_a_model_of_other_heads(stage: int, tmp_path: Path) -> None:
    for rank, found in enumerate(run_ranks(transferred, 2, str(tmp_path), stage)):
        source = found.pop("source")
        for name, (strictly, half, said, texts, before, after) in found.items():
            assert "weights_only=True, strict=False" in strictly, name
            assert "add weights_only=True" in half
            loads = name in ("added", "replaced", "unfrozen")
            assert loads == (said == ""), (name, said)
            for key, value in after.items():
                assert torch.equal(value, source[key] if loads and key in source else before[key]), (name, key)
            assert bool(texts) == (rank == 0 and name in ("added", "replaced"))
        assert "exp_avg of body.weight" in found["unfrozen"][0]
        assert "load_checkpoint(..., weights_only=True);" in found["unfrozen"][0]
        assert "heads.a.weight: [2, 8] in the checkpoint, [4, 8] in the model" in found["of another shape"][2]
        assert "missing from the checkpoint: 0.bias, 0.weight" in found["strange"][2]
        if rank == 0:
            (text,) = found["replaced"][3]
            assert "missing from the checkpoint: heads.b.bias, heads.b.weight" in text
            assert "in the checkpoint but not in the model: heads.a.bias, heads.a.weight" in text


METRICS = [1.0, 0.9, 0.95, 0.97, 0.5, 0.6, 0.7]


def plateau(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.ReduceLROnPlateau:
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)


def by_engine(folder: str, stage: int) -> tuple[dict[str, Tensor], list[float]]:
    """With another engine from the third metric on."""
    rates = []
    for part in (range(3), range(3, len(METRICS))):
        model = Model(1, {"a": 2})
        optimizer = adamw(model)
        scheduler = plateau(optimizer)
        engine = megatron_ds.initialize(model, {"zero": {"stage": stage}}, optimizer, scheduler)
        if part.start:
            engine.load_checkpoint(folder)
        for number in part:
            step(engine, number)
            scheduler.step(METRICS[number])
            rates.append(engine.learning_rate)
        if not part.start:
            engine.save_checkpoint(folder)
        state = engine.state_dict()
        engine.close()
    return state, rates


def test_a_learning_rate_that_follows_a_metric(tmp_path: Path) -> None:
    model = Model(1, {"a": 2})
    optimizer = adamw(model)
    scheduler, rates = plateau(optimizer), []
    for number, metric in enumerate(METRICS):
        optimizer.zero_grad()
        model(samples(number)).backward()
        optimizer.step()
        scheduler.step(metric)
        rates.append(optimizer.param_groups[0]["lr"])
    assert len(set(rates)) > 3
    for stage in (0, 2):
        for state, found in run_ranks(by_engine, 2, str(tmp_path / str(stage)), stage):
            assert found == rates
            assert all((state[key] - value).abs().max() < 1e-9 for key, value in model.state_dict().items())
