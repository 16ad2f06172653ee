"""The engine on one GPU: against plain torch on the CPU in float64, and offload against none, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import Case, run_all
from test_engine_parity import check
from torch import Tensor, nn

import megatron_ds
from megatron_ds.testing import run_ranks

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PLACES = ("none", "cpu", "nvme")
WIDTH, LAYERS = 1024, 6


def offloaded(stage: int, place: str, folder: Path, **more: Any) -> dict[str, Any]:
    """Settings of ZeRO with all that the stage admits in ``place``."""
    offload = {"device": place, **({"path": str(folder)} if place == "nvme" else {}), **more}
    if place == "none":
        return {}
    return {"offload_optimizer": offload, **({"offload_parameters": offload} if stage == 3 else {})}


@pytest.mark.parametrize("place", PLACES)
def test_one_gpu_equals_plain_torch_on_a_cpu(place: str, tmp_path: Path) -> None:
    cases = [
        Case(optimizer, stage, accumulation, clip, zero=offloaded(stage, place, tmp_path))
        for (stage, accumulation, clip), optimizer in zip(product((1, 2, 3), (1, 3), (0.0, 0.05)), ("AdamW", "SGD") * 9)
    ]
    cases += [replace(case, stage=0) for case in cases[:2] if place == "none"]
    for case, ran in zip(cases, run_ranks(run_all, 1, cases)[0], strict=True):
        check(case, ran)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


def trained(dtype: str, settings: list[dict[str, Any]], lag: int) -> list[list[Tensor]]:
    """Parameters after four steps with each of the settings; before each forward, backward and update the device is
    given ``lag`` cycles of nothing, so that the host runs far ahead of it."""
    found = []
    for zero in settings:
        torch.manual_seed(0)
        net = nn.Sequential(*(Layer() for _ in range(LAYERS)))
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        config = {
            "accumulation": 2,
            "optimizer": {"clip_norm": 0.0},
            "precision": {"dtype": dtype},
            "zero": {"bucket_mb": 3.0, **zero},
        }
        engine = megatron_ds.initialize(net, config, optimizer)
        assert engine.mesh.device.type == "cuda"
        generator = torch.Generator("cuda").manual_seed(1)
        for _ in range(4):
            for _ in range(2):
                x = torch.randn(64, WIDTH, device="cuda", generator=generator).to(next(net.parameters()).dtype)
                torch.cuda._sleep(lag)
                loss = engine(x).float().square().mean()
                engine.backward(loss)
                torch.cuda._sleep(lag)
                engine.step()
        found.append([engine.get_parameter(name).cpu() for name, _ in engine.module.named_parameters()])
        engine.zero.close()
    return found


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_offload_changes_no_bit_however_far_the_device_is_behind(dtype: str, tmp_path: Path) -> None:
    settings: list[dict[str, Any]] = [{"stage": 2}]
    for stage in (2, 3):
        small = {"persistence_threshold": 0} if stage == 3 else {}
        settings += [{"stage": stage, **small, **offloaded(stage, place, tmp_path)} for place in ("cpu", "nvme")]
    settings.append({"stage": 2, **offloaded(2, "cpu", tmp_path, ratio=0.5, pin_memory=False)})
    settings.append({"stage": 3, **offloaded(3, "nvme", tmp_path, ratio=0.5, pin_memory=False), "prefetch": 2})
    settings.append({"stage": 3, **offloaded(3, "nvme", tmp_path), "host_memory_mb": 30})
    (results,) = run_ranks(trained, 1, dtype, settings, 4_000_000)
    for setting, parameters in zip(settings[1:], results[1:], strict=True):
        for number, (got, want) in enumerate(zip(parameters, results[0], strict=True)):
            assert torch.equal(got, want), f"{setting}: parameter {number}"
