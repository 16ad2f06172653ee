"""Scales of FP8 that depend on the mesh: what tests of parity must notice. Each rank imports this and little else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

from parity_rows import Row
from parity_run import Outcome, train_on_this_rank
from torch import Tensor

from megatron_ds.layers import float8_recipe as float8
from megatron_ds.mesh import Axis
from megatron_ds.zero import float8_gathering


def scales_of_this_rank_alone() -> Any:
    """The amax of a part of what shares a scale."""
    return patch.object(float8.comm, "all_reduce", lambda tensor, axis, op=None: tensor)


def scales_of_this_cp_rank() -> Any:
    """The amax of a part of a sequence."""
    reduced = float8._reduced
    return patch.object(float8, "_reduced", lambda amax, over: reduced(amax, [a for a in over if a.name != "cp"]))


def codes_scaled_by_this_rank() -> Any:
    """The amax of this rank's part of the masters that ZeRO shards."""
    reduce = float8_gathering.comm.all_reduce

    def alone(tensor: Tensor, axis: Axis, *op: Any) -> Tensor:
        return tensor if axis.name == "data" else reduce(tensor, axis, *op)

    return patch.object(float8_gathering.comm, "all_reduce", alone)


def scales_over_the_micro_batch() -> Any:
    """One scale for all sequences of a micro-batch."""
    return patch.object(float8, "_sequences", lambda x: x.reshape(1, -1, x.shape[-1]).transpose(0, 1)[None, :, 0])


def train_with_fault(row: Row, fault: Callable[[], Any]) -> Outcome:
    with fault():
        return train_on_this_rank([row])[0]
