"""Checkpoints whose files were damaged: what loads is what was saved, or it is refused; and the good one is found."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import SHAPES, loaded, same, save, values
from damage import damage, files_of, refused

from megatron_ds.checkpoint import Checkpoint
from megatron_ds.checkpoint.directory import steps_in
from megatron_ds.checkpoint.last_good import last_good
from megatron_ds.checkpoint.manifest import step_name
from megatron_ds.errors import CheckpointError


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole")
    for step in (1, 2, 3):
        save(directory, step)
    assert loaded(directory) == 3
    return directory


@pytest.mark.trials(12, 1200)
def test_what_is_left_of_a_checkpoint(draw: random.Random, whole: Path, place: Path) -> None:
    directory = place / "checkpoints"
    shutil.copytree(whole, directory)
    newest = [directory / "latest", *files_of(directory / step_name(3))]
    harmed = damage(draw, newest if draw.random() < 0.7 else files_of(directory))
    intact = [step for step in (1, 2, 3) if same(directory / step_name(step), whole / step_name(step))]

    found = []
    error = refused(lambda: found.append(loaded(directory)), str(directory))
    assert found == [3] or error or (found and directory / "latest" in harmed), found
    if not intact:
        return
    good, passed = last_good(directory)
    # What damage leaves alone, as white space behind a word, is no reason to go further back.
    assert loaded(good) >= max(intact) and all("step-" in text for text in passed), passed
    # A step that is whole is one by its own path, whatever became of the others.
    for step in intact:
        assert loaded(directory / step_name(step)) == step
    # And training goes on from there: the next save is found.
    if (directory / "latest").is_dir():
        return
    save(directory, 4)
    assert loaded(directory) == 4 and [path.name for path in steps_in(directory)][-1] == step_name(4)


@pytest.mark.trials(4, 200)
def test_steps_that_were_renamed_copied_or_mixed(draw: random.Random, whole: Path, place: Path) -> None:
    """A folder under another's name, or files of one step among those of another, never pass for what they are not."""
    directory = place / "checkpoints"
    shutil.copytree(whole, directory)
    one, other = (directory / step_name(step) for step in draw.sample((1, 2, 3), 2))
    what = draw.choice(("renamed", "copied", "mixed", "manifest", "link"))
    print(f"{what}: {one.name} -> {other.name}")
    if what in ("renamed", "copied", "link"):
        shutil.rmtree(other)
        {"renamed": one.rename, "copied": lambda to: shutil.copytree(one, to), "link": other.symlink_to}[what](
            one.name if what == "link" else other
        )
    elif what == "mixed":
        name = draw.choice(files_of(one)).name
        shutil.copyfile(one / name, other / name)
    else:
        shutil.copyfile(one / "manifest.json", other / "manifest.json")
    for step in (1, 2, 3):
        path = directory / step_name(step)
        assert refused(lambda path=path: loaded(path), step_name(step)) or loaded(path) == step  # type: ignore[misc]
    with pytest.raises(CheckpointError):
        loaded(other)
    assert loaded(last_good(directory)[0]) in (1, 2, 3)


@pytest.mark.trials(3, 100)
def test_every_byte_that_is_read_alone_is_checked(draw: random.Random, whole: Path, place: Path) -> None:
    """Single tensors, as conversion and inspection read them."""
    directory = place / "checkpoints"
    shutil.copytree(whole, directory)
    damage(draw, files_of(directory / step_name(3)))

    def read() -> None:
        with Checkpoint(directory / step_name(3)) as checkpoint:
            for name in draw.sample(sorted(SHAPES), 2):
                assert torch.equal(checkpoint.read(name), values(3, name, "param"))

    refused(read, step_name(3))
