"""An engine's checkpoints: from any ranks, stage and offload to any other, as if nothing had happened between."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import Case, Ran, plain, samples
from engine_more import (
    go_on,
    kept_while_steps_fail,
    refusals,
    save_after_two,
    saved_and_continued,
    saved_within_a_step,
)
from test_engine_parity import differs
from torch import Tensor, nn

import megatron_ds
from megatron_ds.engine import buffer_sync
from megatron_ds.errors import CheckpointError
from megatron_ds.testing import run_ranks


def check(case: Case, ran: Ran) -> None:
    want = plain(case)
    assert ran.losses == pytest.approx(want.losses[2:], rel=1e-12)
    for name, parameter in want.parameters.items():
        assert differs(ran.parameters[name], parameter) < 1e-9, (case, name)
    for name, state in want.state.items():
        for kind, tensor in state.items():
            assert differs(ran.state[name][kind], tensor) < 1e-9, (case, name, kind)


def test_any_ranks_and_stage_to_any_other(tmp_path: Path) -> None:
    """NAdam has a number of its own a parameter, mu_product, and the scheduler a place."""
    swap = {"offload_optimizer": {"device": "nvme", "path": str(tmp_path)}}
    saved = Case("NAdam", 3, zero=swap)
    folder = str(tmp_path / "of-2")
    here = [Case("NAdam", 3, 3, zero=swap), Case("NAdam", 2), Case("NAdam", 0)]
    for results in run_ranks(saved_and_continued, 2, saved, here, folder):
        for case, ran in zip(here, results, strict=True):
            check(case, ran)
    for case in (Case("NAdam", 1, 3), Case("NAdam", 3)):
        check(case, go_on(case, folder))
    for ran in run_ranks(go_on, 3, Case("NAdam", 2), folder):
        check(Case("NAdam"), ran)
    save_after_two(Case("SGD", 0), str(tmp_path / "of-1"))
    for ran in run_ranks(go_on, 3, Case("SGD", 3), str(tmp_path / "of-1")):
        check(Case("SGD"), ran)


def test_a_checkpoint_within_a_step_is_of_its_beginning_and_the_step_goes_on(tmp_path: Path) -> None:
    cases = [Case("NAdam", stage, 3) for stage in (1, 3)]
    want = plain(cases[0])
    for of_rank in run_ranks(saved_within_a_step, 2, cases, str(tmp_path)):
        for case, (whole, resumed) in zip(cases, of_rank, strict=True):
            assert whole.losses == pytest.approx(want.losses, rel=1e-12)
            whole.losses = whole.losses[2:]
            check(case, whole)
            check(case, resumed)


def test_the_newest_good_checkpoint_is_kept_while_steps_are_skipped(tmp_path: Path) -> None:
    assert kept_while_steps_fail(str(tmp_path)) == [[1], [1, 2], [1, 3], [1, 4], [4, 5]]


def skipping_run(folder: Path, stops: bool) -> list[Any]:
    """Steps in fp16, some of which are skipped, each followed by a save; ``stops``: each is an engine's only one."""
    factors, found, engine = (1, 1, 1, math.nan, 1, 1, math.nan, math.nan, math.nan, 1, 1), list[Any](), None
    for step, factor in enumerate(factors):
        if engine is None or stops:
            torch.manual_seed(step)
            config = {
                "precision": {"dtype": "fp16", "initial_loss_scale": 2.0**10, "loss_scale_window": 2},
                "optimizer": {"lr": 1e-2, "schedule": "linear", "decay_steps": 9, "warmup_steps": 3},
                "cast_inputs": True,
            }
            engine = megatron_ds.initialize(
                nn.Linear(6, 4), config, loss=lambda call, x: call(x).float().square().mean()
            )
            if step:
                engine.load_checkpoint(folder)
            else:
                engine.set_parameter("weight", torch.ones(4, 6))
        result = engine.train_batch([samples(step).float() * factor])
        engine.save_checkpoint(folder, keep_last=2)
        kept = sorted(path.name for path in folder.glob("step-*"))
        found.append((str(result), engine.steps, engine.skipped, engine.learning_rate, kept))
        if stops:
            engine.close()
    return found


def test_a_run_that_skips_steps_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    """Loss scale, its counters, the place in the schedule, what was skipped and which checkpoint is proven."""
    want = skipping_run(tmp_path / "whole", False)
    assert skipping_run(tmp_path / "parts", True) == want
    scales = [float(text.partition("loss_scale=")[2].partition(",")[0]) for text, *_ in want]
    assert scales == [1024.0] * 2 + [2048.0] * 4 + [4096.0] * 2 + [2048.0] + [1024.0] * 2


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_is_refused(world_size: int, tmp_path: Path) -> None:
    for found in run_ranks(refusals, world_size, str(tmp_path)):
        assert "refused" in found["missing"]
        assert "client_state['a'][0]['b'] is a object, which JSON cannot hold" in found["client"]
        assert "optimizer state is of AdamW, this engine's optimizer is SGD" in found["class"]
        assert "has 1 parameter groups, this one" in found["groups"]


class Counted(nn.Module):
    """Keeps state of its own that is neither parameter nor buffer; a hook adds an entry to the state."""

    def __init__(self, in_tensor: bool) -> None:
        super().__init__()
        self.linear, self.in_tensor, self.count = nn.Linear(3, 3), in_tensor, 0
        self.register_state_dict_post_hook(lambda module, state, prefix, _: state.update({prefix + "made": (1, 2)}))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        hidden: Tensor = self.linear(x)
        return hidden * self.count

    def get_extra_state(self) -> Any:
        return torch.tensor([self.count]) if self.in_tensor else {"count": self.count, "seen": {self.count}}

    def set_extra_state(self, state: Any) -> None:
        self.count = int(state[0]) if self.in_tensor else state["count"]


@pytest.mark.parametrize("compiled", [False, True])
def test_extra_state_of_modules_is_saved_and_goes_on(compiled: bool, tmp_path: Path) -> None:
    def model(compiled: bool) -> nn.Module:
        inner = nn.Sequential(Counted(False), Counted(True))
        return nn.Sequential(torch.compile(inner, backend="eager") if compiled else inner)  # type: ignore[list-item]

    engine = megatron_ds.initialize(model(compiled))
    for _ in range(3):
        engine.module(torch.ones(1, 3))
    state = engine.state_dict()
    assert list(state) == list(engine.module.state_dict())
    model(compiled).load_state_dict({name: value for name, value in state.items() if not name.endswith("made")})
    engine.save_checkpoint(tmp_path)
    engine.close()
    again = megatron_ds.initialize(model(not compiled))
    again.load_checkpoint(tmp_path)
    assert [module.count for module in again.module.modules() if isinstance(module, Counted)] == [3, 3]
    again.close()
    bare = megatron_ds.initialize(nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))))
    with pytest.raises(CheckpointError, match=r"strict=False"):
        bare.load_checkpoint(tmp_path, weights_only=True)
    bare.close()


def test_a_tensor_is_saved_whatever_its_strides(tmp_path: Path) -> None:
    def model(*values: float) -> nn.Module:
        table, made = torch.tensor([values]), nn.Linear(2, 2)
        made.register_buffer("kept", table[:, 0])
        made.register_buffer("turned", (values[0] * torch.arange(6.0)).view(2, 3).t())
        made.register_parameter("still", nn.Parameter(table[:, 1], requires_grad=False))
        return made

    engine, again = (megatron_ds.initialize(model(*values)) for values in ((3.0, 5.0), (0.0, 0.0)))
    assert buffer_sync._same(engine.module.kept, torch.tensor([3.0]))  # type: ignore[arg-type]
    engine.save_checkpoint(tmp_path)
    again.load_checkpoint(tmp_path)
    assert again.module.kept.tolist() == [3.0] and again.module.still.tolist() == [5.0]  # type: ignore[operator]
    assert again.module.turned.tolist() == [[0, 9], [3, 12], [6, 15]]  # type: ignore[operator]
    engine.close()
    again.close()
