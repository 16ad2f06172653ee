"""The sums of a bucket's gradients over ranks: reduce-scattered over its shard axis, all-reduced over the others."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_ds.comm import Pending
from megatron_ds.comm.quantized_buffers import Quantization, sum_start
from megatron_ds.mesh import Axis
from megatron_ds.rng import derive_seed
from megatron_ds.zero.buckets import BucketLayout
from megatron_ds.zero.memory import TransientGradients, WholeBuffer


class GradientSums:
    """Reduce-scatter and all-reduce of one bucket's gradients on this rank.

    Stochastic rounding of what is sent has a key. It is made of the run's seed, the step, the sum's number in the step,
    the bucket and this rank's place among those that sum. So a resumed run draws the same numbers again, and no two
    messages draw the same ones, of runs with other seeds neither: the mean of such runs would keep errors that they
    share. Copies of a parameter on tensor-parallel ranks do, as they must stay equal.

    Args:
        axes: the axis over which the bucket is sharded, and that of its replicas.
        also_over: axes over which the shard is summed besides.
        how: gradients are sent over the first two, if not as they are.
    """

    def __init__(
        self,
        layout: BucketLayout,
        gradients: WholeBuffer | TransientGradients,
        axes: tuple[Axis, Axis],
        also_over: Sequence[Axis],
        how: Quantization | None,
    ):
        self._gradients, self._how, self._replicate = gradients, how, axes[1]
        self._axes = [axis for axis in (axes[1], *also_over) if axis.group is not None]
        first = layout.slots[0].spec
        self._identity = (first.name, first.offset, layout.key.stage, axes[0].rank, axes[1].rank)
        self._seed = self._step = self._sums = 0
        self._remaining: list[Axis] = []
        self._pending: Pending | None = None

    def start_step(self, step: int, seed: int) -> None:
        """Forget the gradients of the step before. ``step``: updates so far."""
        self._gradients.start_step()
        self._seed, self._step, self._sums = seed, step, 0

    def start(self) -> None:
        """Start the first of the sums that make the shard whole. Leave the buffer alone until :meth:`finish`."""
        self._remaining = list(self._axes)
        self._pending = self._gradients.reduce_scatter_start(self._key("shard"))
        if self._pending is None and self._remaining:
            self._pending = self._sum_start(self._remaining.pop(0))
        self._sums += 1

    def finish(self) -> None:
        """Wait for the sum that :meth:`start` started."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None

    def over_remaining_axes(self) -> None:
        """The sums over the other axes, once a step."""
        for axis in self._remaining:
            self._sum_start(axis).wait()
        self._remaining = []

    def _sum_start(self, axis: Axis) -> Pending:
        """Over tensor-parallel ranks and stages as they are."""
        how = self._how if axis is self._replicate else None
        return sum_start(self._gradients.shard, axis, how, self._key(axis.name))

    def _key(self, over: str) -> int:
        if self._how is None or not self._how.stochastic:
            return 0
        return derive_seed(self._seed, "rounding", self._step, *self._identity, self._sums, over)
