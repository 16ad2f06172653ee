"""Weights that are quantised from fp32 masters in a bf16 run, against a slow quantisation of what a checkpoint holds.

On every mesh and at every stage of ZeRO the products are given the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.distributed as dist
from parity_rows import Row, config_of, reference_config
from parity_run import steps_of
from torch import Tensor, nn

from megatron_ds.comm import Pending, buffers, local
from megatron_ds.config import PrecisionConfig, RunConfig, validate
from megatron_ds.data.loader import MicroBatch
from megatron_ds.errors import ShardedParameterError
from megatron_ds.kernels.float8 import E4M3, Float8
from megatron_ds.layers import float8_layers
from megatron_ds.layers import float8_recipe as float8
from megatron_ds.mesh import Axis, Mesh
from megatron_ds.models.families import task_of
from megatron_ds.optim.muon import MOMENTUM
from megatron_ds.pipeline.stage import StageSpan
from megatron_ds.shard import spec_of
from megatron_ds.shard.flat_shards import FlatShard
from megatron_ds.testing import run_ranks
from megatron_ds.train import build as build_module
from megatron_ds.train.build import RankRuntime, build
from megatron_ds.train.rank_bytes import account_of
from megatron_ds.zero.memory import TransientParameters

Array = npt.NDArray[Any]
Box = tuple[slice, ...]

ONE = Row((1, 1, 1), architecture="llama", tied=False)
ALONE = [replace(ONE, fp8="blockwise"), replace(ONE, fp8="rowwise", zero=3, offload="nvme")]
CUT = [replace(ONE, mesh=(2, 1, 1), fp8=fp8, sequence_parallel=fp8 == "rowwise") for fp8 in ("tensorwise", "rowwise")]
STAGES = [replace(ONE, mesh=(1, 2, 1), fp8=fp8) for fp8 in ("blockwise", "rowwise")]
SHARDED = [
    replace(ONE, mesh=(1, 1, 2), fp8="rowwise", zero=0),
    replace(ONE, mesh=(1, 1, 2), fp8="tensorwise", zero=1, offload="cpu"),
    replace(ONE, mesh=(1, 1, 2), fp8="blockwise", zero=2, bucket_mb=0.008),
    replace(ONE, mesh=(1, 1, 2), fp8="rowwise", zero=3),
    replace(ONE, mesh=(1, 1, 2), fp8="blockwise", zero=3, offload="nvme", keep_whole=True),
    replace(ONE, mesh=(1, 1, 2), fp8="rowwise", zero=3, offload="nvme", bucket_mb=0.008),
    replace(ONE, mesh=(1, 1, 2), fp8="tensorwise", zero=3, offload="cpu", bucket_mb=0.008),
]
UNEVEN = [
    replace(ONE, mesh=(1, 1, 3), fp8="rowwise", zero=1, optimizer="muon"),
    replace(ONE, mesh=(1, 1, 3), fp8="tensorwise", zero=2, bucket_mb=0.008),
    replace(ONE, mesh=(1, 1, 3), fp8="blockwise", zero=3, bucket_mb=0.008),
]
BOTH = [
    replace(ONE, mesh=(2, 1, 2), fp8="rowwise", zero=1, bucket_mb=0.008),
    replace(ONE, mesh=(2, 1, 2), fp8="tensorwise", zero=3, bucket_mb=0.008),
    replace(ONE, mesh=(2, 1, 2), fp8="blockwise", zero=2),
    replace(ONE, mesh=(2, 1, 2), fp8="rowwise", zero=3, sequence_parallel=True),
]
NODES = [replace(ONE, mesh=(1, 1, 4), fp8="rowwise", zero=3), replace(ONE, mesh=(1, 1, 4), fp8="blockwise", zero=3)]
"""Small buckets go through the process group, and what they send is counted."""
SIDE = 4
FACTOR = -1.25
POSITIVE = torch.arange(127, dtype=torch.uint8).view(E4M3).double().numpy()
"""The numbers of e4m3 from zero to 448, by their bits."""


@dataclass(frozen=True)
class Share:
    """A box of a global tensor that one rank has; of a weight in FP8 its bits and scales ``[*out, in]``."""

    name: str
    shape: tuple[int, ...]
    box: Box
    values: Array
    scales: Array | None = None


@dataclass(frozen=True)
class Look:
    """Of one rank, before a step: the masters, also before a user's write to them, if there was one.

    Attributes:
        given: weights that the step's products are given, by the dim that they sum over.
    """

    before: list[Share]
    masters: list[Share]
    given: dict[str, list[Share]]


def half(row: Row) -> RunConfig:
    values = config_of(row).to_dict()
    values["precision"] |= {"dtype": "bf16"}
    if row.mesh[2] == 4:  # two nodes, and what is not in FP8 is sent in 8 bits
        values["zero"] |= {"secondary_size": 2, "quantized_weights": "int8"}
    return RunConfig.model_validate(values)


def box_of(offset: Sequence[int], shape: Sequence[int]) -> Box:
    return tuple(slice(start, start + size) for start, size in zip(offset, shape))


def masters_of(parts: RankRuntime) -> list[Share]:
    """What a checkpoint would hold, each element on one rank."""
    found = []
    for shard in parts.optimizer.flat_shards():
        assert shard.kind in ("param", "exp_avg", "exp_avg_sq", MOMENTUM) and shard.data.dtype == torch.float32
        if shard.kind == "param":
            acquired = shard.holder.acquire() if shard.holder else None
            for box, values in shard.parts(acquired):
                share = values.numpy().copy()
                found.append(Share(shard.name, shard.global_shape, box_of(box.offset, box.shape), share))
            if shard.holder:
                shard.holder.release(changed=False)
    return found


@contextmanager
def seen(config: RunConfig, parts: RankRuntime) -> Iterator[dict[str, list[Share]]]:
    """Every weight that a product is given, whenever a micro-batch or its recomputation does."""
    found: dict[str, list[Share]] = {"in": [], "out": []}
    original = float8.Float8Recipe._weight
    gathered = parts.optimizer.shard.size > 1 or parts.optimizer.gatherer is not None
    specs = {
        id(x.recipe): spec_of(x.weight)
        for stage in parts.stages.values()
        for _, x in float8_layers.linear_layers(stage)
    }

    def weight(recipe: float8.Float8Recipe, matrix: Tensor, over: str) -> Float8:
        quantised = original(recipe, matrix, over)
        assert (matrix.untyped_storage().size() < 8) == gathered, "a rank has the weight itself, or has it not"
        rows, k = quantised.values.shape
        bits, scales = quantised.values.view(torch.uint8), quantised.scale
        scales = scales.repeat_interleave(rows // scales.shape[0], 0).repeat_interleave(k // scales.shape[1], 1)
        spec, turn = specs[id(recipe)], over == "out"
        both = [(x.t() if turn else x).reshape(spec.local_shape).clone().numpy() for x in (bits, scales)]
        found[over].append(Share(spec.name, spec.global_shape, box_of(spec.offset, spec.local_shape), *both))
        return quantised

    with patch.object(float8.Float8Recipe, "_weight", weight):
        yield found


def held(parts: RankRuntime) -> int:
    """Bytes of this rank's parameters between steps, wherever they are."""
    flat = [each for b in parts.optimizer.buckets for each in (b.parameters, *getattr(b.parameters, "codes", ()))]
    regions = [memory.holding.region for memory in flat if isinstance(memory, TransientParameters)]
    weights = [p.float8 for stage in parts.stages.values() for p in stage.parameters() if hasattr(p, "float8")]
    there = [memory.whole for memory in flat if not isinstance(memory, TransientParameters)]
    there += [scale for weight in weights for scale in weight._scales]
    return sum(tensor.nbytes for tensor in there) + sum(each.numel * each.dtype.itemsize for each in regions)


@contextmanager
def sent(apart: bool) -> Iterator[list[int]]:
    """Bytes of the weights in FP8 that come through the process group, of whole buckets; then nothing comes in fp32."""
    count, original = [0], buffers.all_gather_start

    def start(output: Tensor, tensor: Tensor, axis: Axis) -> Pending:
        assert output.dtype in (torch.uint8, torch.bfloat16) or not apart
        count[0] += output.nbytes if output.dtype == torch.uint8 else 0
        return original(output, tensor, axis)

    with patch.object(buffers, "all_gather_start", start):
        yield count


def codes_sent(config: RunConfig, parts: RankRuntime) -> int:
    """The same: one byte an element, or two, of each bucket once a step, and at stage 3 for each of its uses."""
    codes, units = 2 if config.precision.fp8 == "rowwise" else 1, parts.optimizer.gatherer
    gathers = parts.optimizer.buckets if units is None else units._order
    return sum(codes * bucket.layout.size for bucket in gathers if bucket.layout.key.dtype == torch.float32)


def exact(parts: RankRuntime) -> bool:
    """Whether who asks for the weights has this rank's masters among them, though a gather for a use is under way."""
    units, parameters = parts.optimizer.gatherer, [p for stage in parts.stages.values() for p in stage.parameters()]
    masters = [shard for shard in parts.optimizer.flat_shards(for_load=True) if shard.kind == "param"]
    if units is not None:
        units._start_all(units._buckets[:3])
    with parts.optimizer.gathered(parameters):
        whole = {spec_of(p).name: p.detach().reshape(-1) for p in parameters}
        return all(holds(shard, whole[shard.name][shard.start : shard.stop]) for shard in masters)


def holds(shard: FlatShard, values: Tensor) -> bool:
    """Whether a shard, wherever it is, has these values."""
    if shard.holder is None:
        return torch.equal(values, shard.data.to(values.dtype))
    kept = shard.holder.acquire()[shard.offset : shard.offset + values.numel()].clone()
    shard.holder.release(changed=False)
    return torch.equal(values, kept.to(values.dtype))


@torch.no_grad()
def looks(rows: list[Row]) -> list[list[Look]]:
    """Inside a job, of every row: at the first weights, after an update, and after a user's write to them."""
    mesh = Mesh.single()
    if dist.is_initialized():
        mesh = Mesh.create(validate(half(rows[0]), dist.get_world_size()), torch.device("cpu"))
    results = []
    for row in rows:
        apart, config = row.bucket_mb < 1, half(row)
        with patch.object(local, "open_buffers", lambda *_: None) if apart else nullcontext():
            parts = build(config, mesh, task_of(config))
        account = account_of(config, task_of(config), mesh.shape, mesh.rank)
        assert parts.optimizer.bytes_by_store() == account.layout.bytes().memory
        if row.mesh[2] < 4:
            assert held(parts) == account.layout.bytes().by_kind["parameters"]
        found = []
        for step, batches in enumerate(steps_of(config, mesh)):
            before = masters_of(parts)
            if step == 2:
                parameters = [p for stage in parts.stages.values() for p in stage.parameters()]
                with parts.optimizer.gathered(parameters, write=True):
                    for p in parameters:
                        p.mul_(FACTOR)
            masters = masters_of(parts)
            with seen(config, parts) as given, sent(apart) as counted, torch.enable_grad():
                parts.step(batches)
            if apart:
                assert counted[0] == codes_sent(config, parts)
            found.append(Look(before, masters, given))
        assert exact(parts) and isfinite(parts.step.evaluate([batches]))
        weights: list[Any] = [
            x.weight for stage in parts.stages.values() for _, x in float8_layers.linear_layers(stage)
        ]
        if parts.optimizer.gatherer is not None:  # else autograd would refuse what a compiled block kept over a gather
            assert not any(codes._version for weight in weights for codes in weight.float8._codes)
            read_in_forward(parts, batches)
        elif parts.optimizer.shard.size > 1:  # who looks all the same sees that nothing is there
            assert all(bool(weight.isnan().all()) for weight in weights)
        results.append(found)
        parts.optimizer.close()
        assert all(bool(p.isfinite().all()) for stage in parts.stages.values() for p in stage.parameters())
    return results


def read_in_forward(parts: RankRuntime, batches: Sequence[MicroBatch]) -> None:
    """A hook that reads a weight where its unit is gathered gets an error, and the memory that is not there is left."""
    _, layer = next(float8_layers.linear_layers(parts.stages[0]))
    hook = layer.register_forward_hook(lambda module, *_: module.weight.norm())
    with pytest.raises(
        ShardedParameterError, match=r"norm\(\) needs the values of layers\.0\..*, of which .* FP8 codes"
    ):
        parts.step.evaluate([batches])
    hook.remove()


def first_masters(row: Row) -> dict[str, Array]:
    """On one process."""
    config = reference_config(half(row))
    return whole(masters_of(build(config, Mesh.single(), task_of(config))))


def whole(shares: Iterable[Share]) -> dict[str, Array]:
    found: dict[str, Array] = {}
    for share in shares:
        found.setdefault(share.name, np.full(share.shape, np.nan, share.values.dtype))[share.box] = share.values
    return found


def slowly(weight: Array, fp8: str, over: str) -> tuple[Array, Array]:
    """Bits and scale of every element of ``weight [*out, in]``, for a product that sums over that dim."""
    matrix = weight.reshape(-1, weight.shape[-1])
    row, column = np.indices(matrix.shape)
    groups = {
        "tensorwise": 0 * row,
        "rowwise": row if over == "in" else column,
        "blockwise": row // SIDE * matrix.size + column // SIDE,
    }
    scales = np.empty_like(matrix)
    for group in np.unique(groups[fp8]):
        mine = groups[fp8] == group
        scales[mine] = abs(matrix[mine]).max() / np.float32(448)
    scaled = matrix / scales
    distance = abs(abs(scaled.astype(np.float64))[..., None] - POSITIVE)
    below, above = distance.argmin(-1), 126 - distance[..., ::-1].argmin(-1)  # the same, but halfway between two
    bits = np.where(below % 2 == 0, below, above) | np.where(np.signbit(scaled), 128, 0)
    return bits.reshape(weight.shape), scales.reshape(weight.shape)


def check(row: Row, ranks: Sequence[Sequence[Look]]) -> None:
    """All ranks' products are given the quantised masters, which are those of one process at first."""
    assert {len(looks) for looks in ranks} == {3}
    for step, of_ranks in enumerate(zip(*ranks, strict=True)):
        before, masters = (whole(p for look in of_ranks for p in getattr(look, kind)) for kind in ("before", "masters"))
        if step == 0:
            assert all(np.array_equal(masters[name], values) for name, values in first_masters(row).items())
        for over in ("in", "out"):
            names = sorted({share.name for look in of_ranks for share in look.given[over]})
            assert len(names) == 4 * config_of(row).model.num_layers
            for name in names:
                factor = np.float32(FACTOR if step == 2 else 1.0)
                assert masters[name].dtype == np.float32 and np.array_equal(masters[name], before[name] * factor)
                bits, scales = slowly(masters[name], row.fp8, over)
                for rank, look in enumerate(of_ranks):
                    mine = [share for share in look.given[over] if share.name == name]
                    assert mine or row.mesh[1] > 1, "a stage has its own layers"
                    for share in mine:
                        what = f"{row}: {name} of rank {rank} in step {step}, for a sum over {over!r}"
                        assert np.array_equal(share.scales, scales[share.box]), what  # type: ignore[arg-type]
                        assert np.array_equal(share.values, bits[share.box]), what


@pytest.mark.parametrize(
    "rows",
    [ALONE, CUT, STAGES, SHARDED, UNEVEN, BOTH, NODES],
    ids=["alone", "tensor_parallel", "pipeline", "zero", "uneven", "both", "nodes"],
)
def test_products_are_given_the_quantised_masters(rows: list[Row]) -> None:
    tp, pp, dp = rows[0].mesh
    of_ranks = run_ranks(looks, tp * pp * dp, rows) if tp * pp * dp > 1 else [looks(rows)]
    for row, *ranks in zip(rows, *of_ranks, strict=True):
        check(row, ranks)


def test_a_stage_whose_first_weight_is_a_master_computes_in_half_precision() -> None:
    """As in OLMo 2, whose norms follow: two stages, one behind the other, have the whole model's bits."""
    values = half(ALONE[0]).to_dict()
    values["model"] |= {"norm_position": "output"}
    config = RunConfig.model_validate(values)
    task = task_of(config)
    spans = [StageSpan(0, config.model.num_layers), StageSpan(0, 1, head=False)]
    spans.append(StageSpan(1, config.model.num_layers, embedding=False))
    whole, first, rest = (task.make_stage(span, Mesh.single(), torch.device("cpu"), torch.bfloat16) for span in spans)
    for stage in (whole, first, rest):
        stage.initialize(3)  # type: ignore[operator]
        float8_layers.use_float8(stage, config.precision, Axis("cp"))
    assert next(rest.parameters()).dtype == torch.float32
    batch = steps_of(config, Mesh.single())[0][0]
    assert torch.equal(rest(batch, first(batch)), whole(batch))


def test_weights_quantised_from_half_copies_show() -> None:
    """The comparison notices what it is there for: a setting that is not obeyed."""

    def use(model: nn.Module, settings: PrecisionConfig, cp: Axis) -> None:
        float8_layers.use_float8(model, settings.model_copy(update={"fp8_from_masters": False}), cp)

    with patch.object(build_module, "use_float8", use), pytest.raises(AssertionError, match="for a sum over 'in'"):
        check(ALONE[0], looks(ALONE[:1]))
