"""The engine against DistributedDataParallel on the same ranks, in float64 to 1e-9.

Compared are the loss, norm and gradients of every step, and the parameters and optimizer state that training leaves.
"""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
from ddp_cases import FACTORS, Ran, Row, both, pairs, rows
from engine_cases import model
from test_engine_parity import differs

from megatron_ds.testing import run_ranks


def check(row: Row, got: Ran, want: Ran) -> None:
    assert got.losses == pytest.approx(want.losses, rel=1e-9), row
    assert got.norms == pytest.approx(want.norms, rel=1e-9), row
    assert row.batches or got.gradients.keys() == want.gradients.keys(), row
    for name, gradient in got.gradients.items():
        assert differs(gradient, want.gradients[name]) < 1e-9, (row, name)


def check_end(row: Row, got: Ran, want: Ran) -> None:
    assert got.parameters.keys() == want.parameters.keys(), row
    for name, parameter in want.parameters.items():
        assert differs(got.parameters[name], parameter) < 1e-9, (row, name)
    assert got.state.keys() == want.state.keys() and any(want.state.values()), row
    for name, state in want.state.items():
        assert state.keys() <= got.state[name].keys(), (row, name)
        for kind, tensor in state.items():
            assert differs(got.state[name][kind], tensor) < 1e-9, (row, name, kind)


@pytest.mark.parametrize("ranks", FACTORS["ranks"])
def test_equals_ddp(ranks: int, tmp_path: Path) -> None:
    own = [row for row in rows() if row.ranks == ranks]
    # Three of them without shared memory, as on hosts of their own: their rows have every stage too.
    for results in run_ranks(both, ranks, own, str(tmp_path), apart=True if ranks == 3 else None):
        for row, (engine, ddp) in zip(own, results, strict=True):
            assert len(engine) == len(ddp) == 3
            for got, want in zip(engine, ddp):
                check(row, got, want)
            assert ddp[0].norms[0] > row.clip, row
            check_end(row, engine[-1], ddp[-1])
            assert differs(ddp[-1].parameters["output.weight"], model().output.weight.detach()) > 1e-4, row  # it learns


def test_every_pair_of_settings_occurs() -> None:
    found = {pair for row in rows() for pair in pairs(row)}
    for (one, values), (other, others) in combinations(FACTORS.items(), 2):
        for a in values:
            for b in others:
                legal = {(one, a), (other, b)} & {("stage", 0)} == set() or (other, b) in {("offload", "none")}
                legal = legal or "offload" not in (one, other)
                assert (((one, a), (other, b)) in found) == legal
    assert len(rows()) < 24
