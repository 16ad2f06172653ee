"""Rows of the parity matrix for a diffusion transformer: meshes crossed with the settings that act on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch.distributed as dist
from parity_rows import STEPS, UNUSED_STEPS, Mesh3, reference_config
from parity_run import Outcome, first_steps, train_task
from torch import Tensor

from megatron_ds.config import from_dict, validate
from megatron_ds.config.diffusion import DiffusionRun
from megatron_ds.data.samples import Batch
from megatron_ds.mesh import Mesh
from megatron_ds.models.dit_task import DiTTask
from megatron_ds.testing import device_of_rank


@dataclass(frozen=True)
class DiTRow:
    """One run: every second sample in seven counts nothing."""

    mesh: Mesh3  # tp, pp, dp
    sequence_parallel: bool = True
    zero: int = 1
    recompute: str = "none"
    accumulation: int = 2
    micro_batch: int = 2
    ema: bool = True
    optimizer: str = "adamw"
    objective: tuple[str, str] = ("epsilon", "linear")
    min_snr: bool = False
    chunks: int = 1
    buckets: bool = False  # images of half the width between others: one a micro-batch
    fp8: str = "none"
    model: tuple[str, ...] = ()  # text, qk_norm, rope, swiglu, variance, sparse

    def __str__(self) -> str:
        values = [self.recompute, self.optimizer, *self.objective, f"zero{self.zero}"]
        values += [f"{self.accumulation}x{self.micro_batch}", *self.model]
        values += [self.fp8] if self.fp8 != "none" else []
        flags = [name for name in ("sequence_parallel", "ema", "min_snr", "buckets") if getattr(self, name)]
        return "tp{}-pp{}-dp{}-".format(*self.mesh) + "-".join(values + flags)


TEXT = MappingProxyType({"text_size": 10, "pooled_size": 6})
SPARSE = MappingProxyType({"mode": "bslongformer", "block": 16, "num_sliding_window_blocks": 1})
ALL = ("qk_norm", "rope", "swiglu")
ROWS = [
    DiTRow((2, 2, 2)),
    DiTRow((2, 2, 2), False, 2, "full", ema=False, optimizer="sgd", objective=("v", "cosine"), min_snr=True),
    DiTRow((2, 2, 2), True, 2, "none", accumulation=1, model=("variance",)),
    DiTRow((2, 2, 2), True, 3, "selective", objective=("flow", "flow"), chunks=2),
    DiTRow((4, 2, 1), True, 0, "every_n", 4, 1, objective=("x0", "scaled_linear"), min_snr=True),
    DiTRow((4, 2, 1), False, 0, "selective", 1, 2, optimizer="sgd"),
    DiTRow((1, 2, 4), True, 3, "full", 1, 1, objective=("v", "linear")),
    DiTRow((1, 2, 4), True, 2, "none", 4, 1, ema=False, buckets=True),
    DiTRow((2, 1, 4), True, 2, "every_n", 2, 1, objective=("flow", "flow"), min_snr=True, buckets=True),
    DiTRow((2, 1, 4), False, 3, "none", 1, 1, model=ALL),
    DiTRow((1, 4, 1), True, 0, "none", 4, 2),
    DiTRow((4, 1, 2), True, 1, "full", 1, 1, optimizer="sgd"),
    DiTRow((2, 2, 2), True, 1, "none", objective=("flow", "flow"), model=("text",)),
    DiTRow((2, 2, 2), False, 2, "full", 2, 2, ema=False, optimizer="sgd", model=("text", *ALL)),
    DiTRow((2, 2, 2), True, 3, "selective", 4, 1, chunks=2, buckets=True, model=("text", "rope")),
    DiTRow((4, 2, 1), True, 0, "every_n", 4, 1, objective=("v", "cosine"), model=("text", "qk_norm")),
    DiTRow((4, 2, 1), False, 0, "selective", 1, 2, optimizer="sgd", model=("text", "swiglu")),
    DiTRow((1, 2, 4), True, 3, "full", 1, 1, objective=("flow", "flow"), min_snr=True, model=("text", *ALL)),
    DiTRow((2, 1, 4), True, 2, "every_n", 2, 1, buckets=True, model=("text", "qk_norm", "rope")),
    DiTRow((1, 4, 1), True, 0, "none", 4, 2, ema=False, model=("text",)),
    DiTRow((2, 2, 2), True, 1, "none", 1, 1, ema=False, model=("text", "sparse")),
    DiTRow((2, 1, 4), False, 1, "none", 1, 1, ema=False, model=("sparse",)),
    DiTRow((2, 2, 2), True, 1, "full", 1, 2, ema=False, model=("text",), fp8="rowwise"),
    DiTRow((2, 1, 4), False, 1, "none", 2, 1, ema=False, model=("text", "swiglu"), fp8="tensorwise"),
    DiTRow((2, 1, 4), True, 1, "none", 1, 1, ema=False, fp8="blockwise"),
]


def config_of(row: DiTRow) -> DiffusionRun:
    tp, pp, dp = row.mesh
    prediction, schedule = row.objective
    text = {**TEXT, "text_tokens": 16 if "sparse" in row.model else 4}  # with the patches whole blocks
    fp8 = {} if row.fp8 == "none" else {"fp8": row.fp8, "fp8_min_features": 0, "fp8_emulate": True}
    if row.fp8 == "blockwise":
        fp8["fp8_block"] = 4
    values: dict[str, Any] = {
        "model": {
            "num_layers": max(3, pp * row.chunks),
            "hidden_size": 16,
            "num_heads": 4,
            "ffn_hidden_size": 24,
            "image_size": 8 if "sparse" in row.model else 4,
            "channels": 3,
            "patch_size": 1 if tp == 1 or "sparse" in row.model else 2,
            "zero_init_std": 0.2,
            **({"condition": "text", **text} if "text" in row.model else {"num_classes": 5}),
            "learned_variance": "variance" in row.model,
            "attention": {"sparse": dict(SPARSE) if "sparse" in row.model else {}},
            "qk_norm": "qk_norm" in row.model,
            "positions": "rope" if "rope" in row.model else "sines",
            "activation": "swiglu" if "swiglu" in row.model else "gelu_tanh",
        },
        "objective": {
            "prediction": prediction,
            "schedule": schedule,
            "min_snr": 5.0 if row.min_snr else None,
            "condition_dropout": 0.3,
            **({"density": "logit_normal", "shift": 3.0, "shift_base_tokens": 9} if schedule == "flow" else {}),
        },
        "mesh": {"tp": tp, "pp": pp, "dp": dp, "sequence_parallel": row.sequence_parallel},
        "pipeline": {"schedule": "gpipe" if row.chunks > 1 else "1f1b", "chunks": row.chunks},
        "zero": {"stage": row.zero, **({"persistence_threshold": 40} if row.zero == 3 else {})},
        "optimizer": {
            "name": row.optimizer,
            "lr": 0.02,
            "clip_norm": 0.5,
            "warmup_steps": 1,
            "ema_decay": 0.9 if row.ema else 0.0,
            **({"momentum": 0.9} if row.optimizer == "sgd" else {}),
        },
        "precision": {"dtype": "fp64", **fp8},
        "recompute": {"mode": row.recompute},
        "train": {
            "steps": (STEPS if row.accumulation == 1 else 2) + UNUSED_STEPS,
            "global_batch": dp * row.accumulation * row.micro_batch,
            "micro_batch": row.micro_batch,
        },
    }
    return from_dict(DiffusionRun, values, str(row))


class Samples:
    """Random images of which one in seven counts nothing."""

    def __init__(self, config: DiffusionRun):
        self._made_up = DiTTask(config).open_sources().train
        self.rows = self._made_up.rows

    def __len__(self) -> int:
        return len(self._made_up)

    def batch(self, indices: Any) -> Batch:
        return {**self._made_up.batch(indices), "counts": np.asarray(indices) % 7 != 3}


def run(config: DiffusionRun, mesh: Mesh, buckets: bool) -> Outcome:
    steps = first_steps(config, mesh, Samples(config))
    if buckets:
        steps = [[_narrow(batch) if batch["images"][0, 0, 0, 0] > 0 else batch for batch in step] for step in steps]
    return train_task(config, mesh, DiTTask(config), steps)


def _narrow(batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    half = batch["images"].shape[-1] // 2
    return {**batch, **{name: batch[name][..., :half] for name in ("images", "noise")}}


def one_process(row: DiTRow) -> Outcome:
    config = reference_config(config_of(row))
    if row.buckets:  # no one micro-batch has images of two sizes
        config = config.model_copy(update={"train": config.train.model_copy(update={"micro_batch": row.micro_batch})})
    return run(config, Mesh.single(), row.buckets)


def run_rows(rows: Sequence[DiTRow]) -> list[Outcome]:
    """Inside a job: rows of one mesh."""
    world = dist.get_world_size()
    configs = [config_of(row) for row in rows]
    mesh = Mesh.create(validate(configs[0], world), device_of_rank(dist.get_rank(), world))
    for config in configs:
        validate(config, world)
    return [run(config, mesh, row.buckets) for config, row in zip(configs, rows)]


def by_mesh(rows: Sequence[DiTRow]) -> Mapping[Mesh3, list[DiTRow]]:
    return {mesh: [row for row in rows if row.mesh == mesh] for mesh in dict.fromkeys(row.mesh for row in rows)}
