"""Copies that must stay equal: parameters that every tensor-parallel rank holds whole and updates for itself.

They begin alike and get the same gradients, so nothing sends them around. Kernels that add in another order on one rank
than on another would let them drift apart, and no loss would show it.
"""

from __future__ import annotations

import torch

from megatron_ds import comm
from megatron_ds.comm.together import exchange, merged
from megatron_ds.errors import ReplicaError, listed
from megatron_ds.mesh import Mesh
from megatron_ds.shard.flat_shards import FlatShard, acquired
from megatron_ds.zero.optimizer import ZeroOptimizer

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NAMED = 3


def check_replicas(zero: ZeroOptimizer, mesh: Mesh) -> None:
    """Raise ReplicaError on all ranks if copies over ``mesh.tp`` differ in any bit. Collective over the world.

    One sum a parameter, of the bits of its master weights as integers, and one message of those sums.
    """
    if mesh.tp.size == 1:
        return
    own = [shard for bucket in zero.buckets for shard in bucket.flat_shards(replicas=True)]
    own = [shard for shard in own if shard.kind == "param" and shard.box_shape == shard.global_shape]
    fault = ""
    if own:
        sums = torch.stack([_bit_sum(shard, held).to(mesh.device) for group, held in acquired(own) for shard in group])
        everyone = comm.gather_dim0(sums, mesh.tp).wait().view(mesh.tp.size, -1)
        differs = everyone != everyone[0]
        ranks = [mesh.tp.ranks[place] for place in differs.any(1).nonzero().flatten().tolist()]
        names = [own[number].name for number in differs.any(0).nonzero().flatten().tolist()]
        if ranks:
            fault = _fault(names, mesh.tp.ranks[0], ranks)
    found = merged(exchange(mesh.world, fault))
    if found:
        raise ReplicaError(found)


def _bit_sum(shard: FlatShard, held: torch.Tensor | None) -> torch.Tensor:
    """0-d int64."""
    return shard.tensor(held).view(_BITS[shard.data.itemsize]).sum(dtype=torch.int64)


def _fault(names: list[str], first: int, ranks: list[int]) -> str:
    return (
        f"{listed(names, _NAMED)}: no longer the same on rank {', '.join(map(str, ranks))} as on rank {first}, "
        "although every tensor-parallel rank holds a copy: a kernel gave them different gradients, or their memory was "
        "written. Go on from the last checkpoint, whose copies are rank "
        f"{first}'s, with torch.use_deterministic_algorithms(True); train.check_replicas_every=0 turns this check off"
    )
