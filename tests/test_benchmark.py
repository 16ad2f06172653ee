"""The benchmark's arithmetic: ratios are taken within a round, failures stay visible. No speed is asserted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from scripts_as_modules import load_script

FOLDER = Path(__file__).parent.parent / "tools" / "benchmark"


@pytest.fixture(scope="module")
def run() -> ModuleType:
    module = load_script("tools/benchmark/run.py")
    return module


def figures(rate: float) -> dict[str, float]:
    return {"tokens_per_s": rate, "cpu_tokens_per_s": 2 * rate, "rss_mib": 1000.0}


def test_ratios_are_paired_by_round_and_two_ranks_are_held_to_twice_one(run: ModuleType) -> None:
    chosen = [c for c in run.CONTESTANTS if c.key in ("plain fp32", "ours fp32", "ours-zero1 fp32")]
    # The machine slows down tenfold over the rounds; within each, ours is 1.1, 1.2, 1.3 times plain.
    rounds = [
        {"plain fp32": figures(p), "ours fp32": figures(p * r), "ours-zero1 fp32": figures(p * r * 2 * 0.9)}
        for p, r in ((1000.0, 1.1), (400.0, 1.2), (100.0, 1.3))
    ]
    rows = {row["contestant"]: row for row in run.summarize(rounds, chosen)}
    assert rows["ours fp32"]["ratio_tokens_per_s"] == pytest.approx(1.2)
    assert rows["ours fp32"]["range_tokens_per_s"] == pytest.approx([1.1, 1.3])
    assert rows["ours-zero1 fp32"]["ratio_tokens_per_s"] == pytest.approx(0.9)


def test_a_failed_run_is_left_out_of_ratios_and_a_failed_contestant_keeps_its_row(run: ModuleType) -> None:
    chosen = [c for c in run.CONTESTANTS if c.key in ("plain fp32", "ours fp32", "huggingface fp32")]
    broken = {"error": "no such module"}
    rounds = [
        {"plain fp32": figures(100.0), "ours fp32": figures(150.0), "huggingface fp32": broken},
        {"plain fp32": broken, "ours fp32": figures(900.0), "huggingface fp32": broken},
    ]
    rows = {row["contestant"]: row for row in run.summarize(rounds, chosen)}
    assert rows["ours fp32"]["ratio_tokens_per_s"] == pytest.approx(1.5)
    assert "failed: no such module" in run.table(list(rows.values()))


def test_every_contestant_is_known_to_the_worker(run: ModuleType) -> None:
    source = (FOLDER / "worker.py").read_text()
    assert all(f'"{c.name}": ' in source for c in run.CONTESTANTS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_without_a_gpu_the_gpu_benchmark_says_so_and_succeeds() -> None:
    done = subprocess.run([sys.executable, str(FOLDER / "gpu.py")], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "no CUDA device: not measured")
