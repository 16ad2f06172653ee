"""What collectives gain where all ranks of an axis run on one Linux host, on CPUs, behind one interface.

Ranks of one host need not send each other anything: they read each other's memory (``arena.py``) once a token has said
that it may be read (``tokens.py``). Only :mod:`megatron_ds.comm` asks here; where an axis has no such ranks the answer
is None, on all of its ranks alike, and the process group does the work.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megatron_ds.comm.local.exchange import LocalExchange
from megatron_ds.comm.local.shared_buffers import LocalBuffers
from megatron_ds.mesh import Axis

if TYPE_CHECKING:
    from megatron_ds.comm.buffers import BufferSizes

_EXCHANGE = "local exchange"


def sum_start(tensor: torch.Tensor, axis: Axis) -> Callable[[], None] | None:
    """Start to sum ``tensor`` over the axis, in place; the answer finishes it."""
    exchange = _exchange_on(axis)
    return exchange.sum_start(tensor) if exchange is not None else None


def scatter_sum_start(output: torch.Tensor, tensor: torch.Tensor, axis: Axis) -> Callable[[], None] | None:
    """Start to sum ``tensor`` and keep this rank's slice of dim 0 in ``output``, which may be that slice."""
    exchange = _exchange_on(axis)
    return exchange.scatter_sum_start(output, tensor) if exchange is not None else None


def gather_start(output: torch.Tensor, tensor: torch.Tensor, axis: Axis) -> Callable[[], None] | None:
    """Start to concatenate every rank's ``tensor`` along dim 0; it may be this rank's slice of ``output``."""
    exchange = _exchange_on(axis)
    return exchange.gather_start(output, tensor) if exchange is not None else None


def _exchange_on(axis: Axis) -> LocalExchange | None:
    """The axis's one exchange, where its group is gloo's and the system can share memory."""
    if _EXCHANGE not in axis.connections:
        able = axis.group is not None and dist.get_backend(axis.group) == "gloo" and hasattr(os, "memfd_create")
        # With connections of its own, so that dropping the axis drops the exchange at once.
        axis.connections[_EXCHANGE] = LocalExchange(replace(axis, connections={})) if able else None
    found: LocalExchange | None = axis.connections[_EXCHANGE]
    return found


def open_buffers(axis: Axis, device: torch.device, sizes: BufferSizes) -> LocalBuffers | None:
    """Collective over ``axis``: memory for these buffers that all of its ranks map."""
    return LocalBuffers.create(axis, sizes) if device.type == "cpu" else None
