"""Stage 3: whoever reads a parameter reads what it is now, however slow the rank that holds its values."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from unit_models import LR, Awkward, Setting, mesh_of_ranks, model, optimizer_of, tokens_of

from megatron_ds.mesh import Mesh
from megatron_ds.testing import run_ranks
from megatron_ds.zero.flat import FlatBucket
from megatron_ds.zero.optimizer import ZeroOptimizer

LATE = 0.05


@contextmanager
def late(mesh: Mesh, method: str) -> Iterator[None]:
    """Rank 1 comes late to what changes a bucket."""
    real = getattr(FlatBucket, method)

    def slow(bucket: FlatBucket, *arguments: object, **named: object) -> object:
        if mesh.rank == 1:
            time.sleep(LATE / 10)
        return real(bucket, *arguments, **named)

    with patch.object(FlatBucket, method, slow):
        yield


def backward(made: Awkward, zero: ZeroOptimizer, mesh: Mesh, step: int) -> None:
    zero.start_step()
    loss = made(tokens_of(step)[mesh.rank :: mesh.data.size], step)
    zero.start_backward(last=True)
    loss.backward()
    zero.end_backward()
    zero.finish_gradients()
    zero.norm_squared()


@torch.no_grad()
def seen(made: Awkward) -> Tensor:
    """What an evaluation computes, which reads every parameter."""
    return made(tokens_of(7), 0).detach()


@torch.no_grad()
def of_copy(zero: ZeroOptimizer, made: Awkward) -> Tensor:
    """The same by a plain module with the values that a gather of all gives when every rank has long been done."""
    other = model()
    time.sleep(4 * LATE)
    assert zero.gatherer is not None
    zero.gatherer.free_all()  # else what is whole already would be taken as it is
    with zero.gathered(made.parameters()):
        for mine, theirs in zip(other.parameters(), made.parameters()):
            mine.copy_(theirs)
    return seen(other)


def reads(shared_memory: bool) -> dict[str, bool]:
    mesh, made, right = mesh_of_ranks(), model(), {}
    first = seen(made)
    with late(mesh, "write_back_initial"):
        zero = optimizer_of(made, mesh, Setting(shared_memory=shared_memory, prefetch=0))
    right["after the start"] = torch.equal(seen(made), first)
    backward(made, zero, mesh, 0)
    with late(mesh, "update"):
        zero.step(LR)
    got = seen(made)
    right["after a step"] = torch.equal(got, of_copy(zero, made)) and not torch.equal(got, first)

    backward(made, zero, mesh, 1)
    seen(made)  # leaves its last unit whole
    zero.step(LR)
    right["evaluated before a step"] = torch.equal(seen(made), of_copy(zero, made))

    def loaded() -> None:
        for flat_shard in zero.flat_shards(for_load=True):
            time.sleep(LATE / 10 if mesh.rank == 1 else 0)
            if flat_shard.kind == "param":
                flat_shard.data.mul_(0.5)
        zero.refresh_parameters()

    def written() -> None:
        with late(mesh, "keep_writes"), zero.gathered(made.parameters(), write=True):
            for parameter in made.parameters():
                parameter.data.mul_(0.5)

    changes: dict[str, Callable[[], None]] = {"loaded": loaded, "written": written}
    for name, change in changes.items():
        before = seen(made)
        change()
        got = seen(made)
        right[name] = torch.equal(got, of_copy(zero, made)) and not torch.equal(got, before)
    change()
    with zero.gathered([made.blocks[0].up.weight]):
        inside = made.blocks[0].up.weight.detach().clone()
    of_copy(zero, made)
    with zero.gathered([made.blocks[0].up.weight]):
        right["gathered"] = torch.equal(made.blocks[0].up.weight, inside)
    zero.close()
    return right


@pytest.mark.parametrize("shared_memory", [True, False], ids=["shared memory", "apart"])
def test_a_read_waits_for_the_values(shared_memory: bool) -> None:
    for rank, right in enumerate(run_ranks(reads, 2, shared_memory)):
        assert len(right) == 6 and all(right.values()), f"rank {rank}: {right}"


def slow_evaluation(gradients_first: bool) -> bool:
    """Rank 0 evaluates between its backward pass and the step, slowly; its peers' step must not change what it sees."""
    mesh, made = mesh_of_ranks(), model()
    zero = optimizer_of(made, mesh, Setting())
    if gradients_first:
        backward(made, zero, mesh, 0)
    same = True
    if mesh.rank == 0:
        first = seen(made)
        time.sleep(0.3)  # the peers go on as far as they can
        same = torch.equal(seen(made), first)
    if not gradients_first:
        backward(made, zero, mesh, 0)
    zero.step(LR)
    mesh.barrier()
    return same


@pytest.mark.parametrize("gradients_first", [False, True])
def test_peers_do_not_change_what_a_slow_rank_still_computes_with(gradients_first: bool) -> None:
    assert run_ranks(slow_evaluation, 2, gradients_first, apart=False) == [True, True]
