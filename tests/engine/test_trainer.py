"""Hugging Face's Trainer and Accelerate on the engine: the numbers of their own runs on one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_cases import accelerated, plain_loop, trained, trainings

from megatron_ds.testing import run_ranks


def check(got: Any, want: Any, tolerance: float = 3e-5) -> None:
    """In fp32. Adam turns rounding of a tiny gradient into a step of its learning rate; so parameters as a whole."""
    (logs, state), (wanted_logs, wanted) = got, want
    assert len(logs) == len(wanted_logs)
    for a, b in zip(logs, wanted_logs):
        assert a == pytest.approx(b, rel=1e-3 if isinstance(a, tuple) else 1e-4)
    assert state.keys() == wanted.keys()
    error = sum((state[name].double() - value.double()).square().sum() for name, value in wanted.items())
    size = sum(value.double().square().sum() for value in wanted.values())
    assert (error / size).sqrt() < tolerance


def test_the_trainer_is_the_trainer(tmp_path: Path) -> None:
    """One changed import; the configurations of both kinds, on 1 and 2 ranks, and a run that is taken up again."""
    want = trained(str(tmp_path / "plain"), None, 4, ours=False)
    for world_size in (1, 2):
        folder = tmp_path / str(world_size)
        one = world_size == 1
        for results in [trainings(str(folder), False)] if one else run_ranks(trainings, 2, str(folder), True):
            for name in ("deepspeed", "ours"):
                check(results[name], want)
            if world_size == 2:
                resumed_logs, resumed = results["resumed"]
                assert len(resumed_logs) == 4  # the state of the Trainer came back too
                check((resumed_logs, resumed), want)
            other, _ = results["optimizer and scheduler"]
            assert other[0] == pytest.approx(want[0][0], rel=1e-4) and other[2] != pytest.approx(want[0][2], rel=1e-4)
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "2" / "b" / "final")
    assert all(torch.equal(value, results["ours"][1][name]) for name, value in loaded.state_dict().items())
    assert not (tmp_path / "2" / "a" / "final" / "training_args.bin").exists()


def test_an_accelerate_loop(tmp_path: Path) -> None:
    want = plain_loop()
    for world_size in (1, 2):
        one = world_size == 1
        for results in [accelerated(str(tmp_path))] if one else run_ranks(accelerated, 2, str(tmp_path)):
            check(results, want)
