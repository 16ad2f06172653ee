"""Hooks of a user's optimizer and what else of it torch would do itself, on the engine: the numbers of plain torch."""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_more import message
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import megatron_ds
from megatron_ds.errors import ConfigError
from megatron_ds.testing import run_ranks

STEPS = 3


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double()


def batch(step: int) -> Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def hooked(model: nn.Module, writes: bool, calls: list[str]) -> torch.optim.Optimizer:
    """A rate that a hook sets, and, with ``writes``, weights that one clips."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-1)

    def halve(of: Any, *_: Any) -> None:
        calls.append("before")
        of.param_groups[0]["lr"] /= 2

    def clip(of: Any, *_: Any) -> None:
        calls.append("after")
        for parameter in of.param_groups[0]["params"] if writes else ():
            parameter.data.clamp_(-0.2, 0.2)

    optimizer.register_step_pre_hook(halve)
    optimizer.register_step_post_hook(clip)
    return optimizer


def loss_of(call: Any, x: Tensor) -> Tensor:
    return call(x).square().mean()


def by_engine(stage: int, whole: bool) -> tuple[dict[str, Tensor], list[str]]:
    """``whole``: by ``train_batch()``. One step is skipped, for which torch has no hooks either."""
    model, calls = net(), list[str]()
    zero = {"stage": stage, "bucket_mb": 0.0005, **({"persistence_threshold": 0} if stage == 3 else {})}
    engine = megatron_ds.initialize(model, {"zero": zero}, hooked(model, stage < 3, calls), loss=loss_of)
    axis = engine.mesh.data
    for number in (0, 1, None, 2):
        x = batch(number or 0).chunk(axis.size)[axis.rank] * (float("nan") if number is None else 1.0)
        if whole:
            engine.train_batch([x])
        else:
            engine.backward(loss_of(engine, x))
            engine.step()
    state = engine.state_dict()
    engine.close()
    return state, calls


def all_by_engine() -> dict[tuple[int, bool], Any]:
    return {(stage, whole): by_engine(stage, whole) for stage, whole in zip(range(4), (False, True, True, False))}


def test_hooks_around_a_step_are_called_as_by_torch() -> None:
    want = {}
    for writes in (False, True):
        model, calls = net(), list[str]()
        optimizer = hooked(model, writes, calls)
        for step in range(STEPS):
            optimizer.zero_grad()
            loss_of(model, batch(step)).backward()
            optimizer.step()
        want[writes] = model.state_dict()
    for found in run_ranks(all_by_engine, 2):
        for case, (state, called) in found.items():
            assert called == calls, case
            assert all((state[key] - value).abs().max() < 1e-9 for key, value in want[case[0] < 3].items()), case


def test_a_hook_finds_no_gradient_and_one_of_all_optimizers_is_called_once() -> None:
    model, said, seen = net(), [], []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer.register_step_pre_hook(lambda *_: said.append(message(nn.utils.clip_grad_norm_, model.parameters(), 1.0)))
    handle = register_optimizer_step_post_hook(lambda of, *_: seen.append(of))
    try:
        engine = megatron_ds.initialize(model, {}, optimizer, loss=loss_of)
        engine.train_batch([batch(0)])
    finally:
        handle.remove()
    assert "optimizer.clip_norm in the configuration" in said[0] and model[0].weight.grad is None  # type: ignore[index]
    assert seen == [optimizer]
    engine.close()


def test_the_state_is_not_left_to_torch() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    engine = megatron_ds.initialize(model, {}, optimizer)
    assert "engine.save_checkpoint() writes it" in message(optimizer.state_dict)
    assert "call it before initialize()" in message(optimizer.load_state_dict, {})
    weight, held = model[0].weight, optimizer.state  # type: ignore[index]
    for touch in (held.__getitem__, held.setdefault, lambda key: held.__setitem__(key, {}), lambda _: held.clear()):
        assert "engine.get_optimizer_state(name, kind) gives one whole tensor" in message(touch, weight)
    assert weight not in copy.copy(optimizer).state
    optimizer.state = defaultdict(dict)  # as a loop does that begins anew without momentum
    assert "to train on without it, call engine.close() and" in message(engine.train_batch, [batch(0)])
    optimizer.state = held
    engine.close()
    assert optimizer.state == {} and optimizer.state[weight] == {}
    optimizer.load_state_dict(optimizer.state_dict())
    model = net()
    without = torch.optim.SGD(model.parameters(), lr=0.25)
    engine = megatron_ds.initialize(model, {}, without)
    assert without.state_dict()["param_groups"][0]["lr"] == 0.25
    engine.close()


@pytest.mark.parametrize("wrap", [lambda step: step, lambda step: torch.compile(step, backend="eager")])
def test_a_step_of_the_object_alone_is_refused(wrap: Callable[[Any], Any]) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.step = wrap(optimizer.step)  # type: ignore[method-assign]
    megatron_ds.initialize(model, {}, optimizer).close()
    optimizer.step = wrap(lambda closure=None: None)  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match=re.escape("its step() is one that this object alone has")):
        megatron_ds.initialize(model, {}, optimizer)
