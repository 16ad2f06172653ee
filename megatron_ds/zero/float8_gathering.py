"""Parameters of which ranks gather FP8 codes: the weights of layers that compute in FP8, whose masters are sharded.

A rank has its slice of the masters, which are the parameters themselves, in fp32 or fp64. After an update it quantises
that slice, and the ranks gather the codes: at once, or at stage 3 for each use of a unit. Where the masters of a unit
are offloaded, so are the codes, and both are read and written one bucket after the other. What shares a scale may lie
on several ranks, so they first take the largest amax, of all such parameters together. In their own precision they are
whole where somebody asks for them (``ZeroOptimizer.gathered``), and nowhere else.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ds import comm
from megatron_ds.kernels.float8 import E4M3, scale_of
from megatron_ds.kernels.float8_weight import Float8Format, Float8Weight, add_amax, cast, matrix_shape
from megatron_ds.mesh import Axis
from megatron_ds.shard import ShardSpec
from megatron_ds.zero.flat import FlatBucket
from megatron_ds.zero.memory import Float8Parameters


class Float8Gathering:
    """Quantises and gathers those among a rank's buckets.

    Args:
        tp: the tensor-parallel axis, over which a parameter may be cut besides.
    """

    def __init__(self, buckets: Sequence[FlatBucket], tp: Axis):
        self._buckets = [bucket for bucket in buckets if bucket.layout.codes]
        kinds = dict.fromkeys((b.layout.key.sharded_over, b.layout.key.float8) for b in self._buckets)
        self._groups = [
            _Group([b for b in self._buckets if (b.layout.key.sharded_over, b.layout.key.float8) == kind], form, tp)
            for kind in kinds
            if (form := kind[1]) is not None
        ]

    @torch.no_grad()
    def encode(self) -> None:
        """Quantise this rank's slices as they are now, and start to gather the codes that are whole all the time.

        Collective. No peer may be reading the codes.
        """
        for group in self._groups:
            group.encode()
        for bucket in self._buckets:
            if not bucket.parameters.transient:
                bucket.start_gather()

    def arrived(self) -> None:
        """After :meth:`encode`, when the codes that are whole all the time are there and no peer reads them."""
        for bucket in self._buckets:
            if not bucket.parameters.transient:
                for parameter in bucket.tensors:
                    parameter.float8.turn()  # type: ignore[attr-defined]

    def gather_exactly(self, on: bool) -> None:
        """While it is on, the parameters are gathered and not their codes."""
        for bucket in self._buckets:
            _of(bucket).exactly = on

    @contextmanager
    def gathered(self, buckets: Sequence[FlatBucket]) -> Iterator[None]:
        """Hold those of the buckets whole that are no unit's, which the gatherer holds. Collective."""
        mine = [b for b in self._buckets if b in buckets and not (b.parameters.transient or _of(b).is_whole)]
        self._gather(mine)
        try:
            yield
        finally:
            for bucket in mine:
                bucket.release()
                _hide(bucket)

    def close(self) -> None:
        """Every parameter is left whole, and products are given it again. Collective."""
        self._gather([b for b in self._buckets if not b.parameters.transient])
        for bucket in self._buckets:
            for parameter in bucket.tensors:
                parameter.float8.give((), ())  # type: ignore[attr-defined]

    def _gather(self, buckets: Sequence[FlatBucket]) -> None:
        self.gather_exactly(True)
        for bucket in buckets:
            bucket.start_gather()
        for bucket in buckets:
            bucket.finish_gather()
            bucket.view_parameters()
        self.gather_exactly(False)


class _Group:
    """Buckets with one shard axis and one format, and the scales of all of their parameters in one piece of memory."""

    def __init__(self, buckets: Sequence[FlatBucket], form: Float8Format, tp: Axis):
        self.buckets, self.form, self.tp = buckets, form, tp
        self.axis = buckets[0].shard
        found: list[tuple[bool, tuple[int, int, int], tuple[int, int]]] = []
        for number, bucket in enumerate(buckets):
            for slot in bucket.layout.slots:
                shapes = form.scale_shapes(*matrix_shape(slot.spec.local_shape))
                cuts = _cut_by_tp(form, slot.spec, tp)
                found += [(cut, (number, slot.parameter, i), shape) for i, (cut, shape) in enumerate(zip(cuts, shapes))]
        # Those that tp cuts lie behind the others, to be reduced over it.
        self._places: dict[tuple[int, int, int], tuple[int, tuple[int, int]]] = {}
        used = 0
        for is_cut in (False, True):
            self._cut = used
            for cut, key, shape in found:
                if cut == is_cut:
                    self._places[key] = used, shape
                    used += prod(shape)
        self._scales = torch.zeros(used, device=_of(buckets[0]).whole.device)
        for number, bucket in enumerate(buckets):
            self._give(number, bucket)

    def _give(self, number: int, bucket: FlatBucket) -> None:
        every = _of(bucket).codes
        for codes in every:
            codes.take()  # for views of what has no memory between uses
        for slot, parameter in zip(bucket.layout.slots, bucket.tensors):
            shape = matrix_shape(slot.spec.local_shape)
            # Of ``data``, whose version a gather does not count: what a compiled block keeps is good again after it.
            flat = [codes.whole.data.narrow(0, slot.start, slot.numel) for codes in every]
            views = [codes.view(E4M3).view(shape) for codes in flat]
            weight: Float8Weight = parameter.float8  # type: ignore[attr-defined]
            scales = self._of_slot(self._scales, number, slot.parameter)
            weight.give(views, scales, turned=not bucket.parameters.transient)
        for codes in every:
            codes.discard()
        if not bucket.parameters.transient:
            _hide(bucket)

    def _of_slot(self, flat: Tensor, bucket: int, parameter: int) -> list[Tensor]:
        places = [self._places[bucket, parameter, number] for number in range(self.form.codes)]
        return [flat.narrow(0, start, prod(shape)).view(shape) for start, shape in places]

    def encode(self) -> None:
        amax = torch.zeros_like(self._scales)
        for number, memory in self._fetched():
            with memory.masters() as masters:
                for part, start, k, seen, _ in self._parts(number, masters, amax):
                    add_amax(self.form, part, start, k, seen)
        # As integers, of which a NaN is the largest: it reaches all ranks.
        comm.all_reduce(amax.view(torch.int32), self.axis, dist.ReduceOp.MAX)
        if self._cut < len(amax):
            comm.all_reduce(amax[self._cut :].view(torch.int32), self.tp, dist.ReduceOp.MAX)
        self._scales.copy_(scale_of(amax, E4M3, self.form.power_of_two))
        for number, memory in self._fetched():
            with memory.shards_of_codes() as every, memory.masters() as masters:
                for part, start, k, scales, place in self._parts(number, masters, self._scales):
                    cast(self.form, part, start, k, scales, [codes.view(E4M3)[place] for codes in every])

    def _fetched(self) -> Iterator[tuple[int, Float8Parameters]]:
        """The buckets of which this rank has something, by number. Masters that are elsewhere are read one ahead."""
        mine = [(number, _of(bucket)) for number, bucket in enumerate(self.buckets) if bucket.segments]
        for index, (number, memory) in enumerate(mine):
            for _, near in mine[index : index + 2]:
                near.holding.read_start()
            yield number, memory

    def _parts(
        self, number: int, masters: Tensor, values: Tensor
    ) -> Iterator[tuple[Tensor, int, int, list[Tensor], slice]]:
        """Of each parameter that this rank has a part of, in a bucket: the part, its first element, the columns of the
        matrix, what ``values`` has for it, and the part's place in the bucket's slice."""
        for segment in self.buckets[number].segments:
            spec, place = segment.spec, slice(segment.offset, segment.offset + segment.numel)
            mine = self._of_slot(values, number, segment.slot.parameter)
            yield masters[place], segment.start, spec.local_shape[-1], mine, place


def _hide(bucket: FlatBucket) -> None:
    """Who reads the parameters sees NaN, and who writes to them an error of torch's: in their own memory, which is not
    there, either would end the process."""
    for parameter in bucket.tensors:
        parameter.data = torch.full((), math.nan, dtype=parameter.dtype, device=parameter.device).expand(
            parameter.shape
        )


def _of(bucket: FlatBucket) -> Float8Parameters:
    return typing.cast(Float8Parameters, bucket.parameters)  # what a layout with codes gets


def _cut_by_tp(form: Float8Format, spec: ShardSpec, tp: Axis) -> list[bool]:
    """Whether tp cuts what shares a scale, of the weight and of its transpose."""
    cut = {placement.dim == len(spec.local_shape) - 1 for placement in spec.placements if placement.count > 1}
    if tp.size == 1 or form.block.k is not None or not cut:
        return [False] * form.codes
    return [True] if form.block.is_square else [True in cut, False in cut]
