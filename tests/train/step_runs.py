"""Short runs on the ranks of a job, for the tests of the train step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_ds.config import RunConfig, from_dict, validate
from megatron_ds.data.gpt_dataset import SyntheticDataset
from megatron_ds.data.loader import BatchLoader, MicroBatch
from megatron_ds.mesh import Mesh, MeshShape
from megatron_ds.models.gpt import GPTTask
from megatron_ds.shard import spec_of
from megatron_ds.testing import device_of_rank
from megatron_ds.train.build import RankRuntime, build
from megatron_ds.train.step import StepResult

S = 16


class Samples(SyntheticDataset):
    """Random tokens with masks of uneven length."""

    def rows(self, rows: npt.ArrayLike) -> dict[str, npt.NDArray[Any]]:
        batch = super().rows(rows)
        for mask, row in zip(batch["loss_mask"], np.asarray(rows)):
            mask[: row % 5] = False
        return batch


def configuration(dtype: str = "fp64", **sections: dict[str, Any]) -> RunConfig:
    base: dict[str, dict[str, Any]] = {
        "model": {
            "num_layers": 2,
            "hidden_size": 32,
            "num_heads": 4,
            "vocab_size": 61,
            "vocab_multiple": 16,
            "max_positions": S,
            "init_std": 0.1,
        },
        "precision": {"dtype": dtype},
        "optimizer": {"lr": 1e-2, "schedule": "constant"},
        "train": {"steps": 8, "global_batch": 4, "micro_batch": 1, "sequence_length": S},
        "data": {"synthetic": True},
    }
    values = {name: {**base.get(name, {}), **sections.get(name, {})} for name in {**base, **sections}}
    return from_dict(RunConfig, values, "test")


@dataclass
class Ran:
    """What one rank saw: results of the steps, and its parameters before the first step and after each."""

    results: list[StepResult] = field(default_factory=list)
    parameters: list[dict[str, Tensor]] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    evaluated: list[float] = field(default_factory=list)


def on_mesh(config: RunConfig) -> Mesh:
    return _mesh(validate(config, dist.get_world_size() if dist.is_initialized() else 1))


@cache
def _mesh(shape: MeshShape) -> Mesh:
    """One mesh a job, however many runs it makes."""
    rank = dist.get_rank() if shape.world_size > 1 else 0
    return Mesh.create(shape, device_of_rank(rank, shape.world_size))


def several(runs: Sequence[tuple[Any, ...]]) -> list[Any]:
    """In one job, one after the other: each (function, *arguments)."""
    return [function(*arguments) for function, *arguments in runs]


def loader_of(config: RunConfig, mesh: Mesh, consumed: int = 0) -> BatchLoader:
    t = config.train
    samples = Samples(config.model.vocab_size, S, seed=1)
    return BatchLoader(samples, t.global_batch, t.micro_batch, mesh.dp.rank, mesh.dp.size, consumed, prefetch=0)


def on_device(batches: Sequence[MicroBatch], mesh: Mesh) -> list[MicroBatch]:
    return [{name: tensor.to(mesh.device) for name, tensor in batch.items()} for batch in batches]


def snapshot(parts: RankRuntime) -> dict[str, Tensor]:
    (stage,) = parts.stages.values()
    return {name: p.detach().cpu().clone() for name, p in stage.named_parameters()}


def steps(
    config: RunConfig,
    count: int,
    before: Callable[[RankRuntime, Mesh, int, list[MicroBatch]], None] | None = None,
    stop_on: tuple[int, int] | None = None,
    consumed: int = 0,
) -> Ran:
    """Take steps; ``before`` sees each step first. ``stop_on`` = (rank, step) asks to stop there.

    ``consumed``: samples to leave out first.
    """
    mesh = on_mesh(config)
    parts = build(config, mesh, GPTTask(config))
    loader = loader_of(config, mesh, consumed)
    ran = Ran(parameters=[snapshot(parts)])
    for step in range(1, count + 1):
        batches = on_device(next(loader), mesh)
        if before is not None:
            before(parts, mesh, step, batches)
        run_step = parts.step.queue if config.train.late_check else parts.step
        result = run_step(batches, stop=stop_on == (mesh.rank, step))
        ran.results += [] if result is None else [result]
        ran.parameters.append(snapshot(parts))
        ran.scales.append(parts.scaler.scale)
    last = parts.step.queued_result()
    ran.results += [] if last is None else [last]
    return ran


def plain(config: RunConfig, count: int, stop_on: tuple[int, int] | None = None, consumed: int = 0) -> Ran:
    return steps(config, count, stop_on=stop_on, consumed=consumed)


def poisoned(config: RunConfig, count: int, rank: int, bad_step: int, value: float, where: str) -> Ran:
    """One rank alone sees a NaN or Inf in step ``bad_step``.

    ``where``: ``"hidden"``, in the output of its first block in its second micro-batch; or the name of a parameter, in
    whose gradient it appears after all reductions, as a flipped bit would.
    """

    def before(parts: RankRuntime, mesh: Mesh, step: int, batches: list[MicroBatch]) -> None:
        if mesh.rank != rank or step != bad_step:
            return
        (stage,) = parts.stages.values()
        if where == "hidden":
            poison_second_forward(next(iter(stage.layers.values())), value)
            return
        finish = parts.optimizer.finish_gradients

        def finish_and_poison() -> None:
            finish()
            flat_shard = next(p for p in parts.optimizer.gradient_shards() if p.name == where)
            flat_shard.data[0] = value
            parts.optimizer.finish_gradients = finish  # type: ignore[method-assign]

        parts.optimizer.finish_gradients = finish_and_poison  # type: ignore[method-assign]

    return steps(config, count, before)


def poison_second_forward(block: nn.Module, value: float) -> None:
    calls = 0

    def hook(module: nn.Module, arguments: Any, output: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls < 2:
            return output
        handle.remove()
        return output._replace(residual=output.residual + value)  # of a block's residual stream

    handle = block.register_forward_hook(hook)


def masked(config: RunConfig, count: int, everywhere: bool) -> Ran:
    """No token counts on data-parallel rank 0, or on any."""

    def before(parts: RankRuntime, mesh: Mesh, step: int, batches: list[MicroBatch]) -> None:
        if everywhere or mesh.dp.rank == 0:
            for batch in batches:
                batch["loss_mask"].zero_()

    return steps(config, count, before)


def evaluating(config: RunConfig, batches: int) -> Ran:
    """Evaluate, step, evaluate twice."""
    mesh = on_mesh(config)
    parts = build(config, mesh, GPTTask(config))
    loader = loader_of(config, mesh)
    data = [on_device(next(loader), mesh) for _ in range(batches)]
    ran = Ran(parameters=[snapshot(parts)])
    ran.evaluated.append(parts.step.evaluate(data))
    ran.parameters.append(snapshot(parts))
    ran.results.append(parts.step(data[0]))
    ran.parameters.append(snapshot(parts))
    ran.evaluated += [parts.step.evaluate(data), parts.step.evaluate(iter(data))]
    assert all(stage.training for stage in parts.stages.values())
    return ran


def gradients_and_update(config: RunConfig) -> tuple[StepResult, dict[str, Tensor], dict[str, Tensor]]:
    """One process: the result of a step, its gradients before clipping, and what it changed."""
    mesh = on_mesh(config)
    parts = build(config, mesh, GPTTask(config))
    before = snapshot(parts)
    gradients: dict[str, Tensor] = {}
    update = parts.optimizer.step

    def look(lr: float, scale: float = 1.0) -> None:
        for flat_shard in parts.optimizer.gradient_shards():
            gradients[flat_shard.name] = flat_shard.data.clone().view(flat_shard.global_shape)
        update(lr, scale)

    parts.optimizer.step = look  # type: ignore[method-assign, assignment]
    result = parts.step(on_device(next(loader_of(config, mesh)), mesh))
    after = snapshot(parts)
    return result, gradients, {name: after[name] - before[name] for name in before}


def is_finite(tensors: dict[str, Tensor]) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())


def norm_of(tensors: dict[str, Tensor]) -> float:
    return math.sqrt(sum(t.double().square().sum().item() for t in tensors.values()))


def decays(config: RunConfig) -> dict[str, bool]:
    """Whether each parameter of the whole model decays."""
    parts = build(config, Mesh.single(), GPTTask(config))
    (stage,) = parts.stages.values()
    return {name: spec_of(p).weight_decay for name, p in stage.named_parameters()}
