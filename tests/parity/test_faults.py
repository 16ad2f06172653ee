"""The matrix can fail: each deliberate fault does make it fail, and the message names the first thing that is wrong."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from parity_faults import FAULTS, Fault, train_with_faults
from parity_rows import Mesh3, Row, config_of
from parity_run import Outcome, ParityError, assert_parity, reference

from megatron_ds.testing import run_ranks


@cache
def one_process(row: Row) -> Outcome:
    return reference(config_of(row))


ROWS = sorted({fault.row for fault in FAULTS}, key=str)


@cache
def job(mesh: Mesh3) -> dict[Fault | Row, list[Outcome]]:
    """All of a mesh, in one job: what a fault left behind would show in the rows, which come last."""
    faults = [fault for fault in FAULTS if fault.row.mesh == mesh]
    rows = [row for row in ROWS if row.mesh == mesh]
    ranks = run_ranks(train_with_faults, rows[0].world_size, faults, rows)
    return {run: [outcomes[i] for outcomes in ranks] for i, run in enumerate([*faults, *rows])}


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_the_row_passes_without_the_fault(row: Row) -> None:
    assert_parity(job(row.mesh)[row], one_process(row))


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_fault_is_found(fault: Fault) -> None:
    with pytest.raises(ParityError) as failure:
        assert_parity(job(fault.row.mesh)[fault], one_process(fault.row))
    assert fault.shows_in in str(failure.value)


def changed(outcome: Outcome, name: str, index: int, change: float) -> Outcome:
    """The outcome with one element of a gradient of the last step changed."""
    parts = []
    for part in outcome.gradients[-1]:
        values = part.values.copy()
        if part.name == name:
            values[index] += change
        parts.append(replace(part, values=values))
    return replace(outcome, gradients=[*outcome.gradients[:-1], parts])


def test_the_first_tensor_in_model_order_is_named_with_its_place() -> None:
    want = one_process(Row((1, 1, 1)))
    last = changed(want, "layers.1.mlp.down.weight", 25, 3e-9)
    both = changed(last, "layers.0.mlp.up.bias", 7, np.nan)
    with pytest.raises(ParityError, match=r"differs, in step 3: layers\.1\.mlp\.down\.weight, by 3\.0\d*e-09"):
        assert_parity([want, last], want)
    with pytest.raises(
        ParityError, match=r"layers\.0\.mlp\.up\.bias, by inf at \[7\]: .*nan.* on rank 1.*\(2 of \d+ differ\)"
    ):
        assert_parity([want, both], want)
    with pytest.raises(ParityError, match=r"by 3\.0\d*e-09 at \[1, 5\]"):  # rows of 20
        assert_parity([last], want)


def test_a_tensor_that_is_nowhere_is_named() -> None:
    want = one_process(Row((1, 1, 1)))
    parts = [part for part in want.parameters if part.name != "layers.1.attention.out.bias"]
    with pytest.raises(ParityError, match=r"layers\.1\.attention\.out\.bias, which no rank holds at \[0\]"):
        assert_parity([replace(want, parameters=parts)], want)
    extra = replace(want.parameters[0], name="layers.2.extra")
    with pytest.raises(ParityError, match=r"layers\.2\.extra, which the one-process run does not have"):
        assert_parity([replace(want, parameters=[*want.parameters, extra])], want)


def test_differences_below_the_tolerance_pass() -> None:
    want = one_process(Row((1, 1, 1)))
    assert_parity([changed(want, "layers.0.mlp.up.bias", 7, 5e-10)], want)
