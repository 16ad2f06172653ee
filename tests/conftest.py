"""Every run of the suite draws the same examples, and a busy machine fails no test for being slow."""

from __future__ import annotations

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


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """On a CPU files run two at a time: half of them leave a core idle. On GPUs one at a time: ranks fill them."""
    return 0 if torch.cuda.is_available() else 2
