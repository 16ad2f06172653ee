"""The bytes that the dry run prints are those that engines hold; what autograd keeps is counted as it is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sdxl_tiny import tiny_unet

import megatron_ds
from megatron_ds.config.engine import EngineConfig
from megatron_ds.engine.model_layout import layout_of
from megatron_ds.integrations.sdxl import gpu_memory
from megatron_ds.integrations.sdxl.gpu_memory import activation_bytes, memory_table, saved_bytes
from megatron_ds.integrations.sdxl.model_folders import prepare_unet

CONFIG = Path(__file__).parents[2] / "examples" / "configs" / "diffusion" / "sdxl-unet.json"
PUBLISHED = 2_567_463_684


def settings(stage: int, average: bool) -> EngineConfig:
    values: dict[str, Any] = {"precision": {"dtype": "bf16"}, "zero": {"stage": stage, "bucket_mb": 0.3}}
    return EngineConfig.model_validate({**values, "optimizer": {"ema_decay": 0.9 * average}})


@pytest.mark.parametrize("rank", [None, 2])
def test_the_layout_is_that_of_an_engine(rank: int | None) -> None:
    """In bf16, all of it and LoRA adapters; on several ranks test_sdxl_parity.py compares the two."""
    config = EngineConfig.model_validate(
        {"precision": {"dtype": "bf16"}, "zero": {"stage": 2, "bucket_mb": 0.3}, "optimizer": {"ema_decay": 0.9}}
    )
    engine = megatron_ds.initialize(unet := prepare_unet(tiny_unet(), rank, False), config)
    held = engine.bytes_report()
    engine.close()
    assert layout_of(unet, config, 1).bytes().by_kind == held
    assert layout_of(prepare_unet(tiny_unet(), rank, False), config, 1).bytes().by_kind == held, "in fp32 so far"


def test_what_autograd_keeps_is_counted() -> None:
    """Of a layer whose arithmetic is known, with a part that is computed again."""

    class Block(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.exp().exp()  # keeps both results

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.scale, self.again = Block(), torch.nn.Parameter(torch.ones(1)), None

        def enable_gradient_checkpointing(self, function: Any) -> None:
            self.again = function

        def disable_gradient_checkpointing(self) -> None:
            self.again = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x * self.scale  # keeps x
            return (self.again(self.block, y) if self.again else self.block(y)) * self.scale  # keeps the last result

    x = torch.zeros(100, device="meta", dtype=torch.float64)
    assert saved_bytes(Model().to("meta"), lambda: None, False) == (0, 0)
    model = Model().double().to("meta")
    assert saved_bytes(model, lambda: model(x), False) == (3 * 800, 0)
    assert saved_bytes(model, lambda: model(x), True) == (3 * 800, 2 * 800)  # x, y and the last; inside it two


def test_the_full_unet_is_built_without_memory_and_its_table_says_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import UNet2DConditionModel

    monkeypatch.setattr(gpu_memory, "GPUS", (1, 2, 3))  # of the 8, each of which takes half a second
    with torch.device("meta"):
        unet = torch.nn.Module.to(UNet2DConditionModel.from_config(json.loads(CONFIG.read_text())), torch.bfloat16)
    whole, again = (activation_bytes(unet, 1, 1024, checkpointing) for checkpointing in (False, True))
    assert whole > 5 * again
    shown = memory_table(unet, {"precision": {"dtype": "bf16"}}, again, "one image").splitlines()
    assert f"{PUBLISHED:,} parameters" in shown[0]
    exact = {line[:28].strip(): line[28:].split() for line in shown if "GPU" in line and line.count(",") >= 8}
    assert len(exact) == 2 * 3
    # bf16 weights whole; gradients, masters, two moments and the average shared out; padding of less than 0.01%.
    for ranks in gpu_memory.GPUS:
        size = int(exact[f"{ranks} GPU{'s' * (ranks > 1)} with --use_ema"][2].replace(",", ""))
        assert 0 <= size - (2 + 20 / ranks) * PUBLISHED < 1e-4 * size
    fits = [line for line in shown if line.startswith("ZeRO-2 ") and "from" in line]
    assert fits and fits[0].split()[1:] == ["from", "3", "GPUs", "from", "2", "GPUs", "from", "1", "GPU"]


def test_activations_grow_with_the_images() -> None:
    unet = tiny_unet().to("meta")
    for checkpointing in (False, True):
        one, two = (activation_bytes(unet, batch, 64, checkpointing) for batch in (1, 2))
        assert 1.8 * one < two <= 2 * one, checkpointing
