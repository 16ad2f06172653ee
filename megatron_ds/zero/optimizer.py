"""ZeRO data parallelism (Rajbhandari et al. 2020): the numbers of plain data parallelism, the memory of a share.

Each parameter bucket is reduced to the rank that owns a slice, updated there, and gathered again. Ranks are split in
a *shard* axis, over which buckets are cut, and a *replicate* axis, over which those slices are repeated: stage 1
shards over all data-parallel ranks, stage 0 is the same code with a shard axis of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from megatron_ds.comm.buffers import Buffers, exact_gathers
from megatron_ds.config import OptimizerConfig, ZeroConfig
from megatron_ds.mesh import Axis, Mesh
from megatron_ds.optim.factory import as_rule
from megatron_ds.optim.rule import Late, Update, UpdateRule
from megatron_ds.shard import ShardSpec, as_real
from megatron_ds.shard.flat_shards import FlatShard, share_out
from megatron_ds.zero.allocate import RankMemory, Stores, data_axes, quantization, take_values
from megatron_ds.zero.capacity import check_capacity
from megatron_ds.zero.flat import FlatBucket
from megatron_ds.zero.float8_gathering import Float8Gathering
from megatron_ds.zero.gatherer import Gatherer
from megatron_ds.zero.layout import ZeroLayout
from megatron_ds.zero.moves import MovableParameters
from megatron_ds.zero.reducer import Phase, Reducer
from megatron_ds.zero.units import choose_units, describe, unique


class ZeroOptimizer(MovableParameters):
    """Owns gradients, master weights and optimizer state of this rank's parameters, and updates them.

    One step::

        zero.start_step()
        for micro_batch, last in ...:
            ...                            # forward
            zero.start_backward(last)      # gradients are reduced during the last backward; from stage 2 on, in each
            ...                            # backward
            zero.end_backward()
        zero.finish_gradients()            # gradients are now sums over the global batch
        norm = comm.all_reduce(zero.norm_squared(), mesh.world).sqrt()
        zero.step(lr, scale)               # or zero.skip()

    Gradients are summed, never averaged: whoever computes the loss divides by the global count of tokens. A parameter
    that no micro-batch of the step used has a gradient of zero (and is updated with it), as in one process where some
    other sample used it. Results do not depend on ``config.overlap``, bit for bit.

    Args:
        parameters: this rank's parameters, or (name, parameter) pairs, in registration order, each with its ``.shard``.
            Repetitions are dropped; frozen ones are left where they are, and only saved. At stage 3 frozen parameters
            of a unit are sharded like all others.
        shared_over: parameters of which other pipeline stages hold a copy, each with the axis of the ranks that do;
            every rank of the axis must list it at the same position. Their gradients are summed over that axis.
        shared_memory: let CPU ranks of one host read each other's buffers instead of sending them. Sums are the same,
            but for the order in which gloo adds small buckets of three ranks and more.
        root: the module whose forward uses the parameters, or a list of them. Stage 3 finds in it the units that are
            gathered and freed together; see :mod:`megatron_ds.zero.units`.
        unit_classes: the classes of modules that are units, instead of the members of lists of modules.
        fill: gives values to parameters that have none yet (on the meta device, or of a model that is larger than
            this rank's memory): called with the parameters of one unit at a time, whose memory is there for the call.
            All ranks must give the same values. Default: parameters keep the values they have.
        stage_of: the pipeline stage of a parameter, by its ``id``, where the rank holds several: whose backward pass
            completes its gradient. Default: stage 0.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter] | Iterable[tuple[str, nn.Parameter]],
        mesh: Mesh,
        config: ZeroConfig,
        optimizer_config: OptimizerConfig | UpdateRule,
        shared_over: Sequence[tuple[nn.Parameter, Axis]] = (),
        shared_memory: bool = True,
        root: nn.Module | None = None,
        unit_classes: Sequence[type[nn.Module]] = (),
        fill: Callable[[list[nn.Parameter]], None] | None = None,
        stage_of: Mapping[int, int] | None = None,
    ):
        self.config = config
        self._axes = data_axes(mesh, config)
        self.shard, self.replicate = self._axes[()]
        self._parameters = unique(parameters)
        self._rule = as_rule(optimizer_config, self._parameters, mesh.tp)
        self._root, self._unit_classes, self._count = root, unit_classes, 0
        self.seed = 0  # the run's, by which stochastic rounding draws
        self._choose_units()
        shared = {id(parameter): number for number, (parameter, _) in enumerate(shared_over)}
        infos = describe(
            self._parameters, self._modules, config.persistence_threshold, self._rule, shared, stage_of or {}
        )
        sizes = {over: (shard.size, replicate.size) for over, (shard, replicate) in self._axes.items()}
        self.layout = ZeroLayout.plan(infos, config, sizes)
        self._mesh, self._shared_over, self._shared_memory = mesh, shared_over, shared_memory
        self._quantization = quantization(mesh, config, sizes)
        self.stores: list[Stores] = []
        self._buffers: list[Buffers] = []
        self._all = self._allocate(self.layout)
        take_values(self._all, fill)
        self.gatherer: Gatherer | None = None
        self._attach()
        self._publish()

    def _choose_units(self) -> None:
        """The modules that are gathered and freed, as the model has them now."""
        self._modules = choose_units(self.config, self.shard.size, self._root, self._unit_classes)

    def _allocate(self, layout: ZeroLayout) -> list[FlatBucket]:
        """The buckets of a layout, with memory of their own. Collective."""
        device = self._parameters[0].device if self._parameters else self._mesh.device
        if layout.offloads and device.type != "meta":
            check_capacity(layout.bytes(), self.config, self._parameters, device, self._mesh.world)
        shards = {over: shard for over, (shard, _) in self._axes.items()}
        memory = RankMemory(layout, device, shards, self._shared_memory, self._quantization)
        self.stores.append(memory.stores)
        self._buffers += memory.buffers.values()
        return memory.buckets(self._parameters, self._mesh, self._axes, self._shared_over, self._rule)

    def _attach(self) -> None:
        """Hooks on parameters and modules, for the buckets that there are."""
        self.buckets = [bucket for bucket in self._all if bucket.layout.key.trainable]
        self._float8 = Float8Gathering(self.buckets, self._mesh.tp)
        each = self.layout.frees_gradients and not self.config.keep_whole
        self.reducer = Reducer(self.buckets, self.config.overlap, each, self.layout.gradient_window, self._meet_at)
        if self._root is not None and self._modules:
            axis = self.shard if len(self._axes) == 1 else self._mesh.data
            self.gatherer = Gatherer.over(self._root, self._modules, self._all, self.config.prefetch, axis)

    def _meet_at(self, place: str) -> None:
        if self.gatherer is not None:
            self.gatherer.meet(place)

    def close(self) -> None:
        """Let go of the parameters: no more hooks. They stay views of the flat buffers, whole ones."""
        try:
            if self.gatherer is not None:
                self.gatherer.free_all()
                for buffers in self._buffers:
                    buffers.gather_exactly(True)
                self._float8.gather_exactly(True)
                self.gatherer.close()  # gathers, which fails where a store has
            self._float8.close()
        finally:
            for stores in self.stores:
                stores.close()
            self.reducer.close()

    # Gradients

    def start_step(self) -> None:
        """Forget the gradients of the step before."""
        self.reducer.expect(Phase.IDLE, "start_step")
        self.reducer.start_step(self._count, self.seed)
        if self.gatherer is not None:
            self.gatherer.start_step()
            self.gatherer.keep = self.config.keep_whole

    def start_backward(self, last: bool, stage: int = 0) -> None:
        """A backward pass of a pipeline stage follows, ``last``: the stage's last one of this step here."""
        self.reducer.start_backward(last, stage)

    def start_input_backward(self, stage: int, micro_batch: int) -> None:
        """A backward pass follows whose weight gradients are computed later, in :meth:`add_weight_gradients`."""
        self.reducer.start_input_backward(stage, micro_batch)

    def end_input_backward(self, stage: int) -> None:
        """The input gradients are there."""
        if self.gatherer is not None:
            self.gatherer.end_backward()
        self.reducer.end_input_backward(stage)

    def add_weight_gradients(self, stage: int, micro_batch: int) -> None:
        """Compute what was kept of a micro-batch, between :meth:`start_backward` and :meth:`end_backward`."""
        self.reducer.add_weight_gradients(stage, micro_batch)

    def end_backward(self, stage: int = 0) -> None:
        """The backward pass is over. Where each one is reduced, all its gradients are in their shards now."""
        if self.gatherer is not None:
            self.gatherer.end_backward()
        self.reducer.end_backward(stage)

    def finish_gradients(self) -> None:
        """Reduce what is left and wait; afterwards every slice holds its sum over the global batch."""
        self.reducer.finish()
        if self.gatherer is not None:
            self.gatherer.compare_orders_start()
            self.gatherer.free_all()
        if self.buckets:
            self.buckets[-1].prefetch()

    def norm_squared(self) -> torch.Tensor:
        """0-d float64: this rank's share of the squared gradient norm.

        The sum of all ranks' shares over ``mesh.world`` counts every element of every global parameter once.
        """
        self.reducer.expect(Phase.REDUCED, "norm_squared")
        device = self._parameters[0].device if self._parameters else None
        total = torch.zeros((), dtype=torch.float64, device=device)
        for bucket in self.buckets:
            own = bucket.norm_squared()
            # The other replicas hold the same numbers: theirs count as 0, but a NaN or Inf that only they see as NaN.
            total += own if bucket.replicate.is_first else 0.0 * own
        return total

    def gradient_shards(self) -> list[FlatShard]:
        """The reduced gradients that this rank holds, of kind ``"gradient"``, in fp32 (fp64 for fp64 parameters).

        Between ``finish_gradients`` and ``step``: before clipping, multiplied by the loss scale. The data are views,
        which ``step`` may change. Replicas are included.
        """
        self.reducer.expect(Phase.REDUCED, "gradient_shards")
        return [
            FlatShard.of(segment.spec, "gradient", bucket.gradient_of(segment), segment.start, segment.stop)
            for bucket in self.buckets
            for segment in bucket.segments
        ]

    # Parameters

    def step(self, lr: float, scale: float | torch.Tensor = 1.0) -> None:
        """Update with gradients multiplied by ``scale`` and gather the parameters.

        A ``scale`` that is a tensor may be NaN, and then nothing changes; see :meth:`Update.step`. Buckets go in the
        order in which the next forward pass needs them.
        """
        self.reducer.expect(Phase.REDUCED, "step")
        self._rule.begin_step()
        self._update(lambda update: update.step(lr, scale), step=True)
        self._count += 1
        self.reducer.phase = Phase.IDLE

    def change(self, change: Callable[[Update], None]) -> None:
        """Between two steps, on all ranks: ``change`` is called with every bucket's rule; the parameters follow."""
        self.reducer.expect(Phase.IDLE, "a change of the weights by their optimizer")
        self._update(change)

    def _update(self, change: Callable[[Update], None], step: bool = False) -> None:
        self._before_change()
        order = self.buckets[::-1]
        size = max(1, int(self.config.bucket_mb * 1e6) // 4)
        parts = [(b, slice(i, i + size)) for b in order for i in range(0, b.layout.shard_size, size)]
        looked_at, look = parts[self._count % len(parts)] if parts else (None, None)
        for bucket, following in zip(order, [*order[1:], None]):
            if following is not None:
                following.prefetch()
            # One part after the other, besides buckets in which something was found.
            bucket.update(change, look if bucket is looked_at else None, step)
            if bucket.follows_update:
                bucket.start_gather()
        self._publish()

    def skip(self) -> None:
        """Drop the gradients of this step; parameters and state stay as they are."""
        self.reducer.expect(Phase.REDUCED, "skip")
        self._before_change()
        self._publish(changed=False)
        self.reducer.phase = Phase.IDLE

    def refresh_parameters(self) -> None:
        """Make the parameters what the master weights say, on all ranks of the shard axis; after loading."""
        self._before_change()
        for bucket in self.buckets:
            bucket.master_to_parameters()
            if bucket.follows_update:
                bucket.start_gather()
        self._publish()

    @contextmanager
    def gathered(self, parameters: Iterable[nn.Parameter], write: bool = False) -> Iterator[None]:
        """Inside, these parameters are whole on every rank, as they are kept. Collective over the shard axis.

        ``write``: between two steps; what every rank has written alike is kept, in the master weights too.
        """
        if write:
            self.reducer.expect(Phase.IDLE, "gathered(write=True)")
        wanted = {id(p) for p in parameters}
        touched = [bucket for bucket in self._all if any(id(p) in wanted for p in bucket.tensors)]
        exactly = exact_gathers([*self._buffers, self._float8])
        units = nullcontext() if self.gatherer is None else self.gatherer.gathered(touched, exactly)
        with self._float8.gathered(touched), units:
            yield
            if write:
                self._meet()
                for bucket in touched:
                    bucket.keep_writes(replaced=True)
        if write:
            self._publish()

    # Ranks that read each other's memory

    def _before_change(self) -> None:
        """Before parameters change: no rank holds or reads old values, of which an evaluation may have left some."""
        if self.gatherer is not None:
            self.gatherer.require_one_order()
            self.gatherer.free_all()
        self._meet()
        for bucket in self._all:
            bucket.parameters.write_back()
            bucket.parameters.discard()

    def _publish(self, changed: bool = True) -> None:
        """Signals that peers may read this rank's parameters, and waits for those that are whole all the time."""
        if changed:
            self._float8.encode()
        for buffers in self._buffers:
            buffers.publish()
        waited = [b.finish_gather() for b in reversed(self.buckets) if b.layout.key.unit is None]
        if any(waited):
            self._meet()  # a peer may still be copying what the caller is free to change from here on
            self._float8.arrived()

    def _meet(self) -> None:
        """Wait until every peer is here and so reads nothing of this rank: before a write that is not a step's."""
        for buffers in self._buffers:
            buffers.meet()

    # State

    @property
    def count(self) -> int:
        """Updates so far: AdamW's step, which a checkpoint keeps beside the flat shards."""
        return self._count

    @count.setter
    def count(self, updates: int) -> None:
        self._count = updates
        for update in self._rules():
            update.set_count(updates)

    def take_back(self) -> None:
        """Undo the step count of an update that the device has skipped, for each parameter that it was for."""
        late, frozen = self.late(), frozenset[str]().union(*(update.frozen for update in self._rules()))
        self.count -= 1
        made = {n: {**own, "step": own["step"] - 1} for n, own in late.items() if own is not None and n not in frozen}
        self.load_late({**late, **made})

    def _rules(self) -> list[Update]:
        return [bucket.optimizer for bucket in self.buckets if bucket.optimizer is not None]

    def late(self) -> dict[str, Mapping[str, float] | None]:
        """What a checkpoint keeps of parameters with fewer updates than :attr:`count`; of this rank's segments."""
        return {name: numbers for update in self._rules() for name, numbers in update.late(self._count).items()}

    def load_late(self, late: Late) -> None:
        """Take what all ranks' :meth:`late` gave, after the count has been set and all other state loaded."""
        for update in self._rules():
            update.load_late(late)

    def flat_shards(self, for_load: bool = False) -> list[FlatShard]:
        """What a checkpoint keeps of this rank: master weights (``"param"``) and each kind of optimizer state.

        For saving, every element is listed by one rank of the world, and replicas share out what they hold alike.
        ``for_load`` lists all that this rank holds: all ranks of the shard axis call it, fill the tensors and call
        :meth:`refresh_parameters`.
        """
        if for_load:
            self._before_change()
        else:
            self._meet()
        for bucket in self._all:
            bucket.keep_writes()
        if not for_load:
            self._publish(changed=False)
        found: list[FlatShard] = []
        for over, (shard, replicate) in self._axes.items():
            mine = [bucket for bucket in self._all if bucket.layout.key.sharded_over == over]
            cut = [flat_shard for bucket in mine for flat_shard in bucket.flat_shards(for_load)]
            whole = [
                FlatShard.of(info.spec, "param", as_real(parameter.data))
                for info, parameter in zip(self.layout.parameters, self._parameters)
                if not info.trainable and info.unit is None and info.sharded_over == over
                if for_load or not info.spec.replica
            ]
            if not for_load:
                cut = share_out(cut, replicate.rank, replicate.size)
                number = replicate.rank * shard.size + shard.rank
                whole = share_out(whole, number, replicate.size * shard.size)
            found += cut + whole
        return found

    def owns(self, spec: ShardSpec) -> bool:
        """Whether what this rank holds of a parameter is not a replica of what another rank has."""
        _, replicate = self._axes[("ep",) if spec.is_sharded_over("ep") else ()]
        return replicate.is_first and not spec.replica

    def kinds_of(self, name: str) -> tuple[str, ...]:
        """The state tensors that are kept of a parameter of this rank; of a frozen one none."""
        return next((info.rule.kinds for info in self.layout.parameters if info.spec.name == name), ())

    def bytes_by_store(self) -> dict[str, dict[str, int]]:
        """Bytes this rank holds between steps: kind, then ``"device"``, ``"host"`` or ``"disk"``."""
        return {kind: dict(places) for kind, places in self.layout.bytes().memory.items()}

    def bytes_report(self) -> dict[str, int]:
        """The same by kind, wherever they are; see :meth:`megatron_ds.zero.layout.ZeroLayout.bytes`."""
        return self.layout.bytes().by_kind
