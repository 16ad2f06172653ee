"""Whether ranks were given the same data: without a DistributedSampler they compute the same gradient, silently."""

from __future__ import annotations

from typing import Any
from zlib import crc32

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from megatron_ds import comm
from megatron_ds.advice.rules import Advice
from megatron_ds.errors import listed
from megatron_ds.mesh import Axis
from megatron_ds.shard.flat_shards import as_bytes

_BYTES = 1 << 20  # of a tensor that are looked at


class FirstInputs:
    """A digest of what a rank's model computes with first."""

    def __init__(self) -> None:
        self._digest: int | None = None
        self._what = ""

    def see(self, inputs: Any) -> None:
        """Everything that the model is called with. Only the first call counts; 0 where there are no tensors."""
        if self._digest is not None:
            return
        self._digest = 0
        for tensor in tree_leaves(inputs):
            if isinstance(tensor, Tensor) and _is_plain(tensor) and tensor.numel():
                some = tensor.detach().reshape(-1)[: _BYTES // tensor.element_size()].cpu()
                self._digest = crc32(as_bytes(some).numpy().tobytes(), self._digest)
                self._what = self._what or f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"

    def compare(self, axis: Axis, device: torch.device) -> Advice | None:
        """On all ranks of the data axis. Waits for a GPU."""
        mine = torch.tensor([self._digest or 0], dtype=torch.int64, device=device)
        everyone = comm.gather_dim0(mine, axis).wait().tolist()
        return same_inputs(everyone, self._what)


def _is_plain(tensor: Tensor) -> bool:
    """Whether it has values of its own in a row of memory; a sparse or a nested one is not worth the trouble."""
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # where the model is called inside of torch.func.vmap
        return False
    return tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_meta


def same_inputs(digests: list[int], what: str) -> Advice | None:
    """Ranks whose inputs are equal. ``digests``: one a rank, 0 for none; ``what``: describes the first tensor."""
    ranks = [rank for rank, digest in enumerate(digests) if digest and digests.count(digest) > 1]
    if not ranks:
        return None
    return Advice(
        "same inputs",
        f"{len(ranks)} of {len(digests)} data-parallel ranks ({listed(ranks, 8)}) began with inputs that others had "
        f"too ({what}, ...): equal samples give equal gradients, and the global batch is smaller than it looks",
        "give the DataLoader a DistributedSampler(dataset, num_replicas=engine.mesh.data.size, "
        "rank=engine.mesh.data.rank)",
    )
