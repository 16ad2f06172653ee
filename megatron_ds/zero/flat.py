"""One bucket's memory and its way through a step.

A bucket goes through the same phases at every ZeRO stage; the stages differ in which of its buffers are whole between
them::

    accumulate   gradients   <- backward pass            (stages 2, 3: whole while a micro-batch's backward fills them)
    reduce       gradient shard <- sum over the axes     (stages 2, 3: the whole is given back)
    update       master shard <- optimizer               (from wherever the state lives, see ``state.py``)
    gather       parameters <- every rank's shard        (stage 3: not here but before each use, and freed after it)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from megatron_ds import comm
from megatron_ds.comm import Pending
from megatron_ds.comm.buffers import Buffers, Slots
from megatron_ds.comm.quantized_buffers import Quantization
from megatron_ds.kernels.square_sum import square_sum
from megatron_ds.mesh import Axis
from megatron_ds.optim.rule import OptimizerSegment, Update, UpdateRule
from megatron_ds.shard import in_order, shaped_as
from megatron_ds.shard.flat_shards import FlatShard
from megatron_ds.zero.buckets import BucketLayout, Segment, owned_ranges, state_dtype
from megatron_ds.zero.gradient_sums import GradientSums
from megatron_ds.zero.main_grad import MainGradient
from megatron_ds.zero.memory import TransientGradients, WholeBuffer, parameter_memory
from megatron_ds.zero.state import BucketState
from megatron_ds.zero.store import BucketStores
from megatron_ds.zero.writes import EVERYTHING, masters_follow, take_replaced


class FlatBucket:
    """The flat buffers of one bucket on this rank. The parameters become views of them.

    Args:
        parameters: the bucket's parameters, in the order of ``layout.slots``. Their values are taken over by
            :meth:`adopt_values`; until then parameters of a unit have none.
        axes: the axis over which the bucket is sharded, whose size is ``layout.shards``, and that of its replicas.
        also_over: axes besides the replicas over which the reduced shard is summed once more (tensor-parallel ranks
            that each saw a part of the sequence, pipeline stages that share the parameter). Summing the shard instead
            of the whole bucket moves ``1 / shards`` of the bytes.
        buffers: of the shard axis, where parameters and gradients lie.
        slots: where whole gradients lie while they are filled; None: they are whole all the time.
        stores: where the state, and at stage 3 the parameters' shard, live between uses.
        how: gradients are sent over the replicas, if not as they are.

    Attributes:
        parameters, gradients: flat buffers; ``.whole`` is ``[size]``, ``.shard`` this rank's ``[size / shards]`` of it.
            ``gradients`` is None for frozen parameters.
        state: master weights in fp32 (fp64 for fp64), each ``[size / shards]``, and the kinds of optimizer state.
            A parameter of that dtype is its own master weight.
        segments: this rank's part of the parameters.
        main_grads: where the gradient of each parameter goes, set by the owner.
        gathering: the gather of the parameters that is under way.
    """

    def __init__(
        self,
        layout: BucketLayout,
        parameters: Sequence[nn.Parameter],
        axes: tuple[Axis, Axis],
        also_over: Sequence[Axis],
        rule: UpdateRule,
        buffers: Buffers,
        slots: Slots | None,
        stores: BucketStores,
        how: Quantization | None = None,
    ):
        self.layout, self.rule = layout, rule
        self.shard, self.replicate = shard, _ = axes
        self.main_grads: list[MainGradient] = []
        self.tensors = list(parameters)
        name = f"the bucket of {layout.slots[0].spec.name}"
        self.parameters = parameter_memory(name, layout, buffers, stores.parameters)
        self.gradients: WholeBuffer | TransientGradients | None = None
        wide = state_dtype(dtype := layout.key.dtype)
        if layout.key.trainable:
            if slots is None:
                self.gradients = WholeBuffer(name, layout.size, wide, buffers)
            else:
                self.gradients = TransientGradients(layout.size, shard, slots)
            self._sums = GradientSums(layout, self.gradients, axes, also_over, how)
        self.segments = layout.segments(shard.rank)
        rows = (*(("master",) if wide != dtype else ()), *layout.key.rule.kinds)
        self.state = BucketState(name, rows if layout.key.trainable else (), layout.shard_size, wide, stores.state)
        self.optimizer: Update | None = None  # a slice of nothing but padding has nothing to update
        self._versions = [parameter._version for parameter in parameters]
        self._looks = 2.0  # the next so many updates look at every element
        self._arrived: torch.Tensor | None = None  # what _digest() was when the parameters came
        self._bound = False  # the optimizer has the state's tensors for good
        self._frozen: set[str] | None = None  # in all backward passes of the step; None before the first
        self.gathering: Pending | None = None

    def adopt_values(self) -> None:
        """Take over what the parameters hold: they become views of the flat buffer, and their old memory is free."""
        old = [parameter.detach() for parameter in self.tensors]
        self.view_parameters()
        for parameter, values in zip(self.tensors, old):
            parameter.data.copy_(values)
        self.write_back_initial()

    def view_parameters(self) -> None:
        """Make the parameters views of the flat buffer, whose memory is taken if it is not there."""
        self.layout.clear_padding(self.parameters.take())
        for slot, parameter in zip(self.layout.slots, self.tensors):
            parameter.data = shaped_as(self.parameters.whole.narrow(0, slot.start, slot.numel), parameter)

    def write_back_initial(self) -> None:
        """Set shard and master weights to what the parameters are, and free what is not kept."""
        self.parameters.keep_slice()
        if self.gradients is None or not self.segments:
            return
        with self.acquire_segments() as segments:
            self.optimizer = self.rule.over(segments)
            self._bound = self.resident
            if "master" in self.state.rows:
                self._parameters_to_master()

    def forget(self, parameters: Container[int]) -> None:
        """These parameters, by number, have moved to other buckets."""
        kept = [slot.parameter not in parameters for slot in self.layout.slots]
        self.tensors = [tensor for tensor, stays in zip(self.tensors, kept) if stays]
        self._versions = [version for version, stays in zip(self._versions, kept) if stays]
        self.layout = self.layout.without(parameters)
        self.segments = self.layout.segments(self.shard.rank)

    @property
    def follows_update(self) -> bool:
        """Whether its parameters are gathered at once when they have changed."""
        return self.layout.key.unit is None and not self.layout.codes

    @property
    def resident(self) -> bool:
        """Whether master weights and state are there all the time."""
        return self.state.resident and self.parameters.holding.resident

    @contextmanager
    def acquire_segments(self) -> Iterator[list[OptimizerSegment]]:
        """What the optimizer sees of each segment, and writes; it goes back to where it lives."""
        assert self.gradients is not None
        rows = self.state.acquire()
        shard = self.parameters.holding.acquire()
        master = rows.pop("master", shard)

        def part(row: torch.Tensor, segment: Segment) -> torch.Tensor:
            flat = row.narrow(0, segment.offset, segment.numel)
            spec = segment.spec
            return in_order(flat, spec.local_shape, spec.order) if self.layout.key.rule.whole else flat

        try:
            yield [
                OptimizerSegment(
                    master=part(master, segment),
                    gradient=part(self.gradients.shard, segment),
                    state={kind: part(row, segment) for kind, row in rows.items()},
                    weight_decay=segment.spec.weight_decay,
                    name=segment.spec.name,
                    start=segment.start,
                    order=segment.spec.order,
                    low=part(shard, segment) if "master" in self.state.rows else None,
                )
                for segment in self.segments
            ]
        finally:
            self.parameters.holding.release(changed=True)
            self.state.release(changed=True)

    def flat_shards(self, replicas: bool) -> list[FlatShard]:
        """What a checkpoint keeps, kind by kind: what one store holds together comes together."""
        kept = [segment for segment in self.segments if replicas or not segment.spec.replica]
        return [self.flat_shard(kind, segment) for kind in ("param", *self.layout.key.rule.kinds) for segment in kept]

    def flat_shard(self, kind: str, segment: Segment) -> FlatShard:
        """What a checkpoint keeps of a segment: ``"param"`` (its master weights) or a kind of optimizer state."""
        row = "master" if kind == "param" else kind
        if row in self.state.rows:
            holding, offset = self.state.holding, self.state.offset(row) + segment.offset
        else:
            holding, offset = self.parameters.holding, segment.offset
        assert holding is not None
        if not holding.resident:
            dtype = holding.region.dtype
            return FlatShard.from_holder(segment.spec, kind, holding, offset, dtype, segment.start, segment.stop)
        data = holding.acquire().narrow(0, offset, segment.numel)
        holding.release(changed=False)
        return FlatShard.of(segment.spec, kind, data, segment.start, segment.stop)

    def prefetch(self) -> None:
        """Start to fetch what :meth:`update` needs."""
        if not self.resident and self.segments:  # a slice of padding is not updated
            self.state.read_start()
            self.parameters.holding.read_start()

    def _parameters_to_master(self) -> None:
        """Master weights of their own become what the shard is."""
        if "master" in self.state.rows:
            self.state.acquire()["master"].copy_(self.parameters.holding.acquire())
            self.parameters.holding.release(changed=False)
            self.state.release(changed=True)

    # Gradients

    @property
    def frees_gradients(self) -> bool:
        """Whether whole gradients have memory only while a backward pass fills them."""
        return self.gradients is not None and self.gradients.transient

    @property
    def lacks_gradients(self) -> bool:
        """Whether nothing of this step has been reduced into the shard that is kept."""
        return self.gradients is not None and self.gradients.empty

    def start_step(self, step: int, seed: int) -> None:
        """Forget the gradients of the step before. ``step``: updates so far, and ``seed``: the run's, of rounding."""
        assert self.gradients is not None
        self._sums.start_step(step, seed)
        self._frozen = None
        if self.gradients.whole is not None and self.main_grads[0].view is None:
            self._set_grad_views(self.gradients.whole)

    def note_frozen(self) -> None:
        """Record which parameters are frozen (``requires_grad=False``), before each backward pass of a step.

        Those frozen in every pass get no update, as in torch: a GAN's loop may freeze one that has its gradient.
        """
        if self._frozen is None or self._frozen:  # else an earlier pass had none
            now = {slot.spec.name for slot, p in zip(self.layout.slots, self.tensors) if not p.requires_grad}
            self._frozen = now if self._frozen is None else self._frozen & now

    def open(self) -> None:
        """Take memory for whole gradients, and show the main gradients their parts of it."""
        assert self.gradients is not None
        whole = self.gradients.take()
        self.layout.clear_padding(whole)
        self._set_grad_views(whole)

    def _set_grad_views(self, whole: torch.Tensor) -> None:
        for slot, parameter, main_grad in zip(self.layout.slots, self.tensors, self.main_grads):
            main_grad.view = shaped_as(whole.narrow(0, slot.start, slot.numel), parameter)
            main_grad.written = False

    def start_reduce(self) -> None:
        """Start the first of the sums that make ``gradients.shard`` whole. Leave the buffer alone until the end."""
        assert self.gradients is not None
        if self.gradients.whole is None:
            self.open()  # no gradient came; other ranks may have some
        for main_grad in self.main_grads:
            if not main_grad.written:
                assert main_grad.view is not None
                main_grad.view.zero_()
        self._sums.start()
        if self.frees_gradients:
            for main_grad in self.main_grads:
                main_grad.view = None

    def finish_reduce(self) -> None:
        """Wait for the sum that :meth:`start_reduce` started."""
        self._sums.finish()

    def free_gradients(self) -> None:
        """Give whole gradients back where they are not kept. All ranks of the shard axis, in one order."""
        assert self.gradients is not None
        self.gradients.free()

    def sum_over_remaining_axes(self) -> None:
        """The sums over the other axes, once a step."""
        self._sums.over_remaining_axes()

    def norm_squared(self) -> torch.Tensor:
        """0-d float64: squared norm of this rank's slice, without parameters that another rank owns.

        Those count as zero, but a NaN or Inf in them makes it NaN: only this rank sees it.
        """
        assert self.gradients is not None
        total = torch.zeros((), dtype=torch.float64, device=self.gradients.shard.device)
        for begin, end in owned_ranges(self.segments):
            total += square_sum(self.gradients.shard[begin:end])
        for segment in self.segments:
            if segment.spec.replica:
                total += 0.0 * square_sum(self.gradient_of(segment))
        return total

    def gradient_of(self, segment: Segment) -> torch.Tensor:
        """``[numel]``: the reduced gradient of a segment, a view."""
        assert self.gradients is not None
        return self.gradients.shard.narrow(0, segment.offset, segment.numel)

    # Parameters

    def update(self, change: Callable[[Update], None], look: slice | None = None, step: bool = False) -> None:
        """Call ``change``, an optimizer ``step`` or another, with the rule over this rank's slice; parameters follow.

        ``look``: at which elements of it, whether they were written since the step before.
        """
        if self.optimizer is None:
            return
        if self._frozen is None:
            self.note_frozen()  # there was no backward pass here
        self.optimizer.frozen = frozenset(self._frozen or ())
        with nullcontext() if self._bound else self.acquire_segments() as segments:
            if segments is not None:
                self.optimizer.bind(segments)
            if step and getattr(self.optimizer, "writes_low", False):
                change(self.optimizer)
            else:
                self._masters_follow(look)
                change(self.optimizer)
                self.master_to_parameters()

    def master_to_parameters(self) -> None:
        """The shard becomes what master weights of their own are."""
        if "master" in self.state.rows:
            self.parameters.holding.acquire().copy_(self.state.acquire()["master"])
            self.state.release(changed=False)
            self.parameters.holding.release(changed=True)

    def _masters_follow(self, look: slice | None) -> None:
        """Master weights of their own become what was written into the low-precision parameters."""
        if "master" in self.state.rows:
            master, shard = self.state.acquire()["master"], self.parameters.holding.acquire()
            found = masters_follow(master, shard, EVERYTHING if self._looks > 0 else look)
            self.parameters.holding.release(changed=False)
            self.state.release(changed=found)
            self._looks = math.inf if found else self._looks - 1  # who writes once does so again

    def keep_writes(self, replaced: bool = False) -> None:
        """Shard and master weights become what was written into the parameters; no peer may be reading the shard.

        ``replaced``: or what they were given by ``parameter.data = ...``, where they are whole all the time, too.
        """
        self._write_back()
        if replaced and not self.parameters.transient:
            take_replaced(self.layout.slots, self.tensors, self.parameters.whole)
        self.parameters.write_back()
        if self.gradients is not None and self.segments and (self.resident or self._is_written()):
            self._masters_follow(EVERYTHING)
        self._versions = [parameter._version for parameter in self.tensors]

    def release(self) -> None:
        """Give the memory of whole parameters of a unit back. What was written into them stays."""
        self._write_back()
        self.parameters.free()

    def _write_back(self) -> None:
        """What was written is in the buffer, and in the shard where that is offloaded."""
        if not self.parameters.has_copy:
            return
        whole = self.parameters.whole
        replaced = take_replaced(self.layout.slots, self.tensors, whole)
        arrived, digest = self._arrived, self._digest()
        differs = arrived is not None and digest is not None and bool(arrived != digest)
        if not self.parameters.holding.resident and (replaced or differs or self._is_written()):
            self._looks = math.inf
            self.parameters.holding.acquire().copy_(comm.slice_dim0(whole, self.shard))
            self.parameters.holding.release(changed=True)

    def _digest(self) -> torch.Tensor | None:
        """A sum that tells a write of an offloaded shard, which is not here to be compared. To ask a GPU means to wait
        for it: there only in the first steps, and where something was found."""
        whole, there = self.parameters.whole, self.parameters.has_copy
        if self.parameters.holding.resident or not there or not (whole.device.type == "cpu" or self._looks > 0):
            return None
        return comm.slice_dim0(whole, self.shard).view(torch.int64).sum()

    def _is_written(self) -> bool:
        return any(parameter._version != seen for parameter, seen in zip(self.tensors, self._versions))

    def start_gather(self) -> None:
        """Start to collect every rank's slice of the parameters, in place."""
        self.gathering = self.parameters.all_gather_start()

    def cancel_gather(self) -> None:
        """A gather was begun for a use that did not come. Of a shard that is fetched first it has not begun."""
        if self.parameters.holding.resident:
            self.finish_gather()
        else:
            self.gathering = None
            self.parameters.cancel()
        self.parameters.free()

    def finish_gather(self) -> bool:
        """Wait for the gather; False if there was none under way."""
        gathering, self.gathering = self.gathering, None  # none is under way either when it fails
        if gathering is None:
            return False
        gathering.wait()
        self._arrived = self._digest()
        return True
