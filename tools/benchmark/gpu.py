"""Everything about speed on one GPU, in nine minutes: `make bench-gpu`.

The parts: what the machine can reach, whole training steps of GPT-2 124M and a 1.3B Llama in bf16, a compiled plain
torch loop beside them, each kernel, products and attention, choices, blocks as wide as Llama 8B's in FP8, DiT-XL/2.
Each part is a process of its own, so that one that fails or hangs costs itself alone; the next one imports torch while
it runs. Each prints a table as it ends, and all rows go to one JSON file. What no time is left for is named.

    python tools/benchmark/gpu.py --parts products attention
    python tools/benchmark/gpu.py --tiny          # any machine: the code runs, its figures mean nothing
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gpu_diffusion
import gpu_parts
import gpu_steps
import torch
from gpu_clock import Bench, Row, table


@dataclass(frozen=True)
class Part:
    """What runs, the most seconds that it is given, and those that the parts before it leave to it."""

    run: Callable[[Bench], None]
    seconds: float
    kept: float


# The most wanted first, as together they may take more time than there is; but each leaves to the later ones what they
# need for their first rows, so that one run says something of everything. The first step compiles the kernels, and the
# plain loops whole models, a minute or more each.
PARTS = {
    "machine": Part(gpu_parts.machine, 20, 15),
    "gpt2": Part(gpu_steps.gpt2, 90, 35),
    "llama": Part(gpu_steps.llama, 90, 45),
    "plain": Part(gpu_steps.beside_plain, 200, 120),
    "kernels": Part(gpu_parts.our_kernels, 130, 80),
    "products": Part(gpu_parts.products, 40, 25),
    "attention": Part(gpu_parts.attention, 20, 15),
    "flags": Part(gpu_steps.flags, 90, 45),
    "compiled": Part(gpu_steps.compiled, 100, 45),
    "update": Part(gpu_steps.update, 10, 10),
    "float8": Part(gpu_steps.float8, 90, 40),
    "dit": Part(gpu_diffusion.dit, 90, 40),
}
LEAST = 15.0  # seconds that are worth starting a part for
START = 120.0  # for a process to import torch
GRACE = 10.0  # for the row that is being measured when a part's time is over


def work(name: str, rows: Path, seconds: float, tiny: bool, wait: bool) -> list[Row]:
    """Run one part in this process; with ``wait``, once a line comes in with the seconds that it has."""
    if wait:
        rows.touch()  # ready
        seconds = float(sys.stdin.readline())
    device = "cuda" if torch.cuda.is_available() and not tiny else "cpu"
    with rows.open("a", encoding="utf-8", buffering=1) as file:
        bench = Bench(tiny, device, time.perf_counter() + seconds, lambda row: print(json.dumps(row), file=file))
        try:
            PARTS[name].run(bench)
        except Exception as error:
            bench.row("the part ended early", note=f"{type(error).__name__}: {error}"[:300])
    return bench.rows


class Worker:
    """The process of a part, which waits for its turn with torch imported."""

    def __init__(self, name: str, folder: Path, tiny: bool):
        self.name, self.rows, self.log = name, folder / f"{name}.jsonl", folder / f"{name}.log"
        command = [sys.executable, __file__, "--part", name, "--rows", str(self.rows), *(["--tiny"] if tiny else [])]
        self._output = self.log.open("w", encoding="utf-8")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=self._output, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip

    def finish(self, seconds: float) -> list[Row]:
        """Let it run for so long; what it found, and how it ended if not well."""
        note = ""
        try:
            self._process.communicate(f"{seconds}\n", timeout=seconds + GRACE)
        except subprocess.TimeoutExpired:
            note = f"stopped after {seconds + GRACE:.0f} s"
        except BrokenPipeError:
            self._process.wait(GRACE)
        finally:
            self.stop()
        if not note and self._process.returncode:
            last = " | ".join(self.log.read_text(encoding="utf-8").strip().splitlines()[-3:])
            note = f"exit status {self._process.returncode}: {last}"[:400]
        rows = [json.loads(line) for line in self.rows.read_text().splitlines()] if self.rows.exists() else []
        return rows + ([{"name": "the part ended early", "note": note}] if note else [])

    def wait_until_ready(self, seconds: float) -> None:
        end = time.perf_counter() + seconds
        while not self.rows.exists() and self._process.poll() is None and time.perf_counter() < end:
            time.sleep(0.1)

    def stop(self) -> None:
        """End it with what it has started: a compiler that checks kernels would disturb the figures of the next."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._output.close()


def given(name: str, later: list[str], left: float) -> float:
    """Seconds for a part, where so many are left for it and for those after it."""
    part = PARTS[name]
    return min(part.seconds, max(left - sum(PARTS[other].kept for other in later), min(part.kept, left)))


def run(names: list[str], seconds: float, tiny: bool, out: Path) -> dict[str, list[Row]]:
    """All of these parts, within so many seconds; prints their tables and writes the file after each."""
    end = time.perf_counter() + seconds
    found: dict[str, list[Row]] = {}
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as folder:
        waiting = Worker(names[0], Path(folder), tiny)
        for number, name in enumerate(names):
            worker, began, later = waiting, time.perf_counter(), names[number + 1 :]
            if later:
                waiting = Worker(later[0], Path(folder), tiny)
            worker.wait_until_ready(min(START, end - began))
            left = end - time.perf_counter() - GRACE
            if left < min(LEAST, PARTS[name].kept):
                worker.stop()
                found[name] = [{"name": "left out", "note": f"{max(left, 0.0):.0f} s were left"}]
            else:
                found[name] = worker.finish(given(name, later, left))
            print(f"\n{name}, {time.perf_counter() - began:.0f} s\n{table(found[name])}", flush=True)
            out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure products, attention, kernels and steps on one GPU.")
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=540.0, help="for all parts together; what is left is named")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on the CPU: everything runs, no figures")
    parser.add_argument("--json", type=Path, default=Path("build/gpu.json"))
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not torch.cuda.is_available() and not args.tiny:
        print("no CUDA device: not measured")
    elif args.part:
        work(args.part, args.rows, 0.0, args.tiny, wait=True)
    else:
        run(args.parts, args.seconds, args.tiny, args.json)


if __name__ == "__main__":
    main()
