"""Models of transformers and diffusers, unchanged, on the engine: each equals its own run on one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from hf_cases import MODELS, all_on_the_engine, made, plain
from safetensors.torch import load_file
from torch import Tensor

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


def test_adapters_in_a_model_of_diffusers_are_saved_as_their_average(tmp_path: Path) -> None:
    """diffusers writes what it has itself, whatever state it is given."""
    from diffusers import UNet2DConditionModel

    sizes = {"sample_size": 4, "in_channels": 1, "out_channels": 1, "block_out_channels": (8,), "norm_num_groups": 4}
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    shape = {"layers_per_block": 1, "cross_attention_dim": 4, "attention_head_dim": 4}
    model: Any = UNet2DConditionModel(**sizes, **blocks, **shape).requires_grad_(False)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    adapters = [p for p in model.double().parameters() if p.requires_grad]
    config = {"optimizer": {"ema_decay": 0.9}}
    engine = megatron_ds.initialize(model, config, torch.optim.SGD(adapters, lr=0.1))
    for _ in range(2):
        words = torch.ones(1, 3, 4, dtype=torch.float64)
        engine.backward(engine(torch.ones(1, 1, 4, 4, dtype=torch.float64), 1, words).sample.square().mean())
        engine.step()
    engine.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    average, weights = engine.state_dict(average=True), engine.state_dict()
    engine.close()
    assert saved.keys() == average.keys()
    assert all(torch.equal(value, average[name]) for name, value in saved.items())
    assert not all(torch.equal(value, weights[name]) for name, value in saved.items())


def with_added(folder: str) -> dict[str, Tensor]:
    """A hook adds to the state of rank 0 alone."""
    model = made("llama")
    if not dist.is_initialized() or dist.get_rank() == 0:
        model.register_state_dict_post_hook(lambda module, state, *_: state.update({"added": torch.arange(3)}))
    config = {"zero": {"stage": 3, "persistence_threshold": 0}}
    engine = megatron_ds.initialize(model, config, torch.optim.SGD(model.parameters()))
    engine.save_pretrained(folder)
    engine.close()
    return load_file(f"{folder}/model.safetensors")


def test_what_a_hook_adds_to_the_state_is_saved(tmp_path: Path) -> None:
    state = made("llama").state_dict() | {"added": torch.arange(3)}
    for found in [with_added(str(tmp_path / "1")), *run_ranks(with_added, 2, str(tmp_path / "2"))]:
        assert found.keys() == state.keys() and all(torch.equal(value, state[name]) for name, value in found.items())
