"""A save that dies at any of its operations on files: a complete checkpoint is found at every instant.

The process is not killed for real. Its calls into the operating system are counted, and from the n-th on none of them
does anything any more, which is all that a kill is to a disk.
"""

from __future__ import annotations

import builtins
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ds.checkpoint import FlatShard, load, resolve, save
from megatron_ds.checkpoint import writer as writer_module
from megatron_ds.checkpoint.save import prune

CALLS = ("mkdir", "rename", "replace", "unlink", "rmdir", "write", "pwrite", "fsync", "ftruncate", "open", "remove")


class Dead(BaseException):
    """The process is no more."""


@contextmanager
def dies_at(number: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """From operation ``number`` on (the first is 0) nothing reaches the disk; gives the operations so far."""
    done: list[str] = []

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            reads = (name == "open" and not more and len(args) > 1 and args[1] == os.O_RDONLY) or "rb" in args[1:2]
            if not reads:
                if len(done) >= number:
                    raise Dead(name)
                done.append(name)
            return real(*args, **more)

        return call

    with monkeypatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, counted(name, getattr(os, name)))
        patch.setattr(builtins, "open", counted("open a text", builtins.open))
        # One thread and one order of operations.
        patch.setattr(writer_module, "THREADS", 1)
        yield done


def flat_shard(value: float) -> FlatShard:
    return FlatShard.whole("w", "param", torch.full((1000,), value, dtype=torch.float64))


def loaded(directory: Path) -> float:
    """The one value that the checkpoint which is found holds everywhere."""
    target = flat_shard(float("nan"))
    meta = load(directory, [target])
    values = set(target.data.tolist())
    assert len(values) == 1 and values == {meta["value"]}
    return float(values.pop())


# What is there before (the step of each save), the step of the save that dies, whether it prunes.
CASES: dict[str, tuple[list[int], int, bool]] = {
    "a new step": ([1], 2, False),
    "the same step again": ([7], 7, False),
    "the same step beside another": ([6, 7], 7, True),
    "an older step again": ([6, 7], 6, False),
    "pruning": ([1, 2, 3], 4, True),
}


@pytest.mark.parametrize("case", CASES)
def test_whenever_a_save_dies_a_complete_checkpoint_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    before, step, pruning = CASES[case]
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # counted like the others; a disk's time tells nothing here
    number, finished = 0, False
    found = set()
    while not finished:
        run = tmp_path / str(number)
        for old in before:
            save(run, old, [flat_shard(old)], {"value": old}, replace=True)
        newest = before[-1]
        with dies_at(number, monkeypatch) as done:
            try:
                save(run, step, [flat_shard(100)], {"value": 100}, replace=step in before)
                if pruning:
                    prune(run, step, keep_last=1)
                finished = True
            except Dead:
                pass
        assert len(done) == number or finished
        value = loaded(run)
        assert value in (newest, 100), f"after {done[-3:]}"
        found.add(value)
        if finished:
            assert value == 100
        # An explicit path finds it too, and what the dead one left does not stop the next save, which clears it away.
        assert loaded(run / resolve(run).name) == value
        save(run, step, [flat_shard(200)], {"value": 200}, replace=True)
        assert loaded(run) == 200
        assert {path.name for path in run.iterdir()} <= {"latest", *(f"step-{n:08d}" for n in (*before, step))}
        number += 1
    assert found == {newest, 100} and number > 15


def test_the_trial_finds_a_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it was: a checkpoint that was moved aside is not looked for."""
    monkeypatch.setattr("megatron_ds.checkpoint.directory.in_place", lambda step: step)
    with pytest.raises(Exception, match="step-00000007 is not a checkpoint: it does not exist"):
        test_whenever_a_save_dies_a_complete_checkpoint_is_found(tmp_path, monkeypatch, "the same step again")
