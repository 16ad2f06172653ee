"""Stages small enough to check by hand, run through the executor on the ranks of a job."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from megatron_ds.mesh import Axis, Mesh, MeshShape
from megatron_ds.pipeline.action import Action
from megatron_ds.pipeline.executor import Executor, LeftToAutograd
from megatron_ds.pipeline.placement import Placement
from megatron_ds.pipeline.schedule import Schedule
from megatron_ds.pipeline.schedules import build_schedule
from megatron_ds.pipeline.timeline import Event
from megatron_ds.testing import device_of_rank

WIDTH = 3


class Stage(nn.Module):
    """``tanh(W x + b)``; the last stage weighs its output with the micro-batch's targets and adds up."""

    def __init__(self, index: int, num_stages: int):
        super().__init__()
        generator = torch.Generator().manual_seed(index)
        self.index, self.is_first, self.is_last = index, index == 0, index == num_stages - 1
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(WIDTH, generator=generator, dtype=torch.float64))
        self.fails_on: int | None = None

    def forward(self, micro_batch: dict[str, Tensor], hidden: Tensor | None = None) -> Tensor:
        if self.fails_on == int(micro_batch["number"]):
            raise ValueError(f"stage {self.index} fails on micro-batch {self.fails_on}")
        assert (hidden is None) == self.is_first
        x = micro_batch["input"] if hidden is None else hidden
        out = torch.tanh(x @ self.weight.T + self.bias)
        return (out * micro_batch["target"]).sum() if self.is_last else out


def shape_of(micro_batch: Mapping[str, Tensor]) -> tuple[int, ...]:
    return micro_batch["input"].shape


def micro_batches(count: int) -> list[dict[str, Tensor]]:
    """Of unequal sizes."""
    result = []
    for number in range(count):
        generator, shape = torch.Generator().manual_seed(100 + number), (2 + number % 3, WIDTH)
        result.append(
            {
                "number": torch.tensor(number),
                "input": torch.randn(shape, generator=generator, dtype=torch.float64),
                "target": torch.randn(shape, generator=generator, dtype=torch.float64),
            }
        )
    return result


def expected(num_stages: int, count: int, seed: float) -> tuple[float, dict[int, list[Tensor]]]:
    """Loss sum and every stage's gradients, by plain autograd through all stages at once."""
    stages = [Stage(index, num_stages) for index in range(num_stages)]
    total = torch.zeros((), dtype=torch.float64)
    for batch in micro_batches(count):
        x = None
        for stage in stages:
            x = stage(batch, x)
        assert x is not None
        (x * seed).backward()
        total += x.detach()
    return total.item(), {s.index: [p.grad for p in s.parameters() if p.grad is not None] for s in stages}


@dataclass
class Ran:
    """What one rank saw in one run."""

    loss: float
    gradients: dict[int, list[Tensor]]
    announced: list[tuple[int, int]] = field(default_factory=list)  # stage, backwards done before the announcement
    recorded: list[Event] = field(default_factory=list)


class Announced(LeftToAutograd):
    """Notes each stage's last backward pass, and how many events were recorded before it."""

    def __init__(self) -> None:
        self.executor: Executor | None = None
        self.last: list[tuple[int, int]] = []

    def start_backward(self, last: bool, stage: int = 0) -> None:
        if last:
            self.last.append((stage, len((self.executor and self.executor.recorded) or [])))


def make(
    schedule: Schedule, num_stages: int, announced: Announced | None = None, other_sizes: Sequence[Schedule] = ()
) -> Executor:
    mesh = mesh_of(len(schedule))
    stages = {i: Stage(i, num_stages) for i in schedule.placement.stages_of(mesh.pp.rank)}
    return Executor(
        schedule,
        stages,
        pp=mesh.pp,
        pp_back=mesh.pp_back,
        against=mesh.against_the_flow() if schedule.placement.chunks > 1 else None,
        activation_shape=shape_of,
        dtype=torch.float64,
        device=mesh.device,
        gradients=announced,
        other_sizes=other_sizes,
    )


def mesh_of(pp: int) -> Mesh:
    if pp == 1:
        return Mesh.single()
    return Mesh.create(MeshShape(pp=pp), device_of_rank(dist.get_rank(), pp))


def run(schedule: Schedule, num_stages: int, count: int, times: int = 1) -> Ran:
    """Run the schedule ``times`` times, recording the last; gradients add up."""
    announced = Announced()
    executor = announced.executor = make(schedule, num_stages, announced)
    seed = torch.tensor(0.25, dtype=torch.float64)
    for time_ in range(times):
        executor.recorded = [] if time_ == times - 1 else None
        loss = executor.run(micro_batches(count), seed)
    gradients = {i: [p.grad for p in stage.parameters() if p.grad is not None] for i, stage in executor.stages.items()}
    assert executor.recorded is not None
    return Ran(loss.item(), gradients, announced.last, executor.recorded)


def run_schedules(pp: int, counts: tuple[int, ...]) -> dict[tuple[str, int], Ran]:
    """On a rank: both schedules for each number of micro-batches."""
    return {
        (name, count): run(build_schedule(name, pp, count), pp, count) for name in ("gpipe", "1f1b") for count in counts
    }


def run_twice(pp: int) -> Ran:
    return run(build_schedule("1f1b", pp, 3), pp, 3, times=2)


def run_sizes(pp: int, counts: tuple[int, ...]) -> list[Ran]:
    """On a rank: steps of different numbers of micro-batches on one executor, the gradients of each for itself."""
    first, *others = (build_schedule("1f1b", pp, count) for count in sorted(set(counts)))
    announced = Announced()
    executor = make(first, pp, announced, others)
    steps = []
    for count in counts:
        announced.last.clear()
        loss = executor.run(micro_batches(count), torch.tensor(0.25, dtype=torch.float64))
        gradients = {}
        for i, stage in executor.stages.items():
            gradients[i] = [p.grad.clone() for p in stage.parameters() if p.grad is not None]
            stage.zero_grad()
        steps.append(Ran(loss.item(), gradients, list(announced.last)))
    return steps


def run_given(actions: list[list[str]], num_stages: int, count: int, placement: Placement | None = None) -> Ran:
    return run(Schedule.of([[Action.parse(a) for a in rank] for rank in actions], placement), num_stages, count)


def transfers(schedule: Schedule, num_stages: int, count: int) -> list[tuple[str, int, int]]:
    """On a rank: (group, from, to) of everything that it sends, the first transfers of each link included."""
    found = []

    def noted(real: Callable[..., Any]) -> Callable[..., Any]:
        def send(tensor: Tensor, target: int, group: Any) -> Any:
            found.append((group.group_name, dist.get_rank(), target))
            return real(tensor, target, group=group)

        return send

    with patch.object(dist, "send", noted(dist.send)), patch.object(dist, "isend", noted(dist.isend)):
        run(schedule, num_stages, count)
    return found


def first_transfers(schedule: Schedule) -> list[tuple[str, int, int]]:
    """(group, from, to) of what executors transfer when they are made, a thread a rank, all at once.

    As under NCCL where a pair meets for the first time: a send blocks its rank until the other one receives. Raises
    where ranks wait for one another in a circle.
    """
    pp, here, guard = len(schedule), threading.local(), threading.Lock()
    found: list[tuple[str, int, int]] = []
    doors: dict[tuple[str, int, int], tuple[threading.Semaphore, threading.Semaphore]] = {}

    def meet(link: tuple[str, int, int], sends: bool) -> None:
        with guard:
            mine, other = doors.setdefault(link, (threading.Semaphore(0), threading.Semaphore(0)))[
                :: 1 if sends else -1
            ]
            found.extend([link] * sends)
        mine.release()
        assert other.acquire(timeout=2), f"rank {here.rank} waits for ever in {link}"

    def make_one(rank: int) -> None:
        here.rank = rank
        ranks: dict[str, Any] = {"rank": rank, "size": pp, "ranks": tuple(range(pp))}
        pp_axis, back, *against = (
            Axis(name, group=name, **ranks) for name in ("pp", "back", "against", "against back")
        )  # type: ignore[arg-type]
        stages = {i: nn.Identity() for i in schedule.placement.stages_of(rank)}
        axes: dict[str, Any] = {"pp": pp_axis, "pp_back": back, "against": tuple(against)}
        Executor(schedule, stages, **axes, activation_shape=shape_of, dtype=torch.float64, device=torch.device("cpu"))

    with (
        patch.object(dist, "send", lambda token, target, group: meet((group, here.rank, target), True)),
        patch.object(dist, "recv", lambda token, source, group: meet((group, source, here.rank), False)),
        ThreadPoolExecutor(pp) as pool,
    ):
        list(pool.map(make_one, range(pp)))
    return found


def outputs_alive(count: int) -> list[int]:
    """How many outputs of the first of two stages have memory when each of their gradients is waited for.

    Between the ranks a transfer is over at once.
    """
    sent: list[StorageWeakRef] = []
    alive: list[int] = []

    class Gone:
        def __init__(self, tensor: Tensor, *_: Any):
            sent.append(StorageWeakRef(tensor.untyped_storage()))

        def wait(self) -> None:
            pass

    class Gradient:
        def __init__(self, shape: tuple[int, ...], *_: Any):
            self.shape = shape

        def wait(self) -> Tensor:
            alive.append(sum(not storage.expired() for storage in sent))
            return torch.ones(self.shape, dtype=torch.float64)

    class Linear(nn.Linear):  # keeps its input for the backward pass, and not its output
        def forward(self, micro_batch: dict[str, Tensor], hidden: Tensor | None = None) -> Tensor:  # type: ignore[override]
            return super().forward(micro_batch["input"])

    alone = Axis("pp", size=2, ranks=(0, 1))
    where: dict[str, Any] = {"activation_shape": shape_of, "dtype": torch.float64, "device": torch.device("cpu")}
    stages = {0: Linear(WIDTH, WIDTH, dtype=torch.float64)}
    executor = Executor(build_schedule("gpipe", 2, count), stages, pp=alone, pp_back=alone, **where)
    with patch("megatron_ds.pipeline.executor.Send", Gone), patch("megatron_ds.pipeline.executor.Receive", Gradient):
        executor.run(micro_batches(count), torch.tensor(1.0, dtype=torch.float64))
    assert len(sent) == count
    return alive


def run_against_the_flow(schedule: Schedule) -> None:
    """An executor that is given no groups for that."""
    mesh = mesh_of(len(schedule))
    stages = {i: Stage(i, schedule.num_stages) for i in schedule.placement.stages_of(mesh.pp.rank)}
    axes = {"pp": mesh.pp, "pp_back": mesh.pp_back}
    Executor(schedule, stages, **axes, activation_shape=shape_of, dtype=torch.float64, device=mesh.device)


def run_unfit(schedule: Schedule, stages: Sequence[int], others: Sequence[Schedule]) -> None:
    """An executor of one rank with stages or other sizes that the schedule does not have."""
    mesh = Mesh.single()
    Executor(
        schedule,
        {i: Stage(i, schedule.num_stages) for i in stages},
        pp=mesh.pp,
        pp_back=mesh.pp_back,
        activation_shape=shape_of,
        dtype=torch.float64,
        device=mesh.device,
        other_sizes=others,
    )


def evaluate(pp: int, count: int) -> tuple[float, bool]:
    """Forward only, of more micro-batches than the schedule has, then the schedule itself."""
    executor = make(build_schedule("1f1b", pp, 2), pp)
    loss = executor.run_forward(micro_batches(count))
    untouched = all(p.grad is None for stage in executor.stages.values() for p in stage.parameters())
    assert not loss.requires_grad
    executor.run(micro_batches(2), torch.tensor(1.0, dtype=torch.float64))
    return loss.item(), untouched


def wrong_count(pp: int) -> str:
    executor = make(build_schedule("gpipe", pp, 3), pp)
    dist.barrier()  # no rank may leave while another is still connecting to it
    try:
        executor.run(micro_batches(2), torch.tensor(1.0, dtype=torch.float64))
    except ValueError as error:
        return str(error)
    return "no error"


def fail_on_stage(pp: int, bad: int) -> None:
    executor = make(build_schedule("1f1b", pp, 6), pp)
    if bad in executor.stages:
        executor.stages[bad].fails_on = 2  # type: ignore[assignment]
    executor.run(micro_batches(6), torch.tensor(1.0, dtype=torch.float64))


def outlive_a_failed_stage(pp: int, bad: int, timeout: float) -> tuple[str, float]:
    """The failed rank stays alive and silent; how the others end, and after how many seconds."""
    mesh = mesh_of(pp)
    for group in (mesh.pp.group, mesh.pp_back.group):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout), group)
    stages = {mesh.pp.rank: Stage(mesh.pp.rank, pp)}
    stages[mesh.pp.rank].fails_on = 2 if mesh.pp.rank == bad else None
    executor = Executor(
        build_schedule("1f1b", pp, 6),
        stages,
        pp=mesh.pp,
        pp_back=mesh.pp_back,
        activation_shape=shape_of,
        dtype=torch.float64,
        device=mesh.device,
    )
    start = time.monotonic()
    try:
        executor.run(micro_batches(6), torch.tensor(1.0, dtype=torch.float64))
        outcome = "finished"
    except Exception as error:
        outcome = type(error).__name__
    seconds = time.monotonic() - start
    if mesh.pp.rank == bad:
        time.sleep(3 * timeout)
    return outcome, seconds
