"""Randomness that does not depend on the mesh, the micro-batching or the order of computation.

Nothing here has a state to save, restore or keep apart between ranks:

* an initial weight is a function of (seed, global parameter name, row);
* a dropout decision is a function of (seed, site in the model, sample, position, channel), computed by a counter-based
  hash. A rank computes the decisions of just the elements it holds, so tensor, sequence, pipeline and data parallel
  runs drop the same elements as one process, and recomputation in the backward pass drops them again without having
  kept a mask or a generator state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from megatron_ds.kernels.dropout import dropout_add, mix
from megatron_ds.kernels.dropout import keep_mask as keep_mask
from megatron_ds.kernels.registry import define
from megatron_ds.shard import spec_of

# Rows of a global tensor drawn from one generator: a shard along dim 0 draws only the blocks it touches, and no more
# than a block of a larger tensor is in memory twice.
_ROWS_A_BLOCK = 1024


def derive_seed(seed: int, *names: object) -> int:
    """A 63-bit seed for a named purpose, from the run's seed."""
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


@torch.no_grad()
def initialize_parameters(parameters: Iterable[nn.Parameter], seed: int) -> None:
    """Fill each parameter from its :class:`~megatron_ds.shard.ShardSpec`; values depend on (seed, name) alone.

    Normal values are drawn in fp32 on the CPU whatever the parameter's dtype and device, so that all agree.
    """
    for parameter in parameters:
        spec = spec_of(parameter)
        if parameter.is_meta:
            continue
        if spec.init == "zeros":
            parameter.zero_()
        elif spec.init == "ones":
            parameter.fill_(1.0)
        else:
            _fill_normal(parameter, seed)


def _fill_normal(parameter: nn.Parameter, seed: int) -> None:
    spec = spec_of(parameter)
    shape = spec.global_shape
    rows = shape[0]
    row_shape = shape[1:]
    first = spec.offset[0]
    last = first + parameter.shape[0]
    local = parameter.data.reshape(parameter.shape[0], -1) if parameter.dim() > 1 else parameter.data.unsqueeze(1)
    # Rows may be few and huge (qkv has one row a group), so a block is bounded by its elements too.
    whole_row = prod(row_shape)
    block = max(1, min(_ROWS_A_BLOCK, (1 << 24) // max(1, whole_row)))
    for start in range(first - first % block, last, block):
        stop = min(start + block, rows)
        generator = torch.Generator().manual_seed(derive_seed(seed, spec.name, start))
        values = torch.randn((stop - start, *row_shape), generator=generator).mul_(spec.std)
        for dim in range(1, len(shape)):
            values = values.narrow(dim, spec.offset[dim], parameter.shape[dim])
        lo, hi = max(start, first), min(stop, last)
        local[lo - first : hi - first] = values[lo - start : hi - start].reshape(hi - lo, -1).to(local)


@dataclass(frozen=True)
class DropoutKeys:
    """What a dropout site needs to know about the elements it sees.

    Attributes:
        seed: the run's dropout seed.
        samples: ``[b]`` int64, each sequence's index in the run's sample order: unique over the whole run.
        position_offset: first sequence position this rank holds when the sequence is split over ranks.
    """

    seed: int
    samples: Tensor
    position_offset: int = 0

    def row_keys(self, site: int, length: int, offset: int) -> Tensor:
        """``[length, b]`` int32: one hash for each (site, position, sample)."""
        return torch.ops.megatron_ds.dropout_row_keys(self.samples, self.seed, site, length, offset)


def _row_keys(samples: Tensor, seed: int, site: int, length: int, offset: int) -> Tensor:
    positions = torch.arange(offset, offset + length, device=samples.device)
    base = derive_seed(seed, "dropout", site) & 0xFFFFFFFF
    sample_keys = mix((samples ^ base).to(torch.int32) ^ (samples >> 32).to(torch.int32))
    return mix(sample_keys.unsqueeze(0) ^ mix(positions.to(torch.int32)).unsqueeze(1))


# An operator, because torch.compile cannot trace the hash of the seed and would cut every block in pieces.
define(
    "dropout_row_keys(Tensor samples, SymInt seed, SymInt site, SymInt length, SymInt offset) -> Tensor",
    _row_keys,
    lambda samples, seed, site, length, offset: samples.new_empty((length, samples.shape[0]), dtype=torch.int32),
)


def dropout(x: Tensor, p: float, keys: DropoutKeys | None, site: int) -> Tensor:
    """Drop elements of ``x`` ``[s, b, h]`` with probability ``p`` and scale the rest by ``1 / (1 - p)``.

    Args:
        keys: None in evaluation: nothing is dropped.
        site: a number that no other dropout of the model uses.
    """
    if keys is None or p == 0.0:
        return x
    return dropout_add(x, None, p, keys_of_rows(x, p, keys, site))


def keys_of_rows(x: Tensor, p: float, keys: DropoutKeys | None, site: int) -> Tensor | None:
    """``[s, b]`` row keys of a dropout of ``x`` ``[s, b, h]``; None where nothing is dropped."""
    return None if keys is None or p == 0.0 else keys.row_keys(site, x.shape[0], keys.position_offset)
