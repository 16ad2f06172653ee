"""Flat buffers whose bytes are quantised on their way, for links that are slower than the ranks (ZeRO++).

After Wang et al. 2023 (arXiv 2306.10209): gathered weights in 8 bits (section 3.1), a second shard of the weights
inside a node (3.2), and gradients that go all-to-all in 8 or 4 bits and are summed in fp32 (3.3). What a rank owns
stays exact: its shard of weights, master weights and gradient sums.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_ds.comm.buffers import GatheredMemory, GroupBuffers, GroupGathered
from megatron_ds.comm.collectives import all_gather_start, all_reduce_start, all_to_all_start
from megatron_ds.comm.pending import Pending, slice_dim0
from megatron_ds.kernels.quantized_blocks import pack, packed_bytes, row_keys, unpack
from megatron_ds.mesh import Axis


@dataclass(frozen=True)
class Quantization:
    """How the buffers of an axis are sent.

    Attributes:
        weights, gradients: the format (see :mod:`megatron_ds.kernels.quantized_blocks`); None: as they are.
        stochastic: gradients are rounded up or down by chance, which a key decides: whoever sums has one for each rank
            and each sum.
        node: the axis cut in two, where it is: neighbours (of one node), and their counterparts of all nodes.
    """

    weights: str | None = None
    gradients: str | None = None
    stochastic: bool = False
    node: tuple[Axis, Axis] | None = None


class QuantizedBuffers(GroupBuffers):
    """In this rank's own memory, sent as ``how`` says."""

    def __init__(self, axis: Axis, device: torch.device, how: Quantization):
        super().__init__(axis, device)
        self.how = how
        self.version = 0
        self.exact = False

    def sum_start(self, output: Tensor, whole: Tensor, add: bool, key: int) -> Pending:
        if self.how.gradients is None:
            return super().sum_start(output, whole, add, key)
        return reduce_scatter_start(output, whole, add, self.axis, self.how, key)

    def gathered(self, size: int, dtype: torch.dtype) -> GatheredMemory:
        how = self.how if dtype.is_floating_point else replace(self.how, weights=None)  # codes are rounded already
        if how.weights is None and how.node is None:
            return super().gathered(size, dtype)
        return QuantizedGathered(size, dtype, self, how)

    def gather_exactly(self, on: bool) -> None:
        if self.how.weights is not None:
            self.exact = on
            self.version += 1

    def publish(self) -> None:
        self.version += 1


class QuantizedGathered(GroupGathered):
    """Gathered in fewer bits: ``whole`` has the values that all ranks have, in its own slice too; ``shard`` is exact.

    A shard is quantised once for all gathers until it changes. With a node: the first gather after a change goes over
    all ranks, and what came is kept, sharded over the node, from which further gathers take it.
    """

    def __init__(self, size: int, dtype: torch.dtype, buffers: QuantizedBuffers, how: Quantization):
        axis = buffers.axis
        self._exact = torch.zeros(size // axis.size, dtype=dtype, device=buffers.device)
        super().__init__(size, dtype, buffers.device, axis, self._exact)
        self._buffers, self._how = buffers, how
        self._sent: Tensor | None = None  # what peers got of this rank's shard; None: as it is
        self._sent_version = -1  # the buffers' version of which that is
        self._came = self._exact  # this rank's slice of `whole` as it was gathered
        self._second: Tensor | None = None
        self._version = -1

    def all_gather_start(self, shard: Tensor) -> Pending:
        gathering = super().all_gather_start(shard)

        def arrived() -> None:
            gathering.wait()
            if self._how.weights is not None:
                self._came = slice_dim0(self.whole, self._axis).clone()

        return Pending(self.whole, then=arrived)

    def _gather_start(self, whole: Tensor, shard: Tensor) -> Pending:
        node, form = self._how.node, None if self._buffers.exact or not len(shard) else self._how.weights
        version = self._buffers.version
        if self._second is not None and node is not None and self._version == version:
            return all_gather_start(whole, self._second, node[0])
        sent = shard.unsqueeze(0)
        if form is not None and (self._sent is None or self._sent_version != version):
            self._sent, self._sent_version = pack(sent, form), version
        sent = sent if form is None or self._sent is None else self._sent
        received = whole.view(self._axis.size, -1) if form is None else sent.new_empty(self._axis.size, sent.shape[1])
        gathering = all_gather_start(received, sent, self._axis)

        def arrived() -> None:
            gathering.wait()
            if form is not None:
                for part, of_rank in zip(whole.chunk(self._axis.size), received):
                    part.copy_(unpack(of_rank.unsqueeze(0), part.numel(), form, part.dtype)[0])
            if node is not None:
                self._second, self._version = slice_dim0(whole, node[0]).clone(), version

        return Pending(whole, then=arrived)

    def write_back(self) -> None:
        """Only what was written: the rest of the shard is more exact than what was gathered of it."""
        if not self.is_gathered:
            return
        if self._second is not None and self._how.node is not None:  # all ranks have written alike
            self._second.copy_(slice_dim0(self.whole, self._how.node[0]))
        own, exact, came = slice_dim0(self.whole, self._axis), self._exact, self._came
        # A fifth of the time of what follows on a CPU; a GPU would have to be waited for.
        if own.device.type == "cpu" and torch.equal(own.view(torch.uint8), came.view(torch.uint8)):
            return
        exact.copy_(torch.where((own == came) | (own.isnan() & came.isnan()), exact, own))
        came.copy_(own)
        self._sent_version = -1

    def discard(self) -> None:
        super().discard()
        self._came = self._exact


def reduce_scatter_start(
    output: Tensor, whole: Tensor, add: bool, axis: Axis, how: Quantization, key: int = 0
) -> Pending:
    """Sum this rank's slice of ``whole`` over the axis into ``output`` (or ``add`` it), what others send quantised.

    Over the node first, where there is one: then between nodes goes what was summed in each of them. ``key``: of this
    rank and this sum.
    """
    count = whole.numel() // axis.size
    if not count:
        return Pending(output)
    if how.node is None:
        rows = whole.view(axis.size, 1, count)
        exchange = _exchange_start(rows, axis, how, key)
        return Pending(output, then=lambda: _put(output, exchange.wait()[0], add))
    near, far = how.node
    rows = whole.view(far.size, near.size, count).transpose(0, 1)  # by neighbour, what it owns and its counterparts do
    inside = _exchange_start(rows, near, how, key)

    def between() -> None:
        summed = inside.wait().unsqueeze(1)  # [nodes, 1, count]
        _put(output, _exchange_start(summed, far, how, key, axis.size).wait()[0], add)

    return Pending(output, then=between)


def _put(output: Tensor, total: Tensor, add: bool) -> None:
    output.add_(total) if add else output.copy_(total)


def _exchange_start(rows: Tensor, axis: Axis, how: Quantization, key: int, first: int = 0) -> Pending:
    """``[ranks, k, count]``, the first dim by receiver, to the sum of what came for this rank, ``[k, count]``.

    ``first``: rows that ``key`` has rounded before these.
    """
    form, (ranks, k, count) = how.gradients, rows.shape
    assert form is not None
    keys = row_keys(key, first, ranks * k, rows.device) if how.stochastic else None
    sent = pack(rows.reshape(ranks * k, count), form, keys).view(ranks, -1)
    received = torch.empty_like(sent)
    exchange = all_to_all_start(received, sent, axis)
    total = rows[axis.rank].clone()  # what stays here is not rounded

    def add_up() -> None:
        exchange.wait()
        for peer in range(ranks):  # in one order: the same bits in every run
            if peer != axis.rank:
                total.add_(unpack(received[peer].view(k, -1), count, form, total.dtype))

    return Pending(total, then=add_up)


def sum_start(tensor: Tensor, axis: Axis, how: Quantization | None, key: int = 0) -> Pending:
    """Sum in place over an axis: each rank sums a part, and all get it in the same rounded form.

    ``key``: of this rank and this sum.
    """
    if how is None or how.gradients is None or not tensor.numel():
        return all_reduce_start(tensor, axis)
    form = how.gradients
    count = -(-tensor.numel() // axis.size)
    rows = torch.nn.functional.pad(tensor, (0, count * axis.size - tensor.numel())).view(axis.size, 1, count)
    exchange = _exchange_start(rows, axis, how, key)

    def finish() -> None:
        keys = row_keys(key, axis.size, 1, tensor.device) if how.stochastic else None
        sent = pack(exchange.wait(), form, keys)
        packed = sent.new_empty(axis.size, packed_bytes(count, form, tensor.dtype))
        all_gather_start(packed, sent, axis).wait()
        tensor.copy_(unpack(packed, count, form, tensor.dtype).flatten()[: tensor.numel()])

    return Pending(tensor, then=finish)
