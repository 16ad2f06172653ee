"""Ours and the peers side by side on this machine's CPU: `make bench`.

Every run is a fresh set of processes. One round runs every contestant once, so that contestants are paired: a ratio is
taken within a round, and the table shows the median ratio over rounds. One-process rows are relative to the plain
eager loop of their dtype; 2-rank rows to the ideal, which is twice our own one-process rate with one thread.

    python tools/benchmark/run.py --rounds 3 --only fp32 --json bench.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PEERS = ROOT / ".venv-bench"

Figures = dict[str, Any]


@dataclass(frozen=True)
class Contestant:
    """A row of the table. ``name`` is known to worker.py; ``reference`` is the key of the row it is relative to."""

    name: str
    dtype: str
    ranks: int
    what: str

    @property
    def key(self) -> str:
        return f"{self.name} {self.dtype}" + (f" x{self.ranks}" if self.ranks > 2 else "")

    @property
    def reference(self) -> str:
        return f"plain {self.dtype}" if self.ranks == 1 else f"ours {self.dtype}"

    @property
    def ours(self) -> bool:
        return self.name.startswith("ours")


def _one_process(dtype: str) -> list[Contestant]:
    bf16 = ", autocast" if dtype == "bf16" else ""
    return [
        Contestant("plain", dtype, 1, f"plain torch loop{bf16}"),
        Contestant("ours", dtype, 1, "megatron-ds" + (", bf16 weights, fp32 masters" if bf16 else "")),
        Contestant("plain-compile", dtype, 1, f"plain torch loop, torch.compile{bf16}"),
        Contestant("ours-compile", dtype, 1, "megatron-ds --compile"),
        Contestant("huggingface", dtype, 1, f"Hugging Face GPT-2{bf16}"),
    ]


def _zero(dtype: str, ranks: int) -> list[Contestant]:
    """Stages 2 and 3 and offload, beside those who shard as much."""
    return [
        Contestant("ours-zero2", dtype, ranks, "megatron-ds ZeRO-2"),
        Contestant("deepspeed-zero2", dtype, ranks, "DeepSpeed ZeRO-2"),
        Contestant("ours-zero3", dtype, ranks, "megatron-ds ZeRO-3"),
        Contestant("deepspeed-zero3", dtype, ranks, "DeepSpeed ZeRO-3"),
        Contestant("fsdp2", dtype, ranks, "torch FSDP2"),
        Contestant("ours-zero2-offload", dtype, ranks, "megatron-ds ZeRO-2, optimizer on the host"),
        Contestant("deepspeed-zero2-offload", dtype, ranks, "DeepSpeed ZeRO-2, optimizer on the host"),
    ]


CONTESTANTS = [
    *_one_process("fp32"),
    *_one_process("bf16"),
    Contestant("ours-alone", "fp32", 2, "(2 x megatron-ds apart: the machine's limit)"),
    Contestant("ours-zero1", "fp32", 2, "megatron-ds ZeRO-1"),
    Contestant("ddp", "fp32", 2, "torch DDP"),
    Contestant("zero-redundancy", "fp32", 2, "DDP + ZeroRedundancyOptimizer"),
    Contestant("deepspeed-zero1", "fp32", 2, "DeepSpeed ZeRO-1"),
    Contestant("ours-tp", "fp32", 2, "megatron-ds TP 2"),
    Contestant("dtensor-tp", "fp32", 2, "DTensor parallelize_module TP 2"),
    Contestant("ours-tp-sp", "fp32", 2, "megatron-ds TP 2 + SP"),
    Contestant("dtensor-tp-sp", "fp32", 2, "DTensor parallelize_module TP 2 + SP"),
    Contestant("ours-1f1b-3+3", "fp32", 2, "megatron-ds 1F1B, 3+3 layers"),
    Contestant("torch-1f1b-3+3", "fp32", 2, "torch Schedule1F1B, 3+3 layers"),
    Contestant("ours-1f1b-4+2", "fp32", 2, "megatron-ds 1F1B, 4+2 layers"),
    Contestant("torch-1f1b-4+2", "fp32", 2, "torch Schedule1F1B, 4+2 layers"),
    *_zero("fp32", 2),
    *_zero("bf16", 2),
    Contestant("ours-alone", "fp32", 4, "(4 x megatron-ds apart: the machine's limit)"),
    *_zero("fp32", 4),
]


def install_peers() -> None:
    """Make .venv-bench once: torch by its exact pin alone, then the peers."""
    done = PEERS / ".installed"
    constraints = HERE / "constraints.txt"
    if done.exists() and done.stat().st_mtime >= constraints.stat().st_mtime:
        return
    print("Installing the peers (torch, transformers, DeepSpeed) into .venv-bench, once ...", flush=True)
    pins = [line for line in constraints.read_text().splitlines() if line and not line.startswith("#")]
    environment = {**os.environ, "DS_BUILD_OPS": "0", "DS_ACCELERATOR": "cpu"}
    python = PEERS / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(PEERS)], check=True)
    for wanted in ([p for p in pins if p.startswith("torch==")], ["setuptools", *pins]):
        subprocess.run([str(python), "-m", "pip", "install", "-qq", *wanted], check=True, env=environment)
    done.touch()


def run_once(contestant: Contestant, warmup: int, steps: int, threads: int, limit: float) -> Figures:
    """One run in fresh processes. A failed run gives ``{"error": ...}`` with the end of its output."""
    python = sys.executable if contestant.ours else str(PEERS / "bin" / "python")
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        out = Path(folder) / "figures.json"
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "DS_ACCELERATOR": "cpu",
            "BENCHMARK_OUT": str(out),
            "TOKENIZERS_PARALLELISM": "false",
        }
        logs, processes = [], []
        for rank in range(contestant.ranks):
            log = open(Path(folder) / f"log-{rank}", "w+")  # noqa: SIM115  (read after the processes have ended)
            logs.append(log)
            command = [python, str(HERE / "worker.py"), contestant.name, "--dtype", contestant.dtype]
            command += ["--warmup", str(warmup), "--steps", str(steps), "--threads", str(threads)]
            command += ["--rank", str(rank), "--ranks", str(contestant.ranks), "--rendezvous", folder + "/store"]
            processes.append(
                subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
            )
        try:
            failed = _wait(processes, limit)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if failed is None and out.exists():
            figures: Figures = json.loads(out.read_text())
            return figures
        log = logs[failed or 0]
        log.seek(0)
        return {"error": " | ".join(log.read().strip().splitlines()[-3:]) or f"no figures within {limit:.0f} s"}


def _wait(processes: list[subprocess.Popen[bytes]], limit: float) -> int | None:
    """The rank that failed first, or None if all ended well. Past the limit: rank 0."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        for rank, code in enumerate(codes):
            if code:
                return rank
        if all(code == 0 for code in codes):
            return None
        time.sleep(0.05)
    return 0


def summarize(rounds: list[dict[str, Figures]], chosen: list[Contestant]) -> list[Figures]:
    """One row a contestant: medians over rounds, ratios taken within each round."""
    rows = []
    for contestant in chosen:
        runs = [r[contestant.key] for r in rounds if contestant.key in r]
        good = [f for f in runs if "error" not in f]
        row: Figures = {"contestant": contestant.key, "what": contestant.what, "dtype": contestant.dtype}
        row["ranks"] = contestant.ranks
        if not good:
            rows.append({**row, "error": runs[-1]["error"] if runs else "not run"})
            continue
        for name in ("tokens_per_s", "cpu_tokens_per_s", "rss_mib"):
            row[name] = statistics.median(f[name] for f in good)
        for name in ("tokens_per_s", "cpu_tokens_per_s"):
            ratios = [
                r[contestant.key][name] / (r[contestant.reference][name] * contestant.ranks)
                for r in rounds
                if all(name in r.get(key, {}) for key in (contestant.key, contestant.reference))
            ]
            if ratios:
                row[f"ratio_{name}"] = statistics.median(ratios)
                row[f"range_{name}"] = [min(ratios), max(ratios)]
        rows.append(row)
    return rows


def table(rows: list[Figures]) -> str:
    """The rows as aligned text."""
    head = ("", "tokens/s", "ratio", "(min-max)", "by CPU time", "peak RSS MiB")
    lines: list[tuple[str, ...]] = []
    section = None
    for row in rows:
        ranks, dtype = row["ranks"], row["dtype"]
        name = f"1 process, {dtype}; ratio to the plain eager loop"
        if ranks > 1:
            name = f"{ranks} ranks, {dtype}, gloo; ratio to the ideal, {ranks} x megatron-ds on one process"
        if name != section:
            section = name
            lines.append((name,))
        if "error" in row:
            lines.append(("  " + row["what"], "failed: " + row["error"][-150:]))
            continue
        low, high = row.get("range_tokens_per_s", (float("nan"),) * 2)
        lines.append(
            (
                "  " + row["what"],
                f"{row['tokens_per_s']:,.0f}",
                f"{row.get('ratio_tokens_per_s', float('nan')):.3f}",
                f"({low:.2f}-{high:.2f})",
                f"{row.get('ratio_cpu_tokens_per_s', float('nan')):.3f}",
                f"{row['rss_mib']:,.0f}",
            )
        )
    whole = [line for line in lines if len(line) == len(head)]
    widths = [max((len(line[i]) for line in [head, *whole]), default=0) for i in range(len(head))]
    text = []
    for line in [head, *lines]:
        if len(line) == 1:
            text += ["", line[0]]
        else:
            text.append(line[0].ljust(widths[0]) + "".join("  " + c.rjust(n) for c, n in zip(line[1:], widths[1:])))
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure ours and the peers side by side on the CPU.")
    parser.add_argument("--rounds", type=int, default=3, help="times that every contestant runs")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a run")
    parser.add_argument("--warmup", type=int, default=3, help="steps of a run before the clock starts")
    parser.add_argument("--threads", type=int, default=1, help="compute threads a rank")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds that one run may take")
    parser.add_argument(
        "--only", nargs="*", default=[], help="run the rows whose name has one of these, and their references"
    )
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args()
    chosen = CONTESTANTS
    if args.only:
        asked = {c.key: c for c in CONTESTANTS if any(word in f"{c.key} {c.ranks}ranks" for word in args.only)}
        needed = set(asked) | {c.reference for c in asked.values()}
        chosen = [c for c in CONTESTANTS if c.key in needed]
    if any(not c.ours for c in chosen):
        install_peers()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(
        f"{platform.machine()}, {cores} cores, load {os.getloadavg()[0]:.1f}; {args.threads} thread(s) a rank",
        flush=True,
    )
    rounds: list[dict[str, Figures]] = [{}]
    try:
        runs = tqdm([(number, c) for number in range(args.rounds) for c in chosen], unit="run")
        for number, contestant in runs:
            runs.set_description(f"round {number + 1}: {contestant.key}")
            if number == len(rounds):
                rounds.append({})
            rounds[number][contestant.key] = run_once(contestant, args.warmup, args.steps, args.threads, args.limit)
            if args.json:  # after every run: a long one that is stopped has shown something
                rows = summarize(rounds, chosen)
                figures = {"rows": rows, "rounds": rounds, "settings": vars(args)}
                args.json.write_text(json.dumps(figures, indent=1, default=str))
    except KeyboardInterrupt:
        print("\nstopped; what has run:", file=sys.stderr)
    print(table(summarize(rounds, chosen)))
    if args.json:
        print(f"\nall figures: {args.json}")


if __name__ == "__main__":
    main()
