"""The Triton kernels beside torch, torch.compile, SDPA and FlexAttention on this machine's GPU: `make bench-kernels`.

Each kernel is first checked, forward and backward, against its reference in float64 at the tolerance of its dtype;
one that is wrong is reported as wrong and not measured. A peer that fails is reported as failed. Times are medians of
CUDA events over a cache that is flushed before each call. Rates count the work that an op cannot avoid: for streaming
ops the bytes of each input read once and each output written once, as a share of the copy rate that this machine was
measured to have; for matrix products FLOPs, as a share of its measured matmul rate. Without a CUDA device nothing is
measured, and it says so.

    python tools/benchmark/kernel_benchmark.py --only norm --json kernels.json --plot kernels.png
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import kernel_cases
import torch
from kernel_cases import BYTES, SPARSE_SHARE_OF_DENSE, TARGETS, Case, cases, compiled, normal
from torch import Tensor

from megatron_ds.kernels import registry

NOT_MEASURED = "no CUDA device: not measured"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
FLUSHED_BYTES = 1 << 30  # more than any L2 cache
HEAD_START = 2_000_000
"""Cycles, about a millisecond, that the device is kept busy while Python launches what is measured: a backward pass of
several kernels takes Python longer than the flush takes the device, and gaps would be counted."""
REPEATS = 30


@dataclass
class Row:
    """A line of the result.

    Attributes:
        direction: forward, backward, or both in one call.
        milliseconds, rate, share: share of the measured copy or matmul rate; None where the implementation failed.
        target: the least share, or for attention rate, that ours is to reach; None: there is none.
        note: why there is no figure.
    """

    op: str
    shape: str
    dtype: str
    direction: str
    implementation: str
    unit: str
    milliseconds: float | None = None
    rate: float | None = None
    share: float | None = None
    target: float | None = None
    note: str = ""

    @property
    def case(self) -> str:
        return f"{self.op} {self.shape} {self.dtype} {self.direction}"


# --- is it right? -----------------------------------------------------------------------------------------------


def check(case: Case) -> str:
    """What is wrong with the twin, or nothing. Errors are relative to the largest element of each result."""
    inputs = case.make()
    exact = [x.double() if x.is_floating_point() else x for x in inputs]
    results = []
    seeds: list[Tensor] = []
    for given, implementation in ((inputs, "triton"), (exact, "reference")):
        leaves = [x.detach().clone() if i in case.constant or not x.is_floating_point() else x.detach().requires_grad_()
                  for i, x in enumerate(given)]  # fmt: skip
        if case.in_place:
            leaves = given  # a clone would lose the rows' alignment
        with registry.use(implementation):
            outputs = as_tuple(case.run(*leaves))
            wanted = [x for x in leaves if x.requires_grad]
            seeds = seeds or [torch.randn_like(y) for y in outputs if wanted]
            gradients = (
                torch.autograd.grad(outputs, wanted, [s.to(y) for s, y in zip(seeds, outputs)]) if wanted else ()
            )
        results.append([x.detach() for x in (*outputs, *gradients)])
    for number, (got, want) in enumerate(zip(*results, strict=True)):
        got, want = got.double(), want.double()
        error = ((got - want).abs().max() / want.abs().max().clamp_min(1e-30)).item()
        if not error <= TOLERANCE[case.dtype]:
            return f"result {number} is off by {error:.1e}, allowed {TOLERANCE[case.dtype]:.0e}"
    return ""


# --- how fast is it? --------------------------------------------------------------------------------------------


def milliseconds(function: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Median time on the GPU, with a cold L2 cache."""
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device="cuda")
    for _ in range(min(5, repeats)):
        function()
    times = []
    for _ in range(repeats):
        flushed.zero_()
        torch.cuda._sleep(HEAD_START)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def copy_rate() -> float:
    """GB/s of a copy of 1 GiB on this GPU, reads and writes counted."""
    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / milliseconds(lambda: target.copy_(source)) / 1e6


def matmul_rate() -> float:
    """TFLOP/s of a bf16 product of 8192-square matrices on this GPU."""
    a, b = (normal(8192, 8192, dtype=torch.bfloat16) for _ in "ab")
    return 2 * 8192**3 / milliseconds(lambda: a @ b) / 1e9


def implementations(case: Case) -> Iterable[tuple[str, AbstractContextManager[None], Callable[[], Callable[..., Any]]]]:
    """Name, choice of the registry, and what makes the function; ours first."""
    yield "ours", registry.use("triton"), lambda: case.run
    if case.eager:
        yield "eager", registry.use("reference"), lambda: case.run
        yield "compile", registry.use("reference"), lambda: compiled(case.run)
    for name, make in case.peers.items():
        yield name, registry.use("reference"), make


def measure(case: Case, rates: dict[str, float], only: Sequence[str] = ("ours",), repeats: int = REPEATS) -> list[Row]:
    """A row for each implementation and direction; ``rates``: the machine's, by unit; ``only`` ours: all of them."""
    found = []
    for name, selection, make in implementations(case):
        if len(only) > 1 and name not in only:
            continue
        torch.compiler.reset()
        with selection:
            try:
                times = time_of(case, make(), repeats)
            except Exception as error:  # a peer's defect, or memory, must not cost the other rows
                times = {}
                note = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120] if str(error) else ''}"
                found.append(row_of(case, "forward", name, note=note))
        for direction, (time, work) in times.items():
            rate = work / time / (1e6 if case.unit == BYTES else 1e9)
            found.append(row_of(case, direction, name, time, rate, rate / rates[case.unit]))
    return found


def row_of(case: Case, direction: str, name: str, *figures: float, note: str = "") -> Row:
    target = target_of(f"{case.op} {direction}") if name == "ours" else None
    dtype = str(case.dtype).removeprefix("torch.")
    row = Row(case.op, case.shape, dtype, direction, name, case.unit, target=target, note=note)
    if figures:
        row.milliseconds, row.rate, row.share = figures
    return row


def target_of(what: str) -> float | None:
    return next((target for start, target in TARGETS.items() if what.startswith(start)), None)


def time_of(case: Case, function: Callable[..., Any], repeats: int) -> dict[str, tuple[float, float]]:
    """Milliseconds and unavoidable work by direction."""
    inputs = case.make()
    for number, x in enumerate(inputs):
        if x.is_floating_point() and number not in case.constant:
            x.requires_grad_()
    wanted = [x for x in inputs if x.requires_grad]
    if case.together:

        def both() -> Any:
            outputs = as_tuple(function(*inputs))
            return torch.autograd.grad(outputs, wanted) if wanted else outputs

        return {"forward and backward": (milliseconds(both, repeats), case.forward + case.backward)}
    times = {"forward": (milliseconds(lambda: function(*inputs), repeats), case.forward)}
    if wanted and case.backward:
        outputs = as_tuple(function(*inputs))
        seeds = [torch.randn_like(y) for y in outputs]
        backward = milliseconds(lambda: torch.autograd.grad(outputs, wanted, seeds, retain_graph=True), repeats)
        times["backward"] = (backward, case.backward)
    return times


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def compile_ahead(processes: int, arguments: Sequence[str]) -> None:
    """Compile what these arguments measure in so many processes; the compilers' caches on the disk keep it."""
    commands = [[sys.executable, __file__, *arguments, "--part", f"{i}/{processes}"] for i in range(processes)]
    # Beside each other they need no threads of their own, and a part that fails is compiled when it is measured.
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
    silent = subprocess.DEVNULL
    running = [subprocess.Popen(c, env=environment, stdout=silent, stderr=silent) for c in commands]
    try:
        for process in running:
            process.wait()
    finally:
        for process in running:
            process.kill()


def compile_part(chosen: Sequence[Case], only: Sequence[str], measured: bool) -> None:
    """Run each case once: our kernels forward and backward, and where they are ``measured`` the others too."""
    for case in chosen:
        fault_of(case)
        if measured:
            measure(case, {BYTES: 1.0, kernel_cases.FLOPS: 1.0}, only, repeats=1)
            torch.cuda.empty_cache()


# --- the report -------------------------------------------------------------------------------------------------


def set_sparse_targets(rows: list[Row]) -> None:
    """A sparse layout is to reach its share of what the dense one reached, of the same length where there is one."""
    dense = [r for r in rows if r.implementation == "ours" and r.op.startswith("attention dense") and r.rate]
    for row in rows:
        if row.implementation == "ours" and row.op.startswith("attention") and "dense" not in row.op:
            own = [d for d in dense if (d.direction, d.op.split()[-1]) == (row.direction, row.op.split()[-1])]
            same = [d for d in own if d.shape == row.shape] or own[-1:]
            row.target = SPARSE_SHARE_OF_DENSE * same[0].rate if same and same[0].rate else None


def verdict(row: Row) -> str:
    """Ours against its target; empty where there is none."""
    reached = row.rate if row.op.startswith("attention") else row.share
    if row.target is None or reached is None:
        return ""
    shown = f"{row.target:.0f}" if row.op.startswith("attention") else f"{row.target:.0%}"
    return f"{'reaches' if reached >= row.target else 'SHORT OF'} {shown}"


def line(row: Row) -> str:
    head = f"{row.op:32} {row.shape:18} {row.direction:21} {row.implementation:15}"
    if row.milliseconds is None or row.rate is None or row.share is None:
        return f"{head} failed: {row.note}"
    of = "copy" if row.unit == BYTES else "matmul"
    figures = f"{row.milliseconds:8.3f} ms {row.rate:7.0f} {row.unit:7} {row.share:4.0%} of {of}"
    return f"{head} {figures} {verdict(row)}".rstrip()


def plot(rows: list[Row], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = list(dict.fromkeys(row.case for row in rows))
    names = list(dict.fromkeys(row.implementation for row in rows))
    figure, axes = pyplot.subplots(figsize=(10, 1 + 0.34 * len(labels)))
    height = 0.9 / max(len(names), 1)
    for offset, name in enumerate(names):
        own = {row.case: row.share for row in rows if row.implementation == name and row.share is not None}
        places = [labels.index(label) + height * (offset - (len(names) - 1) / 2) for label in own]
        axes.barh(places, [100 * share for share in own.values()], height=height, label=name)
    axes.set_yticks(range(len(labels)), labels, fontsize=6)
    axes.invert_yaxis()
    axes.set_xlabel("% of the measured copy rate (attention and projections: of the matmul rate)")
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def fault_of(case: Case) -> str:
    """What :func:`check` finds, an exception included."""
    try:
        return check(case)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        torch.cuda.empty_cache()


def run(
    chosen: list[Case], machine: dict[str, Any], json_file: Path, plot_file: Path, only: Sequence[str] = ("ours",)
) -> int:
    """Check and measure the cases, print the table, write both files; 1 where a kernel is wrong or failed."""
    print(", ".join(f"{k} {v:.0f}" if isinstance(v, float) else f"{k} {v}" for k, v in machine.items()))
    rates = {unit: machine[name] for unit, name in ((BYTES, "copy GB/s"), (kernel_cases.FLOPS, "bf16 matmul TFLOP/s"))}
    rows: list[Row] = []
    wrong: dict[str, str] = {}
    for case in chosen:
        fault = fault_of(case)
        if fault:
            wrong[f"{case.op} {case.shape}"] = fault
            print(f"WRONG {case.op} {case.shape}: {fault}", flush=True)
            continue
        found = measure(case, rates, only)
        wrong |= {row.case: row.note for row in found if row.implementation == "ours" and row.note}
        rows += found
        set_sparse_targets(rows)
        print(*map(line, found), sep="\n", flush=True)
        torch.cuda.empty_cache()
    for path in (json_file, plot_file):
        path.parent.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine, "rows": [asdict(row) for row in rows], "wrong": wrong}
    json_file.write_text(json.dumps(result, indent=1) + "\n")
    if rows:
        plot(rows, plot_file, f"{machine['gpu']}, torch {machine['torch']}, triton {machine['triton']}")
    short = [row for row in rows if verdict(row).startswith("SHORT")]
    ours = [row for row in rows if row.target is not None]
    print(f"{len(ours) - len(short)} of {len(ours)} targets reached; {len(wrong)} wrong; {json_file} and {plot_file}")
    return 1 if wrong else 0


def machine_of() -> dict[str, Any]:
    import triton

    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "copy GB/s": copy_rate(),
        "bf16 matmul TFLOP/s": matmul_rate(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only ops whose name contains this")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument(
        "--implementations",
        nargs="*",
        default=[],
        help="ours and which others (eager, compile, torch, sdpa, flex); default: all (compiling takes longest)",
    )
    parser.add_argument(
        "--processes", type=int, default=min(16, os.cpu_count() or 1), help="compile in so many before measuring"
    )
    parser.add_argument("--check", action="store_true", help="check every kernel against its reference, measure none")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, default=Path("build/kernels.json"))
    parser.add_argument("--plot", type=Path, default=Path("build/kernels.png"))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print(NOT_MEASURED)
        return 0
    torch.manual_seed(0)
    chosen = [case for case in cases(getattr(torch, arguments.dtype)) if arguments.only in case.op]
    only = ["ours", *arguments.implementations]
    if arguments.part:
        number, count = map(int, arguments.part.split("/"))
        compile_part(chosen[number::count], only, not arguments.check)
        return 0
    if arguments.processes > 1:
        compile_ahead(arguments.processes, sys.argv[1:])
    if arguments.check:
        wrong = {f"{case.op} {case.shape}": fault for case in chosen if (fault := fault_of(case))}
        for name, fault in wrong.items():
            print(f"WRONG {name}: {fault}")
        print(f"{len(chosen) - len(wrong)} of {len(chosen)} cases are right")
        return 1 if wrong else 0
    return run(chosen, machine_of(), arguments.json, arguments.plot, only)


if __name__ == "__main__":
    sys.exit(main())
