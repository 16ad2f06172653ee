"""Copies over tensor-parallel ranks: equal ones pass, and one bit on one rank is named on every rank."""

from __future__ import annotations

import pytest
import torch
from test_zero_mesh import LR, build, reduce_gradients

from megatron_ds.errors import ReplicaError
from megatron_ds.mesh import Mesh, MeshShape
from megatron_ds.testing import run_ranks
from megatron_ds.zero.replicas import check_replicas


def drift(stage: int, shape: MeshShape, written: tuple[int, ...]) -> tuple[str, str]:
    """What is said before and after the last bit of one element of a norm changes on the ``written`` ranks."""
    mesh = Mesh.create(shape, torch.device("cpu"))
    zero, _ = build(mesh, stage, "sgd")
    said = []
    for change in (False, True):
        shards = [shard for bucket in zero.buckets for shard in bucket.flat_shards(replicas=True)]
        for shard in shards if change and mesh.rank in written else ():
            if shard.name.endswith((".norm", ".column")) and shard.kind == "param":
                shard.data.view(torch.int64)[0] += 1  # the column's parts are different ones anyway
        try:
            check_replicas(zero, mesh)
            said.append("")
        except ReplicaError as error:
            said.append(str(error))
    return said[0], said[1]


@pytest.mark.parametrize("stage", [0, 1])
def test_one_bit_that_differs_is_named_with_its_rank_on_every_rank(stage: int) -> None:
    shape = MeshShape(pp=2, tp=2)
    for before, after in run_ranks(drift, 4, stage, shape, (3,)):
        assert before == ""
        assert after.startswith("rank 2, 3: 1.norm: no longer the same on rank 3 as on rank 2"), after
        assert "train.check_replicas_every=0" in after


def test_copies_over_data_parallel_shards_are_compared_part_by_part() -> None:
    for before, after in run_ranks(drift, 4, 1, MeshShape(dp=2, tp=2), (0, 1)):
        assert before == after == "", "written alike on both ranks of a line"


def steps_in_few_bits() -> None:
    """Copies lie beside what tensor parallelism cuts, whose numbers are others on each rank."""
    mesh = Mesh.create(MeshShape(dp=2, tp=2), torch.device("cpu"))
    for stage, form in ((1, "int4"), (2, "int8")):
        few_bits = {"quantized_gradients": form, "quantized_stochastic": stage == 2}
        zero, parameters = build(mesh, stage, "sgd", bucket_mb=1.0, **few_bits)
        for _ in range(5):  # other random numbers in each
            reduce_gradients(zero, parameters, mesh)
            zero.step(LR)
            check_replicas(zero, mesh)


def test_copies_stay_equal_where_gradients_are_sent_in_few_bits() -> None:
    run_ranks(steps_in_few_bits, 4)
