"""A tensor-parallel model of ours keeps its axis on the engine, and comes out whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_tp import refused, trained
from test_engine_parity import differs

from megatron_ds.mesh import MeshShape
from megatron_ds.testing import run_ranks


@pytest.mark.parametrize("shape", [MeshShape(pp=2), MeshShape(cp=2)], ids=str)
def test_a_mesh_with_stages_is_refused(shape: MeshShape) -> None:
    (message, _) = run_ranks(refused, 2, shape)
    assert f"this mesh has pp={shape.pp}, cp={shape.cp}; use a mesh of dp and tp" in message


def test_tensor_parallel_equals_one_process(tmp_path: Path) -> None:
    losses, norms, state = trained(1, 0, str(tmp_path / "one"))
    assert norms[0] > 0.5  # it clips
    for stage in (1, 2):
        for got, got_norms, got_state in run_ranks(trained, 4, 2, stage, str(tmp_path / f"tp-{stage}")):
            assert got == pytest.approx(losses, rel=1e-10) and got_norms == pytest.approx(norms, rel=1e-10)
            assert got_state.keys() == state.keys()
            for name, value in state.items():
                assert got_state[name].shape == value.shape and differs(got_state[name], value) < 1e-9, name
