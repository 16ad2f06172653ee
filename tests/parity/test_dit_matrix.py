"""A diffusion transformer has the one-process run's numbers on every mesh, in float64, to 1e-9."""

from __future__ import annotations

from math import prod

import pytest
from dit_rows import ROWS, by_mesh, one_process, run_rows
from parity_rows import Mesh3
from parity_run import assert_parity

from megatron_ds.testing import run_ranks


@pytest.mark.parametrize("mesh", by_mesh(ROWS), ids=str)
def test_same_numbers_as_one_process(mesh: Mesh3) -> None:
    rows = by_mesh(ROWS)[mesh]
    ranks = run_ranks(run_rows, prod(mesh), rows)
    for i, row in enumerate(rows):
        assert_parity([outcomes[i] for outcomes in ranks], one_process(row))
