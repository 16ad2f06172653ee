"""The engine against one process of plain torch, in float64: losses, norms, gradients, parameters, optimizer state."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import OPTIMIZERS, Case, Ran, plain, run_all
from torch import Tensor

from megatron_ds.testing import run_ranks

STAGES = (0, 1, 2, 3)
CASES = [
    Case(optimizer, stage, accumulation, clip, batches=batches)
    for (stage, accumulation, clip), optimizer, batches in zip(
        product(STAGES, (1, 3), (0.0, 0.05)), ("AdamW", "SGD", "SGD", "AdamW") * 99, (False, False, True) * 99
    )
]
OFFLOADED = [
    Case("AdamW", 1, 3, zero={"offload_optimizer": {"device": "cpu"}}),
    Case("NAdam", 2, 1, 0.05, zero={"offload_optimizer": {"device": "cpu", "ratio": 0.5}}),
    Case("SGD", 3, 3, zero={"offload_optimizer": {"device": "nvme"}, "offload_parameters": {"device": "cpu"}}),
    Case("Adagrad", 3, 1, zero={"offload_optimizer": {"device": "nvme"}, "offload_parameters": {"device": "nvme"}}),
]
EVERY_OPTIMIZER = [Case(optimizer, accumulation=3, clip=0.5) for optimizer in OPTIMIZERS]


def on_disk(folder: Path) -> list[Case]:
    """The offloaded cases, with a place for their swap files."""

    def placed(zero: dict[str, Any]) -> dict[str, Any]:
        return {
            part: {**values, "path": str(folder)} if values["device"] == "nvme" else values
            for part, values in zero.items()
        }

    return [replace(case, zero=placed(case.zero)) for case in OFFLOADED]


@cache
def reference(optimizer: str, clip: float) -> Ran:
    return plain(Case(optimizer, clip=clip))


def differs(got: Tensor, want: Tensor) -> float:
    if not want.numel():
        return 0.0
    return ((got - want).abs() / want.abs().clamp(min=1.0)).max().item()


def check(case: Case, ran: Ran) -> None:
    want = reference(case.optimizer, case.clip)
    assert ran.losses == pytest.approx(want.losses, rel=1e-12), case
    assert ran.norms == pytest.approx(want.norms, rel=1e-12), case
    if not case.batches:
        assert ran.gradients.keys() == want.gradients.keys()
    for name, gradient in ran.gradients.items():
        assert differs(gradient, want.gradients[name]) < 1e-12, (case, name)
    assert ran.parameters.keys() == want.parameters.keys()
    for name, parameter in want.parameters.items():
        assert differs(ran.parameters[name], parameter) < 1e-9, (case, name)
    for name, state in want.state.items():
        for kind, tensor in state.items():
            assert differs(ran.state[name][kind], tensor) < 1e-9, (case, name, kind)


@pytest.mark.parametrize("world_size", [2, 3])
def test_equals_plain_torch(world_size: int, tmp_path: Path) -> None:
    cases = CASES if world_size == 3 else CASES + EVERY_OPTIMIZER + on_disk(tmp_path)
    for results in run_ranks(run_all, world_size, cases):
        for case, ran in zip(cases, results, strict=True):
            check(case, ran)


def test_equals_plain_torch_on_one_process(tmp_path: Path) -> None:
    cases = CASES + EVERY_OPTIMIZER + on_disk(tmp_path)
    for case, ran in zip(cases, run_all(cases), strict=True):
        check(case, ran)


def test_the_reference_moves() -> None:
    """Or everything above would hold of a model that does not learn."""
    for name in OPTIMIZERS:
        ran = reference(name, 0.5)
        assert len(set(ran.losses)) == len(ran.losses) and all(norm > 0 for norm in ran.norms)
        start = torch.zeros(()) if not ran.parameters else ran.parameters["scale"]
        assert start.item() != 1.0, name
