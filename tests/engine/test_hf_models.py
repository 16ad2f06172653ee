"""Models of transformers and diffusers, unchanged, on the engine: each equals its own run on one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_cases import MODELS, all_on_the_engine, plain

import megatron_ds
from megatron_ds.testing import run_ranks

STAGES = [1, 3]


def check(results: dict[tuple[str, int], Any]) -> None:
    for name in MODELS:
        losses, parameters = plain(name)
        for stage in STAGES:
            got, state, (evaluated, again) = results[name, stage]
            assert got == pytest.approx(losses, rel=1e-9), (name, stage)
            assert state.keys() == parameters.keys()
            for key, value in parameters.items():
                error = (state[key] - value).abs().max().item()
                assert error < 1e-9, (name, stage, key, error)
            assert evaluated == pytest.approx(again, rel=1e-6), (name, stage)


@pytest.mark.parametrize("world_size", [1, 2])
def test_each_equals_its_own_run_on_one_process(world_size: int, tmp_path: Path) -> None:
    one = world_size == 1
    arguments = (STAGES, str(tmp_path))
    for results in [all_on_the_engine(*arguments)] if one else run_ranks(all_on_the_engine, world_size, *arguments):
        check(results)
    assert torch.get_default_dtype() is torch.float32


def test_a_folder_of_master_weights_says_their_dtype(tmp_path: Path) -> None:
    """Also where the library writes it, which looks at the model."""
    for name in ("llama", "mixtral"):
        model = MODELS[name]()
        engine = megatron_ds.initialize(model, {"precision": {"dtype": "bf16"}}, torch.optim.SGD(model.parameters()))
        engine.save_pretrained(tmp_path / name, masters=True)
        engine.close()
        assert {p.dtype for p in type(model).from_pretrained(tmp_path / name).parameters()} == {torch.float32}  # type: ignore[attr-defined]
