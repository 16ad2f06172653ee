"""Gradients given by hand on TP x PP x DP: what is summed over which axis, counted once in the norm, saved once."""

from __future__ import annotations

import time
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn

from megatron_ds import comm
from megatron_ds.checkpoint import load, save
from megatron_ds.config import OptimizerConfig, ZeroConfig
from megatron_ds.mesh import Mesh, MeshShape
from megatron_ds.shard import ShardedDim, ShardSpec, empty_parameter, spec_of
from megatron_ds.testing import run_ranks
from megatron_ds.zero.flat import FlatBucket
from megatron_ds.zero.optimizer import ZeroOptimizer

LR, SCALE = 0.5, 0.125
SHAPES = {
    "embedding": (8, 5),
    "column": (4, 6),
    "row": (3, 10),
    "norm": (7,),
    "bias": (5,),
    "frozen": (9,),
    "expert": (4, 6, 3),  # sharded over ep and over tp
}
Held = dict[tuple[str, str], list[tuple[tuple[int, ...], tuple[int, ...], int, int, torch.Tensor]]]


def random(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(ord(c) * 31**i for i, c in enumerate(key)) % 2**31)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def specs_of_stage(mesh: Mesh) -> list[ShardSpec]:
    """An untied stage has its own layer; first and last also hold the embedding."""
    tp, ep, stage = mesh.tp, mesh.ep, mesh.pp.rank
    over_tp = ShardedDim.over(tp, 0)
    whole = {"replica": tp.rank > 0, "weight_decay": False}
    specs = [
        ShardSpec(f"{stage}.column", SHAPES["column"], (over_tp,)),
        ShardSpec(f"{stage}.row", SHAPES["row"], (ShardedDim.over(tp, 1),)),
        ShardSpec(f"{stage}.norm", SHAPES["norm"], reduce_over=("tp",), **whole),  # type: ignore[arg-type]
        ShardSpec(f"{stage}.bias", SHAPES["bias"], **whole),  # type: ignore[arg-type]
        ShardSpec(f"{stage}.frozen", SHAPES["frozen"], **whole),  # type: ignore[arg-type]
        ShardSpec(f"{stage}.expert", SHAPES["expert"], (ShardedDim.over(ep, 0), ShardedDim.over(tp, 1))),
    ]
    if mesh.pp.is_first or mesh.pp.is_last:
        copy = mesh.pp.size > 1 and mesh.pp.is_last
        specs.insert(0, ShardSpec("embedding", SHAPES["embedding"], (over_tp,), replica=copy))
    return specs


def gradient(spec: ShardSpec, mesh: Mesh) -> torch.Tensor:
    """This rank's part, with the coordinates over which it is expected to be summed in its key."""
    key = f"{spec.name} d{mesh.data.rank}"
    if spec.reduce_over:
        key += f" t{mesh.tp.rank}"
    if spec.name == "embedding":
        key += f" p{mesh.pp.rank}"
    return spec.slice_of(random(key, spec.global_shape))


def summed(name: str, shape: MeshShape) -> torch.Tensor:
    """The global gradient of a global parameter, with no collective."""
    keys = [f"{name} d{d}" for d in range(shape.dp * shape.cp)]
    if name.endswith("norm"):
        keys = [f"{key} t{t}" for key in keys for t in range(shape.tp)]
    if name == "embedding":
        keys = [f"{key} p{p}" for key in keys for p in sorted({0, shape.pp - 1})]
    size = SHAPES[name.split(".")[-1]]
    if not name.endswith("expert"):
        return sum((random(key, size) for key in keys), torch.zeros(size, dtype=torch.float64))
    # Of each expert the sum over the ranks that hold it: every ep-th one of the data-parallel ranks.
    total = torch.zeros(size, dtype=torch.float64)
    each = size[0] // shape.ep
    for d, key in enumerate(keys):
        rows = slice(d % shape.ep * each, (d % shape.ep + 1) * each)
        total[rows] += random(key, size)[rows]
    return total


def global_names(shape: MeshShape) -> list[str]:
    layer = ("column", "row", "norm", "bias", "frozen", "expert")
    return ["embedding", *(f"{p}.{name}" for p in range(shape.pp) for name in layer)]


def build(mesh: Mesh, stage: int, name: str, **settings: Any) -> tuple[ZeroOptimizer, list[nn.Parameter]]:
    """``settings``: of ``ZeroConfig``."""
    parameters = []
    for spec in specs_of_stage(mesh):
        parameter = empty_parameter(spec, dtype=torch.float64)
        parameter.data.copy_(spec.slice_of(random(spec.name, spec.global_shape)))
        parameter.requires_grad_(not spec.name.endswith("frozen"))
        parameters.append(parameter)
    tied = [(p, mesh.embedding) for p in parameters if spec_of(p).name == "embedding"]
    zero = ZeroOptimizer(
        parameters,
        mesh,
        ZeroConfig(stage=stage, **{"bucket_mb": 0.0004, **settings}),  # type: ignore[arg-type]
        OptimizerConfig(name=name, lr=LR, weight_decay=0.0, momentum=0.9),  # type: ignore[arg-type]
        shared_over=tied,
    )
    return zero, parameters


def reduce_gradients(zero: ZeroOptimizer, parameters: list[nn.Parameter], mesh: Mesh) -> None:
    zero.start_step()
    zero.start_backward(last=True)
    for parameter in reversed(parameters):
        if parameter.requires_grad:
            parameter.main_grad.add(gradient(spec_of(parameter), mesh))  # type: ignore[attr-defined]
    zero.finish_gradients()


def one_step(shape: MeshShape, stage: int) -> tuple[float, dict[str, float], Held]:
    """Squared norm, largest error of each local parameter, and the flat shards for saving."""
    mesh = Mesh.create(shape, torch.device("cpu"))
    zero, parameters = build(mesh, stage, "sgd")
    reduce_gradients(zero, parameters, mesh)
    norm = comm.all_reduce(zero.norm_squared(), mesh.world).item()
    zero.step(LR, SCALE)
    errors = {}
    for parameter in parameters:
        spec = spec_of(parameter)
        want = random(spec.name, spec.global_shape)
        if parameter.requires_grad:
            want = want - LR * SCALE * summed(spec.name, shape)
        errors[spec.name] = (parameter.detach() - spec.slice_of(want)).abs().max().item()
    held: Held = {}
    for flat_shard in zero.flat_shards():
        part = (flat_shard.box_offset, flat_shard.box_shape, flat_shard.start, flat_shard.stop, flat_shard.data.clone())
        held.setdefault((flat_shard.kind, flat_shard.name), []).append(part)
    return norm, errors, held


MESHES = [
    MeshShape(tp=2, dp=2),
    MeshShape(pp=2, dp=2),
    MeshShape(pp=3),
    MeshShape(pp=2, dp=2, tp=2),
    MeshShape(dp=4, tp=2, ep=2),
    MeshShape(dp=2, cp=2, ep=4),
]


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("shape", MESHES, ids=lambda s: f"pp{s.pp}dp{s.dp}cp{s.cp}tp{s.tp}ep{s.ep}")
def test_sums_norm_and_flat_shards(shape: MeshShape, stage: int) -> None:
    results = run_ranks(one_step, shape.world_size, shape, stage)
    trained = [name for name in global_names(shape) if not name.endswith("frozen")]
    squared = sum(summed(name, shape).square().sum().item() for name in trained)
    for rank, (norm, errors, _) in enumerate(results):
        assert norm == pytest.approx(squared, rel=1e-13), f"rank {rank}"
        assert all(error < 1e-14 for error in errors.values()), f"rank {rank}: {errors}"

    assert stage or all(held for _, _, held in results)  # replicas share the writing
    # Together the flat shards hold every element of every global tensor once.
    for kind, names in (("param", global_names(shape)), ("momentum_buffer", trained)):
        for name in names:
            size = SHAPES[name.split(".")[-1]]
            found, times = torch.zeros(size, dtype=torch.float64), torch.zeros(size)
            for _, _, held in results:
                for offset, box, start, stop, data in held.pop((kind, name), []):
                    flat, count = torch.zeros(prod(box), dtype=torch.float64), torch.zeros(prod(box))
                    flat[start:stop], count[start:stop] = data, 1.0
                    where = tuple(slice(o, o + b) for o, b in zip(offset, box))
                    found[where] += flat.view(box)
                    times[where] += count.view(box)
            assert torch.equal(times, torch.ones(size)), f"{kind} of {name} is saved {times.tolist()} times"
            want = summed(name, shape) * SCALE
            if kind == "param":
                want = random(name, size) - (0.0 if name.endswith("frozen") else LR) * want
            torch.testing.assert_close(found, want, rtol=0, atol=1e-14)
    assert not any(held for _, _, held in results)


def reload(shape: MeshShape, stage: int) -> list[float]:
    """Fill what a rank holds from global tensors; refreshed parameters and the next update must follow from them."""
    mesh = Mesh.create(shape, torch.device("cpu"))
    zero, parameters = build(mesh, stage, "adamw")
    for flat_shard in zero.flat_shards(for_load=True):
        box = tuple(slice(o, o + b) for o, b in zip(flat_shard.box_offset, flat_shard.box_shape))
        values = random(f"loaded {flat_shard.name}", flat_shard.global_shape)
        if flat_shard.kind != "param":
            values = values.abs() + (0.5 if flat_shard.kind == "exp_avg_sq" else 0.0)
        flat_shard.data.copy_(values[box].flatten()[flat_shard.start : flat_shard.stop])
    zero.refresh_parameters()
    zero.count = 9
    errors = []
    for parameter in parameters:
        spec = spec_of(parameter)
        want = spec.slice_of(random(f"loaded {spec.name}", spec.global_shape))
        errors.append((parameter.detach() - want).abs().max().item())
    zero.start_step()
    zero.finish_gradients()  # no gradient at all: the update is that of the moments, which decay
    zero.step(LR)
    assert zero.count == 10
    for parameter in parameters:
        spec = spec_of(parameter)
        start = spec.slice_of(random(f"loaded {spec.name}", spec.global_shape))
        moment = start.abs() * 0.9 / (1 - 0.9**10)
        square = (start.abs() + 0.5) * 0.95 / (1 - 0.95**10)
        want = start - LR * moment / (square.sqrt() + 1e-8) if parameter.requires_grad else start
        errors.append((parameter.detach() - want).abs().max().item())
    return errors


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("shape", [MeshShape(pp=2, dp=2), MeshShape(dp=4, ep=2)], ids=["pp2dp2", "dp4ep2"])
def test_loading_and_the_update_after_it(shape: MeshShape, stage: int) -> None:
    for errors in run_ranks(reload, 4, shape, stage):
        assert all(error < 1e-12 for error in errors), errors


def passed_on(
    shape: MeshShape, stage: int, source: str, target: str, trained: MeshShape
) -> dict[tuple[str, str], float]:
    """Load what mesh ``trained`` saved after a step, or take that step where there is no ``source``; save it.

    Returns the errors of all that a rank holds, against the update computed with no collective.
    """
    mesh = Mesh.create(shape, torch.device("cpu"))
    zero, parameters = build(mesh, stage, "sgd")
    if source:
        shards = list(zero.flat_shards(for_load=True))
        for shard in shards:
            shard.data.fill_(float("nan"))
        load(source, shards, mesh.world)
        zero.refresh_parameters()
    else:
        reduce_gradients(zero, parameters, mesh)
        zero.step(LR, SCALE)
        shards = list(zero.flat_shards())
    errors = {}
    for parameter in parameters:
        spec = spec_of(parameter)
        moment = SCALE * summed(spec.name, trained)
        values = {"param": random(spec.name, spec.global_shape), "momentum_buffer": moment}
        if parameter.requires_grad:
            values["param"] = values["param"] - LR * moment
        errors["read", spec.name] = (parameter.detach() - spec.slice_of(values["param"])).abs().max().item()
        for shard in (shard for shard in shards if shard.name == spec.name and shard.data.numel()):
            box = tuple(slice(o, o + b) for o, b in zip(shard.box_offset, shard.box_shape))
            want = values[shard.kind][box].flatten()[shard.start : shard.stop]
            errors[shard.kind, spec.name] = (shard.data - want).abs().max().item()
    save(target, 1, list(zero.flat_shards()), {}, mesh.world)
    return errors


def test_a_checkpoint_of_experts_goes_through_every_kind_of_mesh(tmp_path: Path) -> None:
    """With a parameter that is cut on two dims over ep and tp, whose ZeRO axis is what ep leaves of the data axis."""
    shapes = [MeshShape(dp=4, tp=2, ep=2), MeshShape(dp=2, cp=2, ep=4), MeshShape(dp=3, tp=2), MeshShape()]
    source = ""
    for number, (shape, stage) in enumerate(zip([*shapes, shapes[0]], (2, 1, 0, 1, 1), strict=True)):
        target = str(tmp_path / str(number))
        for errors in run_ranks(passed_on, shape.world_size, shape, stage, source, target, shapes[0]):
            assert len(errors) >= 7 and all(error < 1e-14 for error in errors.values()), (shape, errors)
        source = target


def skipped_then_stepped() -> bool:
    """A skipped step leaves no trace, and peers' buffers are not overwritten while they are read."""
    mesh = Mesh.create(MeshShape(dp=dist.get_world_size()), torch.device("cpu"))
    outcomes = []
    for skips in (0, 3):
        zero, parameters = build(mesh, 1, "adamw")
        for attempt in range(skips + 1):
            zero.start_step()
            for parameter in parameters:
                if parameter.requires_grad:
                    bad = torch.full_like(parameter, float("nan")) if attempt < skips else None
                    parameter.main_grad.add(gradient(spec_of(parameter), mesh) if bad is None else bad)  # type: ignore[attr-defined]
            zero.finish_gradients()
            norm = comm.all_reduce(zero.norm_squared(), mesh.world)
            if norm.isfinite():
                zero.step(LR, SCALE)
            else:
                zero.skip()
        assert zero.count == 1
        outcomes.append([p.detach().clone() for p in parameters])
    return all(torch.equal(a, b) for a, b in zip(*outcomes))


def test_a_skipped_step_leaves_no_trace() -> None:
    assert run_ranks(skipped_then_stepped, 3) == [True] * 3


def slow_reader() -> list[bool]:
    """Rank 0 dawdles before it reads its peers; they go on as far as they can. Values must be those of their time."""
    mesh = Mesh.create(MeshShape(dp=dist.get_world_size()), torch.device("cpu"))
    zero, parameters = build(mesh, 1, "sgd")
    late = time.sleep if mesh.rank == 0 else (lambda seconds: None)
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    right = []
    for value in (1.0, 10.0, 100.0):
        zero.start_step()
        zero.start_backward(last=True)
        for parameter in trained:
            parameter.main_grad.add(torch.full_like(parameter, value))  # type: ignore[attr-defined]
        (context,) = zero.reducer.contexts.values()
        while context.launched < len(context.buckets):
            zero.reducer._launch(context)
        late(0.2)
        zero.finish_gradients()
        for bucket in zero.buckets:
            own = bucket.gradients.shard[bucket.gradients.shard != 0]
            right.append(bool((own == value * mesh.data.size).all()))
        zero.skip()
    for value in (3.0, 4.0):
        for flat_shard in zero.flat_shards(for_load=True):
            flat_shard.data.fill_(value)
        for bucket in zero.buckets:
            bucket.start_gather()
        finish = zero.buckets[-1].finish_gather  # of the first that is waited for

        def slowly(finish: Callable[[], bool] = finish) -> bool:
            late(0.2)
            return finish()

        with patch.object(zero.buckets[-1], "finish_gather", slowly):
            zero._publish()
        right += [bool((parameter == value).all()) for parameter in parameters]
    mesh.barrier()
    return right


def slow_sums() -> list[bool]:
    """Rank 0 dawdles before it reads its peer's gradients, whose memory the peer needs for its next micro-batch."""
    mesh = Mesh.create(MeshShape(dp=dist.get_world_size()), torch.device("cpu"))
    zero, parameters = build(mesh, 2, "sgd")
    trained, finish = (
        [parameter for parameter in reversed(parameters) if parameter.requires_grad],
        FlatBucket.finish_reduce,
    )

    def slowly(bucket: FlatBucket) -> None:
        time.sleep(0.02)
        finish(bucket)

    with patch.object(FlatBucket, "finish_reduce", slowly if mesh.rank == 0 else finish):
        zero.start_step()
        for value in (1.0, 10.0, 100.0):
            zero.start_backward(last=value == 100.0)
            for parameter in trained:
                parameter.main_grad.add(torch.full_like(parameter, value))  # type: ignore[attr-defined]
            zero.end_backward()
        zero.finish_gradients()
    mesh.barrier()
    sums = [shard.data for shard in zero.gradient_shards()]
    return [bool((own == 111.0 * mesh.data.size).all()) for own in sums]


def slow_peer() -> list[list[bool]]:
    return [slow_reader(), slow_sums()]


def test_nobody_overwrites_what_a_slow_peer_has_yet_to_read() -> None:
    for at_stage_1, at_stage_2 in run_ranks(slow_peer, 2):
        assert all(at_stage_1) and all(at_stage_2) and len(at_stage_2) >= 2


def edited_at_once() -> list[bool]:
    """Rank 0 is slow to copy its peer's parameters after a step; the peer edits its own as soon as the step is over."""
    mesh = Mesh.create(MeshShape(dp=dist.get_world_size()), torch.device("cpu"))
    zero, parameters = build(mesh, 1, "sgd")
    before = [p.detach().clone() for p in parameters]
    for bucket in zero.buckets if mesh.rank == 0 else ():

        def finish(finish: Callable[[], bool] = bucket.finish_gather) -> bool:
            time.sleep(0.05)
            return finish()

        bucket.finish_gather = finish  # type: ignore[method-assign]
    zero.start_step()
    zero.finish_gradients()
    zero.step(LR)  # with gradients of zero
    for parameter in parameters if mesh.rank > 0 else ():
        parameter.data.mul_(2)
    mesh.barrier()
    return [torch.equal(p.detach(), b) for p, b in zip(parameters, before)]


def test_after_a_step_a_rank_may_edit_its_parameters_though_a_peer_is_slow() -> None:
    unchanged, _ = run_ranks(edited_at_once, 2)
    assert all(unchanged)
