"""The ZeRO layout of one rank: what it holds, in which buckets, on which store. Pure data, made before any memory.

A layout follows from descriptions of the parameters, the settings and the sizes of the shard axes. It needs no tensor
and no process group, so that any rank of any mesh can be laid out on a laptop. The optimizer makes its memory from it;
the dry run, the capacity check, the advice and the planner read the same bytes from it.

Memory is that of Rajbhandari et al. 2020 (arXiv 1910.02054), section 5, communication that of section 7, with gradients
that are summed in fp32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from megatron_ds.config import OffloadConfig, ZeroConfig
from megatron_ds.kernels.quantized_blocks import packed_bytes
from megatron_ds.zero.buckets import BYTES_ALONE, BucketLayout, ParameterInfo, plan_buckets, state_dtype
from megatron_ds.zero.byte_table import KINDS, PLACES, STATE, RankBytes
from megatron_ds.zero.nodes import AxisSizes, node_size
from megatron_ds.zero.store import placement
from megatron_ds.zero.store.blocks import BlockPool

_PLACE_OF_STORE = (("none", "device"), ("cpu", "host"), ("nvme", "disk"))
_WINDOW = 2  # buckets of gradients that are reduced at one time
_OVERLAP = 3  # regions in staging: one is read, one updated, one written

PoolKey = tuple[torch.dtype, tuple[str, ...]]
"""The dtype in which gradients are summed, and the mesh axes over which their parameters are sharded already."""


@dataclass(frozen=True)
class OffloadPlacement:
    """Which buckets, by their number, are offloaded, and the staging memory of that.

    Attributes:
        state, parameters: buckets whose master weights and optimizer state, whose parameters are not on the device.
        staging: host bytes for the staging buffers of the store of the state and of the parameters; 0 where it is not
            on a disk. With ``host_memory_mb`` set they get what host-resident state leaves of it, but never less than
            the largest region needs: to refuse that is for the capacity check.
    """

    state: frozenset[int]
    parameters: frozenset[int]
    staging: tuple[int, int]

    @staticmethod
    def of(config: ZeroConfig, buckets: Sequence[BucketLayout]) -> OffloadPlacement:
        offloads = (config.offload_optimizer, config.offload_parameters)
        state = _chosen(offloads[0], {i: b.size for i, b in enumerate(buckets) if b.key.trainable})
        parameters = _chosen(offloads[1], {i: b.size for i, b in enumerate(buckets) if b.key.unit is not None})
        sizes = [
            [sum(buckets[i].state_bytes) for i in sorted(state)],
            [size for i in sorted(parameters) for size in buckets[i].parameter_bytes],
        ]
        resident = sum(sum(each) for offload, each in zip(offloads, sizes) if offload.device == "cpu")
        costs = [
            [BlockPool.cost(size) for size in each] if offload.device == "nvme" else []
            for offload, each in zip(offloads, sizes)
        ]
        least = [max(each, default=0) for each in costs]
        left = None if config.host_memory_mb is None else max(0, int(config.host_memory_mb * 1e6) - resident)

        def share(needed: int, everything: int) -> int:
            wanted = _OVERLAP * needed if left is None else left * needed // max(sum(least), 1)
            return max(needed, min(wanted, everything))

        return OffloadPlacement(state, parameters, (share(least[0], sum(costs[0])), share(least[1], sum(costs[1]))))


@dataclass(frozen=True)
class ZeroLayout:
    """The parameters of one rank in buckets, and where every part of a bucket lives.

    Attributes:
        parameters: in registration order.
        buckets: in the order in which a backward pass fills them; those of frozen parameters of a unit are among them.
    """

    config: ZeroConfig
    parameters: tuple[ParameterInfo, ...]
    axes: AxisSizes
    buckets: tuple[BucketLayout, ...]
    offload: OffloadPlacement

    @staticmethod
    def plan(parameters: Sequence[ParameterInfo], config: ZeroConfig, axes: AxisSizes) -> ZeroLayout:
        """Buckets for the parameters of a rank; few where it is alone, offloads nothing and so exchanges nothing."""
        alone = all(size == 1 for sizes in axes.values() for size in sizes)
        alone = alone and {config.offload_optimizer.device, config.offload_parameters.device} == {"none"}
        size = BYTES_ALONE if alone else config.bucket_mb * 1e6
        rounds = {config.quantized_weights, config.quantized_gradients} != {"none"}
        buckets = plan_buckets(parameters, size, lambda over: axes[over][0], copies_apart=rounds)
        return ZeroLayout(config, tuple(parameters), axes, buckets, OffloadPlacement.of(config, buckets))

    def at_stage(self, stage: int) -> ZeroLayout:
        """The same parameters on the same ranks at a stage below 3, parameters on the device."""
        update = {
            "stage": stage,
            "keep_whole": False,
            "offload_parameters": OffloadConfig(),
            "quantized_weights": "none",
        }
        parameters = [replace(info, unit=None) for info in self.parameters]
        axes = self.axes if stage else {over: (1, shard * copies) for over, (shard, copies) in self.axes.items()}
        return ZeroLayout.plan(parameters, self.config.model_copy(update=update), axes)

    def of_these(self, infos: Mapping[int, ParameterInfo]) -> ZeroLayout:
        """Of the parameters with these numbers, as ``infos`` describes them, and of no others."""
        others = [replace(info, trainable=False, unit=None) for info in self.parameters]
        parameters = [infos.get(number, info) for number, info in enumerate(others)]
        return ZeroLayout.plan(parameters, self.config, self.axes)

    def with_added(self, added: ZeroLayout, infos: Mapping[int, ParameterInfo]) -> ZeroLayout:
        """Both, after the parameters of ``infos`` have moved into the buckets of ``added``."""
        parameters = tuple(infos.get(number, info) for number, info in enumerate(self.parameters))
        found = [(bucket.without(infos), self.offload, number) for number, bucket in enumerate(self.buckets)]
        found += [(bucket, added.offload, number) for number, bucket in enumerate(added.buckets)]
        found = sorted((each for each in found if each[0].slots), key=lambda each: each[0].due)
        mine, theirs = self.offload.staging, added.offload.staging
        offload = OffloadPlacement(
            frozenset(now for now, (_, offload, number) in enumerate(found) if number in offload.state),
            frozenset(now for now, (_, offload, number) in enumerate(found) if number in offload.parameters),
            (mine[0] + theirs[0], mine[1] + theirs[1]),
        )
        return ZeroLayout(self.config, parameters, self.axes, tuple(bucket for bucket, _, _ in found), offload)

    @property
    def offloads(self) -> bool:
        """Whether anything is to leave the device, on any rank: one with few buckets may itself keep all of them."""
        return any(o.device != "none" for o in (self.config.offload_optimizer, self.config.offload_parameters))

    @property
    def frees_gradients(self) -> bool:
        """Whether whole gradients have memory only while a backward pass fills them."""
        return self.config.stage >= 2 and self.axes[()][0] > 1

    @property
    def gradient_window(self) -> float:
        """Bytes of gradients that are reduced at one time, where their buffers are given back."""
        return _WINDOW * self.config.bucket_mb * 1e6

    def _node_size(self, bucket: BucketLayout) -> int | None:
        return node_size(self.config, self.axes, bucket.key.sharded_over)

    def gradient_sizes(self) -> dict[PoolKey, list[int]]:
        """Elements of every bucket of gradients."""
        sizes: dict[PoolKey, list[int]] = {}
        for bucket in self.buckets:
            if bucket.key.trainable:
                key = (state_dtype(bucket.key.dtype), bucket.key.sharded_over)
                sizes.setdefault(key, []).append(bucket.size)
        return sizes

    def keeps_gradients_whole(self, micro_batches: int) -> bool:
        """Whether whole gradients stay from micro-batch to micro-batch of a step."""
        return self.config.stage < 2 or (self.config.keep_whole and micro_batches > 1)

    def bytes(self, micro_batches: int = 1) -> RankBytes:
        """What this rank holds, exactly, padding included: between steps, or from micro-batch to micro-batch.

        An fp32 or fp64 parameter is its own master weight, so that only half precision has ``master`` bytes. Frozen
        parameters count under ``parameters``. From stage 2 on a rank keeps its slice of the gradients, at stage 3 its
        slice of each unit's parameters; what is whole for a moment comes on top, see :meth:`transient_bytes`.
        """
        held = {kind: dict.fromkeys(PLACES, 0) for kind in KINDS}
        whole = [info for info in self.parameters if not info.trainable and info.unit is None]
        held["parameters"]["device"] = sum(info.numel * info.dtype.itemsize for info in whole)
        stores, config = dict(_PLACE_OF_STORE), self.config
        whole_gradients = self.keeps_gradients_whole(micro_batches)
        for number, bucket in enumerate(self.buckets):
            away = config.offload_parameters.device if number in self.offload.parameters else "none"
            held["parameters"][stores[away]] += sum(bucket.parameter_bytes)
            held["parameters"]["device"] += bucket.scale_bytes
            if bucket.key.unit is not None:
                if (node := self._node_size(bucket)) is not None:
                    held["parameters"]["device"] += bucket.gathered_bytes // node
                if config.quantized_weights != "none" and not bucket.codes:  # the shard as it is sent
                    held["parameters"]["device"] += packed_bytes(
                        bucket.shard_size, config.quantized_weights, bucket.key.dtype
                    )
            if bucket.key.trainable:
                held["gradients"]["device"] += bucket.gradient_bytes // (1 if whole_gradients else bucket.shards)
                away = config.offload_optimizer.device if number in self.offload.state else "none"
                for kind, size in zip(STATE, bucket.state_bytes):
                    held[kind][stores[away]] += size
        return RankBytes(held, sum(self.offload.staging))

    def transient_bytes(self, micro_batches: int = 1) -> dict[str, int]:
        """Device memory at most, besides :meth:`bytes`, of ``gradients`` and ``parameters`` that are whole for a while.

        Of gradients those that are reduced at one time and two that are filled. Of parameters, at stage 3, the unit in
        use and those that are gathered ahead of it; all of them with ``keep_whole``. Of what is gathered in fewer bits
        this rank's slice twice, to tell what is written.
        """
        found = {"gradients": 0, "parameters": 0}
        if self.frees_gradients and not self.keeps_gradients_whole(micro_batches):
            for (dtype, _), sizes in self.gradient_sizes().items():
                most = self.gradient_window + 2 * max(sizes) * dtype.itemsize
                found["gradients"] += min(sum(sizes) * dtype.itemsize, int(most))
        units: dict[int, int] = {}
        for bucket in self.buckets:
            if bucket.key.unit is not None:
                rounded = self.config.quantized_weights != "none" and not bucket.codes
                size = bucket.gathered_bytes + rounded * bucket.gathered_bytes // bucket.shards
                units[bucket.key.unit] = units.get(bucket.key.unit, 0) + size
        sizes = [units[number] for number in sorted(units)]
        at_once = len(sizes) if self.config.keep_whole else 1 + self.config.prefetch
        found["parameters"] = max((sum(sizes[i : i + at_once]) for i in range(len(sizes))), default=0)
        return found

    def communication_bytes(self, micro_batches: int = 1) -> int:
        """Bytes one rank sends over the shard and the replicate axis in a step (and receives as many).

        A ring's reduce-scatter or all-gather of a buffer over ``n`` ranks sends ``(n - 1) / n`` of it, an all-reduce
        twice as much. Gradients are reduced once a step at stages 0 and 1, after every micro-batch at stages 2 and 3;
        parameters are gathered once a step up to stage 2, those of units at stage 3 for every forward and every
        backward pass. ``keep_whole`` makes both once a step.
        """
        times = 1 if self.config.keep_whole else micro_batches
        reductions = times if self.config.stage >= 2 else 1
        gathers = 1 if self.config.keep_whole else 2 * times
        weights, gradients = self.config.quantized_weights, self.config.quantized_gradients
        sent = 0
        for bucket in self.buckets:
            shard, copies = self.axes[bucket.key.sharded_over]
            whole = bucket.gathered_bytes
            node = self._node_size(bucket)
            near = node or shard
            if bucket.key.unit is not None:
                again = gathers - 1 if node else 0  # from the second shard, as it is
                packed = whole if bucket.codes else _sent_bytes(bucket, weights, bucket.key.dtype)
                sent += (gathers - again) * packed * (shard - 1) // shard + again * whole * (near - 1) // near
            else:
                sent += whole * (shard - 1) // shard
            if bucket.key.trainable:
                packed = _sent_bytes(bucket, gradients, state_dtype(bucket.key.dtype))
                if gradients == "none":
                    near = shard
                sent += reductions * packed * (near - 1) // near
                sent += reductions * (packed // near) * (shard // near - 1) // (shard // near)
                sent += 2 * packed // shard * (copies - 1) // copies
        return sent


def _sent_bytes(bucket: BucketLayout, form: str, dtype: torch.dtype) -> int:
    """Of a whole bucket in a format of :mod:`megatron_ds.kernels.quantized_blocks`, or as it is."""
    return bucket.size * dtype.itemsize if form == "none" else packed_bytes(bucket.size, form, dtype)


def _chosen(offload: OffloadConfig, sizes: Mapping[int, int]) -> frozenset[int]:
    if offload.device == "none":
        return frozenset()
    away = placement(list(sizes.values()), offload.ratio)
    return frozenset(number for number, goes in zip(sizes, away) if goes)
