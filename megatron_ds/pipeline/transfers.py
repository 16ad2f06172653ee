"""Transfers between two pipeline stages: of a shape that both know, or of one that each tensor brings along."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Receive:
    """A posted receive; :meth:`wait` gives the tensor."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, source: int, group: Any):
        self._buffer = torch.empty(shape, dtype=dtype, device=device)
        self._work = dist.irecv(self._buffer, source, group=group)

    def wait(self) -> Tensor:
        assert self._work is not None
        self._work.wait()
        return self._buffer


class SizedReceive:
    """The same of a 1-d tensor behind a header: its number of elements and its dtype.

    Nothing is posted before :meth:`wait`: the next tensor's header would be taken for this one's elements.
    """

    def __init__(self, device: torch.device, source: int, group: Any):
        self._device, self._source, self._group = device, source, group

    def wait(self) -> Tensor:
        header = torch.empty(2, dtype=torch.int64, device=self._device)
        dist.recv(header, self._source, group=self._group)
        numel, dtype = header.tolist()
        tensor = torch.empty(numel, dtype=_DTYPES[dtype], device=self._device)
        dist.recv(tensor, self._source, group=self._group)
        return tensor


class Send:
    """The sends of one tensor, which stays until they are done. ``sized``: behind a header."""

    def __init__(self, tensor: Tensor, sized: bool, target: int, group: Any):
        header = [torch.tensor([tensor.numel(), _DTYPES.index(tensor.dtype)], device=tensor.device)] if sized else []
        self._tensors = [*header, tensor]
        self._works = [dist.isend(part, target, group=group) for part in self._tensors]

    def wait(self) -> None:
        for work in self._works:
            assert work is not None
            work.wait()
