"""Loops that look, copy and average on their way; and what cannot be as in plain torch, and says so."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from engine_more import message
from test_engine_setups import Setup, adamw, made, samples
from torch import Tensor, nn

import megatron_ds
from megatron_ds.config.engine import EngineLogConfig
from megatron_ds.engine.clock import Clock
from megatron_ds.engine.model_check import check_model
from megatron_ds.mesh import Mesh
from megatron_ds.testing import run_ranks
from megatron_ds.train.step import StepResult


@dataclass
class Calls:
    """What the loop below calls: plain torch's, or an engine's."""

    forward: Callable[..., Tensor]
    backward: Callable[[Tensor], object]
    step: Callable[[], object]
    state: Callable[[], dict[str, Tensor]]
    whole: Callable[[], contextlib.AbstractContextManager[object]]


def looking_loop(model: nn.Module, calls: Calls, cut: Callable[[Tensor], Tensor], alone: bool) -> dict[str, Tensor]:
    """Two micro-batches a step; between them an evaluation and a ``state_dict()``; an average and a copy after it.

    ``alone``: only this rank evaluates the average.
    """
    found: dict[str, Tensor] = {}
    with calls.whole():
        average, target = torch.optim.swa_utils.AveragedModel(model), copy.deepcopy(model).requires_grad_(False)
    for step in range(3):
        for part in range(2):
            x = cut(samples(10 * step + part))
            with torch.no_grad():
                wanted = target(x)
            calls.backward((calls.forward(x) - wanted - 1).square().mean())
            model.eval()
            with torch.no_grad():
                found[f"loss {step}.{part}"] = calls.forward(samples(99)).square().mean()
            model.train()
            found |= {f"{step}.{part} {name}": value.clone() for name, value in calls.state().items()}
        calls.step()
        with calls.whole():
            average.update_parameters(model)
            target.load_state_dict(model.state_dict())
            found[f"{step} numpy"] = torch.tensor([p.detach().cpu().numpy().sum() for p in model.parameters()])
        if alone:
            with torch.no_grad():
                average(samples(98))
    return found | {f"average {name}": value.detach() for name, value in average.state_dict().items()}


def looking_by_engine(stage: int) -> dict[str, Tensor]:
    model = made(Setup())
    zero = {"stage": stage, "bucket_mb": 0.0005, **({"persistence_threshold": 0} if stage == 3 else {})}
    engine = megatron_ds.initialize(model, {"zero": zero, "accumulation": 2}, adamw(model))
    axis = engine.mesh.data
    calls = Calls(engine, engine.backward, engine.step, engine.state_dict, engine.gathered)
    found = looking_loop(model, calls, lambda x: x.chunk(axis.size)[axis.rank], axis.is_first)
    engine.close()
    return found


def looking_by_engines() -> list[dict[str, Tensor]]:
    return [looking_by_engine(stage) for stage in (0, 1, 2, 3)]


def plain_looking() -> dict[str, Tensor]:
    model = made(Setup())
    optimizer = adamw(model)

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    calls = Calls(model, lambda loss: (loss / 2).backward(), step, model.state_dict, contextlib.nullcontext)
    return looking_loop(model, calls, lambda x: x, True)


@pytest.mark.parametrize("apart", [False, True])
def test_a_loop_that_looks_and_copies_on_its_way_equals_plain_torch(apart: bool) -> None:
    want = plain_looking()
    for rows in run_ranks(looking_by_engines, 2, apart=apart):
        for stage, found in enumerate(rows):
            assert found.keys() == want.keys()
            for key, value in want.items():
                assert (found[key].double() - value.double()).abs().max() < 1e-9, (stage, key)


# --- what cannot be as in plain torch


def tied_by_data() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight.data = model[0].weight.data  # type: ignore[union-attr, assignment]
    return model


def shown_in_a_buffer() -> nn.Module:
    model = nn.Linear(3, 3)
    model.register_buffer("first_row", model.weight.detach()[0])
    return model


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (tied_by_data, "0.weight and 1.weight are two tensors in one memory.*tie parameters by a.weight = b.weight"),
        (shown_in_a_buffer, "weight and first_row are two|first_row and weight are two"),
        (lambda: nn.Embedding(3, 2, sparse=True), "gives a sparse gradient.*make it with sparse=False"),
        (lambda: nn.LazyLinear(2), "weight has no shape yet; call the model once"),
    ],
)
def test_what_would_come_apart_is_refused(make: Callable[[], nn.Module], said: str) -> None:
    assert re.search(said, message(megatron_ds.initialize, make()))


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
def test_torchscript_is_refused_where_its_parameters_come_and_go() -> None:
    traced = nn.Sequential(nn.Linear(3, 3), torch.jit.trace(nn.Linear(3, 3), torch.ones(1, 3)))
    check_model(traced)
    assert "1 is TorchScript" in message(check_model, traced, gathers=True)


def test_what_is_the_engines_is_not_left_to_torch(tmp_path: Path) -> None:
    model = nn.Linear(3, 1)
    optimizer = adamw(model)
    engine = megatron_ds.initialize(model, {}, optimizer)
    engine.backward(engine(torch.ones(2, 3)).sum())
    assert "engine.step()" in message(optimizer.step)
    engine.step()
    assert "save engine.state_dict()" in message(torch.save, model, tmp_path / "model.pt")
    engine.close()
    torch.save(model, tmp_path / "model.pt")


def test_the_line_of_a_few_steps_has_their_means(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    clock, quiet = (Clock(EngineLogConfig(every=n, breakdown=n > 0), Mesh.single(), 32) for n in (2, 0))
    for step in range(1, 5):
        for part, seconds in (("forward", 0.5), ("backward", float(step)), ("forward", 0.25)):
            with clock.timing(part), quiet.timing(part):
                now[0] += seconds
        now[0] += 0.25
        for each in (clock, quiet):
            each.finished(step, StepResult(step / 2, 3.0, 1e-3, 4, 64.0 if step > 2 else 1.0, step == 4, False))
    assert capsys.readouterr().out.splitlines() == [
        "step 2: loss 1.0000, learning rate 0.001, gradient norm 3, 2.500 s a step, 12.8 samples/s, "
        "forward 0.750 s, backward 1.500 s",
        "step 4: loss 2.0000, learning rate 0.001, gradient norm 3, 4.500 s a step, loss scale 64, skipped, "
        "7.1 samples/s, forward 0.750 s, backward 3.500 s",
    ]
