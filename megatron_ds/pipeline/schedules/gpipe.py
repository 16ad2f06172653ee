"""GPipe: every forward, then every backward (Huang et al. 2019, section 2.3).

The simplest order that fills the pipeline, and the most memory: all micro-batches are in flight at once. Backwards
run in the order of the forwards, as in 1F1B, so that gradients are summed in the same order under either schedule.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_ds.pipeline.action import Action, Op
from megatron_ds.pipeline.placement import Placement


def actions(rank: int, placement: Placement, num_micro_batches: int) -> Iterator[Action]:
    stages = placement.stages_of(rank)
    for op, order in ((Op.F, stages), (Op.B, stages[::-1])):
        for stage in order:
            for micro_batch in range(num_micro_batches):
                yield Action(stage, op, micro_batch)


def max_in_flight(rank: int, placement: Placement, num_micro_batches: int) -> int:
    """Micro-batches whose activations a rank holds at once, over all its stages."""
    return num_micro_batches * placement.chunks
