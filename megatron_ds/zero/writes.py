"""Parameters that are written in place, by a module in its forward or by a loop: the written values hold, as in DDP.

A codebook, a momentum encoder or clipped weights are written by all ranks alike, without a word to the optimizer. What
is kept of a parameter between uses (a shard at stage 3, a master weight in half precision) has to become what was
written. A version counter cannot tell: a write through ``.data`` has none. So the values are compared.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megatron_ds.shard import ShardSpec, shaped_as
from megatron_ds.zero.buckets import Slot

_CHUNK_CPU, _CHUNK = 1 << 19, 1 << 24  # elements compared at a time: of a cache, of a device's memory
_EVERY = 509  # elements from one that is looked at to the next: a prime, so that they lie in all columns of a matrix
EVERYTHING = slice(None)


def masters_follow(master: Tensor, shard: Tensor, look: slice | None) -> bool:
    """Sets master weights to the values of ``shard`` where it is not what they round to; True if there may be such.

    Args:
        look: at these elements, and some of all others; None: at those alone. Where one of them was written, at all.
            To look at all on a CPU takes as long as a third of the update. On a GPU it is always done: there it takes
            no time to speak of, where to ask would mean to wait.
    """
    on_cpu = shard.device.type == "cpu"
    size = _CHUNK_CPU if on_cpu else _CHUNK
    parts = [slice(None, None, _EVERY), slice(0, 0) if look is None else look]
    if on_cpu and not any(
        not _same_bits(whole.to(low.dtype), low)
        for part in parts
        for whole, low in zip(master[part].split(size), shard[part].split(size))
    ):
        return False
    for whole, low in zip(master.split(size), shard.split(size)):
        whole.copy_(torch.where(whole.to(low.dtype) == low, whole, low.to(whole.dtype)))
    return True


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors ``[n]`` are equal: torch compares one element after the other, so eight bytes are one."""
    if not all(t.stride() == (1,) and t.storage_offset() % 8 == 0 for t in (one, other)):
        return torch.equal(one, other)
    whole = one.numel() // 8 * 8
    words = [t[:whole].view(torch.int64) for t in (one, other)]
    return torch.equal(*words) and torch.equal(one[whole:], other[whole:])


def take_replaced(slots: Sequence[Slot], parameters: Sequence[nn.Parameter], whole: Tensor) -> bool:
    """Parameters whose memory was exchanged (``parameter.data = ...``) lie in a flat buffer again, with the new values.

    Returns:
        Whether there were any.

    Raises:
        RuntimeError: the shape of one of them is another one now.
    """
    replaced, start, size = False, whole.data_ptr(), whole.element_size()
    for slot, parameter in zip(slots, parameters):
        if slot.numel and parameter.data_ptr() != start + slot.start * size:
            _take(slot.spec, parameter, whole.narrow(0, slot.start, slot.numel))
            replaced = True
    return replaced


def _take(spec: ShardSpec, parameter: nn.Parameter, place: Tensor) -> None:
    shape = (*parameter.shape, 2) if parameter.is_complex() else tuple(parameter.shape)
    if shape != spec.local_shape:
        raise RuntimeError(
            f"{spec.name} was given the shape {list(shape)} by parameter.data = ..., but has "
            f"{list(spec.local_shape)}; change the model before initialize(), or call engine.close() and initialize() "
            "again"
        )
    part = shaped_as(place, parameter)
    part.copy_(parameter.data)
    parameter.data = part
