"""This library as a contestant: the training step of ``megatron_ds.train``, built as a run builds it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist
from setting import Workload

from megatron_ds.config import RunConfig, from_dict, validate
from megatron_ds.kernels.cpu.allocator import keep_freed_memory, map_large_tensors
from megatron_ds.mesh import Mesh
from megatron_ds.models.gpt import GPTTask
from megatron_ds.train.build import RankRuntime, build

_MICRO_BATCHES = 8
_FP8 = {"fp8_min_features": 0, "fp8_emulate": not torch.cuda.is_available()}


def configuration(
    w: Workload,
    dp: int = 1,
    tp: int = 1,
    pp: int = 1,
    sequence_parallel: bool = False,
    layers_per_stage: tuple[int, ...] | None = None,
    compiled: bool = False,
    zero: int = 1,
    offload: str = "none",
    graphs: bool = False,
) -> RunConfig:
    """The workload as a run's configuration. A pipeline runs 8 micro-batches, everything else ``w.accumulate``."""
    family = {"position": "rope", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "tied_embeddings": False}
    settings = {
        "output": tempfile.gettempdir() + "/megatron-ds-benchmark",  # nothing is written there
        "compile": compiled,
        "model": {
            "num_layers": w.layers,
            "hidden_size": w.hidden,
            "num_heads": w.heads,
            "kv_heads": w.kv_heads,
            "ffn_hidden_size": w.ffn_hidden,
            "vocab_size": w.vocab,
            "max_positions": w.sequence,
            **(family if w.family == "llama" else {}),
        },
        "mesh": {"dp": dp, "tp": tp, "pp": pp, "sequence_parallel": sequence_parallel},
        "pipeline": {"layers_per_stage": layers_per_stage},
        "zero": {"stage": zero, "offload_optimizer": {"device": offload}},
        "optimizer": {
            "lr": w.lr,
            "beta1": w.betas[0],
            "beta2": w.betas[1],
            "weight_decay": w.weight_decay,
            "clip_norm": w.clip,
            "schedule": "constant",
        },
        "precision": {"dtype": w.dtype, "fp8": w.fp8, **(_FP8 if w.fp8 != "none" else {})},
        "train": {
            "global_batch": w.batch,
            "micro_batch": w.batch // (_MICRO_BATCHES if pp > 1 else dp * w.accumulate),
            "sequence_length": w.sequence,
            "cuda_graphs": graphs,
        },
        "data": {"synthetic": True},
    }
    return from_dict(RunConfig, settings, "benchmark")


def alone(w: Workload, compiled: bool = False) -> Callable[[], torch.Tensor]:
    """Each rank trains a model of its own on its share of the batch: what this machine does for two processes that
    exchange nothing, and so the limit of all that do."""
    return training_step(replace(w, batch=w.batch // dist.get_world_size()), world_size=1, compiled=compiled)


def built(
    w: Workload, device: str = "cpu", world_size: int | None = None, **layout: object
) -> tuple[RunConfig, Mesh, RankRuntime]:
    """What this rank runs; see :func:`training_step`."""
    map_large_tensors()
    config = configuration(w, **layout)  # type: ignore[arg-type]
    shape = validate(config, world_size or (dist.get_world_size() if dist.is_initialized() else 1))
    mesh = Mesh.create(shape, torch.device(device))
    parts = build(config, mesh, GPTTask(config))
    parts.step.after_first = keep_freed_memory
    return config, mesh, parts


def training_step(
    w: Workload, device: str = "cpu", world_size: int | None = None, **layout: object
) -> Callable[[], torch.Tensor]:
    """The step of this rank on random tokens, in the job or on a mesh of ``world_size`` (1); ``layout`` is passed to
    :func:`configuration`."""
    config, mesh, parts = built(w, device, world_size, **layout)
    draw = w.batches(mesh.dp.rank, mesh.dp.size, device)
    size = config.train.micro_batch

    def step() -> torch.Tensor:
        tokens, targets = draw()
        positions = torch.arange(w.sequence, device=device).expand_as(tokens)
        batch = {
            "tokens": tokens,
            "labels": targets,
            "position_ids": positions,
            "loss_mask": torch.ones_like(tokens, dtype=torch.bool),
            "sample_index": torch.arange(len(tokens), device=device),
        }
        micro_batches = [{k: t[i : i + size] for k, t in batch.items()} for i in range(0, len(tokens), size)]
        return torch.tensor(parts.step(micro_batches).loss)

    return step
