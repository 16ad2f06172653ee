"""DiT-XL/2 in `make bench-gpu`: training steps on latents of images of 256 x 256 pixels, in bf16."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gpu_steps
import torch
from diffusion import MODELS, batch_of
from gpu_clock import Bench, Row
from torch import Tensor

from megatron_ds.config import from_dict
from megatron_ds.config.diffusion import DiffusionRun
from megatron_ds.config.read import read_toml
from megatron_ds.kernels import registry
from megatron_ds.layers.modulation import modulated_norm
from megatron_ds.mesh import Mesh, MeshShape
from megatron_ds.models.dit_task import DiTTask
from megatron_ds.train.build import build

CONFIG = Path(__file__).parents[2] / "examples/configs/diffusion/dit-xl2-256.toml"
BATCH, MICRO_BATCH = 256, 64


@dataclass(frozen=True)
class Images:
    """A step's work."""

    tokens: int
    flops_per_token: float


def dit(bench: Bench) -> None:
    """As the paper trains it, moving average included; beside it one A100's published 0.84 steps of 256 images a second
    (fast-DiT, in bf16 with recomputation)."""
    for title, compiled in (("fused kernels", False), ("compiled blocks", True)):
        measure = partial(steps, bench, compiled and not bench.tiny)
        gpu_steps.model_row(bench, f"DiT-XL/2, micro-batches of {MICRO_BATCH}, {title}", measure)
    for shape in ((256, MICRO_BATCH, 1152), (4096, 2, 3072)):
        for implementation in ("triton", "reference")[not bench.cuda :]:
            bench.each(f"adaLN, {shape}, {implementation}", partial(adaln, bench, shape, implementation))


def adaln(bench: Bench, shape: tuple[int, int, int], implementation: str) -> Row:
    """A residual sum by a gate and its norm, ``[s, b, h]``; GB/s of streams that are read or written, each once."""
    s, b, h = (bench.size(side, 16) for side in shape)
    streams = [bench.normal(s, b, h).requires_grad_() for _ in range(2)]
    vectors = bench.normal(b, 3, h).requires_grad_()

    def forward() -> tuple[Tensor, Tensor]:
        shift, scale, gate = vectors.unbind(1)
        return modulated_norm(streams[0], shift, scale, 1e-6, streams[1], gate)

    grads = [bench.normal(s, b, h) for _ in range(2)]

    def both() -> None:
        torch.autograd.grad(forward(), [*streams, vectors], grads)

    with registry.use({"adaln": implementation}):
        first = bench.milliseconds(forward)
        second = bench.milliseconds(both) - first
    stream = 2 * s * b * h / 1e6
    return {
        "forward ms": first, "forward GB/s": 4 * stream / first,
        "backward ms": second, "backward GB/s": 6 * stream / max(second, 1e-9),
    }  # fmt: skip


def steps(bench: Bench, compiled: bool) -> Row:
    batch, size = (8, 4) if bench.tiny else (BATCH, MICRO_BATCH)
    settings: dict[str, Any] = read_toml(CONFIG)
    settings["output"], settings["compile"] = tempfile.gettempdir() + "/megatron-ds-benchmark", compiled
    settings["train"] |= {"global_batch": batch, "micro_batch": size}
    if bench.tiny:
        settings["model"] = MODELS["digits"]
    config = from_dict(DiffusionRun, settings, "benchmark")
    task = DiTTask(config)
    parts = build(config, Mesh.create(MeshShape(), torch.device(bench.device)), task)
    images = {name: value.to(bench.device) for name, value in batch_of(settings["model"], batch).items()}
    micro_batches = [{name: value[i : i + size] for name, value in images.items()} for i in range(0, batch, size)]
    work = Images(batch * task.tokens_per_sample, task.flops_per_token)
    row = gpu_steps.timed(bench, work, lambda: parts.step(micro_batches).loss)
    return row | {"steps/s": 1e3 / row["ms"], "images/s": 1e3 * batch / row["ms"]}
