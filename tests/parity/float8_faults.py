"""Scales of FP8 that depend on the mesh: what tests of parity must notice. Each rank imports this and little else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

from parity_rows import Row
from parity_run import Outcome, train_on_this_rank

from megatron_ds.layers import float8_recipe as float8


def scales_of_this_rank_alone() -> Any:
    """The amax of a part of what shares a scale."""
    return patch.object(float8.comm, "all_reduce", lambda tensor, axis, op=None: tensor)


def scales_over_the_micro_batch() -> Any:
    """One scale for all sequences of a micro-batch."""
    return patch.object(float8, "_sequences", lambda x: x.reshape(1, -1, x.shape[-1]).transpose(0, 1)[None, :, 0])


def train_with_fault(row: Row, fault: Callable[[], Any]) -> Outcome:
    with fault():
        return train_on_this_rank([row])[0]
