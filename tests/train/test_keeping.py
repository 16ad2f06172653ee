"""Which checkpoints a run keeps while its steps fail, and from which one it goes on: the newest that is good."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from megatron_ds.checkpoint import Checkpoint, resolve
from megatron_ds.checkpoint.directory import steps_in
from megatron_ds.config import load_toml
from megatron_ds.data.indexed_writer import IndexedDatasetWriter
from megatron_ds.errors import CheckpointError
from megatron_ds.mesh import Axis
from megatron_ds.train.keeping import Keeper
from megatron_ds.train.report import read_losses

if TYPE_CHECKING:
    from entry_point import Run

pytest_plugins = ["entry_point"]


def names(output: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in steps_in(output / "checkpoints")]


def largest(step: Path) -> float:
    with Checkpoint(step) as checkpoint:
        return max(checkpoint.read(name).abs().max().item() for name in checkpoint.names())


EVERY = ("--checkpoint.save-every", "1", "--train.max-skipped-steps", "3")


@pytest.mark.parametrize("keep", [1, 3])
def test_a_run_that_diverges_keeps_its_good_checkpoints_and_goes_back_to_the_newest(
    run: Run, tmp_path: Path, keep: int
) -> None:
    own = ("--output", str(tmp_path), *EVERY, "--checkpoint.keep-last", str(keep), "--optimizer.schedule", "constant")
    assert run(*own, "--train.steps", "5").code == 0
    more = (*own, "--checkpoint.resume", "--train.steps", "30")
    done = run(*more, "--optimizer.lr", "1e30")
    assert done.code == 2 and "3 steps in a row, up to step 9, had NaN or Inf gradients" in done.error
    # Step 6 itself was a good one: its update is what ruined the weights, and no step after it proved them.
    assert "--checkpoint.resume continues from step 5, since no step after the checkpoint of step 6" in done.error
    assert names(tmp_path) == {1: [5, 6], 3: [4, 5, 6]}[keep]
    assert largest(tmp_path / "checkpoints" / "step-00000006") > 1e20
    for step in names(tmp_path)[:-1]:
        assert largest(tmp_path / "checkpoints" / f"step-{step:08d}") < 10
    assert resolve(tmp_path / "checkpoints").name == "step-00000005"
    assert "checkpoint of step 7 put off: its gradients are NaN or Inf" in done.out
    # The way out of the message: a lower rate, from the good weights.
    done = run(*more, "--optimizer.lr", "1e-4", "--train.steps", "8")
    assert done.code == 0 and "resumed from step 5 of 8" in done.out
    assert largest(resolve(tmp_path / "checkpoints")) < 10 and len(read_losses(tmp_path)) == 8
    assert names(tmp_path) == {1: [7, 8], 3: [6, 7, 8]}[keep]


def test_a_stop_among_failing_steps_loses_neither_the_last_nor_the_good_checkpoint(run: Run, tmp_path: Path) -> None:
    """What is saved among them is not taken for good later, in however many starts the run fails."""
    own = ("--output", str(tmp_path), *EVERY, "--checkpoint.keep-last", "1", "--optimizer.schedule", "constant")
    assert run(*own, "--train.steps", "3").code == 0
    own = (*own, "--checkpoint.resume", "--optimizer.lr", "1e30")
    done = run(*own, "--train.steps", "5")  # ends while step 5 fails
    assert done.code == 0 and "should they go on so, --checkpoint.resume-from 3 continues from before them" in done.out
    assert names(tmp_path) == [3, 5]
    done = run(*own, "--train.steps", "6")
    assert done.code == 0 and names(tmp_path) == [3, 6]
    done = run(*own, "--train.steps", "7")
    assert done.code == 2 and "continues from step 3, since no step after the checkpoint of step 4" in done.error
    assert names(tmp_path) == [3, 6] and resolve(tmp_path / "checkpoints").name == "step-00000003"


def test_a_run_without_a_good_checkpoint_says_so(run: Run, tmp_path: Path) -> None:
    wrong = ("--optimizer.lr", "1e30", "--optimizer.schedule", "constant", "--train.max-skipped-steps", "2")
    done = run("--output", str(tmp_path / "none"), *wrong)
    assert done.code == 2 and done.error.rstrip().endswith("these steps; there is no checkpoint")
    done = run("--output", str(tmp_path / "one"), *wrong, "--checkpoint.save-every", "1")
    assert done.code == 2 and "no checkpoint from before these steps but that of step 1, after which" in done.error
    assert names(tmp_path / "one") == [1]


def test_a_checkpoint_that_good_steps_followed_is_what_a_diverged_run_continues_from(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        (tmp_path / f"step-{step:08d}").mkdir()
    said: list[str] = []
    keeper = Keeper(tmp_path, 2, Axis("world"), said.append)
    keeper.started_from(4, None)
    assert (keeper.unproven, keeper.proven()) == (4, 3)
    assert len(steps_in(tmp_path)) == 4  # starting removes nothing
    keeper.good_step()
    assert (keeper.unproven, keeper.proven()) == (None, 4)
    assert [path.name for path in steps_in(tmp_path)] == ["step-00000003", "step-00000004"]
    assert keeper.go_back() == "--checkpoint.resume continues from step 4, after which gradients were finite"


def test_an_old_checkpoint_that_cannot_be_removed_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("megatron_ds.train.keeping.prune", full)
    said: list[str] = []
    Keeper(tmp_path, 2, Axis("world"), said.append).saved(3)
    assert said == ["an old checkpoint cannot be removed, training goes on: [Errno 5] Input/output error"]


# --- another checkpoint than the latest -------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.fixture
def finished(run: Run, tmp_path: Path) -> Path:
    """A run of 6 steps with checkpoints at 2, 4 and 6."""
    output = tmp_path / "finished"
    assert run("--output", str(output), "--train.steps", "6", "--checkpoint.save-every", "2").code == 0
    return output


@pytest.mark.parametrize("way", ["2", "last-good", "path"])
def test_a_run_goes_on_from_a_checkpoint_of_choice_as_if_nothing_had_happened(
    run: Run, finished: Path, way: str
) -> None:
    losses = read_losses(finished)
    weights = [torch.from_numpy(np.fromfile(p, np.uint8)) for p in sorted(finished.rglob("step-00000006/rank-*"))]
    for step in (4, 6):
        flip(finished / "checkpoints" / f"step-0000000{step}" / "rank-00000.safetensors")
    own = ("--output", str(finished), "--train.steps", "6", "--checkpoint.save-every", "2")
    damaged = run(*own, "--checkpoint.resume")
    assert damaged.code == 2 and "--checkpoint.resume-from last-good" in damaged.error
    chosen = {"path": str(finished / "checkpoints" / "step-00000002")}.get(way, way)
    done = run(*own, "--checkpoint.resume-from", chosen)
    assert done.code == 0 and "resumed from step 2 of 6" in done.out, done.error
    if way == "last-good":
        assert "passed over: " in done.out and "step-00000006/rank-00000.safetensors is damaged" in done.out
    assert read_losses(finished) == losses  # optimizer state and place in the data included
    assert names(finished) == [2, 4, 6]
    again = [torch.from_numpy(np.fromfile(p, np.uint8)) for p in sorted(finished.rglob("step-00000006/rank-*"))]
    assert weights[0].numel() and all(torch.equal(a, b) for a, b in zip(weights, again, strict=True))
    # Meant for that one start: the next one goes on from where the run is.
    assert load_toml(finished / "config.toml").checkpoint.resume_from is None
    done = run(*own, "--checkpoint.resume", "--train.steps", "7")
    assert "resumed from step 6 of 7" in done.out


def test_a_new_run_continues_another_ones_state(run: Run, finished: Path, tmp_path: Path) -> None:
    source = str(finished / "checkpoints" / "step-00000004")
    own = ("--output", str(tmp_path / "new"), "--train.steps", "6", "--checkpoint.resume-from", source)
    done = run(*own)
    assert done.code == 0 and "resumed from step 4 of 6" in done.out
    lines = [json.loads(line) for line in (tmp_path / "new" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 6]
    assert [line["loss"] for line in lines] == read_losses(finished)[4:]
    refused = run(*own)
    assert refused.code == 2 and "holds another run (its checkpoints)" in refused.error
    shutil.rmtree(tmp_path / "new")
    for wrong in (("--model.rope-theta", "500000", "--model.position", "rope"), ("--seed", "3")):
        refused = run(*own, *wrong)
        assert refused.code == 2 and "is of another model or seed" in refused.error
    assert names(tmp_path / "new") == []


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ("3", "step-00000003 is not a checkpoint: it does not exist"),
        ("nowhere", "resume_from='nowhere' does not exist; give last-good, a step of"),
        ("-2", "=-2 does not exist"),
        (str(10**12), "does not exist"),
    ],
)
def test_what_is_no_checkpoint_is_refused(run: Run, finished: Path, chosen: str, message: str) -> None:
    done = run("--output", str(finished), "--train.steps", "8", f"--checkpoint.resume-from={chosen}")
    assert done.code == 2 and message in done.error
    assert len(read_losses(finished)) == 6


def test_no_good_checkpoint_at_all(run: Run, finished: Path) -> None:
    for path in finished.rglob("rank-*.safetensors"):
        flip(path)
    done = run("--output", str(finished), "--train.steps", "8", "--checkpoint.resume-from", "last-good")
    assert done.code == 2 and "holds no good checkpoint" in done.error and done.error.count("is damaged") == 3


# --- the data of a run that is resumed ----------------------------------------------------------------------------


def corpus(prefix: Path, documents: int, first: int = 0) -> None:
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for document in range(documents):
            writer.add_document((np.arange(50) * 7 + document + first) % 61)


def grown(prefix: Path) -> None:
    corpus(prefix, 25)


def of_the_same_size(prefix: Path) -> None:
    corpus(prefix, 20, first=1)


@pytest.mark.parametrize(
    ("change", "more", "message"),
    [
        (grown, (), "20 documents of 1,000 tokens -> 25 documents of 1,250 tokens"),
        (of_the_same_size, (), "20 documents of 1,000 tokens -> as many, but others"),
        (lambda prefix: None, ("--data.split", "1,1"), "split: 1 -> 1,1"),
        (lambda prefix: None, ("--train.sequence-length", "4"), "sequence_length: 8 -> 4"),
    ],
)
def test_other_data_under_the_same_name_is_refused_or_accepted_on_purpose(
    run: Run, tmp_path: Path, change: Callable[[Path], None], more: tuple[str, ...], message: str
) -> None:
    corpus(tmp_path / "text", 20)
    data = ("--data.no-synthetic", "--data.prefix", str(tmp_path / "text"), "--data.split", "1")
    own = ("--output", str(tmp_path / "run"), *data)
    assert run(*own).code == 0
    change(tmp_path / "text")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    again = (*own, *more, "--checkpoint.resume", "--train.steps", "6")
    done = run(*again)
    assert done.code == 2 and message in done.error and "--data.changed accept" in done.error, done.error
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    done = run(*again, "--data.changed", "accept")
    assert done.code == 0 and "data changed, as accepted: " in done.out and message in done.out
    # Accepted once: it is the run's data now.
    assert load_toml(tmp_path / "run" / "config.toml").data.changed == "refuse"
    assert run(*again, "--train.steps", "7").code == 0


def test_the_same_data_elsewhere_is_the_same_data(run: Run, tmp_path: Path) -> None:
    corpus(tmp_path / "text", 20)
    own = ("--output", str(tmp_path / "run"), "--data.no-synthetic", "--data.split", "1")
    assert run(*own, "--data.prefix", str(tmp_path / "text")).code == 0
    (tmp_path / "moved").mkdir()
    for path in tmp_path.glob("text.*"):
        path.rename(tmp_path / "moved" / path.name)
    done = run(*own, "--data.prefix", str(tmp_path / "moved" / "text"), "--checkpoint.resume", "--train.steps", "6")
    assert done.code == 0, done.error
    manifest = (tmp_path / "run" / "checkpoints" / "step-00000006" / "manifest.json").read_text()
    assert json.loads(manifest)["meta"]["data"]["datasets"][0]["tokens"] == 1000


def test_keeping_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="keep_last=0 would remove the checkpoint being saved; use 1 or more"):
        Keeper(tmp_path, 0, Axis("world"), print)
