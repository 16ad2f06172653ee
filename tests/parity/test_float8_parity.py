"""FP8 on a mesh: with the products carried in float64, a run has the one-process run's numbers to 1e-9.

A scale that depended on the mesh would round every value another way, and show at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from float8_faults import scales_of_this_rank_alone, scales_over_the_micro_batch, train_with_fault
from parity_rows import Mesh3, Row, config_of, matrix, reference_config
from parity_run import Outcome, ParityError, assert_parity, one_process, reference, run_rows

from megatron_ds.testing import run_ranks

RECIPES = ("tensorwise", "rowwise", "blockwise")
MATRIX = matrix()
MESHES: tuple[Mesh3, ...] = ((2, 1, 1), (4, 1, 1), (1, 1, 3), (1, 2, 2), (2, 2, 2))
# Of the mesh's rows in the matrix one for each recipe: with and without sequence parallelism, recomputation, stages of
# ZeRO, micro-batches of one and of several sequences.
ROWS = [
    replace(row, fp8=fp8)
    for mesh in MESHES
    for fp8, row in zip(RECIPES, [row for row in MATRIX if row.mesh == mesh][MESHES.index(mesh) % 2 :])
]


@cache
def job(mesh: Mesh3) -> dict[Row, list[Outcome]]:
    return run_rows([row for row in ROWS if row.mesh == mesh])


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_same_numbers_as_one_process(row: Row) -> None:
    assert_parity(job(row.mesh)[row], one_process(reference_config(config_of(row)).model_dump_json()))


def test_the_rows_differ_in_what_could_change_a_scale() -> None:
    assert {row.sequence_parallel for row in ROWS if row.mesh[0] > 1} == {False, True}
    assert {row.micro_batch for row in ROWS} == {1, 2} and {row.accumulation for row in ROWS} == {1, 4}
    assert len({row.architecture for row in ROWS}) == 4 and len({row.recompute for row in ROWS}) == 4


# --- planted faults ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "row"),
    [
        (scales_of_this_rank_alone, Row((2, 1, 1), fp8="rowwise")),
        (scales_over_the_micro_batch, Row((1, 1, 2), micro_batch=2, fp8="blockwise")),
    ],
    ids=["this_rank_alone", "over_the_micro_batch"],
)
def test_a_scale_that_depends_on_the_mesh_shows(fault: Callable[[], Any], row: Row) -> None:
    want = reference(reference_config(config_of(row)))
    with pytest.raises(ParityError, match="first gradient that differs"):
        assert_parity(run_ranks(train_with_fault, row.world_size, row, fault), want)
