"""ZeRO data parallelism (Rajbhandari et al. 2020): the numbers of plain data parallelism, the memory of a share.

Each parameter bucket is reduced to the rank that owns a slice, updated there, and gathered again. Ranks are split in
a *shard* axis, over which buckets are cut, and a *replicate* axis, over which the pieces are repeated: stage 1 shards
over all data-parallel ranks, stage 0 is the same code with a shard axis of one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum

import torch
from torch import nn

from megatron_ds.checkpoint.pieces import Piece
from megatron_ds.config import OptimizerConfig, PrecisionConfig, ZeroConfig
from megatron_ds.mesh import Axis, Mesh
from megatron_ds.optim.factory import UpdateRule, state_kinds
from megatron_ds.shared_memory import SharedArena, Tokens
from megatron_ds.zero import buckets
from megatron_ds.zero.buckets import BucketLayout, ParameterInfo, plan_buckets, state_dtype
from megatron_ds.zero.flat import FlatBucket
from megatron_ds.zero.sink import GradSink


class Phase(Enum):
    """Where a step stands. Gradients are only taken between ``start_step`` and ``finish_gradients``."""

    IDLE = "between steps"
    ACCUMULATING = "accumulating gradients"
    LAST_MICRO_BATCH = "in the last micro-batch"
    REDUCED = "holding reduced gradients"


class ZeroOptimizer:
    """Owns gradients, master weights and optimizer state of this rank's parameters, and updates them.

    One step::

        zero.start_step()
        ...                                # forward and backward of all micro-batches but the last
        zero.start_last_micro_batch()      # from here on each bucket is reduced as soon as it is complete
        ...
        zero.finish_gradients()            # gradients are now sums over the global batch
        norm = comm.all_reduce(zero.norm_squared(), mesh.world).sqrt()
        zero.step(lr, scale)               # or zero.skip()

    Gradients are summed, never averaged: whoever computes the loss divides by the global count of tokens. A parameter
    that no micro-batch of the step used has a gradient of zero (and is updated with it), as in one process where some
    other sample used it. Results do not depend on ``config.overlap``, bit for bit.

    Args:
        parameters: this rank's parameters, or (name, parameter) pairs, in registration order, each with its ``.shard``.
            Repetitions are dropped; frozen ones are left where they are, and only saved.
        shared_over: parameters of which other pipeline stages hold a copy, each with the axis of the ranks that do;
            every rank of the axis must list it at the same position. Their gradients are summed over that axis.
        shared_memory: let CPU ranks of one host read each other's buffers instead of sending them. The sums are the
            same but for the order in which gloo adds small buckets of three ranks and more.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter] | Iterable[tuple[str, nn.Parameter]],
        mesh: Mesh,
        config: ZeroConfig,
        optimizer_config: OptimizerConfig | UpdateRule,
        precision: PrecisionConfig,
        shared_over: Sequence[tuple[nn.Parameter, Axis]] = (),
        shared_memory: bool = True,
    ):
        self.config = config
        self.shard, self.replicate = shard_axes(mesh, config.stage)
        self._parameters = unique(parameters)
        shared = {id(parameter): number for number, (parameter, _) in enumerate(shared_over)}
        self._infos = [ParameterInfo.of(p, shared.get(id(p))) for p in self._parameters]
        self._kinds = state_kinds(optimizer_config)
        layouts = plan_buckets(self._infos, config.bucket_mb * 1e6, self.shard.size)
        self._arena = _arena(layouts, self._parameters, self.shard) if shared_memory else None
        # What peers may still be reading of this rank's shared buffers.
        self._gradients_read = self._parameters_read = False
        self.buckets: list[FlatBucket] = []
        self._sinks: list[list[GradSink]] = []
        self._missing: list[int] = []  # for each bucket, parameters of the last micro-batch yet to come
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        for layout in layouts:
            also_over = [self.replicate]
            if layout.key.partial_over_tp:
                also_over.append(mesh.tp)
            if layout.key.shared is not None:
                also_over.append(shared_over[layout.key.shared][1])
            mine = [self._parameters[slot.parameter] for slot in layout.slots]
            self.buckets.append(FlatBucket(layout, mine, self.shard, also_over, optimizer_config, self._arena))
            self._missing.append(0)
            self._sinks.append([self._attach(len(self._sinks), i, p) for i, p in enumerate(mine)])
        self._phase = Phase.IDLE
        self._launched = 0
        self._count = 0

    def _attach(self, bucket: int, position: int, parameter: nn.Parameter) -> GradSink:
        """Give the parameter its sink, and a hook that moves what autograd leaves in ``.grad`` there."""
        name = self.buckets[bucket].layout.slots[position].spec.name
        if hasattr(parameter, "grad_sink"):
            raise ValueError(f"{name} already belongs to a ZeroOptimizer; close() that one first")
        view = self.buckets[bucket].gradient_views[position]
        sink = GradSink(name, view, lambda sink: self._on_write(sink, bucket))
        parameter.grad_sink = sink  # type: ignore[attr-defined]

        def move(parameter: torch.Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None:  # None: the layer wrote into the sink itself
                sink.add(gradient)

        self._hooks.append(parameter.register_post_accumulate_grad_hook(move))
        return sink

    def close(self) -> None:
        """Let go of the parameters: no more hooks. They stay views of the flat buffers."""
        for hook in self._hooks:
            hook.remove()
        for layout in (bucket.layout for bucket in self.buckets):
            for slot in layout.slots:
                del self._parameters[slot.parameter].grad_sink  # type: ignore[attr-defined]

    # Gradients

    def start_step(self) -> None:
        """Forget the gradients of the step before, and wait for its parameters."""
        self._expect(Phase.IDLE, "start_step")
        self.wait_parameters()
        if self._gradients_read:  # the step before was skipped
            self._wait_readers()
        for sink in self._all_sinks():
            sink.written = False
            sink.writes = 0
        self._launched = 0
        self._phase = Phase.ACCUMULATING

    def start_last_micro_batch(self) -> None:
        """The next backward pass is this stage's last of the step: reduce buckets as it completes them."""
        self._expect(Phase.ACCUMULATING, "start_last_micro_batch")
        for index, sinks in enumerate(self._sinks):
            self._missing[index] = len(sinks)
            for sink in sinks:
                sink.writes = 0
        self._phase = Phase.LAST_MICRO_BATCH

    def _on_write(self, sink: GradSink, bucket: int) -> None:
        if self._phase is Phase.ACCUMULATING:
            return
        if self._phase is not Phase.LAST_MICRO_BATCH:
            raise RuntimeError(
                f"{sink.name} got a gradient {self._phase.value}; call start_step() before the backward pass"
            )
        if bucket < self._launched:
            raise RuntimeError(
                f"{sink.name} got gradient number {sink.writes} of the last micro-batch after its bucket had left, "
                f"because earlier steps had {sink.expected}; set zero.overlap=false for a graph that changes"
            )
        # How often a parameter is written in one backward pass is a property of the graph, learned from the step
        # before; so the first step reduces everything at its end.
        if sink.writes == sink.expected:
            self._missing[bucket] -= 1
            if self.config.overlap:
                # One order on all ranks, whatever the order in which gradients come: collectives match by order.
                while self._launched < len(self.buckets) and self._missing[self._launched] == 0:
                    self.buckets[self._launched].start_reduce()
                    self._launched += 1

    def finish_gradients(self) -> None:
        """Reduce what is left and wait; afterwards every slice holds its sum over the global batch."""
        if self._phase is not Phase.ACCUMULATING:
            self._expect(Phase.LAST_MICRO_BATCH, "finish_gradients")
            for sink in self._all_sinks():
                sink.expected = max(sink.expected, sink.writes)
        for index in range(self._launched, len(self.buckets)):
            for sink in self._sinks[index]:
                if not sink.written:
                    sink.view.zero_()
            self.buckets[index].start_reduce()
        self._launched = len(self.buckets)
        for bucket in self.buckets:
            bucket.finish_reduce()
        # Peers sent their gradients, so they have this rank's parameters of the step before; they may read on here.
        self._gradients_read, self._parameters_read = True, False
        self._phase = Phase.REDUCED

    def norm_squared(self) -> torch.Tensor:
        """0-d float64: this rank's share of the squared gradient norm.

        The sum of all ranks' shares over ``mesh.world`` counts every element of every global parameter once.
        """
        self._expect(Phase.REDUCED, "norm_squared")
        device = self._parameters[0].device if self._parameters else None
        total = torch.zeros((), dtype=torch.float64, device=device)
        if self.replicate.is_first:
            for bucket in self.buckets:
                total += bucket.norm_squared()
        return total

    def gradient_pieces(self) -> list[Piece]:
        """The reduced gradients that this rank holds, of kind ``"gradient"``, in fp32 (fp64 for fp64 parameters).

        Between ``finish_gradients`` and ``step``: before clipping, multiplied by the loss scale. The data are views,
        which ``step`` may change. Replicas are included.
        """
        self._expect(Phase.REDUCED, "gradient_pieces")
        return [
            Piece.of(segment.spec, "gradient", tensors.gradient, segment.start, segment.stop)
            for bucket in self.buckets
            for segment, tensors in bucket.segments
        ]

    # Parameters

    def step(self, lr: float, scale: float | torch.Tensor = 1.0, wait: bool = True) -> None:
        """Update with gradients multiplied by ``scale`` and gather the parameters.

        Buckets go in the order in which the next forward pass needs them. ``wait=False`` returns while parameters
        are still under way: call :meth:`wait_parameters` before anything reads them.
        """
        self._expect(Phase.REDUCED, "step")
        for bucket in reversed(self.buckets):
            bucket.update(lr, scale)
            bucket.start_gather()
        self._count += 1
        self._phase = Phase.IDLE
        if wait:
            self.wait_parameters()

    def skip(self) -> None:
        """Drop the gradients of this step; parameters and state stay as they are."""
        self._expect(Phase.REDUCED, "skip")
        self._phase = Phase.IDLE

    def wait_parameters(self) -> None:
        """Wait until the parameters of the last step have arrived."""
        waited = [bucket.finish_gather() for bucket in reversed(self.buckets)]
        if any(waited):
            # Peers sent their parameters, so they are done with the gradients; they may still read parameters here.
            self._gradients_read, self._parameters_read = False, True

    def refresh_parameters(self) -> None:
        """Make the parameters what the master weights say, on all ranks of the shard axis; after loading."""
        self._wait_readers()
        for bucket in self.buckets:
            bucket.master_to_parameters()
            bucket.start_gather()
        self.wait_parameters()

    def _wait_readers(self) -> None:
        """Wait until no peer reads this rank's buffers any more, so that they may be written.

        In the ordinary course of steps each collective proves that the one before it has been read; this exchange is
        for what breaks that course. It comes before the write and not after the read, because by then a peer may have
        left at the end of its work.
        """
        if self._arena is not None and (self._gradients_read or self._parameters_read):
            Tokens(self.shard).wait()
        self._gradients_read = self._parameters_read = False

    # State

    @property
    def count(self) -> int:
        """Updates so far: AdamW's step, which a checkpoint keeps beside the pieces."""
        return self._count

    @count.setter
    def count(self, updates: int) -> None:
        self._count = updates
        for bucket in self.buckets:
            if bucket.optimizer is not None:
                bucket.optimizer.set_count(updates)

    def pieces(self, for_load: bool = False) -> list[Piece]:
        """What a checkpoint keeps of this rank: master weights (``"param"``) and each kind of optimizer state.

        For saving, every element is listed by one rank of the world. ``for_load`` lists all that this rank holds,
        replicas included: all ranks of the shard axis call it, fill the tensors and call :meth:`refresh_parameters`.
        """
        if for_load:
            self._wait_readers()
        found: list[Piece] = []

        def add(kind: str, spec: buckets.ShardSpec, data: torch.Tensor, start: int, stop: int) -> None:
            if for_load or (self.replicate.is_first and not spec.replica):
                found.append(Piece.of(spec, kind, data, start, stop))

        for bucket in self.buckets:
            for segment, tensors in bucket.segments:
                add("param", segment.spec, tensors.master, segment.start, segment.stop)
                for kind, tensor in tensors.state.items():
                    add(kind, segment.spec, tensor, segment.start, segment.stop)
        for info, parameter in zip(self._infos, self._parameters):
            if not info.trainable and (for_load or self.shard.is_first):
                add("param", info.spec, parameter.data, 0, info.numel)
        return found

    def bytes_report(self) -> dict[str, int]:
        """Bytes this rank holds, by kind; see :func:`megatron_ds.zero.buckets.bytes_report`."""
        layouts = [bucket.layout for bucket in self.buckets]
        return buckets.bytes_report(self._infos, layouts, len(self._kinds))

    def _all_sinks(self) -> Iterable[GradSink]:
        return (sink for sinks in self._sinks for sink in sinks)

    def _expect(self, phase: Phase, method: str) -> None:
        if self._phase is not phase:
            raise RuntimeError(
                f"{method}() was called {self._phase.value}; the order is start_step, start_last_micro_batch, "
                "finish_gradients, norm_squared, then step or skip"
            )


def shard_axes(mesh: Mesh, stage: int) -> tuple[Axis, Axis]:
    """The shard and the replicate axis: ``mesh.data`` is one of them, the other has this rank alone."""
    if stage == 0:
        return Axis("shard", ranks=(mesh.rank,)), mesh.data
    return mesh.data, Axis("replicate", ranks=(mesh.rank,))


def _arena(layouts: Sequence[BucketLayout], parameters: Sequence[nn.Parameter], shard: Axis) -> SharedArena | None:
    """Memory for parameters and gradients that the ranks of the shard axis share, where they can."""
    if any(parameter.device.type != "cpu" for parameter in parameters):
        return None
    wanted = [(layout.size, dtype) for layout in layouts for dtype in (layout.key.dtype, state_dtype(layout.key.dtype))]
    return SharedArena.create(SharedArena.bytes_for(wanted), shard)


def unique(parameters: Iterable[nn.Parameter] | Iterable[tuple[str, nn.Parameter]]) -> list[nn.Parameter]:
    """The parameters in order, each once; pairs give their second part."""
    seen: dict[int, nn.Parameter] = {}
    for item in parameters:
        parameter = item[1] if isinstance(item, tuple) else item
        seen.setdefault(id(parameter), parameter)
    return list(seen.values())
