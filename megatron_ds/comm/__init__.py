"""Collectives on an :class:`~megatron_ds.mesh.Axis`, and the autograd pairs built on them; flat buffers.

The plain functions (``collectives.py``) move data and do nothing at all on an axis of one rank, so that one process
runs the same code as a cluster. The differentiable ones (``regions.py``) keep each forward collective beside its
backward. What only ranks of one host gain by is behind ``local/``, which nobody but this package asks.
"""

from megatron_ds.comm.agreement import Agreement, open_agreement
from megatron_ds.comm.buffers import Buffers, BufferSizes, GroupBuffers, open_buffers
from megatron_ds.comm.collectives import (
    all_gather_start,
    all_reduce,
    all_reduce_start,
    broadcast,
    gather_dim0,
    movable,
    reduce_scatter_start,
    scatter_sum_dim0,
)
from megatron_ds.comm.pending import Pending, slice_dim0
from megatron_ds.comm.regions import gather_from_region, reduce_from_region, reduce_scatter_sequence, sum_over_region
