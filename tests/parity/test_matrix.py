"""The parity matrix: on every mesh up to 8 ranks a run has the one-process run's numbers, in float64, to 1e-9."""

from __future__ import annotations

from collections import defaultdict
from functools import cache

import pytest
from parity_rows import SETTINGS, Mesh3, Row, config_of, matrix, meshes, pairs_of, reference_config, wanted_pairs
from parity_run import Outcome, assert_parity, one_process, run_rows, train_through_the_group

from megatron_ds.config import validate
from megatron_ds.testing import run_ranks

ROWS = matrix()


@cache
def job(mesh: Mesh3) -> dict[Row, list[Outcome]]:
    """Every row of a mesh, run in one job: the outcomes of all ranks."""
    return run_rows([row for row in ROWS if row.mesh == mesh])


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_same_numbers_as_one_process(row: Row) -> None:
    outcomes = job(row.mesh)[row]
    assert len(outcomes) == row.world_size
    assert_parity(outcomes, one_process(reference_config(config_of(row)).model_dump_json()))


def test_every_mesh_has_every_setting() -> None:
    seen = defaultdict(set)
    for row in ROWS:
        for name in SETTINGS:
            seen[row.mesh, name].add(getattr(row, name))
    assert len(meshes()) == 38
    for mesh in meshes():
        for name, levels in SETTINGS.items():
            assert seen[mesh, name] == set(levels), f"{name} on tp, pp, dp = {mesh}"


def test_every_pair_of_settings_occurs_where_both_matter() -> None:
    seen = {pair for row in ROWS for pair in pairs_of(row)}
    assert wanted_pairs() - seen == set()


def test_every_row_is_a_legal_run() -> None:
    for row in ROWS:
        validate(config_of(row), row.world_size)


def test_the_matrix_is_the_same_in_every_session() -> None:
    assert matrix.__wrapped__() == ROWS


@cache
def through_the_group() -> dict[Row, list[Outcome]]:
    """Rows of one mesh, in one job whose tensor-parallel ranks share no memory."""
    rows = [row for row in ROWS if row.mesh == (4, 2, 1)]
    ranks = run_ranks(train_through_the_group, 8, rows)
    return {row: [outcomes[i] for outcomes in ranks] for i, row in enumerate(rows)}


@pytest.mark.parametrize("row", [row for row in ROWS if row.mesh == (4, 2, 1)], ids=str)
def test_the_same_between_hosts(row: Row) -> None:
    """In all other rows ranks of one host share memory."""
    outcomes = through_the_group()[row]
    assert_parity(outcomes, one_process(reference_config(config_of(row)).model_dump_json()))
