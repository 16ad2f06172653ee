"""examples/pretrain_gpt.py, called in this process: the fixture ``run``, for ``pytest_plugins = ["entry_point"]``."""

from __future__ import annotations

import types
from collections.abc import Callable

import pytest
from started_ranks import TINY, pretrain_gpt

from megatron_ds.train.launch import run_main


class Outcome(types.SimpleNamespace):
    """What a process would have ended with: ``code`` and ``error``, the one message."""

    code: int
    error: str
    out: str


Run = Callable[..., Outcome]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """``run(*arguments)``: examples/pretrain_gpt.py with the smallest model, as a job of one in this process."""

    def call(*arguments: str) -> Outcome:
        monkeypatch.setattr("sys.argv", ["pretrain_gpt.py", *TINY, *arguments])
        capfd.readouterr()
        code = run_main(pretrain_gpt().main)
        out, err = capfd.readouterr()
        errors = [line for line in err.splitlines() if "Traceback" in line or line.startswith("error: ")]
        assert len(errors) == (code != 0), err
        return Outcome(code=code, error=err[err.index("error: ") :] if code else "", out=out + err)

    return call
