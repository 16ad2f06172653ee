"""1F1B: as few forwards ahead as keep the pipeline full, then one forward and one backward in turn.

The non-interleaved "PipeDream-flush" order (Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on
GPU Clusters", section 2.2.1). The same bubble as GPipe, but rank r never holds more than ``pp - r`` micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_ds.pipeline.action import Action, Op
from megatron_ds.pipeline.placement import Placement


def actions(rank: int, placement: Placement, num_micro_batches: int) -> Iterator[Action]:
    ahead = max_in_flight(rank, placement, num_micro_batches)
    for micro_batch in range(ahead):
        yield Action(rank, Op.F, micro_batch)
    for micro_batch in range(num_micro_batches):
        yield Action(rank, Op.B, micro_batch)
        if micro_batch + ahead < num_micro_batches:
            yield Action(rank, Op.F, micro_batch + ahead)


def max_in_flight(rank: int, placement: Placement, num_micro_batches: int) -> int:
    """Micro-batches whose activations a rank holds at once."""
    return min(num_micro_batches, placement.pp - rank)
