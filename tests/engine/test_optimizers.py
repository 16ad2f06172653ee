"""Optimizers with habits of their own are those of plain torch on one process, or refused by name with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from optimizer_cases import (
    RIGHT,
    Bounded,
    Clipping,
    Coding,
    Counting,
    Distance,
    Failing,
    FirstRate,
    KeyInState,
    Late,
    LayerWise,
    OfImages,
    ScheduleFree,
    Shared,
    Small,
    Warming,
    Wrapping,
    groups,
    later,
    model,
    plain,
    run_all,
)

import megatron_ds
from megatron_ds.errors import ConfigError, EngineError
from megatron_ds.testing import run_ranks


@pytest.mark.parametrize(("world_size", "resumed"), [(1, 0), (1, 1), (3, 0)])
def test_numbers_that_an_optimizer_keeps_in_its_groups(world_size: int, resumed: int, tmp_path: Path) -> None:
    """Steps that it counts itself, averages, modes: kept from step to step, on every rank alike, and in checkpoints.

    On three ranks at every stage; half of the optimizers and stages there is resumed, the others go through."""
    stages = [1] if world_size == 1 else [0, 1, 2, 3]
    check(run_ranks(run_all, world_size, list(RIGHT), stages, str(tmp_path), None, resumed))


def test_state_that_is_offloaded_follows(tmp_path: Path) -> None:
    """Its tensors are in other memory at every step, and an optimizer may have put its own in their place."""
    zero = {"offload_optimizer": {"device": "nvme", "path": str(tmp_path / "swap")}}
    check(run_ranks(run_all, 2, ["Counting", "ScheduleFree", "LayerWise"], [3], str(tmp_path), zero))


def check(ranks: list[Any]) -> None:
    for name, make in RIGHT.items():
        want = plain(make)
        for found in ranks:
            for (of, stage), (looked, end, settings) in found.items():
                for got, right in ((looked, want[0]), (end, want[1])) if of == name else ():
                    for parameter, value in right.items():
                        assert torch.allclose(got[parameter], value, rtol=1e-11, atol=1e-12), (name, stage, parameter)
                assert settings == ranks[0][of, stage][2], (of, stage)


def test_what_the_optimizer_writes_is_in_the_users_groups() -> None:
    net = model()
    optimizer = Counting([{"params": list(net.parameters())[:2]}, {"params": list(net.parameters())[2:]}])
    engine = megatron_ds.initialize(net, None, optimizer, loss=lambda net, batch: net(batch).square().mean())
    for _ in range(3):
        engine.train_batch([torch.ones(2, 6, dtype=torch.float64)])
    assert [group["step"] for group in optimizer.param_groups] == [3, 3]
    assert all(group["limit"] == float("inf") and group["betas"] == (0.9, 0.99) for group in optimizer.param_groups)
    engine.close()


def test_a_step_out_of_train_mode_is_the_optimizers_own_error() -> None:
    net = model()
    optimizer = ScheduleFree(net.parameters())
    engine = megatron_ds.initialize(net, None, optimizer, loss=lambda net, batch: net(batch).square().mean())
    with pytest.raises(RuntimeError, match="not in train mode"):
        engine.train_batch([torch.ones(2, 6, dtype=torch.float64)])
    engine.close()


def test_a_mode_is_said_before_each_micro_batch() -> None:
    """As transformers' Trainer does; another one within a step is refused."""
    net, other = model(), model()
    optimizer, plain_optimizer = ScheduleFree(net.parameters()), ScheduleFree(other.parameters())
    engine = megatron_ds.initialize(net, {"accumulation": 2}, optimizer)
    for batch in torch.randn(6, 2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2)):
        for of in (optimizer, plain_optimizer):
            of.train()
        engine.backward(engine(batch).square().mean())
        (other(batch).square().mean() / 2).backward()
        if engine.is_boundary:
            plain_optimizer.step()
            plain_optimizer.zero_grad()
        else:
            with pytest.raises(EngineError, match="after 1 of a step's micro-batches"):
                optimizer.eval()
        engine.step()
    for of in (optimizer, plain_optimizer):
        of.eval()
    for name, value in other.named_parameters():
        torch.testing.assert_close(engine.get_parameter(name), value, rtol=0, atol=1e-12)
    engine.close()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Distance, r"depends on the others that are updated with it \(group 0 'd': "),
        (Clipping, "depends on the others that are updated with it; use an elementwise one"),
        (Shared, "depends on the others that are updated with it; use"),
        (
            Failing,
            "on 1-D tensors and their gradients alone (ValueError: not today), nor on whole parameters",
        ),
        (torch.optim.Adafactor, "it keeps 'row_var', float64 of shape [6, 1], for a parameter that is "),
        (Small, "it keeps 'state1', uint8 of shape [16384], for a parameter that is float64 of shape [16384]"),
        (Coding, "it keeps 'code', a Coded, of each parameter"),
        (Wrapping, "it wraps another optimizer, inner"),
        (Late, "it keeps before only from a later step on"),
        (Warming, "it keeps numbers in its attribute warmup, a Count"),
    ],
)
def test_what_cannot_be_right_on_shards_is_refused(make: Any, reason: str) -> None:
    net = torch.nn.Linear(128, 200).double()
    with pytest.raises(ConfigError) as refused:
        megatron_ds.initialize(net, None, make(net.parameters(), lr=0.1))
    assert f"{make.__name__} cannot update sharded parameters" in str(refused.value)
    assert reason.replace("\\", "") in str(refused.value)


def test_state_of_another_shape_that_is_there_already_is_refused() -> None:
    net = torch.nn.Linear(6, 4).double()
    optimizer = torch.optim.Adafactor(net.parameters())
    net(torch.ones(2, 6, dtype=torch.float64)).sum().backward()
    optimizer.step()
    with pytest.raises(ConfigError, match=r"it keeps 'row_var', float64 of shape \[4, 1\], for a parameter that is"):
        megatron_ds.initialize(net, None, optimizer)


def test_a_group_without_state_takes_none_of_another_groups() -> None:
    net = model()
    first, *others = net.parameters()
    optimizer = torch.optim.SGD([{"params": [first]}, {"params": others, "momentum": 0.9}], lr=0.1)
    net(torch.ones(2, 6, dtype=torch.float64)).sum().backward()
    optimizer.step()
    engine = megatron_ds.initialize(net, None, optimizer)
    assert engine.rule is not None
    assert [template.kinds for template in engine.rule.templates] == [[], ["momentum_buffer"]]
    engine.close()


@pytest.mark.parametrize("make", [FirstRate, Bounded])
def test_a_group_that_is_not_updated_for_itself_is_refused(make: Any) -> None:
    net = model()
    with pytest.raises(ConfigError, match=r"its update of group 1 depends on the groups beside it.*give it one group"):
        megatron_ds.initialize(net, None, make(groups(net), lr=0.1))
    megatron_ds.initialize(net, None, make(net.parameters(), lr=0.1)).close()


def test_an_update_of_whole_convolutions_is_found() -> None:
    for net, whole in ((torch.nn.Conv2d(2, 3, 2).double(), True), (torch.nn.Linear(2, 3).double(), False)):
        engine = megatron_ds.initialize(net, None, OfImages(net.parameters(), lr=0.1))
        assert engine.rule is not None and [template.whole for template in engine.rule.templates] == [whole]
        engine.close()


def test_a_group_without_a_rate() -> None:
    net = model()
    optimizer = KeyInState([{"params": net.parameters()}])
    optimizer.param_groups[0]["lr"] = None
    engine = megatron_ds.initialize(net, None, optimizer, loss=lambda net, batch: net(batch).square().mean())
    engine.train_batch([torch.ones(2, 6, dtype=torch.float64)])
    engine.close()
    with pytest.raises(ConfigError, match="has no 'lr' that a schedule could set"):
        megatron_ds.initialize(net, None, optimizer, lambda step: 0.1)


def test_whole_matrices_that_are_complex_are_refused() -> None:
    net = torch.nn.Linear(4, 4, dtype=torch.complex128)
    with pytest.raises(ConfigError, match=r"weight is complex, and LayerWise updates whole parameters, which are real"):
        megatron_ds.initialize(net, None, LayerWise(net.parameters()))


def test_a_setting_of_another_kind_than_in_the_checkpoint_is_named(tmp_path: Path) -> None:
    for dtype in (torch.float64, torch.float32):
        net = model()
        optimizer = Counting(net.parameters())
        optimizer.param_groups[0]["computes_in"] = dtype
        engine = megatron_ds.initialize(net, None, optimizer)
        if dtype == torch.float64:
            engine.save_checkpoint(tmp_path)
        else:
            with pytest.raises(ConfigError, match=r"has computes_in=torch.float64, this one torch.float32"):
                engine.load_checkpoint(tmp_path)
        engine.close()


def test_numbers_that_come_apart_later_are_an_error() -> None:
    found = later()
    assert "LaterDistance came to other numbers for some parameters than for others (group 0 'd': " in found
