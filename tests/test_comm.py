"""Collectives against their definition, and the autograd pairs against finite differences over two and three ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ds import comm
from megatron_ds.comm import collectives
from megatron_ds.comm.quantized_buffers import Quantization, QuantizedBuffers
from megatron_ds.mesh import Axis, Mesh, MeshShape
from megatron_ds.testing import device_of_rank, run_ranks

ROWS, COLUMNS = 6, 2


def axis_of(size: int) -> Axis:
    return Mesh.create(MeshShape(tp=size), device_of_rank(dist.get_rank(), size)).tp


def values(rank: int, rows: int = ROWS) -> Tensor:
    return torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


def every_collective(size: int) -> int:
    group = axis_of(size)
    everyone = [values(rank) for rank in range(size)]
    own, total = everyone[group.rank], sum(everyone)
    part = slice(group.rank * ROWS // size, (group.rank + 1) * ROWS // size)
    # Straight from rank to rank, by gloo's own algorithms, and through shared memory.
    elsewhere = replace(group, layerwise=False)
    ways = [(elsewhere, 0), (elsewhere, collectives.EXCHANGE_BYTES), (group, collectives.EXCHANGE_BYTES)]
    for axis, limit in ways:
        with patch.object(collectives, "EXCHANGE_BYTES", limit):
            reduced = own.clone()
            assert comm.all_reduce(reduced, axis) is reduced
            torch.testing.assert_close(reduced, total)
            largest = comm.all_reduce(own.clone(), axis, dist.ReduceOp.MAX)
            assert torch.equal(largest, torch.stack(everyone).amax(0))

            strided = own.t().contiguous().t()
            assert not strided.is_contiguous()
            for tensor in (own, strided):
                assert torch.equal(comm.gather_dim0(tensor, axis).wait(), torch.cat(everyone))
                torch.testing.assert_close(comm.scatter_sum_dim0(tensor, axis).wait(), total[part])

            # In place: the output is the rank's own slice of the input, and the other way round.
            buffer = own.clone()
            pending = comm.reduce_scatter_start(buffer[part], buffer, axis)
            torch.testing.assert_close(pending.wait(), total[part])
            torch.testing.assert_close(buffer[part], total[part])
            assert torch.equal(pending.wait(), buffer[part])  # waiting twice does nothing
            gathered = torch.full((ROWS, COLUMNS), torch.nan, dtype=torch.float64)
            gathered[part] = own[part]
            comm.all_gather_start(gathered, gathered[part], axis).wait()
            assert torch.equal(
                gathered, torch.cat([t[r * ROWS // size : (r + 1) * ROWS // size] for r, t in enumerate(everyone)])
            )
    assert torch.equal(comm.slice_dim0(own, group), own[part])
    return dist.get_rank()


@pytest.mark.parametrize("size", [2, 3])
def test_collectives(size: int) -> None:
    assert run_ranks(every_collective, size, size) == list(range(size))


# For each pair: whether all ranks have the same input, and whether all have the same output, which then counts once.
PAIRS: dict[str, tuple[bool, bool]] = {
    "reduce_from_region": (False, True),
    "sum_over_region": (False, False),
    "reduce_scatter_sequence": (False, False),
    "gather_from_region": (False, False),
}


def gradients(size: int) -> list[str]:
    """Analytic against central differences of the loss summed over ranks, one element of one rank at a time."""
    axis = axis_of(size)
    for name, (same_input, same_output) in PAIRS.items():
        pair: Callable[[Tensor, Axis], Tensor] = getattr(comm, name)

        def loss(x: Tensor, pair: Callable[[Tensor, Axis], Tensor] = pair, same_output: bool = same_output) -> Tensor:
            y = pair(x.sin(), axis)
            weights = values(10 if same_output else 10 + axis.rank, rows=size * ROWS)[: y.shape[0]]
            return (y.square() * weights).sum()

        x = values(0 if same_input else axis.rank).requires_grad_()
        (analytic,) = torch.autograd.grad(loss(x), x)
        step = 1e-5
        for rank in range(1 if same_input else size):
            for index in range(x.numel()):
                moved = []
                for sign in (1, -1):
                    shifted = x.detach().clone()
                    if same_input or axis.rank == rank:
                        shifted.view(-1)[index] += sign * step
                    value = loss(shifted)
                    moved.append(value if same_output else comm.all_reduce(value, axis))
                numeric = (moved[0] - moved[1]) / (2 * step)
                if same_input or axis.rank == rank:
                    assert abs(analytic.view(-1)[index] - numeric) < 1e-7, f"{name}, element {index} of rank {rank}"
    return list(PAIRS)


@pytest.mark.parametrize("size", [2, 3])
def test_gradients_of_the_pairs(size: int) -> None:
    assert run_ranks(gradients, size, size) == [list(PAIRS)] * size


def test_one_rank_moves_nothing() -> None:
    alone, x = Axis("tp"), values(0).requires_grad_()
    for name in PAIRS:
        assert getattr(comm, name)(x, alone) is x
    for function in (comm.all_reduce, comm.slice_dim0):
        assert torch.equal(function(x.detach(), alone), x)
    assert comm.gather_dim0(x, alone).wait() is x and comm.scatter_sum_dim0(x, alone).wait() is x
    for start in (comm.all_gather_start, comm.reduce_scatter_start):
        output = torch.empty_like(x)
        assert start(output, x.detach(), alone).wait() is output
        assert torch.equal(output, x)


def backward_leaves_its_input_alone() -> bool:
    """The gradient that arrives may be used elsewhere too; a reduction in place would change it there."""
    axis = axis_of(2)
    for name in PAIRS:
        x = values(axis.rank).requires_grad_()
        y = getattr(comm, name)(x, axis)
        grad = values(5 + axis.rank, rows=len(y))
        kept = grad.clone()
        y.backward(grad)
        assert torch.equal(grad, kept), name
        before = x.detach().clone()
        getattr(comm, name)(x, axis)
        assert torch.equal(x, before), name
    return True


def test_backward_leaves_its_input_alone() -> None:
    assert all(run_ranks(backward_leaves_its_input_alone, 2))


def test_a_shard_takes_what_was_written_last_and_is_else_as_exact_as_it_was() -> None:
    """Of weights that are gathered in fewer bits: also the rounded value that was there before the first write."""
    buffers = QuantizedBuffers(Axis("shard"), torch.device("cpu"), Quantization(weights="int8"))
    memory = buffers.gathered(256, torch.float32)
    assert memory.shard is not None
    exact = memory.shard.copy_(torch.randn(256, generator=torch.Generator().manual_seed(0))).clone()
    buffers.publish()
    memory.all_gather_start(memory.shard).wait()
    rounded = memory.whole[3].item()
    assert rounded != exact[3]
    memory.write_back()
    assert torch.equal(memory.shard, exact)
    for value in (5.0, rounded):
        memory.whole[3] = exact[3] = value
        memory.write_back()
        assert torch.equal(memory.shard, exact)
