"""Say where the package index has newer releases of torch and Triton than constraints.txt pins.

The code leans on what these two do inside (private operators, registers of compiled kernels), so a new release is
tried before the pin moves: python tools/newest_releases.py. It changes nothing, and fails nobody who has no network.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

WATCHED = ("torch", "triton")
PINS = Path(__file__).parent.parent / "constraints.txt"


def newest(package: str) -> str | None:
    """The newest final release that pip finds for this Python; None where it cannot tell."""
    command = [sys.executable, "-m", "pip", "index", "versions", package, "--disable-pip-version-check"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:
        return None
    found = re.match(rf"{package} \(([^)]+)\)", done.stdout)
    return found[1] if found else None


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


def report(pins: str, ask: Callable[[str], str | None] = newest) -> list[str]:
    """A line for each watched package whose newest release is not the pinned one, or is not known."""
    lines = []
    for package in WATCHED:
        pinned, out = re.findall(rf"^{package}==(\S+)$", pins, re.MULTILINE)[0], ask(package)
        if out is None:
            lines.append(f"{package} {pinned} is pinned; its newest release is not known: no package index answered")
        elif _numbers(out) > _numbers(pinned):
            lines.append(
                f"{package} {pinned} is pinned, {out} is out: install it in an environment of its own and run the "
                "suite there; kernels that spill registers or calls that were renamed show in tests/kernels"
            )
    return lines


if __name__ == "__main__":
    for line in report(PINS.read_text()):
        print(line)
