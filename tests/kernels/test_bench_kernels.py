"""`make bench-kernels` on a machine without a GPU: it says so and succeeds. Its checks run in test_interpreter.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "tools" / "benchmark" / "kernel_benchmark.py"


def test_without_a_gpu_nothing_is_measured(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--json", str(tmp_path / "kernels.json")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "no CUDA device: not measured\n"
    assert not (tmp_path / "kernels.json").exists(), "a file of results without a measurement"
