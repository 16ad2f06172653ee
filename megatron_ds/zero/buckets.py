"""Where every parameter lies in the flat buckets: arithmetic alone, no tensor and no process group.

Parameters are taken in reverse registration order, which is close to the order in which the backward pass finishes
their gradients, and packed into buckets of about ``bucket_bytes`` of gradients. A bucket holds parameters of one dtype
that are sharded over the same axes and whose gradients are summed over the same. Its size is a multiple of the number
of shards, and rank ``r`` of the shard axis owns slice ``r`` of it, so that a parameter may lie on one rank, on several,
or (smaller than the number of ranks) on a part of them. The part of one parameter in one slice is a :class:`Segment`:
the unit that the optimizer and the checkpoint see. Where an update needs whole matrices, parameters are placed so that
each lies in one slice; slices of less are padded to the fullest.

Because nothing here touches memory, the bytes of any rank of any mesh can be counted on a laptop, exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf, prod

import torch

from megatron_ds.errors import ConfigError
from megatron_ds.kernels.float8_weight import Float8Format, matrix_shape
from megatron_ds.optim.rule import STATELESS, RuleGroup, UpdateRule
from megatron_ds.shard import ShardSpec, real_dtype, spec_of

ALIGN = 32
"""Elements to whose multiple parameters and slices are aligned: 64 bytes of bf16, 128 of fp32."""
BYTES_ALONE = inf
"""Of a bucket's gradients, on a rank that exchanges nothing."""


@dataclass(frozen=True)
class ParameterInfo:
    """What the layout needs to know of one local parameter.

    ``shared`` numbers the parameters that other pipeline stages hold too (a tied embedding); None for all others.
    ``unit`` numbers what stage 3 gathers and frees together (see ``zero/units.py``); None: the parameter stays whole.
    ``stage`` is the pipeline stage whose backward pass completes the gradient. ``rule``: how it is updated. ``float8``:
    how it is gathered in FP8, where it is sharded or offloaded; None: as it is.
    """

    spec: ShardSpec
    dtype: torch.dtype
    trainable: bool = True
    shared: int | None = None
    unit: int | None = None
    stage: int = 0
    rule: RuleGroup = STATELESS
    float8: Float8Format | None = None

    @cached_property
    def numel(self) -> int:
        return prod(self.spec.local_shape)

    @property
    def sharded_over(self) -> tuple[str, ...]:
        """The mesh axes within the data axis over which the parameter is sharded: that of the experts is one."""
        return ("ep",) if self.spec.is_sharded_over("ep") else ()

    @cached_property
    def bucket_key(self) -> BucketKey:
        over = (self.sharded_over, self.spec.reduce_over if self.trainable else ())
        key = BucketKey(self.dtype, *over, self.shared, self.unit, self.trainable, self.stage, self.rule)
        return replace(key, float8=self.float8)

    @staticmethod
    def of(
        parameter: torch.Tensor,
        shared: int | None = None,
        unit: int | None = None,
        stage: int = 0,
        rule: UpdateRule | None = None,
        trainable: bool | None = None,
    ) -> ParameterInfo:
        """Of a local parameter on any device, the meta device included.

        ``trainable``: whether it has a gradient and state. Default: as ``requires_grad`` says now.

        Raises:
            TypeError: the parameter has no ``.shard``.
            ValueError: its shape is not the one its spec describes.
            ConfigError: the rule does not update it, or cannot: it needs the whole of what is sharded already.
        """
        spec = spec_of(parameter)
        shape = (*parameter.shape, 2) if parameter.is_complex() else tuple(parameter.shape)
        if shape != spec.local_shape:
            raise ValueError(
                f"{spec.name} has shape {list(shape)}, but its ShardSpec describes {list(spec.local_shape)}"
            )
        trainable = parameter.requires_grad if trainable is None else trainable
        group = rule.group_of(spec.name) if rule is not None and trainable else STATELESS
        if group.whole and not group.gathers and spec.local_shape != spec.global_shape:
            raise ConfigError(
                f"the update of {spec.name} is of whole parameters, and a rank has {list(spec.local_shape)} of its "
                f"{list(spec.global_shape)}; use an elementwise rule such as AdamW for it, or mesh.tp=1"
            )
        in_float8 = getattr(parameter, "float8", None) if trainable else None
        form = None if in_float8 is None else in_float8.form
        return ParameterInfo(spec, real_dtype(parameter.dtype), trainable, shared, unit, stage, group, form)


@dataclass(frozen=True)
class BucketKey:
    """What the parameters of one bucket have in common.

    Attributes:
        sharded_over: mesh axes within the data axis over which the parameters are sharded already, so that ZeRO shards
            what is left of it.
        reduce_over: mesh axes over which gradients are to be summed besides.
        shared, unit, stage, rule: see :class:`ParameterInfo`; a shared parameter has a bucket to itself, of the same
            layout on every stage that holds it.
        cut: whether the parameters are sharded over another axis than the data axis, as tensor-parallel weights are.
            False for all where buckets need not tell (see ``copies_apart``).
        float8: how they are gathered in FP8; None: as they are.
    """

    dtype: torch.dtype
    sharded_over: tuple[str, ...] = ()
    reduce_over: tuple[str, ...] = ()
    shared: int | None = None
    unit: int | None = None
    trainable: bool = True
    stage: int = 0
    rule: RuleGroup = STATELESS
    cut: bool = False
    float8: Float8Format | None = None


@dataclass(frozen=True)
class Slot:
    """One parameter's place: ``[start, start + numel)`` of its bucket. ``parameter`` indexes the caller's list."""

    parameter: int
    spec: ShardSpec
    start: int
    numel: int


@dataclass(frozen=True)
class Segment:
    """The elements ``[start, stop)`` of a flattened local parameter that lie at ``offset`` of one rank's slice."""

    slot: Slot
    start: int
    stop: int
    offset: int

    @property
    def spec(self) -> ShardSpec:
        return self.slot.spec

    @property
    def numel(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class BucketLayout:
    """One bucket: ``size`` elements in ``shards`` equal slices, padding (always zero) included."""

    key: BucketKey
    slots: tuple[Slot, ...]
    size: int
    shards: int

    @property
    def shard_size(self) -> int:
        return self.size // self.shards

    @property
    def due(self) -> int:
        """Orders buckets as a backward pass fills them: by the parameter of each that was registered first."""
        return -min(slot.parameter for slot in self.slots)

    @property
    def codes(self) -> int:
        """Bytes an element of what is gathered in place of its parameters, in FP8; 0: they are gathered."""
        return 0 if self.key.float8 is None else self.key.float8.codes

    @property
    def gathered_bytes(self) -> int:
        """Of all of its parameters, as they are gathered."""
        return self.size * (self.codes or self.key.dtype.itemsize)

    @property
    def parameter_bytes(self) -> list[int]:
        """Of each piece of its parameters that one rank keeps: in FP8, the codes besides the masters."""
        kept = self.size if self.key.unit is None else self.shard_size
        if self.key.float8 is None:
            return [kept * self.key.dtype.itemsize]
        return [self.shard_size * self.key.dtype.itemsize, *[kept] * self.codes]

    @property
    def scale_bytes(self) -> int:
        """Of the scales of its parameters in FP8, which are on the device."""
        if self.key.float8 is None:
            return 0
        shapes = (self.key.float8.scale_shapes(*matrix_shape(slot.spec.local_shape)) for slot in self.slots)
        return sum(prod(shape) for of_slot in shapes for shape in of_slot) * torch.float32.itemsize

    @property
    def gradient_bytes(self) -> int:
        """Of its whole gradients."""
        return self.size * state_dtype(self.key.dtype).itemsize

    @property
    def state_bytes(self) -> tuple[int, int]:
        """Of its master weights, and of its optimizer state, on one rank."""
        wide = state_dtype(self.key.dtype)
        row = self.shard_size * wide.itemsize
        return row * (wide != self.key.dtype), row * len(self.key.rule.kinds)

    def clear_padding(self, whole: torch.Tensor) -> None:
        """Set what lies between and behind the parameters to zero, in the flat buffer of the bucket."""
        ends = [0, *(slot.start + slot.numel for slot in self.slots)]
        starts = [*(slot.start for slot in self.slots), self.size]
        for end, start in zip(ends, starts):
            if end < start:
                whole[end:start].zero_()

    def without(self, parameters: Container[int]) -> BucketLayout:
        """The rest of it when these parameters, by number, have moved elsewhere; their places stay empty."""
        return replace(self, slots=tuple(slot for slot in self.slots if slot.parameter not in parameters))

    def segments(self, rank: int) -> list[Segment]:
        """The non-empty parts of parameters in the slice of shard ``rank``, in order of offset."""
        begin, end = rank * self.shard_size, (rank + 1) * self.shard_size
        found = []
        for slot in self.slots:
            start, stop = max(begin, slot.start), min(end, slot.start + slot.numel)
            if start < stop:
                found.append(Segment(slot, start - slot.start, stop - slot.start, start - begin))
        return found


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which gradients accumulate and master weights live: fp64 for fp64 parameters, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def plan_buckets(
    parameters: Sequence[ParameterInfo],
    bucket_bytes: float,
    shards: int | Callable[[tuple[str, ...]], int],
    copies_apart: bool = False,
) -> tuple[BucketLayout, ...]:
    """Lay the trainable parameters out in buckets, in the order in which a backward pass fills them.

    Args:
        parameters: in registration order; each once. Frozen ones get a place only in a unit, whose memory is sharded.
        bucket_bytes: a bucket is closed before its gradients would exceed this; a larger parameter has its own. One of
            whole parameters takes more, until there may be as much for each shard as its largest parameter.
        shards: ranks over which each bucket is sharded, or a function that says so for a key's ``sharded_over``.
        copies_apart: parameters of which every tensor-parallel rank has a copy share no bucket with those that are cut:
            where blocks of a bucket are rounded together, copies stay alike only beside what is alike.
    """
    shards_of = shards if callable(shards) else lambda _: shards
    filling: dict[BucketKey, tuple[list[Slot], int]] = {}  # with the time at which the last gradient is due
    closed: list[tuple[int, BucketLayout]] = []

    def close(key: BucketKey, slots: list[Slot], time: int) -> None:
        count = shards_of(key.sharded_over)
        if key.rule.whole:
            slots, used = _place_whole(slots, count)
        else:
            slots, used = _place_by_decay(slots)
        closed.append((time, BucketLayout(key, tuple(slots), _aligned(used, ALIGN * count), count)))

    for time, index in enumerate(reversed(range(len(parameters)))):
        info = parameters[index]
        if not info.trainable and info.unit is None:
            continue
        cut = copies_apart and any(placement.count > 1 for placement in info.spec.placements)
        form = info.float8 if shards_of(info.sharded_over) > 1 or info.unit is not None else None
        key, numel = replace(info.bucket_key, cut=cut, float8=form), info.numel
        slots, last = filling.get(key, ([], 0))
        start = _aligned(slots[-1].start + slots[-1].numel, ALIGN) if slots else 0
        most = bucket_bytes / state_dtype(info.dtype).itemsize
        if info.rule.whole:
            largest = max(numel, *(slot.numel for slot in slots), 0)
            most = max(most, shards_of(key.sharded_over) * _aligned(largest, ALIGN))
        if slots and start + numel > most:
            close(key, slots, last)
            slots, start = [], 0
        slots.append(Slot(index, info.spec, start, numel))
        filling[key] = slots, time
    for key, (slots, last) in filling.items():
        close(key, slots, last)
    return tuple(layout for _, layout in sorted(closed, key=lambda item: item[0]))


def _place_by_decay(slots: Sequence[Slot]) -> tuple[list[Slot], int]:
    """Parameters with weight decay and those without, each beside each other: an update goes over two ranges."""
    placed, used = [], 0
    for slot in sorted(slots, key=lambda slot: not slot.spec.weight_decay):
        placed.append(replace(slot, start=_aligned(used, ALIGN)))
        used = placed[-1].start + slot.numel
    return placed, used


def _place_whole(slots: Sequence[Slot], shards: int) -> tuple[list[Slot], int]:
    """The same parameters, each in one of ``shards`` equal slices; and the size of all slices together.

    The largest first, each into the slice that has least: at most 4/3 of the best (Graham 1969, theorem 2).
    """
    ends = [0] * shards
    placed: list[tuple[int, int, Slot]] = []  # slice, and start in it
    for slot in sorted(slots, key=lambda slot: -slot.numel):
        least = ends.index(min(ends))
        placed.append((least, ends[least], slot))
        ends[least] += _aligned(slot.numel, ALIGN)
    size = max(ends)
    found = [replace(slot, start=of_slice * size + start) for of_slice, start, slot in placed]
    return sorted(found, key=lambda slot: (slot.start, slot.numel)), size * shards


def _aligned(numel: int, to: int) -> int:
    return -(-numel // to) * to


def owned_ranges(segments: Sequence[Segment]) -> list[tuple[int, int]]:
    """Runs of segments in a slice that are not replicas; padding between them is zero and may be included."""
    ranges: list[tuple[int, int]] = []
    open_run = False
    for segment in segments:
        if segment.spec.replica:
            open_run = False
        elif open_run:
            ranges[-1] = (ranges[-1][0], segment.offset + segment.numel)
        else:
            ranges.append((segment.offset, segment.offset + segment.numel))
            open_run = True
    return ranges
