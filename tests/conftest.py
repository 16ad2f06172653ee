"""Every run of the suite draws the same examples, and a busy machine fails no test for being slow."""

from __future__ import annotations

import gc
from pathlib import Path

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("same-every-time", derandomize=True, deadline=None)
hypothesis.settings.load_profile("same-every-time")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--faults",
        choices=("sample", "full"),
        default="sample",
        help="tests/faults: a few trials of each kind, or all of them (make test-faults)",
    )


ALONE = "pytest.mark.alone"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With ``-m alone`` a file without that mark is not even imported: all of them take half a minute a process."""
    if config.option.markexpr != "alone" or not collection_path.match("test_*.py"):
        return None
    return True if ALONE not in collection_path.read_text() else None


def pytest_itemcollected(item: pytest.Item) -> None:
    if item.get_closest_marker("alone") is not None and ALONE not in item.path.read_text():
        raise pytest.UsageError(f"{item.nodeid} would never run: write {ALONE} in its file, by which files are chosen")


def pytest_collection() -> None:
    gc.disable()  # nothing of what is imported goes away: six seconds of each process


def pytest_collection_finish() -> None:
    """What was imported stays: neither this process's garbage collections walk it, nor those of its forks copy it."""
    gc.freeze()
    gc.enable()


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """On a CPU files run two at a time: half of them leave a core idle. Tests that mostly wait for the time limits of
    other processes (``-m alone``) run four at a time. On GPUs one at a time: ranks fill them."""
    return 0 if torch.cuda.is_available() else 4 if config.option.markexpr == "alone" else 2
