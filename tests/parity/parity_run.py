"""Running a row of the parity matrix on any mesh, and finding the first tensor in which two runs differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from parity_rows import STEPS, UNUSED_STEPS, VOCABULARY, Row, config_of, reference_config, schedules_of

from megatron_ds.comm.local.exchange import LocalExchange
from megatron_ds.config import BaseRunConfig, RunConfig, validate
from megatron_ds.data.loader import BatchLoader, MicroBatch
from megatron_ds.data.samples import SampleSource
from megatron_ds.layers.position import rotary_table
from megatron_ds.mesh import Mesh, MeshShape
from megatron_ds.models import transformer
from megatron_ds.models.families import task_of
from megatron_ds.pipeline.passes import make_ready
from megatron_ds.pipeline.schedule import Schedule
from megatron_ds.pipeline.validator import validate as validate_schedule
from megatron_ds.shard import ShardSpec, spec_of
from megatron_ds.shard.flat_shards import FlatShard
from megatron_ds.testing import device_of_rank, run_ranks
from megatron_ds.train import build as build_module
from megatron_ds.train.build import RankRuntime, build
from megatron_ds.train.task import Task

TOLERANCE = 1e-9
Array = npt.NDArray[np.floating[Any]]


class Samples:
    """Random samples with what makes sums and means differ: masks of uneven length, one sample in seven all masked.

    A sample depends on its place in the run alone. With ``documents``, it is packed of up to three of them.
    """

    def __init__(self, sequence_length: int, documents: bool, vocabulary: int = VOCABULARY):
        self.sequence_length, self.documents, self.vocabulary = sequence_length, documents, vocabulary

    def __len__(self) -> int:
        return 1 << 20

    def rows(self, rows: npt.ArrayLike) -> dict[str, npt.NDArray[Any]]:
        samples = [self._sample(row) for row in np.asarray(rows).tolist()]
        return {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}

    batch = rows

    def _sample(self, row: int) -> dict[str, npt.NDArray[Any]]:
        s = self.sequence_length
        chance = np.random.default_rng((99, row))
        text = chance.integers(self.vocabulary, size=s + 1)
        sample = {
            "tokens": text[:-1],
            "labels": text[1:],
            "loss_mask": (np.arange(s) >= chance.integers(s)) & (row % 7 != 3),
            "position_ids": np.arange(s),
        }
        if self.documents:
            starts = np.zeros(s, np.int64)
            starts[chance.integers(1, s, size=2)] = 1
            sample["document_ids"] = starts.cumsum()
            first = np.maximum.accumulate(np.where(starts, np.arange(s), 0))
            sample["position_ids"] = np.arange(s) - first
        return sample


def steps_of(config: RunConfig, mesh: Mesh) -> list[list[MicroBatch]]:
    """This rank's micro-batches of the first steps."""
    samples = Samples(config.train.sequence_length, config.data.document_masking, config.model.vocab_size)
    return first_steps(config, mesh, samples)


def first_steps(config: BaseRunConfig, mesh: Mesh, samples: SampleSource) -> list[list[MicroBatch]]:
    """The same of any samples."""
    train = config.train
    loader = BatchLoader(samples, train.global_batch, train.micro_batch, mesh.dp.rank, mesh.dp.size, prefetch=0)
    steps = range(min(STEPS, train.steps - UNUSED_STEPS))
    return [[{k: t.to(mesh.device) for k, t in batch.items()} for batch in next(loader)] for _ in steps]


@dataclass(frozen=True)
class Part:
    """A rank's part of a global tensor: ``values`` are the elements ``start ..`` of a box, in row-major order."""

    name: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    start: int
    values: Array

    def of(self, whole: Array) -> Array:
        """The same part of another whole tensor."""
        box = whole[tuple(slice(o, o + n) for o, n in zip(self.offset, self.shape))]
        return box.reshape(-1)[self.start : self.start + self.values.size]

    def place(self, index: int) -> tuple[int, ...]:
        """Global coordinates of an element of ``values``."""
        local = np.unravel_index(self.start + index, self.shape)
        return tuple(int(o + i) for o, i in zip(self.offset, local))


@dataclass(frozen=True)
class Outcome:
    """What one rank saw: loss, gradient norm and its parts of the gradients of each step, and of the parameters and
    their moving averages, where there are some."""

    scalars: list[tuple[float, float]]
    gradients: list[list[Part]]
    parameters: list[Part]
    averages: list[Part]


def train(
    config: RunConfig,
    mesh: Mesh,
    look: Callable[[RankRuntime], None] | None = None,
    schedule: Schedule | None = None,
) -> Outcome:
    """Build the run of ``config`` on ``mesh`` and take the first steps.

    Args:
        look: called with the parts before the first step.
        schedule: what runs instead of the configuration's schedule.
    """
    return train_task(config, mesh, task_of(config), steps_of(config, mesh), look, schedule)


def train_task(
    config: BaseRunConfig,
    mesh: Mesh,
    task: Task,
    steps: Sequence[Sequence[MicroBatch]],
    look: Callable[[RankRuntime], None] | None = None,
    schedule: Schedule | None = None,
) -> Outcome:
    """The same of any family, on these batches."""
    torch.manual_seed(mesh.rank)  # nothing may depend on it
    if schedule is not None:
        validate_schedule(make_ready(schedule))
    with patch.object(build_module, "schedule_of", lambda *_: schedule) if schedule else nullcontext():
        parts = build(config, mesh, task)
    if look is not None:
        look(parts)
    whole = {id(p): p for stage in parts.stages.values() for p in stage.parameters()}.values()
    gradients: list[list[Part]] = []
    update = parts.optimizer.step

    def keep_gradients(*arguments: Any, **keywords: Any) -> None:
        gradients.append(parts_of(parts.optimizer.gradient_shards()))
        update(*arguments, **keywords)

    parts.optimizer.step = keep_gradients  # type: ignore[method-assign]
    results = [parts.step(batches) for batches in steps]
    assert not any(result.skipped for result in results)
    with parts.optimizer.gathered(whole):
        parameters = [whole_part(spec_of(p), p) for p in whole]
    averages = [shard for shard in parts.optimizer.flat_shards() if shard.kind == "ema"]
    return Outcome([(r.loss, r.grad_norm) for r in results], gradients, parameters, parts_of(averages))


def parts_of(flat_shards: Sequence[FlatShard]) -> list[Part]:
    return [Part(p.name, p.global_shape, p.box_offset, p.box_shape, p.start, _copy(p.data)) for p in flat_shards]


def _copy(tensor: torch.Tensor) -> Array:
    return tensor.detach().cpu().clone().flatten().numpy()


def whole_part(spec: ShardSpec, parameter: torch.Tensor) -> Part:
    return Part(spec.name, spec.global_shape, spec.offset, spec.local_shape, 0, _copy(parameter))


def reference(config: RunConfig) -> Outcome:
    """The same run on one process."""
    return train(reference_config(config), Mesh.single())


@contextmanager
def rotary_tables_of_the_cpu() -> Iterator[None]:
    """Rotary angles are fp32 by definition, and sines of them on two devices differ in the last bit, by 6e-8: inside,
    all are computed on the CPU, so that everything else can be compared to 1e-9."""

    def table(positions: torch.Tensor, frequencies: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
        both = rotary_table(positions.cpu(), frequencies.cpu(), *rest)
        return tuple(part.to(positions.device) for part in both)

    with patch.object(transformer, "rotary_table", table):
        yield


def train_on_this_rank(rows: Sequence[Row], device: str | None = None) -> list[Outcome]:
    """Inside a job: every row, all of as many ranks. ``device``: one for all, instead of :func:`device_of_rank`'s."""
    world = dist.get_world_size()
    place = torch.device(device) if device else device_of_rank(dist.get_rank(), world)
    meshes: dict[MeshShape, Mesh] = {}
    outcomes = []
    for row in rows:
        config = config_of(row)
        shape = validate(config, world)
        if shape not in meshes:
            meshes[shape] = Mesh.create(shape, place)
        try:
            outcomes.append(train(config, meshes[shape], schedule=schedules_of(row)))
        except Exception as error:
            raise RuntimeError(f"row {row} failed") from error
    return outcomes


@cache
def one_process(config: str) -> Outcome:
    """The run on one process that a configuration, as JSON, describes; each once."""
    return reference(RunConfig.model_validate_json(config))


def run_rows(rows: Sequence[Row]) -> dict[Row, list[Outcome]]:
    """Rows of as many ranks each, in one job: the outcomes of all ranks."""
    ranks = run_ranks(train_on_this_rank, rows[0].world_size, rows)
    return {row: [outcomes[i] for outcomes in ranks] for i, row in enumerate(rows)}


def train_through_the_group(rows: Sequence[Row]) -> list[Outcome]:
    """The same, with no collective between layers through shared memory, as between hosts."""
    refuse = AssertionError("through shared memory")
    with patch.object(LocalExchange, "LARGEST", 0), patch.object(LocalExchange, "_send", side_effect=refuse):
        return train_on_this_rank(rows)


class ParityError(AssertionError):
    """Two runs that should be the same are not."""


def assert_parity(ranks: Sequence[Outcome], want: Outcome) -> None:
    """Raise ParityError unless all ranks' scalars and tensors are those of the one-process run.

    The message names the first scalar, the first gradient (of the first step in which one differs) and the first
    parameter that differ, in the model's order.
    """
    # Gradients are listed bucket by bucket; the model's order is that of the parameters.
    order = [part.name for part in want.parameters]
    lines = _scalar_difference(ranks, want)
    for step, wanted in enumerate(want.gradients):
        found = _tensor_differences([outcome.gradients[step] for outcome in ranks], wanted, order)
        if found:
            lines.append(f"first gradient that differs, in step {step + 1}: {found}")
            break
    found = _tensor_differences([outcome.parameters for outcome in ranks], want.parameters, order)
    if found:
        lines.append(f"first parameter that differs: {found}")
    averages = [outcome.averages for outcome in ranks]
    found = _tensor_differences(averages, want.averages, order) if want.averages or any(averages) else None
    if found:
        lines.append(f"first moving average that differs: {found}")
    if lines:
        raise ParityError("\n".join(lines))


def _tensor_differences(ranks: Sequence[Sequence[Part]], want: Sequence[Part], order: Sequence[str]) -> str | None:
    """The first tensor in ``order`` that differs, how, and how many do; None if none does."""
    whole = {part.name: part.values.reshape(part.global_shape) for part in want}
    assert set(whole) == set(order)
    unknown = sorted({part.name for parts in ranks for part in parts} - set(whole))
    if unknown:
        return f"{unknown[0]}, which the one-process run does not have"
    found = [(name, text) for name in order if (text := _tensor_difference(ranks, name, whole[name]))]
    return f"{found[0][0]}, {found[0][1]} ({len(found)} of {len(order)} differ)" if found else None


def _scalar_difference(ranks: Sequence[Outcome], want: Outcome) -> list[str]:
    for step, values in enumerate(want.scalars):
        for index, name in enumerate(("loss", "gradient norm")):
            for rank, outcome in enumerate(ranks):
                got = outcome.scalars[step][index]
                if not abs(got - values[index]) <= TOLERANCE * max(1.0, abs(values[index])):
                    return [f"{name} of step {step + 1} on rank {rank} is {got!r}, on one process {values[index]!r}"]
    return []


def _tensor_difference(ranks: Sequence[Sequence[Part]], name: str, want: Array) -> str | None:
    """How the ranks' parts differ from the whole tensor, or None. Every part of it must be on some rank."""
    covered = np.zeros(want.shape, bool)
    worst = (0.0, "")
    for rank, parts in enumerate(ranks):
        for part in parts:
            if part.name != name:
                continue
            if part.global_shape != want.shape:
                return f"of shape {part.global_shape} on rank {rank}, on one process {want.shape}"
            box = covered[tuple(slice(o, o + n) for o, n in zip(part.offset, part.shape))]
            box[np.unravel_index(np.arange(part.start, part.start + part.values.size), part.shape)] = True
            wanted = part.of(want)
            error = np.nan_to_num(np.abs(part.values - wanted), nan=np.inf)
            over = error / np.maximum(1.0, np.abs(wanted))
            if over.size and over.max() > max(TOLERANCE, worst[0]):
                at = int(over.argmax())
                worst = (
                    over[at],
                    f"by {error[at]:.3e} at {list(part.place(at))}: {part.values[at].item()!r} on rank {rank}, "
                    f"{wanted[at].item()!r} on one process",
                )
    if not covered.all():
        missing = tuple(int(i) for i in np.argwhere(~covered)[0])
        return f"which no rank holds at {list(missing)} ({(~covered).sum()} of {covered.size} elements missing)"
    return worst[1] or None
