#!/usr/bin/env python3
"""The loss of `make train`'s model in FP8 beside bf16, over several seeds.

    make train                                                   # makes the data
    python tools/benchmark/float8_loss.py [--seeds 3] [--steps 150] [--only tensorwise,rowwise]

Two runs that differ by rounding alone drift apart, so one pair of runs says little: `reordered` is bf16 again with the
sums of a step in another order, and shows how far rounding carries. Each run is one process on the CPU, where FP8 is
emulated with exact products. A run that is complete in --output is not made again.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

from megatron_ds.errors import DataError
from megatron_ds.train.report import read_losses
from megatron_ds.train.torchrun import run_script

ROOT = Path(__file__).parents[2]
FP8 = ("--precision.fp8-emulate", "--precision.fp8-min-features", "0", "--precision.fp8")
KINDS = {
    "bf16": (),
    "reordered": ("--train.micro-batch", "2"),
    "tensorwise": (*FP8, "tensorwise"),
    "rowwise": (*FP8, "rowwise"),
    "blockwise": (*FP8, "blockwise"),
}


def losses(output: Path, data: Path, steps: int, seed: int, settings: Sequence[str]) -> list[float]:
    """Of a run: those it left in ``output``, or new ones."""
    try:
        found = read_losses(output)
    except DataError:
        found = []
    if len(found) == steps:
        return found
    settings = ["--config", str(ROOT / "examples/configs/demo.toml"), *settings]
    settings += ["--data.prefix", str(data / "corpus"), "--data.tokenizer", str(data / "tokenizer")]
    settings += ["--data.split", "970,30,0", "--device", "cpu", "--threads", "1", "--mesh.tp", "1", "--mesh.pp", "1"]
    settings += ["--train.steps", str(steps), "--seed", str(seed), "--precision.dtype", "bf16"]
    settings += ["--checkpoint.no-save-at-end", "--output", str(output)]
    run_script(ROOT / "examples/pretrain_gpt.py", 1, settings)
    return read_losses(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/demo/data"), help="what `make train` made of the text")
    parser.add_argument("--output", type=Path, default=Path("runs/float8_loss"), help="a directory for the runs")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind")
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps of a run")
    parser.add_argument("--last", type=int, default=30, help="steps at the end whose mean loss is compared")
    parser.add_argument("--only", default=",".join(list(KINDS)[1:]), help="what to compare with bf16")
    options = parser.parse_args()
    kinds = options.only.split(",")
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"--only: {', '.join(sorted(unknown))} is not one of {', '.join(KINDS)}")
    if not (options.data / "corpus.idx").exists():
        parser.error(f"{options.data} has no dataset; `make train` makes it, or give another folder with --data")
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    for seed in range(1, options.seeds + 1):
        ends = {}
        for kind in ("bf16", *kinds):
            output = options.output / f"{kind}-{seed}"
            run = losses(output, options.data, options.steps, seed, KINDS[kind])
            ends[kind] = statistics.fmean(run[-options.last :])
        for kind in kinds:
            found[kind].append(100 * (ends[kind] / ends["bf16"] - 1))
        print(
            f"\nseed {seed}: bf16 {ends['bf16']:.4f}, " + ", ".join(f"{k} {found[k][-1]:+.2f}%" for k in kinds),
            flush=True,
        )
    print(f"\nmean loss of the last {options.last} of {options.steps} steps, beside bf16 with the same seed\n")
    print("| | mean | standard error | seeds |\n|---|---|---|---|")
    for kind in kinds:
        error = statistics.stdev(found[kind]) / len(found[kind]) ** 0.5 if options.seeds > 1 else float("nan")
        print(f"| {kind} | {statistics.fmean(found[kind]):+.2f}% | {error:.2f}% | {len(found[kind])} |")


if __name__ == "__main__":
    main()
