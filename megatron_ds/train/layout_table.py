"""What a job needs on every mesh of its ranks, at each stage of ZeRO: a table to choose a layout by, before any run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from megatron_ds.config import BaseRunConfig, OffloadConfig, RecomputeConfig, ZeroConfig, validate
from megatron_ds.errors import ConfigError
from megatron_ds.mesh import MeshShape
from megatron_ds.train.rank_bytes import StageBook, account_of
from megatron_ds.train.task import Task

R = TypeVar("R", bound=BaseRunConfig)
MOST_TP = 8  # tensor parallelism stays inside a node
MOST_PP = 16
USABLE = 0.9  # of a GPU's memory: the rest is for CUDA, NCCL and fragments

FULL = RecomputeConfig(mode="full")
HOST = OffloadConfig(device="cpu")
CHOICES: dict[str, tuple[ZeroConfig, RecomputeConfig | None]] = {
    "zero 1": (ZeroConfig(stage=1), None),
    "zero 2": (ZeroConfig(stage=2), None),
    "zero 3": (ZeroConfig(stage=3), None),
    "1, full": (ZeroConfig(stage=1), FULL),
    "2, full": (ZeroConfig(stage=2), FULL),
    "3, full": (ZeroConfig(stage=3), FULL),
    "3, full, host": (ZeroConfig(stage=3, offload_optimizer=HOST), FULL),
}
"""A column: ZeRO, and recomputation if not that of the run."""


@dataclass(frozen=True)
class Layouts:
    """Bytes on the device by mesh and column of :data:`CHOICES`; None where the job cannot be laid out so."""

    recompute: str
    sizes: dict[MeshShape, dict[str, int | None]]
    gpu_bytes: float

    def __str__(self) -> str:
        lines = [
            "GiB on the device of the fullest rank of the first and the last pipeline stage, activations estimated; "
            f"* fits {USABLE:.0%} of {self.gpu_bytes / 1e9:.0f} GB",
            f"zero N: zero.stage, recompute.mode={self.recompute!r}; full: recompute.mode='full'; host: "
            "zero.offload_optimizer.device='cpu'",
            " tp  pp    dp" + "".join(f"{name:>15}" for name in CHOICES),
        ]
        for shape, cells in self.sizes.items():
            shown = "".join(f"{self._cell(size):>15}" for size in cells.values())
            lines.append(f"{shape.tp:>3} {shape.pp:>3} {shape.dp:>5}{shown}")
        return "\n".join(lines)

    def _cell(self, size: int | None) -> str:
        return "-  " if size is None else f"{size / 2**30:.1f} {'*' if size <= USABLE * self.gpu_bytes else ' '}"


def layouts(config: R, task_of: Callable[[R], Task], world_size: int, gpu_gb: float) -> Layouts:
    """Lay out the job on each mesh of ``world_size`` ranks, tensor-parallel inside a node of 8."""
    book, sizes = StageBook(), {}
    for shape in _shapes(world_size, task_of(config).num_layers):
        cells = {name: _bytes(config, task_of, shape, *choice, book) for name, choice in CHOICES.items()}
        if any(size is not None for size in cells.values()):
            sizes[shape] = cells
    return Layouts(config.recompute.mode, sizes, gpu_gb * 1e9)


def _shapes(world_size: int, num_layers: int) -> Iterator[MeshShape]:
    for tp in range(1, min(MOST_TP, world_size) + 1):
        for pp in range(1, min(MOST_PP, world_size // tp, num_layers) + 1):
            if world_size % (tp * pp) == 0:
                yield MeshShape(pp=pp, dp=world_size // (tp * pp), tp=tp)


def _bytes(
    config: R,
    task_of: Callable[[R], Task],
    shape: MeshShape,
    zero: ZeroConfig,
    recompute: RecomputeConfig | None,
    book: StageBook,
) -> int | None:
    pipeline = config.pipeline
    if pipeline.layers_per_stage is not None and len(pipeline.layers_per_stage) != shape.pp * pipeline.chunks:
        pipeline = pipeline.model_copy(update={"layers_per_stage": None})
    update = {
        "mesh": config.mesh.model_copy(update={"tp": shape.tp, "pp": shape.pp, "dp": None}),
        "pipeline": pipeline,
        "zero": zero,
        "recompute": recompute or config.recompute,
    }
    changed = config.model_copy(update=update)
    try:
        validate(changed, shape.world_size, needs_data=False)
        task = task_of(changed)
        ranks = {shape.rank_at(pp=stage) for stage in (0, shape.pp - 1)}
        return max(account_of(changed, task, shape, rank, book).total("device") for rank in ranks)
    except ConfigError:
        return None
