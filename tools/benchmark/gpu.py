"""GPT-2 124M and a 1.3B Llama in bf16 on one GPU, beside a compiled plain torch loop of the same: `make bench-gpu`.

Every run is a fresh process; contestants take turns, and a ratio is taken within a round. MFU follows the PaLM paper
(arXiv 2204.02311, appendix B): (6 N + 12 L h s) FLOPs a token, N without embedding tables but with the head, causal
attention counted as the full square, against the device's dense bf16 peak.

The plain loop keeps fp32 weights and casts by autocast; ours keeps bf16 weights and fp32 masters.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from run import Figures
from setting import Workload, measure, report

from megatron_ds.train.metrics import peak_tflops

GPT2_124M = Workload(layers=12, hidden=768, heads=12, sequence=1024, vocab=50304, dtype="bf16")
LLAMA_1B = Workload(family="llama", layers=24, hidden=2048, heads=16, sequence=2048, vocab=32000, dtype="bf16")
MODELS = {"GPT-2 124M": GPT2_124M, "Llama 1.3B": LLAMA_1B}
# Sequences a micro-batch, by the device's memory in GiB: the largest power of two that the plain loop's logits allow.
MICRO_BATCH = {"GPT-2 124M": ((70, 32), (35, 16), (20, 8), (0, 2)), "Llama 1.3B": ((70, 4), (35, 1), (0, 1))}
ACCUMULATE = 4
CONTESTANTS = {
    "plain-compile": "plain torch loop, torch.compile, autocast",
    "ours-compile": "megatron-ds --compile",
    "ours": "megatron-ds",
    "ours-offload": "megatron-ds, optimizer state on the host",
}
REFERENCE = "plain-compile"


def workload(model: str, micro_batch: int | None, smoke: bool) -> Workload:
    w = MODELS[model]
    if smoke:
        return replace(w, layers=2, hidden=64, heads=2, sequence=32, vocab=256, batch=4, accumulate=2)
    if micro_batch is None:
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        micro_batch = next(size for least, size in MICRO_BATCH[model] if memory >= least)
    return replace(w, batch=micro_batch * ACCUMULATE, accumulate=ACCUMULATE)


def work(contestant: str, w: Workload, warmup: int, steps: int, device: str) -> None:
    """Run one contestant in this process and report it."""
    cuda = device == "cuda"
    compiled = contestant.endswith("-compile")
    if contestant == REFERENCE:
        import plain

        torch.set_float32_matmul_precision("high")
        step = plain.plain(w, compiled, device)
    else:
        import ours

        step = ours.training_step(w, device, compiled=compiled, offload="cpu" if "offload" in contestant else "none")
    figures = measure(step, w, warmup, steps, torch.cuda.synchronize if cuda else lambda: None)
    if cuda:
        figures["allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30
        figures["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
    report({"name": contestant, "torch": torch.__version__, **figures}, w)


def run_once(contestant: str, model: str, args: argparse.Namespace) -> Figures:
    import json

    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as folder:
        out = Path(folder) / "figures.json"
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", contestant, "--models", model]
        done = subprocess.run(
            command,
            env={**os.environ, "BENCHMARK_OUT": str(out)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=args.limit,
            check=False,
        )
        if done.returncode or not out.exists():
            return {"error": " | ".join(done.stdout.strip().splitlines()[-3:])}
        figures: Figures = json.loads(out.read_text())
        return figures


def rows(model: str, rounds: list[dict[str, Figures]], w: Workload, peak: float | None) -> list[list[str]]:
    """One row a contestant: medians over rounds, ratios within each."""
    lines = []
    for name, what in CONTESTANTS.items():
        if not any(name in r for r in rounds):
            continue
        good = [r[name] for r in rounds if "error" not in r.get(name, {"error": ""})]
        if not good:
            lines.append([model, what, "failed: " + rounds[-1].get(name, {}).get("error", "not run")[-160:]])
            continue
        rate = statistics.median(f["tokens_per_s"] for f in good)
        ratios = [r[name]["tokens_per_s"] / r[REFERENCE]["tokens_per_s"] for r in rounds if _both(r, name)]
        tflops = rate * w.flops_per_token / 1e12
        memory = statistics.median(f.get("allocated_gib", f["rss_mib"] / 1024) for f in good)
        lines.append(
            [
                model,
                what,
                f"{rate:,.0f}",
                f"{statistics.median(ratios):.3f}" if ratios else "-",
                f"{tflops:,.1f}",
                f"{tflops / peak:.1%}" if peak else "peak unknown",
                f"{memory:.2f}",
                f"{good[-1]['loss'][0]:.3f} -> {good[-1]['loss'][1]:.3f}",
            ]
        )
    return lines


def _both(figures: dict[str, Figures], name: str) -> bool:
    return all("tokens_per_s" in figures.get(key, {}) for key in (name, REFERENCE))


def table(lines: list[list[str]]) -> str:
    head = ["model", "", "tokens/s", "ratio", "TFLOP/s", "MFU", "peak GiB", "loss"]
    widths = [max(len(line[i]) for line in [head, *lines] if len(line) == len(head)) for i in range(len(head))]
    return "\n".join("  ".join(c.ljust(n) for c, n in zip(line, widths)).rstrip() for line in [head, *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure training on one GPU beside a plain compiled torch loop.")
    parser.add_argument("--rounds", type=int, default=3, help="times that every contestant runs")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a run")
    parser.add_argument("--warmup", type=int, default=4, help="steps of a run before the clock starts")
    parser.add_argument("--micro-batch", type=int, help="sequences a micro-batch; default: by the GPU's memory")
    parser.add_argument(
        "--contestants",
        nargs="*",
        choices=list(CONTESTANTS),
        default=list(CONTESTANTS),
        help=f"run only these; ratios are to {REFERENCE}",
    )
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--limit", type=float, default=900.0, help="seconds that one run may take")
    parser.add_argument("--smoke", action="store_true", help="tiny models, on a CPU too: the script runs, no figures")
    parser.add_argument("--worker", choices=list(CONTESTANTS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.smoke:
        print("no CUDA device: not measured")
        return
    if args.worker:
        work(args.worker, workload(args.models[0], args.micro_batch, args.smoke), args.warmup, args.steps, device)
        return
    peak = peak_tflops(torch.device(device))
    name = torch.cuda.get_device_name(0) if device == "cuda" else "CPU, tiny models: no figures to quote"
    print(f"{name}, torch {torch.__version__}, dense bf16 peak {peak or 'unknown'} TFLOP/s", flush=True)
    lines: list[list[Any]] = []
    for model in args.models:
        w = workload(model, args.micro_batch, args.smoke)
        rounds = [{c: run_once(c, model, args) for c in args.contestants} for _ in range(args.rounds)]
        print(f"{model}: {w.accumulate} micro-batches of {w.batch // w.accumulate} x {w.sequence} tokens", flush=True)
        lines += rows(model, rounds, w, peak)
    print(table(lines))


if __name__ == "__main__":
    main()
