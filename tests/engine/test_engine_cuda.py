"""The engine on one GPU: against plain torch on the CPU in float64, and offload against none, bit for bit."""

from __future__ import annotations

import warnings
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import Awkward, Case, Ran, look, run_all, take_step
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
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


def trained(
    dtype: str, settings: list[dict[str, Any]], lag: int, width: int = WIDTH, layers: int = LAYERS
) -> list[list[Tensor]]:
    """Parameters after four steps with each of the settings; before each forward, backward and update the device is
    given ``lag`` cycles of nothing, so that the host runs far ahead of it."""
    found = []
    for zero in settings:
        torch.manual_seed(0)
        net = nn.Sequential(*(Layer(width) for _ in range(layers)))
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
                x = torch.randn(64, width, device="cuda", generator=generator).to(next(net.parameters()).dtype)
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


def test_offload_of_large_regions_changes_no_bit(tmp_path: Path) -> None:
    """State of 800 MB a bucket: copies that are still under way when the next step's backward pass runs."""
    settings = [{"stage": 1, **offloaded(1, place, tmp_path)} for place in PLACES]
    (results,) = run_ranks(trained, 1, "bf16", settings, 0, 8192, 3)
    for setting, parameters in zip(settings[1:], results[1:], strict=True):
        for number, (got, want) in enumerate(zip(parameters, results[0], strict=True)):
            assert torch.equal(got, want), f"{setting}: parameter {number}"


def waits(settings: list[dict[str, Any]], own_optimizer: bool) -> list[list[str]]:
    """Where the host waited for the device in one step after two others, for each of the settings."""
    found = []
    for zero in settings:
        torch.manual_seed(0)
        net = nn.Sequential(*(Layer() for _ in range(3)))
        optimizer = None if own_optimizer else torch.optim.AdamW(net.parameters(), lr=1e-3)
        config = {
            "accumulation": 2,
            "precision": {"dtype": "bf16"},
            "optimizer": {"clip_norm": 1e-3},
            "zero": {"bucket_mb": 3.0, **zero},
        }
        engine = megatron_ds.initialize(net, config, optimizer)
        inputs = torch.randn(64, WIDTH, device="cuda", dtype=torch.bfloat16)
        for step in range(3):
            torch.cuda.synchronize()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                if step == 2:
                    torch.cuda.set_sync_debug_mode("warn")
                try:
                    for _ in range(2):
                        engine.backward(engine(inputs).float().square().mean())
                        engine.step()
                finally:
                    torch.cuda.set_sync_debug_mode("default")
        found.append([f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchronizing" in str(w.message)])
        engine.zero.close()
    return found


@pytest.mark.parametrize("own_optimizer", [True, False], ids=["own", "torch"])
def test_the_host_waits_for_the_norm_and_for_nothing_else(own_optimizer: bool, tmp_path: Path) -> None:
    settings: list[dict[str, Any]] = [{"stage": 1}]
    settings += [{"stage": stage, **offloaded(stage, place, tmp_path)} for stage in (2, 3) for place in ("cpu", "nvme")]
    (found,) = run_ranks(waits, 1, settings, own_optimizer)
    for setting, places in zip(settings, found, strict=True):
        assert len(places) == 1 and places[0].startswith("step.py"), f"{setting}: {places}"


def saved_and_loaded(folder: Path, devices: list[str]) -> list[Ran]:
    """Train on the first device, then hand the checkpoint from one to the next: what each of them holds."""
    found = []
    for number, device in enumerate(devices):
        place = ("none", "cpu", "nvme")[number % 3]
        case = Case(stage=3, zero={**offloaded(3, place, folder)})
        net, ran = Awkward().double(), Ran()
        optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2, amsgrad=True)
        engine = megatron_ds.initialize(net, {**case.config, "device": device}, optimizer)
        assert engine.mesh.device.type == device
        if number == 0:
            take_step(engine, 0, ran)
        else:
            engine.load_checkpoint(folder / str(number - 1))
        engine.save_checkpoint(folder / str(number))
        look(engine, ran)
        found.append(ran)
        engine.zero.close()
    return found


def check_the_same_bits(runs: list[Ran]) -> None:
    for ran in runs[1:]:
        for name, parameter in runs[0].parameters.items():
            assert torch.equal(ran.parameters[name], parameter), name
        for name, state in runs[0].state.items():
            assert state.keys() == ran.state[name].keys() and len(state) == 3
            for kind, tensor in state.items():
                assert torch.equal(ran.state[name][kind], tensor), (name, kind)


def test_a_checkpoint_goes_from_gpu_to_cpu_and_back(tmp_path: Path) -> None:
    (runs,) = run_ranks(saved_and_loaded, 1, tmp_path, ["cuda", "cpu", "cuda", "cuda"])
    check_the_same_bits(runs)
