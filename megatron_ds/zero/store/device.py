"""State that stays where it is computed with."""

from __future__ import annotations

import torch

from megatron_ds.comm import Pending


class ResidentRegion:
    """A tensor that needs no transfer."""

    def __init__(self, name: str, tensor: torch.Tensor):
        self.name, self.numel, self.dtype = name, tensor.numel(), tensor.dtype
        self.tensor = tensor

    def read_start(self) -> Pending:
        return Pending(self.tensor)

    def write_start(self) -> None:
        pass

    def release(self) -> None:
        pass


class DeviceStore:
    """Plain device memory: reading gives the tensor itself."""

    def __init__(self, device: torch.device):
        self.device = device

    def allocate(self, name: str, numel: int, dtype: torch.dtype) -> ResidentRegion:
        return ResidentRegion(name, torch.zeros(numel, dtype=dtype, device=self.device))

    def drain(self) -> None:
        pass

    def close(self) -> None:
        pass
