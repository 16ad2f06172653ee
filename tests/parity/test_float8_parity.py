"""FP8 on every mesh of the matrix: with products carried in float64, a run has the one-process numbers to 1e-9.

A scale that depended on the mesh would round every value another way, and show at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from float8_faults import scales_of_this_rank_alone, scales_over_the_micro_batch, train_with_fault
from parity_rows import SETTINGS, Row, config_of, layer_passes, matrix, matters, meshes, reference_config
from parity_run import Outcome, ParityError, assert_parity, one_process, reference, run_rows

from megatron_ds.testing import run_ranks

RECIPES = ("tensorwise", "rowwise", "blockwise")


def facts(row: Row) -> set[tuple[Any, ...]]:
    """What a row is evidence for: its mesh; its recipe on the axes that cut the run, and at the levels of settings."""
    cut = tuple(size > 1 for size in row.mesh)
    levels = {(row.fp8, name, getattr(row, name)) for name in SETTINGS if matters(name, row.mesh)}
    return {row.mesh, (row.fp8, cut), *levels}


def chosen() -> list[Row]:
    """Rows of the matrix, each with a recipe, so that all facts occur: the most new ones at the least cost first."""
    evidence = {row: facts(row) for row in (replace(row, fp8=fp8) for row in matrix() for fp8 in RECIPES)}
    missing = set().union(*evidence.values())
    rows: list[Row] = []
    while missing:
        useful = [row for row in evidence if evidence[row] & missing]
        often = Counter(row.fp8 for row in rows)
        worth = {row: (len(evidence[row] & missing) - layer_passes(row) / 15, -often[row.fp8]) for row in useful}
        rows.append(max(useful, key=worth.__getitem__))
        missing -= evidence[rows[-1]]
    return rows


ROWS = chosen()


@cache
def job(world_size: int) -> dict[Row, list[Outcome]]:
    return run_rows([row for row in ROWS if row.world_size == world_size])


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_same_numbers_as_one_process(row: Row) -> None:
    assert_parity(job(row.world_size)[row], one_process(reference_config(config_of(row)).model_dump_json()))


def test_every_mesh_is_there_and_every_recipe_with_every_cut_and_every_setting() -> None:
    seen = set().union(*map(facts, ROWS))
    cuts = {tuple(size > 1 for size in mesh) for mesh in meshes()}
    levels = {(name, level) for name, every in SETTINGS.items() for level in every}
    assert len(cuts) == 8 and set(meshes()) <= seen
    for fp8 in RECIPES:
        assert {fact[1] for fact in seen if fact[0] == fp8 and len(fact) == 2} == cuts
        assert {fact[1:] for fact in seen if fact[0] == fp8 and len(fact) == 3} == levels


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
