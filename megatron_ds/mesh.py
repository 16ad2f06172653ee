"""Where a rank sits: the only module that creates process groups.

The ranks of a job form a 4-D grid ``[pp, dp, cp, tp]``. ``tp`` varies fastest, so that the ranks which talk most
share a node; ``pp`` varies slowest, because it moves the fewest bytes. Everything else is handed an :class:`Axis`
(a group, this rank's place in it, its size) and never asks a global.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megatron_ds.errors import ConfigError, divisors, multiples_around

AXES = ("pp", "dp", "cp", "tp")
LAYERWISE = ("cp", "tp")
"""Axes over which the work of one layer is divided."""


@dataclass(frozen=True)
class Axis:
    """One line of ranks through this rank. ``group`` is None when the line has one rank: nothing to talk to.

    ``ranks`` are the global ranks in group order. ``timeout``: seconds that ranks wait for each other (None: torch's
    default). ``layerwise``: every layer has collectives on it, so that buffers for them are worth keeping.
    ``connections`` is where collectives keep what they have opened to the other ranks, by what it is.
    """

    name: str
    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    ranks: tuple[int, ...] = (0,)
    timeout: float | None = None
    layerwise: bool = False
    connections: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        return self.rank == self.size - 1

    @property
    def peers(self) -> list[int]:
        """The other ranks, by place in the line: the one before this rank first, then the one before that."""
        return [(self.rank - step) % self.size for step in range(1, self.size)]


MOST_RANKS = 1 << 20
"""Of a job: ten times the largest there is. More is a mistake, and lists of ranks would fill the memory."""


@dataclass(frozen=True)
class MeshShape:
    """The extents of the mesh, before any process group exists.

    ``ep`` is no axis of the grid but divides the ``dp x cp`` ranks: experts are sharded over ``ep`` neighbours of them.
    """

    pp: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        data = self.dp * self.cp
        if data % self.ep:
            raise ConfigError(
                f"ep={self.ep} does not divide dp={self.dp} x cp={self.cp} = {data} ranks; ep may be {divisors(data)}"
            )

    @property
    def world_size(self) -> int:
        return self.pp * self.dp * self.cp * self.tp

    def coordinates(self, rank: int) -> dict[str, int]:
        """``{"pp": ..., "dp": ..., "cp": ..., "tp": ...}`` of a global rank."""
        coordinates = {}
        for name in reversed(AXES):
            rank, coordinates[name] = divmod(rank, getattr(self, name))
        return {name: coordinates[name] for name in AXES}

    def rank_at(self, **coordinates: int) -> int:
        """The global rank at the given coordinates; an axis left out counts as 0."""
        rank = 0
        for name in AXES:
            rank = rank * getattr(self, name) + coordinates.get(name, 0)
        return rank

    @staticmethod
    def for_world(world_size: int, pp: int = 1, cp: int = 1, tp: int = 1, dp: int | None = None) -> MeshShape:
        """The mesh of ``world_size`` ranks with the given model-parallel extents; ``dp`` is what is left over."""
        if not 0 < world_size <= MOST_RANKS:
            raise ConfigError(f"world_size={world_size} is no number of ranks; start 1 to {MOST_RANKS}")
        model = pp * cp * tp
        if world_size % model:
            raise ConfigError(
                f"world_size={world_size} cannot be divided by pp={pp} x cp={cp} x tp={tp} = {model}; start "
                f"{multiples_around(world_size, model)} ranks, or change mesh.pp, mesh.cp or mesh.tp so that their "
                f"product divides {world_size}"
            )
        derived = world_size // model
        if dp is not None and dp != derived:
            raise ConfigError(
                f"mesh.dp={dp}, but world_size={world_size} / (pp={pp} x cp={cp} x tp={tp}) leaves dp={derived}; "
                f"leave mesh.dp unset, or start {model * dp} ranks"
            )
        return MeshShape(pp=pp, dp=derived, cp=cp, tp=tp)

    def draw(self, mark: int | None = None) -> str:
        """A table of the mesh: one row a pipeline stage, one box a data-parallel replica, tp ranks side by side.

        ``mark`` puts one rank in brackets. Of a mesh too large for a screen, its neighbourhood is drawn.
        """
        width = len(str(self.world_size - 1)) + 2
        place = self.coordinates(mark or 0)
        replicas = _window(self.dp, max(1, 64 // (self.cp * self.tp * width)), place["dp"])
        stages = _window(self.pp, 16, place["pp"])
        title = f"mesh of {self.world_size} rank{'s' * (self.world_size > 1)}: " + " x ".join(
            f"{name}={getattr(self, name)}" for name in AXES
        )
        # The box of one replica lists its cp x tp ranks in order.
        boxes = [f"dp {d}".center(max(self.cp * self.tp * width, 4)) for d in replicas]
        rule = "+" + "+".join("-" * len(box) for box in boxes) + "+"
        before, after = " ..." * (replicas.start > 0), " ..." * (replicas.stop < self.dp)
        digits = max(2, len(str(self.pp - 1)))
        margin = " " * (len("stage ") + digits + len(before))
        lines = [title, margin + " " + " ".join(boxes) + after, margin + rule]
        if stages.start:
            lines.insert(1, f"  ... {stages.start} earlier stage{'s' * (stages.start > 1)}")
        for p in stages:
            cells = []
            for d, box in zip(replicas, boxes):
                ranks = (self.rank_at(pp=p, dp=d, cp=c, tp=t) for c in range(self.cp) for t in range(self.tp))
                text = "".join(f"[{r}]".rjust(width) if r == mark else f" {r} ".rjust(width) for r in ranks)
                cells.append(text.center(len(box)))
            lines.append(f"stage {p:<{digits}}{before}|" + "|".join(cells) + "|" + after)
        if stages.stop < self.pp:
            lines.append(f"  ... {self.pp - stages.stop} more stage{'s' * (self.pp - stages.stop > 1)}")
        lines.append(margin + rule + "   (tp ranks side by side inside a box)")
        return "\n".join(lines)


def _window(size: int, shown: int, around: int) -> range:
    """At most ``shown`` consecutive numbers of ``0 .. size - 1``, with ``around`` near their middle."""
    first = max(0, min(around - shown // 2, size - shown))
    return range(first, min(first + shown, size))


class Mesh:
    """This rank's place in the mesh and its groups.

    Attributes:
        pp, dp, cp, tp: the four axes.
        pp_back: the pipeline axis again, with a group of its own for gradients flowing back. NCCL runs the
            operations of one group in the order they were issued; with one group a direction, each direction has
            one order that both ends agree on, and 1F1B cannot deadlock.
        data: ``dp x cp`` flattened: the ranks that hold the same parameters, over which ZeRO shards.
        ep, expert_data: ``data`` in two, where experts are sharded: neighbours that hold different experts, and the
            ranks that hold the same ones, over which ZeRO shards those.
        embedding: first and last pipeline stage, which share a tied embedding; a single rank on the other stages.
        world: every rank.
    """

    def __init__(
        self,
        shape: MeshShape,
        device: torch.device,
        rank: int = 0,
        device_mesh: DeviceMesh | None = None,
        timeout: timedelta | None = None,
    ):
        self.shape = shape
        self.device = device
        self.rank = rank
        self.device_mesh = device_mesh
        self._timeout = timeout
        self.pp, self.dp, self.cp, self.tp = (self._axis(name) for name in AXES)
        if device_mesh is None:
            self.data = self._described("data", shape.dp * shape.cp, shape.tp)
        elif shape.dp > 1 and shape.cp > 1:
            flat = device_mesh["dp", "cp"]._flatten("data", backend_override=_options(timeout))
            self.data = self._line("data", flat)
        else:  # the same ranks as those of the one that is longer, and so its group
            self.data = replace(self.dp if shape.dp > 1 else self.cp, name="data")
        self.world = Axis("world", rank, shape.world_size, None, tuple(range(shape.world_size)), self._seconds)
        if device_mesh is not None:
            self.world = replace(self.world, group=dist.group.WORLD)
        lines = self._pipeline_lines()
        self.pp_back = self._extra_axis("pp_back", lines)
        self.embedding = self._extra_axis("embedding", [[line[0], line[-1]] for line in lines])
        self.ep, self.expert_data = Axis("ep", ranks=(rank,)), replace(self.data, name="expert_data")
        if shape.ep > 1:
            self.ep, self.expert_data = self._split(self._data_lines(), shape.ep, ("ep", "expert_data"))

    @staticmethod
    def create(shape: MeshShape, device: torch.device, timeout_seconds: float | None = None) -> Mesh:
        """The mesh of the running job. ``torch.distributed`` must be initialised if there is more than one rank.

        ``timeout_seconds``: how long a rank waits for another in any of the mesh's groups. They do not inherit it from
        the default group; None leaves torch's default (30 minutes under gloo, 10 under NCCL).
        """
        if shape.world_size == 1:
            return Mesh(shape, device)
        timeout = None if timeout_seconds is None else timedelta(seconds=timeout_seconds)
        # No groups of one rank: under gloo each has a thread that wakes 100 times a second and disturbs the computing.
        names = tuple(name for name in AXES if getattr(shape, name) > 1)
        # One each: a group writes its own name into its options.
        options: dict[int | str, Any] = {name: _options(timeout) for name in names}
        device_mesh = init_device_mesh(
            device.type if device.type != "meta" else "cpu",
            tuple(getattr(shape, name) for name in names),
            mesh_dim_names=names,
            backend_override=None if None in options.values() else options,
        )
        return Mesh(shape, device, dist.get_rank(), device_mesh, timeout)

    @staticmethod
    def described(shape: MeshShape, rank: int) -> Mesh:
        """The place of ``rank`` in a mesh of that shape, without process groups: to count what a rank holds."""
        return Mesh(shape, torch.device("meta"), rank)

    @staticmethod
    def single(device: torch.device | str = "cpu") -> Mesh:
        """The mesh of ones: the same code on one process, with no process group at all."""
        return Mesh(MeshShape(), torch.device(device))

    def _axis(self, name: str) -> Axis:
        size = getattr(self.shape, name)
        if self.device_mesh is None:
            return self._described(name, size, self.shape.rank_at(**{name: 1}) if size > 1 else 1)
        return Axis(name, ranks=(self.rank,)) if size == 1 else self._line(name, self.device_mesh[name])

    def _described(self, name: str, size: int, stride: int) -> Axis:
        """An axis without a group, of this rank and others at multiples of ``stride`` from it."""
        rank = self.rank // stride % size
        first = self.rank - rank * stride
        return Axis(name, rank, size, None, tuple(range(first, first + size * stride, stride)))

    def _line(self, name: str, line: DeviceMesh) -> Axis:
        place = (name, line.get_local_rank(), line.size(), line.get_group(), _ranks(line))
        return Axis(*place, self._seconds, layerwise=name in LAYERWISE)

    @property
    def _seconds(self) -> float | None:
        return None if self._timeout is None else self._timeout.total_seconds()

    def against_the_flow(self) -> tuple[Axis, Axis]:
        """:attr:`pp` and :attr:`pp_back` once more, for what goes from a later rank to an earlier one, and back.

        Where ranks hold several stages, activations flow both ways between two ranks. In one group of NCCL each would
        wait until the other has arrived. Collective over the world; makes two groups.
        """
        lines = self._pipeline_lines()
        return self._extra_axis("pp_against", lines), self._extra_axis("pp_back_against", lines)

    def data_besides(self, axes: Iterable[str]) -> Axis:
        """The ranks that hold the same part of a parameter that is sharded over ``axes``: those ZeRO shards over."""
        return self.expert_data if "ep" in axes else self.data

    def axis(self, name: str) -> Axis:
        """The axis called ``name``, such as ``"tp"`` or ``"ep"``."""
        found = getattr(self, name, None)
        if not isinstance(found, Axis):
            raise ValueError(f"{name!r} is no axis of the mesh; its axes are {', '.join(AXES)}, ep and data")
        return found

    def split_data(self, size: int, besides: Iterable[str] = ()) -> tuple[Axis, Axis]:
        """:meth:`data_besides` in two axes: ``size`` neighbours (which a node holds) that shard, and their counterparts
        that replicate. Collective over the world; ``size`` must divide the ranks that are split."""
        lines = self._data_lines()
        if "ep" in besides:
            lines = [line[offset :: self.shape.ep] for line in lines for offset in range(self.shape.ep)]
        return self._split(lines, size, ("shard", "replicate"))

    def add_stages_axis(self, name: str, stages: Iterable[int]) -> Axis:
        """An axis of each pipeline's ranks that hold these stages, which :meth:`axis` knows by ``name`` from now on.

        Collective over the world. On a rank of another stage it is an axis of that rank alone.
        """
        chosen = list(stages)
        axis = self._new_axis(name, [[line[stage] for stage in chosen] for line in self._pipeline_lines()])
        setattr(self, name, axis)
        return axis

    def _data_lines(self) -> list[list[int]]:
        """The global ranks of every line of ``data``; of a mesh without groups its own."""
        if self.device_mesh is None:
            return [list(self.data.ranks)]
        e = self.shape
        return [
            [e.rank_at(pp=p, dp=d, cp=c, tp=t) for d in range(e.dp) for c in range(e.cp)]
            for p in range(e.pp)
            for t in range(e.tp)
        ]

    def _split(self, lines: list[list[int]], size: int, names: tuple[str, str]) -> tuple[Axis, Axis]:
        """Each line in blocks of ``size`` neighbours, and the counterparts of each in all of its blocks."""
        if size < 1 or len(lines[0]) % size:
            raise ConfigError(f"{size} ranks do not divide the {len(lines[0])} data-parallel ranks")
        blocks = [line[start : start + size] for line in lines for start in range(0, len(line), size)]
        counterparts = [line[offset::size] for line in lines for offset in range(size)]
        return self._new_axis(names[0], blocks), self._new_axis(names[1], counterparts)

    def _pipeline_lines(self) -> list[list[int]]:
        """The global ranks of every pipeline, in stage order; of a mesh without groups its own."""
        if self.device_mesh is None:
            return [list(self.pp.ranks)]
        extents = self.shape
        return [
            [extents.rank_at(pp=p, dp=d, cp=c, tp=t) for p in range(extents.pp)]
            for d in range(extents.dp)
            for c in range(extents.cp)
            for t in range(extents.tp)
        ]

    def _extra_axis(self, name: str, lines: list[list[int]]) -> Axis:
        """An axis besides the four: its lines are disjoint and need not cover every rank."""
        return Axis(name, ranks=(self.rank,)) if self.shape.pp == 1 else self._new_axis(name, lines)

    def _new_axis(self, name: str, lines: list[list[int]]) -> Axis:
        if len(lines[0]) == 1:
            return Axis(name, ranks=(self.rank,))
        group = None
        if self.device_mesh is not None:
            group, _ = dist.new_subgroups_by_enumeration(lines, timeout=self._timeout)
        for line in lines:
            if self.rank in line:
                return Axis(name, line.index(self.rank), len(line), group, tuple(line), self._seconds)
        return Axis(name, ranks=(self.rank,))

    def barrier(self) -> None:
        if self.world.group is not None:
            dist.barrier(group=self.world.group)

    def __repr__(self) -> str:
        place = ", ".join(f"{axis.name} {axis.rank}/{axis.size}" for axis in (self.pp, self.dp, self.cp, self.tp))
        return f"Mesh(rank {self.rank}: {place})"

    def __str__(self) -> str:
        return self.shape.draw(mark=self.rank)


def _options(timeout: timedelta | None) -> Any:
    """What gives a group of a device mesh a timeout; it has no argument for that."""
    make: dict[str, Callable[[], Any]] = {
        "gloo": lambda: dist.ProcessGroupGloo._Options(),  # type: ignore[attr-defined]
        "nccl": lambda: dist.ProcessGroupNCCL.Options(),
    }
    if timeout is None or dist.get_backend() not in make:
        return None
    options = make[dist.get_backend()]()
    options._timeout = timeout
    return options


def _ranks(line: DeviceMesh) -> tuple[int, ...]:
    return tuple(line.mesh.flatten().tolist())


def init_process_group(
    backend: str, rank: int, world_size: int, store: dist.Store, timeout_seconds: float = 600.0
) -> None:
    """``torch.distributed.init_process_group`` with this project's defaults."""
    dist.init_process_group(
        backend, rank=rank, world_size=world_size, store=store, timeout=timedelta(seconds=timeout_seconds)
    )
