"""The rows of diffusion transformers can fail: each deliberate fault makes one fail, in the tensor that it spoils."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Any
from unittest.mock import patch

import pytest
import torch
from dit_rows import DiTRow, one_process, run_rows
from parity_run import Outcome, ParityError, assert_parity
from torch import Tensor

from megatron_ds.comm import regions, slice_dim0
from megatron_ds.data import noise
from megatron_ds.layers import affine
from megatron_ds.layers.norms import Norm
from megatron_ds.models import dit
from megatron_ds.models.conditions import TimeEmbedding
from megatron_ds.models.dit import DiT
from megatron_ds.optim.ema import AveragedUpdate
from megatron_ds.testing import run_ranks

Patch = Callable[[], AbstractContextManager[Any]]


def ranks_share_their_noise() -> AbstractContextManager[Any]:
    """A generator of each rank's own, all with one seed: the n-th draw is the same on every rank."""
    real, draws = noise.normal, iter(range(1 << 20))

    def by_draw(seed: int, purpose: int, indices: Any, shape: tuple[int, ...]) -> Any:
        return real(seed, purpose, [next(draws) for _ in indices], shape)

    return patch.object(noise, "normal", by_draw)


def the_average_is_not_stepped() -> AbstractContextManager[Any]:
    return patch.object(AveragedUpdate, "step", lambda self, lr, scale=1.0: self._update.step(lr, scale))


def the_condition_is_dropped_on_one_stage() -> AbstractContextManager[Any]:
    real = DiT._blocks

    def blocks(self: DiT, seen: Mapping[str, Tensor], hidden: Tensor | None) -> Any:
        if hidden is not None:
            hidden = torch.cat([hidden[:-1], torch.zeros_like(hidden[-1:])])
        return real(self, seen, hidden)

    return patch.object(DiT, "_blocks", blocks)


def the_conditions_gradient_stays_a_share() -> AbstractContextManager[Any]:
    real = TimeEmbedding.__init__

    def init(self: TimeEmbedding, *arguments: Any, **settings: Any) -> None:
        make = affine.replicated_parameter
        with patch.object(affine, "replicated_parameter", lambda *a, **k: _whole_gradient(make, *a, **k)):
            real(self, *arguments, **settings)

    return patch.object(TimeEmbedding, "__init__", init)


def _whole_gradient(make: Any, *arguments: Any, **settings: Any) -> Any:
    name, shape, init, tp, _ = arguments
    return make(name, shape, init, tp, False, **settings)


def shares_of_modulation_are_not_summed() -> AbstractContextManager[Any]:
    return patch.object(
        regions._GatherFromRegion,
        "backward",
        staticmethod(lambda ctx, grad: (slice_dim0(grad, ctx.axis), None)),
    )


def the_loss_stays_a_share() -> AbstractContextManager[Any]:
    return patch.object(dit.comm, "reduce_from_region", lambda tensor, axis: tensor)


def norms_of_queries_stay_a_share() -> AbstractContextManager[Any]:
    real = Norm.__init__
    return patch.object(Norm, "__init__", lambda self, *a, **k: real(self, *a, **{**k, "partial": False}))


def the_text_is_dropped_on_one_stage() -> AbstractContextManager[Any]:
    real = DiT._blocks

    def blocks(self: DiT, seen: Mapping[str, Tensor], hidden: Tensor | None) -> Any:
        if hidden is not None:
            rows = seen["text"].shape[1]
            hidden = torch.cat([hidden[: -rows - 1], torch.zeros_like(hidden[-rows - 1 : -1]), hidden[-1:]])
        return real(self, seen, hidden)

    return patch.object(DiT, "_blocks", blocks)


TWO_BY_TWO, TENSOR_PARALLEL = DiTRow((1, 2, 2)), DiTRow((2, 1, 1))
TEXT, TEXT_PARALLEL = DiTRow((1, 2, 1), model=("text",)), DiTRow((2, 1, 1), model=("text", "qk_norm"))
FAULTS: Mapping[DiTRow, tuple[tuple[Patch, str], ...]] = MappingProxyType(
    {
        TWO_BY_TWO: (
            (ranks_share_their_noise, "loss of step 1"),
            (the_average_is_not_stepped, "first moving average that differs: "),
            (the_condition_is_dropped_on_one_stage, "loss of step 1"),
        ),
        TENSOR_PARALLEL: (
            (the_conditions_gradient_stays_a_share, "step 1: condition.time_in.weight"),
            (shares_of_modulation_are_not_summed, "step 1: condition.time_in.weight"),
            (the_loss_stays_a_share, "loss of step 1"),
        ),
        TEXT: (
            (the_condition_is_dropped_on_one_stage, "loss of step 1"),
            (the_text_is_dropped_on_one_stage, "loss of step 1"),
        ),
        TEXT_PARALLEL: (
            (the_conditions_gradient_stays_a_share, "step 1: condition.time_in.weight"),
            (norms_of_queries_stay_a_share, "step 1: layers.0.image.attention.q_norm.weight"),
        ),
    }
)


def with_each_fault(row: DiTRow) -> list[Outcome]:
    """Inside a job: the row with one fault after the other, and at last without any."""
    outcomes = []
    for make, _ in FAULTS[row]:
        with make():
            outcomes += run_rows([row])
    return outcomes + run_rows([row])


@pytest.mark.parametrize("row", FAULTS, ids=str)
def test_each_fault_is_found(row: DiTRow) -> None:
    tp, pp, dp = row.mesh
    ranks = run_ranks(with_each_fault, tp * pp * dp, row)
    want = one_process(row)
    for i, (_, shows_in) in enumerate(FAULTS[row]):
        with pytest.raises(ParityError) as failure:
            assert_parity([outcomes[i] for outcomes in ranks], want)
        assert shows_in in str(failure.value)
    assert_parity([outcomes[-1] for outcomes in ranks], want)
