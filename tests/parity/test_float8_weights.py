"""Weights are quantised once a step, and never from what they were before somebody wrote to them.

Each run is compared, bit for bit, with itself where nothing is kept: every product quantises the weight it is given.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from parity_rows import Row, config_of
from parity_run import steps_of
from torch import Tensor

from megatron_ds.config import validate
from megatron_ds.kernels.float8 import Float8
from megatron_ds.kernels.float8_weight import Float8Weight
from megatron_ds.layers import float8_layers
from megatron_ds.layers import float8_recipe as float8
from megatron_ds.mesh import Mesh
from megatron_ds.models.families import task_of
from megatron_ds.testing import run_ranks
from megatron_ds.train.build import RankRuntime, build
from megatron_ds.train.rank_bytes import account_of

LONG = Row((1, 1, 1), accumulation=2, recompute="full", architecture="llama", tied=False)
ALONE = [replace(LONG, fp8=fp8) for fp8 in ("tensorwise", "rowwise", "blockwise")]
CUT = [replace(LONG, mesh=(2, 1, 1), fp8=fp8, sequence_parallel=fp8 == "rowwise") for fp8 in ("tensorwise", "rowwise")]
SHARDED = [
    replace(LONG, mesh=(1, 1, 2), fp8="rowwise", zero=1, split_backward=True),
    replace(LONG, mesh=(1, 1, 2), fp8="blockwise", zero=2),
    replace(LONG, mesh=(1, 1, 2), fp8="rowwise", zero=3),
    replace(LONG, mesh=(1, 1, 2), fp8="rowwise", zero=3, keep_whole=True),
]
FIRST = 2.0**40  # a loss scale with which the gradients of fp16 overflow


@torch.no_grad()
def writes(parts: RankRuntime, step: int) -> None:
    """What a user does to the weights before a step; after all of them nothing of the first values is left."""
    parameters = [p for stage in parts.stages.values() for p in stage.parameters()]
    optimizer = parts.optimizer
    if step == 0:
        return
    if step == 4:  # a checkpoint, or averaged weights in place of the weights
        shards = optimizer.flat_shards(for_load=True)
        averages = {(s.name, s.start): s.data.clone() for s in shards if s.kind == "ema"}
        for shard in shards:
            if shard.kind == "param":
                shard.data.copy_(averages[shard.name, shard.start])
        optimizer.refresh_parameters()
        return
    with optimizer.gathered(parameters, write=True):
        for p in parameters:
            if step == 1:
                p.mul_(1.25)
            elif step == 2:
                p.data.mul_(0.75)  # torch's version counter does not see it
            else:
                p.data = p.data * 1.5


@contextmanager
def counted(parts: RankRuntime) -> Iterator[list[int]]:
    """How often a weight was quantised, or the transpose made of one that is gathered in FP8: of each step."""
    counts, last, of = [0], dict[int, Float8](), Float8Weight.of
    quantize, both = float8.quantize, float8.quantize_both
    layers = [layer for stage in parts.stages.values() for _, layer in float8_layers.linear_layers(stage)]

    def count(x: Tensor) -> None:
        counts[-1] += any(x.data_ptr() == layer.weight.data_ptr() for layer in layers)

    def one(x: Tensor, *rest: Any) -> Any:
        count(x)
        return quantize(x, *rest)

    def two(x: Tensor, *rest: Any) -> Any:
        count(x)
        return both(x, *rest)

    def given(weight: Float8Weight, transposed: bool) -> Float8:
        found = of(weight, transposed)
        if transposed and not any(found.values.data_ptr() == codes.data_ptr() for codes in weight._codes):
            counts[-1] += found is not last.get(id(weight))
            last[id(weight)] = found
        return found

    quantising = patch.multiple(float8, quantize=one, quantize_both=two)
    with quantising, patch.object(Float8Weight, "of", given):
        yield counts


@contextmanager
def measured(parts: RankRuntime, expected: int) -> Iterator[None]:
    """What is kept at the end of a run has the bytes of the dry run."""
    whole = parts.optimizer.gatherer is None or parts.optimizer.config.keep_whole
    with float8.weights_kept(float8.recipes_of(parts.stages.values()), whole):
        yield
        recipes = [layer.recipe for stage in parts.stages.values() for _, layer in float8_layers.linear_layers(stage)]
        found = [found for recipe in recipes for found in recipe._kept.both or ()]  # type: ignore[union-attr]
        given = [weight for recipe in recipes if (weight := recipe.gathered) is not None and weight.is_given]
        found += [weight._transposed for weight in given if weight._transposed is not None]
        held = {scale.data_ptr() for weight in given for scale in weight._scales}  # all the time
        scales = [each.scale for each in found if each.scale.data_ptr() not in held]
        total = sum(tensor.nbytes for tensor in [*(each.values for each in found), *scales])
        assert total == expected


def run(row: Row, mesh: Mesh, kept: bool, half: bool) -> tuple[list[Any], list[int], int]:
    """Losses, norms and final weights; how often weights were quantised in each step; the layers in FP8."""
    values = config_of(row).to_dict()
    values["optimizer"]["ema_decay"] = 0.5
    values["train"]["steps"] = 8
    if half:
        values["precision"] |= {"dtype": "fp16", "initial_loss_scale": FIRST}
    config = type(config_of(row)).model_validate(values)
    parts = build(config, mesh, task_of(config))
    expected = account_of(config, task_of(config), mesh.shape, mesh.rank).fp8_weights
    parts.step.weights_fixed = partial(measured, parts, expected) if kept else nullcontext
    batches, results = steps_of(config, mesh), []
    with counted(parts) as counts:
        for step in range(5):
            if not half:
                writes(parts, step)
            results.append(parts.step(batches[step % len(batches)]))
            counts.append(0)
    shards = parts.optimizer.flat_shards()
    assert {(s.kind, s.data.dtype) for s in shards if s.kind != "ema"} == {
        (kind, torch.float32 if half else torch.float64) for kind in ("param", "exp_avg", "exp_avg_sq")
    }, "a checkpoint holds masters and moments"
    assert not [name for stage in parts.stages.values() for name, _ in stage.named_buffers() if "recipe" in name]
    parameters = [p for stage in parts.stages.values() for p in stage.parameters()]
    with parts.optimizer.gathered(parameters):
        weights = [p.detach().clone() for p in parameters]
    layers = [layer for stage in parts.stages.values() for _, layer in float8_layers.linear_layers(stage)]
    assert all(isinstance(layer.recipe, float8.Float8Recipe) for layer in layers)
    return [*((r.loss, r.grad_norm, r.skipped) for r in results), *weights], counts[:-1], len(layers)


def both_ways(rows: list[Row], half: bool = False) -> list[tuple[list[int], list[int], int]]:
    """The counts, with and without what is kept; the numbers are the same, or this raises."""
    mesh = Mesh.single()
    if dist.is_initialized():
        mesh = Mesh.create(validate(config_of(rows[0]), dist.get_world_size()), torch.device("cpu"))
    found = []
    for row in rows:
        (got, counts, layers), (want, often, _) = (run(row, mesh, kept, half) for kept in (True, False))
        assert len({str(values[0]) for values in got[:5]}) == 5 or half, "every step has its own loss"
        assert not half or [skipped for *_, skipped in got[:2]] == [True, True]
        for number, (a, b) in enumerate(zip(got, want, strict=True)):
            same = torch.equal(a, b) if isinstance(a, Tensor) else repr(a) == repr(b)
            assert same, f"{row}: result {number} is {a} with what is kept, and {b} without"
        found.append((counts, often, layers))
    return found


@pytest.mark.parametrize("rows", [ALONE, CUT, SHARDED], ids=["alone", "tensor_parallel", "zero"])
def test_once_a_step_and_with_the_same_bits(rows: list[Row]) -> None:
    tp, pp, dp = rows[0].mesh
    for of_rank in run_ranks(both_ways, tp * pp * dp, rows):
        for row, (counts, often, layers) in zip(rows, of_rank, strict=True):
            if row.zero == 3 and not row.keep_whole:
                continue  # the values go with the gathered weights, whose memory changes: only the bits are compared
            gathered = dp > 1 and row.zero > 0
            if gathered and row.fp8 == "rowwise" and row.zero < 3:  # the transpose is gathered, and lies there
                assert counts == often == [0] * 5
                continue
            assert counts == [layers] * 5, f"{row}: {counts}"
            # Of two micro-batches the backward; where those quantise, forward and recomputation too, but for the last
            # of a block's four in the latter.
            assert often == [(layers if gathered else layers * 3 - layers // 4) * 2] * 5


def test_a_skipped_step_changes_nothing() -> None:
    run_ranks(both_ways, 1, [ALONE[2]], True)


def test_a_weight_that_is_never_forgotten_shows() -> None:
    """The comparison notices what it is there for."""

    def keep_on(recipe: float8.Float8Recipe, whole: bool) -> None:
        recipe._kept = recipe._kept or float8.KeptWeight(whole)

    forgetful = patch.multiple(float8.Float8Recipe, forget=lambda recipe: None, keep_weight=keep_on)
    with forgetful, pytest.raises(AssertionError, match="with what is kept"):
        both_ways([ALONE[0]])
