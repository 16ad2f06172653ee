"""The staging memory of a store: blocks that are taken for a transfer and given back, within a bound."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, field

import torch

from megatron_ds.files.direct_io import ALIGNMENT, aligned_buffer, aligned_up

Event = torch.cuda.Event


class HostBlock:
    """Host memory that starts at a multiple of 4096 bytes, and is page-locked if ``pin``.

    torch's own pinned allocator rounds every size up to a power of two and never returns it, so that a bound on host
    memory could be missed by half; here exactly ``size`` bytes are registered with CUDA.
    """

    def __init__(self, size: int, pin: bool):
        self.tensor = aligned_buffer(size)
        self._unlock: weakref.finalize | None = None
        if pin and size > 0:
            cuda, address = torch.cuda.cudart(), self.tensor.data_ptr()
            code = cuda.cudaHostRegister(address, size, 0)
            if int(code) != 0:
                raise RuntimeError(
                    f"CUDA could not page-lock {size} bytes of host memory (error {int(code)}); set "
                    "pin_memory=false, or raise the limit of `ulimit -l`"
                )
            # Of a block that nobody frees too: memory that is registered when it is given back to the system cannot
            # be registered by whoever gets it next.
            self._unlock = weakref.finalize(self, cuda.cudaHostUnregister, address)
            self._unlock.atexit = False  # the end of the process does it

    def free(self) -> None:
        if self._unlock is not None:
            self._unlock()
        self.tensor = self.tensor.new_empty(0)


@dataclass(eq=False)
class Block:
    """Staging for one transfer of up to ``size`` bytes.

    Attributes:
        host: None where the state itself lies in host memory and is only to be brought to the device.
        device: the twin on a CUDA device; None on a CPU, where ``host`` is worked on as it is.
        loaded: the twin is filled. free: whatever used the block before is done with it. Both are recorded on
            streams of the device.
    """

    size: int
    host: HostBlock | None
    device: torch.Tensor | None
    loaded: Event | None = None
    free: Event | None = None

    @property
    def bytes(self) -> torch.Tensor:
        """uint8 ``[size]`` on the compute device."""
        if self.device is not None:
            return self.device
        assert self.host is not None
        return self.host.tensor


@dataclass
class BlockPool:
    """Blocks that are reused, oldest first, and at most ``limit`` bytes of them (None: as many as are held at once).

    Not safe by itself for several threads.
    """

    device: torch.device
    with_host: bool
    pin: bool = False
    limit: int | None = None
    total: int = 0
    _made: list[Block] = field(default_factory=list)
    _idle: list[Block] = field(default_factory=list)

    def take(self, size: int) -> Block | None:
        """A block for ``size`` bytes, of unknown content; None if there can be none until others are given back."""
        size = aligned_up(size)
        fitting = [block for block in self._idle if block.size >= size]
        if fitting:
            block = min(fitting, key=lambda block: block.size)
            self._idle.remove(block)
            return block
        cost = self.cost(size)
        while self.limit is not None and self.total + cost > self.limit:
            if not self._idle:
                return None
            self._drop(self._idle.pop(0))  # each is too small for this
        self.total += cost
        block = Block(size, HostBlock(size, self.pin) if self.with_host else None, None)
        if self.device.type == "cuda":
            # What the allocator hands out may have been given back with work on it still queued: that is in order on
            # the stream it is allocated for, and for the stream that will fill it only through this event.
            block.device = torch.empty(size, dtype=torch.uint8, device=self.device)
            block.free = torch.cuda.current_stream(self.device).record_event()
        self._made.append(block)
        return block

    def give(self, block: Block) -> None:
        self._idle.append(block)

    def clear(self) -> None:
        """Free all blocks, those in use too. Nothing may be under way."""
        while self._made:
            self._drop(self._made[-1])
        self._idle.clear()

    @staticmethod
    def cost(size: int) -> int:
        """Bytes that a block for ``size`` bytes takes: what it is rounded up to, and what aligning it wastes."""
        return aligned_up(size) + ALIGNMENT

    def _drop(self, block: Block) -> None:
        if block.free is not None:
            block.free.synchronize()
        if block.host is not None:
            block.host.free()
        self._made.remove(block)
        self.total -= self.cost(block.size)


class Streams:
    """Side streams of a CUDA device, one for each direction; each does its copies in order."""

    def __init__(self, device: torch.device):
        self.device = device
        self.up = torch.cuda.Stream(device)
        self.down = torch.cuda.Stream(device)
        self._loading = threading.Lock()

    def now(self) -> Event:
        """What the compute stream has been given so far."""
        return torch.cuda.current_stream(self.device).record_event()

    def load(self, block: Block, host: torch.Tensor, start: int) -> None:
        """Queue ``host`` into the twin from byte ``start`` on; ``loaded`` then covers everything queued so far."""
        assert block.device is not None
        # Several threads load parts of one block: the event that is kept must be the one recorded last.
        with self._loading, torch.cuda.stream(self.up):
            if block.free is not None:
                self.up.wait_event(block.free)
            block.device[start : start + host.numel()].copy_(host, non_blocking=True)
            block.loaded = self.up.record_event()

    def store(self, block: Block, host: torch.Tensor, start: int, after: Event) -> Event:
        """Queue the twin's bytes from ``start`` on into ``host``, once ``after`` is done; when they are there."""
        assert block.device is not None
        with torch.cuda.stream(self.down):
            self.down.wait_event(after)
            host.copy_(block.device[start : start + host.numel()], non_blocking=True)
            return self.down.record_event()

    def wait_loaded(self, block: Block) -> None:
        """Let the compute stream wait until the twin is filled."""
        assert block.loaded is not None
        torch.cuda.current_stream(self.device).wait_event(block.loaded)
