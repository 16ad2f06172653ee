"""The trials of this folder: seeded, bounded in time and memory, each repeated by the command that its failure prints.

A test that takes ``draw`` is run for many seeds. ``@pytest.mark.trials(sample, full)`` says for how many: in ``make
test``, and with ``--faults full``, as ``make test-faults`` gives. The first ``sample`` seeds are the same in both.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from corpora import CHATS, CONVERSATIONS, PLAIN, TEXTS

from megatron_ds.data.preprocess import preprocess
from megatron_ds.data.tokenizer_training import train_tokenizer

SECONDS = 240
"""Of one trial, on a machine ten times as busy as one that does it in a few seconds at most."""
STDERR = pytest.StashKey[int]()
MEMORY = 1 << 30
"""Bytes that a trial may map beyond what the process has."""
FILE = 256 << 20
"""Bytes of the largest file that it may write."""


def pytest_configure(config: pytest.Config) -> None:
    config.stash[STDERR] = os.dup(2)  # the terminal's: during a test its output is kept
    config.addinivalue_line("markers", "trials(sample, full): how many seeds a test of tests/faults is run with")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "draw" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("trials")
        assert marker is not None, f"{metafunc.definition.nodeid} needs @pytest.mark.trials(sample, full)"
        count = marker.args[metafunc.config.getoption("--faults") == "full"]
        metafunc.parametrize("draw", range(count), indirect=True)


@pytest.fixture
def draw(request: pytest.FixtureRequest) -> random.Random:
    """All that is random in a trial."""
    return random.Random(request.node.name)


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder of the trial's own, which is gone after it: there are thousands of them."""
    folder = Path(tempfile.mkdtemp(prefix="fault-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus of either kind and what preprocessing makes of it."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (folder / "chat.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
    for name, options in (("text", PLAIN), ("chat", CONVERSATIONS)):
        (folder / name).mkdir()
        preprocess([str(folder / f"{name}.jsonl")], folder / name / name, options, workers=0)
    return folder


@pytest.fixture(scope="session")
def tokenizers(made: Path) -> Path:
    folder = made / "tokenizers"
    for kind in ("bpe", "unigram", "wordpiece"):
        train_tokenizer([str(made / "text.jsonl")], folder / kind, 400, kind)
    return folder


@pytest.fixture(autouse=True)
def bounded(pytestconfig: pytest.Config) -> Iterator[None]:
    """A trial that hangs ends the process with its stack; one that takes too much memory gets a MemoryError."""
    faulthandler.dump_traceback_later(SECONDS, exit=True, file=pytestconfig.stash[STDERR])
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    wanted = {resource.RLIMIT_AS: pages * resource.getpagesize() + MEMORY, resource.RLIMIT_FSIZE: FILE}
    before = {which: resource.getrlimit(which) for which in wanted}
    for which, soft in wanted.items():
        resource.setrlimit(which, (soft, before[which][1]))
    yield
    for which, limits in before.items():
        resource.setrlimit(which, limits)
    faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    if report.failed and "draw" in getattr(item, "fixturenames", ()):
        command = f"{sys.executable} -m pytest --faults full '{item.nodeid}'"
        report.sections.append(("this one trial, whose seed is its name, again", command))
    return report
