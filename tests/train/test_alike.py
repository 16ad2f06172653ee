"""Nodes that differ in what they read are refused before they train, and what differs is named."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
from dataclasses import dataclass
from pathlib import Path

import planted_faults
import pytest
import torch
from started_ranks import arguments, started

from megatron_ds.engine import initialize
from megatron_ds.errors import ConfigError
from megatron_ds.testing import run_ranks
from megatron_ds.train.alike import DATA, DEVICE, SETTINGS, differences, digest, facts_of
from megatron_ds.train.bounded import BoundedStore
from megatron_ds.train.failure import Watch
from megatron_ds.train.whereabouts import Whereabouts


def test_facts_are_compared_as_far_as_both_ranks_came() -> None:
    own = {SETTINGS: {"a": 1, "b": {"c": [1, 2], "d": None}}, DEVICE: "cpu", DATA: {}}
    theirs = {SETTINGS: {"a": 1, "b": {"c": [1, 3], "d": "x" * 100}}, DEVICE: "cpu"}
    (line,) = differences("rank 2, 3", theirs, own)
    assert line.startswith("rank 2, 3: another configuration than on rank 0 (b.c[1]: 3 against 2; b.d: xxx")
    assert "x... against none); give every node the same arguments" in line
    assert differences("rank 2", {SETTINGS: own[SETTINGS]}, own) == []
    assert digest(own) == digest(json.loads(json.dumps(own))) != digest(theirs)


@dataclass(frozen=True)
class Options:
    output: Path
    steps: int = 50
    vae: Path | None = None


def test_options_of_a_tool_are_named() -> None:
    own, theirs = facts_of(Options(Path("a"))), facts_of(Options(Path("a"), 20, Path("v")))
    (line,) = differences("rank 1", json.loads(json.dumps(theirs)), json.loads(json.dumps(own)))
    assert "rank 1: another configuration than on rank 0 (steps: 20 against 50; vae: v against None)" in line
    assert differences("rank 1", facts_of(Options(Path("a"))), own) == []


def _other_version(rank: int) -> None:
    if rank == 1:
        torch.__version__ = "1.0"  # type: ignore[assignment]


def test_other_versions_are_refused(tmp_path: Path) -> None:
    with started(tmp_path, [arguments(tmp_path / "run")] * 2, _other_version) as ranks:
        assert ranks.wait() == [2, 2]
        found = f"error: rank 1: other versions than on rank 0 (torch: 1.0 against {torch.__version__})"
        assert ranks.everything().count(found) == 1


def _engine() -> str:
    with pytest.raises(ConfigError) as caught:
        initialize(torch.nn.Linear(2, 2), {"zero": {"stage": 1 + torch.distributed.get_rank()}})
    return str(caught.value)


def test_an_engine_names_the_settings_that_differ() -> None:
    expected = "rank 1: another configuration than on rank 0 (zero.stage: 2 against 1); give every node the same"
    assert all(text.startswith(expected) for text in run_ranks(_engine, 2))


# --- folders that the nodes do not share: the same path, other files ----------------------------------------------


def _on_a_host_of_its_own(rank: int) -> None:
    os.chdir(f"host-{rank}")


def test_nodes_that_share_no_folder_do_not_mix_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One has a checkpoint of another step by that path, another one of that step, or none."""
    monkeypatch.chdir(tmp_path)
    for rank, steps in enumerate(("2", "1", "2")):
        with started(
            tmp_path, [arguments(tmp_path / f"host-{rank}" / "run", "--train.steps", steps, "--seed", "5")]
        ) as r:
            assert r.wait() == [0]
    own = arguments(Path("run"), "--seed", "5", "--checkpoint.resume")
    found = "run/checkpoints holds another checkpoint on rank 1 (step 1) than on rank 0 (step 2); it must be on a file"
    _refused(tmp_path, own, found)
    shutil.rmtree("host-1")
    os.rename("host-2", "host-1")
    _refused(tmp_path, own, "run/checkpoints holds another checkpoint on rank 1 (step 2) than on rank 0 (step 2)")
    shutil.rmtree("host-1/run")
    _refused(tmp_path, own, "error: rank 1: another checkpoint than on rank 0 (none against run/checkpoints); let all")


def test_an_output_folder_that_is_not_shared_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for rank in (0, 1):
        Path(f"host-{rank}").mkdir()
    _refused(
        tmp_path, arguments(Path("run")), "error: rank 1: run is not the folder that rank 0 writes to; checkpoints"
    )
    assert sorted(path.name for path in Path("host-0").rglob("*")) == ["run"]


def _killed_on_a_host_of_its_own(rank: int) -> None:
    socket.gethostname = lambda: f"host-{rank}"
    planted_faults.is_killed(rank)


def test_a_lost_rank_of_another_node_is_named_with_its_machine(tmp_path: Path) -> None:
    nodes = [{"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}] * 3
    with started(
        tmp_path, [arguments(tmp_path / "run", "--train.global-batch", "3")] * 3, _killed_on_a_host_of_its_own, nodes
    ) as ranks:
        assert ranks.wait() == [1, -signal.SIGKILL, 1]
        text = ranks.everything()
        assert "no answer from rank 1 on host-1: killed" in text, text
        assert re.search("rank ([02]) stops: rank ([02]) on host-\\2: ", text), text


def _refused(folder: Path, own: list[str], message: str) -> None:
    """Two nodes of one rank, and each says it."""
    with started(folder, [own] * 2, _on_a_host_of_its_own, [{"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}] * 2) as ranks:
        assert ranks.wait() == [2, 2]
        assert message in ranks.output(0) and message in ranks.output(1), ranks.everything()


def test_gloo_on_the_loopback_of_several_nodes_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    watch = Watch(BoundedStore(torch.distributed.HashStore(), 1.0), 0, 2, interval=0.01)
    watch._report_peer("timed out connecting: SO_ERROR: Connection refused, remote=[127.0.0.1]:9613", Whereabouts())
    assert "set GLOO_SOCKET_IFNAME to the network's interface on every node" in capsys.readouterr().err
