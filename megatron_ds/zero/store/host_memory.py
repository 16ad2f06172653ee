"""State in host memory."""

from __future__ import annotations

import torch

from megatron_ds.comm import Pending
from megatron_ds.zero.store.base import Region
from megatron_ds.zero.store.blocks import Block, BlockPool, HostBlock, Streams
from megatron_ds.zero.store.device import ResidentRegion


class HostStore:
    """Host memory; regions travel to a CUDA device and back on side streams, and are used in place on a CPU.

    On CUDA nothing waits on the host: the order of copies and of compute is kept by events, so that a region may be
    read ahead, and a block given back, while the device is still behind.

    Args:
        pin: page-lock the host memory (CUDA only): copies then run beside compute, at the bus's full rate.
        staging_bytes: device memory for regions in transit; more than what is held at once lets copies in both
            directions overlap. None: just what is held at once.
    """

    def __init__(self, device: torch.device, pin: bool = True, staging_bytes: int | None = None):
        self.device = device
        self._pin = pin
        self._blocks = BlockPool(device, with_host=False, limit=staging_bytes)
        self._memory: list[HostBlock] = []
        self._streams = Streams(device) if device.type == "cuda" else None

    def allocate(self, name: str, numel: int, dtype: torch.dtype) -> Region:
        if self._streams is None:
            return ResidentRegion(name, torch.zeros(numel, dtype=dtype))
        memory = HostBlock(numel * dtype.itemsize, self._pin)
        memory.tensor.zero_()
        self._memory.append(memory)
        return _TravellingRegion(name, memory.tensor.view(dtype), self._blocks, self._streams)

    def drain(self) -> None:
        if self._streams is not None:
            self._streams.down.synchronize()

    def close(self) -> None:
        if self._streams is not None:
            torch.cuda.synchronize(self.device)
        self._blocks.clear()
        for memory in self._memory:
            memory.free()
        self._memory.clear()


class _TravellingRegion:
    """A host tensor whose content is brought to a block on the device."""

    tensor = None

    def __init__(self, name: str, tensor: torch.Tensor, blocks: BlockPool, streams: Streams):
        self.name, self.numel, self.dtype = name, tensor.numel(), tensor.dtype
        self._bytes = tensor.view(torch.uint8)
        self._blocks, self._streams = blocks, streams
        self._block: Block | None = None
        self._written: torch.cuda.Event | None = None

    def read_start(self) -> Pending:
        if self._block is not None:
            raise RuntimeError(f"{self.name} is read already; write_start() or release() it first")
        block = self._blocks.take(self._bytes.numel())
        if block is None:
            raise RuntimeError(
                f"no staging memory on the device is left for {self.name} ({self._bytes.numel()} bytes of "
                f"{self._blocks.limit}): release other regions first"
            )
        if self._written is not None:
            self._streams.up.wait_event(self._written)
        self._streams.load(block, self._bytes, 0)
        self._block = block
        assert block.device is not None
        tensor = block.device[: self._bytes.numel()].view(self.dtype)
        return Pending(tensor, then=lambda: self._streams.wait_loaded(block))

    def write_start(self) -> None:
        block = self._held("write_start")
        block.free = self._written = self._streams.store(block, self._bytes, 0, self._streams.now())
        self._give_back(block)

    def release(self) -> None:
        block = self._held("release")
        self._streams.wait_loaded(block)  # it may not have been waited for
        block.free = self._streams.now()
        self._give_back(block)

    def _held(self, method: str) -> Block:
        if self._block is None:
            raise RuntimeError(f"{method}() of {self.name}, which is not read")
        return self._block

    def _give_back(self, block: Block) -> None:
        self._block = None
        self._blocks.give(block)
