"""The mesh: coordinates and groups against brute force and torch's own mesh, on fake ranks and on real ones."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_ds.errors import ConfigError
from megatron_ds.mesh import AXES, Axis, Mesh, MeshShape
from megatron_ds.testing import device_of_rank, run_ranks

SHAPES = [
    MeshShape(tp=2),
    MeshShape(pp=2),
    MeshShape(dp=2),
    MeshShape(pp=2, dp=2, tp=2),
    MeshShape(pp=3, dp=2, cp=2, tp=2),
    MeshShape(pp=4, dp=1, cp=2, tp=3),
    MeshShape(pp=16, dp=8, tp=8),
    MeshShape(pp=2, dp=3, cp=2, tp=2, ep=3),
    MeshShape(dp=2, cp=2, ep=4),
]
extents = st.integers(1, 6)
shapes = st.builds(MeshShape, pp=extents, dp=extents, cp=extents, tp=extents)


@contextmanager
def fake_rank(rank: int, world_size: int) -> Iterator[None]:
    """This process as one rank of a job whose other ranks do not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def line_through(shape: MeshShape, rank: int, *free: str) -> tuple[int, ...]:
    """Every rank that agrees with ``rank`` on all axes but the free ones: the slow, obvious way."""
    own = shape.coordinates(rank)
    return tuple(
        other
        for other in range(shape.world_size)
        if all(shape.coordinates(other)[name] == own[name] for name in AXES if name not in free)
    )


# --- coordinates ------------------------------------------------------------------------------------------------


@given(shapes)
def test_coordinates_count_through_the_axes_with_tp_fastest(shape: MeshShape) -> None:
    counted = product(range(shape.pp), range(shape.dp), range(shape.cp), range(shape.tp))
    for rank, place in enumerate(counted):
        assert tuple(shape.coordinates(rank).values()) == place
        assert shape.rank_at(**shape.coordinates(rank)) == rank
    assert list(shape.coordinates(0)) == list(AXES) == ["pp", "dp", "cp", "tp"]


def test_experts_divide_the_data_axis() -> None:
    with pytest.raises(ConfigError, match="ep=4 does not divide dp=3 x cp=2 = 6 ranks; ep may be 1, 2, 3 or 6"):
        MeshShape(dp=3, cp=2, ep=4)


def test_an_axis_left_out_counts_as_zero() -> None:
    shape = MeshShape(pp=2, dp=3, tp=4)
    assert shape.rank_at(pp=1) == 12 and shape.rank_at(dp=2, tp=1) == 9 and shape.rank_at() == 0


@given(shapes)
def test_the_data_axis_is_what_the_world_size_leaves(shape: MeshShape) -> None:
    assert MeshShape.for_world(shape.world_size, pp=shape.pp, cp=shape.cp, tp=shape.tp) == shape
    assert MeshShape.for_world(shape.world_size, pp=shape.pp, cp=shape.cp, tp=shape.tp, dp=shape.dp) == shape


@pytest.mark.parametrize("shape", SHAPES, ids=repr)
def test_axes_are_those_of_torchs_mesh_and_of_brute_force(shape: MeshShape) -> None:
    world = shape.world_size
    for rank in sorted({0, 1, world // 3, world // 2, world - 1}):
        with fake_rank(rank, world):
            mesh = Mesh.create(shape, torch.device("cpu"))
            theirs = init_device_mesh("cpu", (shape.pp, shape.dp, shape.cp, shape.tp), mesh_dim_names=AXES)
            coordinates = theirs.get_coordinate()
            assert coordinates is not None
            for name, coordinate in zip(AXES, coordinates):
                axis: Axis = getattr(mesh, name)
                assert axis.rank == coordinate == shape.coordinates(rank)[name]
                assert axis.size == getattr(shape, name)
                assert axis.ranks == line_through(shape, rank, name)
                assert axis.ranks == tuple(theirs[name].mesh.flatten().tolist())
            assert mesh.data.ranks == line_through(shape, rank, "dp", "cp")
            assert mesh.world.ranks == tuple(range(world))
            assert mesh.pp_back.ranks == mesh.pp.ranks and mesh.pp_back.rank == mesh.pp.rank
            ends = (mesh.pp.ranks[0], mesh.pp.ranks[-1]) if shape.pp > 1 else (rank,)
            assert mesh.embedding.ranks == (ends if rank in ends else (rank,))
            place_in_data = mesh.data.ranks.index(rank)
            assert mesh.ep.ranks == mesh.data.ranks[place_in_data // shape.ep * shape.ep :][: shape.ep]
            assert mesh.expert_data.ranks == mesh.data.ranks[place_in_data % shape.ep :: shape.ep]
            assert mesh.data_besides(()) is mesh.data and mesh.data_besides(("ep",)) is mesh.expert_data
            assert mesh.axis("ep") is mesh.ep
            extra = (mesh.pp_back, mesh.data, mesh.embedding, mesh.world, mesh.ep, mesh.expert_data)
            for axis in (mesh.pp, mesh.dp, mesh.cp, mesh.tp, *extra):
                assert axis.ranks[axis.rank] == rank and len(axis.ranks) == axis.size
                assert (axis.group is None) == (axis.size == 1)
                if axis.group is not None:
                    assert tuple(dist.get_process_group_ranks(axis.group)) == axis.ranks
            if shape.pp > 1:
                assert mesh.pp_back.group is not mesh.pp.group
            # A group that nobody needs still has a thread that polls, and a communicator on a GPU.
            if mesh.device_mesh is not None:
                assert mesh.device_mesh.mesh_dim_names == tuple(n for n in AXES if getattr(shape, n) > 1)
            assert (mesh.data.group is mesh.dp.group) == (shape.cp == 1)
            place = shape.coordinates(rank)
            assert repr(mesh).startswith(f"Mesh(rank {rank}: pp {place['pp']}/{shape.pp}, dp")


@pytest.mark.parametrize("shape", SHAPES, ids=repr)
def test_a_described_mesh_has_the_axes_of_a_real_one_without_groups(shape: MeshShape) -> None:
    world = shape.world_size
    names = (*AXES, "pp_back", "data", "world", "embedding", "ep", "expert_data")
    for rank in sorted({0, 1, world // 3, world // 2, world - 1}):
        with fake_rank(rank, world):
            real = Mesh.create(shape, torch.device("cpu"))
            wanted = [real.axis(name) for name in names]
            wanted += real.split_data(shape.dp)
        mesh = Mesh.described(shape, rank)
        found = [mesh.axis(name) for name in names]
        found += mesh.split_data(shape.dp)
        for axis, other in zip(found, wanted):
            assert axis.group is None
            assert (axis.name, axis.rank, axis.size, axis.ranks) == (other.name, other.rank, other.size, other.ranks)


def test_one_process_is_a_mesh_of_ones_without_groups() -> None:
    assert not dist.is_initialized()
    mesh = Mesh.single()
    for axis in (mesh.pp, mesh.dp, mesh.cp, mesh.tp, mesh.pp_back, mesh.data, mesh.embedding, mesh.world):
        assert (axis.rank, axis.size, axis.group, axis.ranks) == (0, 1, None, (0,))
        assert axis.is_first and axis.is_last
    mesh.barrier()
    assert Mesh.create(MeshShape(), torch.device("cpu")).device_mesh is None


def test_the_ends_of_an_axis() -> None:
    ends = [(Axis("pp", rank, 3).is_first, Axis("pp", rank, 3).is_last) for rank in range(3)]
    assert ends == [(True, False), (False, False), (False, True)]


# --- real groups ------------------------------------------------------------------------------------------------


def sums_of_every_axis(pp: int, dp: int, cp: int, tp: int) -> dict[str, float]:
    """On each axis, the sum of 2**rank over its ranks: which ranks took part can be read from the bits."""
    rank, world = dist.get_rank(), dist.get_world_size()
    device = device_of_rank(rank, world)
    mesh = Mesh.create(MeshShape(pp=pp, dp=dp, cp=cp, tp=tp), device)
    sums = {}
    for name in ("pp", "dp", "cp", "tp", "pp_back", "data", "embedding", "world"):
        axis: Axis = getattr(mesh, name)
        tensor = torch.tensor(2.0**rank, device=device)
        if axis.group is not None:
            dist.all_reduce(tensor, group=axis.group)
        sums[name] = tensor.item()
    mesh.barrier()
    return sums


@pytest.mark.parametrize("extent", [(2, 2, 1, 2), (4, 1, 2, 1)], ids=str)
def test_collectives_reach_exactly_the_ranks_of_the_axis(extent: tuple[int, int, int, int]) -> None:
    shape = MeshShape(*extent)
    results = run_ranks(sums_of_every_axis, shape.world_size, *extent)
    assert len(results) == shape.world_size
    for rank, sums in enumerate(results):
        place = shape.coordinates(rank)
        line = line_through(shape, rank, "pp")
        expected = {name: line_through(shape, rank, name) for name in AXES}
        expected["pp_back"] = line
        expected["data"] = line_through(shape, rank, "dp", "cp")
        expected["world"] = tuple(range(shape.world_size))
        expected["embedding"] = (line[0], line[-1]) if place["pp"] in (0, shape.pp - 1) else (rank,)
        assert sums == {name: float(sum(2**r for r in ranks)) for name, ranks in expected.items()}


# --- drawing ----------------------------------------------------------------------------------------------------

DRAWN = """\
mesh of 8 ranks: pp=2 x dp=2 x cp=1 x tp=2
          dp 0   dp 1
        +------+------+
stage 0 |[0] 1 | 2  3 |
stage 1 | 4  5 | 6  7 |
        +------+------+   (tp ranks side by side inside a box)"""


def test_the_drawing() -> None:
    drawn = MeshShape(pp=2, dp=2, tp=2).draw(mark=0)
    assert [line.rstrip() for line in drawn.splitlines()] == DRAWN.splitlines()
    assert MeshShape().draw().startswith("mesh of 1 rank: pp=1 x dp=1 x cp=1 x tp=1\n")
    assert str(Mesh.single()) == MeshShape().draw(mark=0)


@given(shapes.filter(lambda shape: shape.world_size <= 64 and shape.dp * shape.cp * shape.tp <= 12))
def test_a_small_mesh_is_drawn_whole(shape: MeshShape) -> None:
    rows = [line for line in shape.draw(mark=shape.world_size - 1).splitlines() if line.startswith("stage")]
    numbers = [int(n) for row in rows for n in re.findall(r"\d+", row.split("|", 1)[1])]
    assert sorted(numbers) == list(range(shape.world_size))
    for stage, row in enumerate(rows):
        for replica, box in enumerate(row.split("|")[1:-1]):
            places = [shape.coordinates(int(n)) for n in re.findall(r"\d+", box)]
            assert {(place["pp"], place["dp"]) for place in places} == {(stage, replica)}
    assert sum(row.count(f"[{shape.world_size - 1}]") for row in rows) == 1


def test_a_large_mesh_says_what_it_leaves_out() -> None:
    drawn = MeshShape(pp=20, dp=512, tp=8).draw()
    lines = drawn.splitlines()
    assert lines[0] == "mesh of 81920 ranks: pp=20 x dp=512 x cp=1 x tp=8"
    assert len(lines) < 25 and max(map(len, lines)) < 120
    assert lines[1].rstrip().endswith("...") and "  ... 4 more stages" in lines
