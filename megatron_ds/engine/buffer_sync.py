"""Buffers that training forwards write (running statistics), rank 0's on every rank: DDP's ``broadcast_buffers``.

DDP broadcasts every buffer before a forward pass, the first one and each that follows a pass whose gradients were
reduced. Constant buffers are alike already, so here only those go that a rank has been seen to write, in one broadcast.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_ds import comm
from megatron_ds.comm.together import exchange
from megatron_ds.mesh import Axis
from megatron_ds.shard.flat_shards import as_bytes

_ALIGN = 16  # bytes: no dtype is wider


class BufferSync:
    """Gives the ranks of ``axis`` the first one's buffers of ``module``.

    Which ones are written is looked for at the end of the first step by their values, which sees writes through
    ``.data`` too, and after it by their version counters, which costs next to nothing. The ranks agree on the names,
    as a buffer may be written on some of them only.

    Attributes:
        source: the rank of ``axis`` whose buffers all get; another than the first where that one has no more batches.
    """

    def __init__(self, module: nn.Module, axis: Axis):
        self._module, self._axis, self.source = module, axis, 0
        self._due = axis.size > 1  # the next training forward begins with a broadcast
        self._written: list[str] | None = None  # None: not known yet, and all are broadcast
        self._first = {name: buffer.detach().clone() for name, buffer in self._named()} if self._due else {}
        self._seen: dict[str, tuple[Tensor, int]] = {}

    def _named(self) -> list[tuple[str, Tensor]]:
        return [(name, b) for name, b in self._module.named_buffers() if b.layout == torch.strided and not b.is_meta]

    def before_forward(self, last: bool) -> None:
        """A training forward follows, ``last``: its gradients will be reduced."""
        if self._due:
            self.share(self._written)
        self._due = last and self._axis.size > 1

    def news(self) -> bool:
        """Whether this rank has written a buffer that the ranks have not agreed on. Asked before :meth:`agree`."""
        return self._axis.size > 1 and (self._written is None or bool(self._new_names()))

    def agree(self) -> None:
        """All ranks, after any of them has news: what any has written is broadcast from now on."""
        names = {name for text in exchange(self._axis, "\n".join(self._new_names())) for name in text.splitlines()}
        self._written = sorted(names.union(self._written or ()))
        self._first.clear()
        self._note()

    def _new_names(self) -> list[str]:
        if self._written is None:
            return [name for name, b in self._named() if not _same(b, self._first.get(name))]
        return [name for name, b in self._named() if name not in self._written and not self._is_as_seen(name, b)]

    def _is_as_seen(self, name: str, buffer: Tensor) -> bool:
        seen, version = self._seen.get(name, (None, 0))
        return seen is buffer and version == buffer._version

    def _note(self) -> None:
        self._seen = {name: (b, b._version) for name, b in self._named() if name not in (self._written or ())}

    @torch.no_grad()
    def share(self, names: list[str] | None = None) -> None:
        """Broadcast the buffers of these names, or all."""
        if self._axis.size == 1 or names == []:
            return
        wanted = None if names is None else set(names)
        buffers = [b for name, b in self._named() if b.numel() and (wanted is None or name in wanted)]
        for device in dict.fromkeys(b.device for b in buffers):
            self._broadcast([b for b in buffers if b.device == device], wanted is None)
        if wanted is None:
            self._note()

    def _broadcast(self, buffers: list[Tensor], compares: bool) -> None:
        """``compares``: what is equal is not written; a forward pass of the same step may have kept it for backward."""
        sizes = [-(-b.nbytes // _ALIGN) * _ALIGN for b in buffers]
        packed = torch.zeros(sum(sizes), dtype=torch.uint8, device=buffers[0].device)
        parts = [part[: b.nbytes].view(b.dtype).view(b.shape) for part, b in zip(packed.split(sizes), buffers)]
        if self._axis.rank == self.source:
            for part, buffer in zip(parts, buffers):
                part.copy_(buffer)
        comm.broadcast(packed, self._axis, self.source)
        if self._axis.rank != self.source:
            for part, buffer in zip(parts, buffers):
                if not (compares and _same(buffer, part)):
                    buffer.copy_(part)


def _same(buffer: Tensor, before: Tensor | None) -> bool:
    """Equal in every bit: a NaN is one that was there before."""
    if before is None or before.shape != buffer.shape or before.dtype != buffer.dtype:
        return False
    return torch.equal(as_bytes(buffer), as_bytes(before))
