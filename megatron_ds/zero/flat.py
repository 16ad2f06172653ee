"""One bucket's memory and its way through a step.

A bucket goes through the same phases at every ZeRO stage; the stages differ in which of its buffers live between them::

    accumulate   gradients   <- backward pass            (stages 2, 3: the buffer is taken when the first write comes)
    reduce       gradient shard <- sum over the axes     (stages 2, 3: the rest of the buffer is given back)
    update       master shard <- optimizer
    gather       parameters <- every rank's shard        (stage 3: not here but before each use, and freed after it)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from megatron_ds import comm
from megatron_ds.comm import Pending
from megatron_ds.config import OptimizerConfig
from megatron_ds.mesh import Axis
from megatron_ds.optim.factory import OptimizerSegment, UpdateRule, make_update, state_kinds
from megatron_ds.shared_memory import SharedArena
from megatron_ds.zero.buckets import BucketLayout, state_dtype
from megatron_ds.zero.memory import FlatBuffer

_NORM_ROW = 4096


class FlatBucket:
    """The flat buffers of one bucket on this rank. The parameters become views of them.

    Args:
        parameters: the bucket's parameters, in the order of ``layout.slots``.
        shard: the axis over which the bucket is sharded; its size is ``layout.shards``.
        also_over: axes over which the reduced shard is summed once more (replicas, tensor-parallel ranks that each
            saw a part of the sequence, pipeline stages that share the parameter). Summing the shard instead of the
            whole bucket moves ``1 / shards`` of the bytes.
        arena: where parameters and gradients lie, if the ranks of the shard axis share memory.

    Attributes:
        parameters, gradients: flat buffers; ``.whole`` is ``[size]``, ``.shard`` this rank's ``[size / shards]`` of it.
        master: ``[size / shards]`` in fp32 (fp64 for fp64); ``parameters.shard`` itself where the dtype is the same.
        state: optimizer state by kind, each ``[size / shards]``.
        gradient_views: each parameter's part of ``gradients``, in its shape.
        segments: this rank's segments, and what the optimizer sees of each.
    """

    def __init__(
        self,
        layout: BucketLayout,
        parameters: Sequence[nn.Parameter],
        shard: Axis,
        also_over: Sequence[Axis],
        config: OptimizerConfig | UpdateRule,
        arena: SharedArena | None,
    ):
        self.layout = layout
        self.shard = shard
        self.also_over = tuple(axis for axis in also_over if axis.group is not None)
        device, dtype = parameters[0].device, layout.key.dtype
        wide = state_dtype(dtype)
        self.parameters = FlatBuffer.create(layout.size, dtype, device, shard, arena)
        self.gradients = FlatBuffer.create(layout.size, wide, device, shard, arena)
        self.gradient_views = []
        for slot, parameter in zip(layout.slots, parameters):
            view = self.parameters.whole.narrow(0, slot.start, slot.numel).view(parameter.shape)
            view.copy_(parameter.detach())
            parameter.data = view
            self.gradient_views.append(self.gradients.whole.narrow(0, slot.start, slot.numel).view(parameter.shape))
        self.master = self.parameters.shard.to(wide)
        self.state = {kind: torch.zeros_like(self.master) for kind in state_kinds(config)}
        self.segments = [
            (
                segment,
                OptimizerSegment(
                    master=self.master.narrow(0, segment.offset, segment.numel),
                    gradient=self.gradients.shard.narrow(0, segment.offset, segment.numel),
                    state={k: t.narrow(0, segment.offset, segment.numel) for k, t in self.state.items()},
                    weight_decay=segment.spec.weight_decay,
                    name=segment.spec.name,
                    start=segment.start,
                ),
            )
            for segment in layout.segments(shard.rank)
        ]
        # A slice of nothing but padding has nothing to update.
        self.optimizer = make_update(config, [s for _, s in self.segments]) if self.segments else None
        self._reducing: Pending | None = None
        self._gathering: Pending | None = None
        self._remaining_axes: list[Axis] = []

    def start_reduce(self) -> None:
        """Start the first of the sums that make ``gradients.shard`` whole. Leave the buffer alone until the end."""
        axes = list(self.also_over)
        if self.shard.group is not None:
            self._reducing = self.gradients.reduce_scatter_start()
        elif axes:
            self._reducing = comm.all_reduce_start(self.gradients.shard, axes.pop(0))
        self._remaining_axes = axes

    def finish_reduce(self) -> None:
        """Wait for the sums, running those that could not start earlier."""
        if self._reducing is not None:
            self._reducing.wait()
            self._reducing = None
        for axis in self._remaining_axes:
            comm.all_reduce(self.gradients.shard, axis)
        self._remaining_axes = []

    def norm_squared(self) -> torch.Tensor:
        """0-d float64: squared norm of this rank's slice, without parameters that another rank owns.

        Those count as zero, but a NaN or Inf in them makes it NaN: only this rank sees it.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.master.device)
        for begin, end in self._owned_ranges():
            total += squared_norm(self.gradients.shard[begin:end])
        for segment, tensors in self.segments:
            if segment.spec.replica:
                total += 0.0 * squared_norm(tensors.gradient)
        return total

    def _owned_ranges(self) -> list[tuple[int, int]]:
        """Runs of segments in the slice that are not replicas; padding between them is zero and may be included."""
        ranges: list[tuple[int, int]] = []
        open_run = False
        for segment, _ in self.segments:
            if segment.spec.replica:
                open_run = False
            elif open_run:
                ranges[-1] = (ranges[-1][0], segment.offset + segment.numel)
            else:
                ranges.append((segment.offset, segment.offset + segment.numel))
                open_run = True
        return ranges

    def update(self, lr: float, scale: float | torch.Tensor) -> None:
        """One optimizer step on this rank's slice; the low-precision parameters follow."""
        if self.optimizer is not None:
            self.optimizer.step(lr, scale)
        self.master_to_parameters()

    def master_to_parameters(self) -> None:
        if self.master.dtype != self.parameters.whole.dtype:
            self.parameters.shard.copy_(self.master)

    def start_gather(self) -> None:
        """Start to collect every rank's slice of the parameters, in place."""
        if self.shard.group is not None:
            self._gathering = self.parameters.all_gather_start()

    def finish_gather(self) -> bool:
        """Wait for the gather; False if there was none under way."""
        if self._gathering is None:
            return False
        self._gathering.wait()
        self._gathering = None
        return True


def squared_norm(flat: torch.Tensor) -> torch.Tensor:
    """0-d float64 sum of squares of a 1-D tensor, in one pass at memory speed.

    ``vector_norm`` adds fp32 squares in fp32: over 7 M normal numbers it comes out 4e-4 too small, and asking it for
    float64 takes 30 times as long. Norms of short rows, added in float64, are right to 1e-8 at the same speed.
    """
    whole = flat.numel() // _NORM_ROW * _NORM_ROW
    total = torch.zeros((), dtype=torch.float64, device=flat.device)
    if whole:
        total += torch.linalg.vector_norm(flat[:whole].view(-1, _NORM_ROW), dim=1).double().square().sum()
    if whole < flat.numel():
        total += torch.linalg.vector_norm(flat[whole:]).double().square()
    return total
