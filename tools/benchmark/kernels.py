"""The Triton kernels beside eager torch and torch.compile on this machine's GPU: `make bench-kernels`.

Each kernel is first checked, forward and backward, against its reference in float64 at the tolerance of its dtype;
one that is wrong is reported as wrong and not measured. Times are medians of CUDA events over a cache that is flushed
before each call. Rates count the bytes that an op cannot avoid (each input read once, each output written once), and
are also given as a share of the copy rate that this machine was measured to have. Without a CUDA device nothing is
measured, and it says so.

    python tools/benchmark/kernels.py --only norm --json kernels.json --plot kernels.png
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ds.kernels import registry
from megatron_ds.kernels.activation import bias_gelu, gated
from megatron_ds.kernels.cross_entropy import logit_gradient, token_statistics
from megatron_ds.kernels.dropout import dropout_add
from megatron_ds.kernels.norm import add_norm, layer_norm, rms_norm
from megatron_ds.kernels.rotary import rotary
from megatron_ds.kernels.softmax import scaled_masked_softmax

NOT_MEASURED = "no CUDA device: not measured"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
FLUSHED_BYTES = 256 << 20  # more than any L2 cache


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    Attributes:
        make: the inputs on the GPU; those of floating point get gradients unless numbered in ``constant``.
        run: the op; its outputs are differentiated.
        forward_bytes, backward_bytes: the traffic that cannot be avoided.
    """

    op: str
    shape: str
    dtype: torch.dtype
    make: Callable[[], list[Tensor]]
    run: Callable[..., Any]
    forward_bytes: int
    backward_bytes: int
    constant: tuple[int, ...] = ()


@dataclass
class Row:
    """A line of the result. Milliseconds, GB/s, and the share of the measured copy rate."""

    op: str
    shape: str
    dtype: str
    direction: str
    implementation: str
    milliseconds: float
    gigabytes_a_second: float
    share_of_copy: float


def normal(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.float32).to(dtype)


def vectors(columns: int, *x: Tensor, dtype: torch.dtype, weights: int, keys: bool = False) -> list[Tensor]:
    """Rows of data, then per-column weights, then dropout keys a row."""
    rows = x[0].shape[0]
    more = [torch.randint(-(2**31), 2**31, (rows,), device=x[0].device).to(torch.int32)] if keys else []
    return [*x, *(normal(columns, dtype=dtype) for _ in range(weights)), *more]


def cases(dtype: torch.dtype, scale: int = 1) -> list[Case]:
    """The grid: hidden sizes from 1k to 16k, heads of 128, sequences of 1k to 8k. ``scale`` divides every size."""
    size = dtype.itemsize
    found: list[Case] = []

    def add(op: str, shape: Sequence[int], make: Callable[[], list[Tensor]], run: Callable[..., Any],
            forward: float, backward: float, constant: tuple[int, ...] = ()) -> None:  # fmt: skip
        found.append(
            Case(op, "x".join(map(str, shape)), dtype, make, run, int(forward * size), int(backward * size), constant)
        )

    for shape in ((16384, 1024), (8192, 4096), (8192, 8192), (4096, 16384), (262144, 128)):
        rows, columns = (max(2, side // scale) for side in shape)
        n = rows * columns

        def data(
            count: int, weights: int, keys: bool = False, rows: int = rows, columns: int = columns
        ) -> Callable[[], list[Tensor]]:
            return lambda: vectors(
                columns,
                *(normal(rows, columns, dtype=dtype) for _ in range(count)),
                dtype=dtype,
                weights=weights,
                keys=keys,
            )

        add("rms_norm", (rows, columns), data(1, 1), partial(rms_norm, eps=1e-5), 2 * n, 3 * n)
        add("layer_norm", (rows, columns), data(1, 2), partial(layer_norm, eps=1e-5), 2 * n, 3 * n)
        # Backward: two gradients and the sum in, two gradients out.
        add("add_norm", (rows, columns), data(2, 2, keys=True), dropped_add_norm, 4 * n, 5 * n)
        add("dropout_add", (rows, columns), data(2, 0, keys=True), dropped_add, 3 * n, 2 * n)
    for shape in ((8192, 4096), (8192, 14336), (4096, 28672)):
        rows, columns = (max(2, side // scale) for side in shape)
        n = rows * columns
        add("swiglu", (rows, 2 * columns), partial(one, rows, 2 * columns, dtype=dtype), gated, 3 * n, 5 * n)
        add("bias_gelu", (rows, columns), partial(with_bias, rows, columns, dtype), tanh_gelu, 2 * n, 3 * n)
    for length, heads in ((1024, 32), (2048, 32), (4096, 32), (8192, 8)):
        length = max(2, length // scale)
        heads = max(1, heads // scale)
        n = heads * length * length
        make = partial(one, 1, heads, length, length, dtype=dtype)
        add("softmax", (heads, length, length), make, partial(scaled_masked_softmax, scale=0.1), 2 * n, 3 * n)
        # Half of the square is read, all of it is written.
        causal = partial(scaled_masked_softmax, scale=0.1, causal=True)
        add("softmax causal", (heads, length, length), make, causal, 1.5 * n, 2 * n)
    for length, heads in ((8192, 32), (8192, 64)):
        length = max(2, length // scale)
        n = length * 2 * (heads + 8) * 128
        for name, interleaved in (("rotary", False), ("rotary interleaved", True)):
            run = partial(rotary, interleaved=interleaved)
            make = partial(queries_and_keys, length, heads, 8, dtype)
            add(name, (length, 2, heads + 8, 128), make, run, 2 * n, 2 * n, (2, 3))
    for tokens, vocabulary in ((8192, 32000), (8192, 50257), (8192, 131072)):
        tokens, vocabulary = max(2, tokens // scale), max(2, vocabulary // scale)
        make = partial(logits_and_labels, tokens, vocabulary, dtype)
        add("cross_entropy", (tokens, vocabulary), make, cross_entropy, 3 * tokens * vocabulary, 0, (0,))
    return found


def one(*shape: int, dtype: torch.dtype) -> list[Tensor]:
    return [normal(*shape, dtype=dtype)]


def with_bias(rows: int, columns: int, dtype: torch.dtype) -> list[Tensor]:
    return [normal(rows, columns, dtype=dtype), normal(columns, dtype=dtype)]


def queries_and_keys(length: int, heads: int, groups: int, dtype: torch.dtype) -> list[Tensor]:
    q, k = normal(length, 2, heads, 128, dtype=dtype), normal(length, 2, groups, 128, dtype=dtype)
    angles = normal(length, 1, 1, 64, dtype=torch.float32).repeat(1, 1, 1, 2)
    return [q, k, angles.cos().to(dtype), angles.sin().to(dtype)]


def logits_and_labels(tokens: int, vocabulary: int, dtype: torch.dtype) -> list[Tensor]:
    """Rows begin at multiples of 16 elements, as layers/loss.py lays its logits out."""
    logits = normal(tokens, -(-vocabulary // 16) * 16, dtype=dtype)[:, :vocabulary]
    return [logits, torch.randint(vocabulary, (tokens,), device=logits.device)]


def dropped_add_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, row_keys: Tensor) -> Any:
    return add_norm(x, residual, weight, bias, 1e-5, p=0.1, row_keys=row_keys)


def dropped_add(x: Tensor, residual: Tensor, row_keys: Tensor) -> Tensor:
    return dropout_add(x, residual, 0.1, row_keys)


def tanh_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return bias_gelu(x, bias, "tanh")


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Loss and gradient in one, as training uses it: the gradient is written over the logits."""
    stats, scratch = token_statistics(logits, target, want_sum=False)
    lse = stats[0] + stats[1].log()
    mask = torch.ones(target.shape, dtype=torch.bool, device=target.device)
    size = logits.shape[1]
    return logit_gradient(scratch, stats[0], lse, target, mask, label_smoothing=0.0, z_loss=0.0, vocab_size=size)


def check(case: Case) -> str:
    """What is wrong with the twin, or nothing. Errors are relative to the largest element of each result."""
    inputs = case.make()
    exact = [x.double() if x.is_floating_point() else x for x in inputs]
    results = []
    seeds: list[Tensor] = []
    for given, implementation in ((inputs, "triton"), (exact, "reference")):
        leaves = [x.detach().clone() if i in case.constant or not x.is_floating_point() else x.detach().requires_grad_()
                  for i, x in enumerate(given)]  # fmt: skip
        if case.op == "cross_entropy":
            leaves = given  # a clone would lose the rows' alignment
        with registry.use(implementation):
            outputs = as_tuple(case.run(*leaves))
            wanted = [x for x in leaves if x.requires_grad]
            seeds = seeds or [torch.randn_like(y) for y in outputs]
            gradients = (
                torch.autograd.grad(outputs, wanted, [s.to(y) for s, y in zip(seeds, outputs)]) if wanted else ()
            )
        results.append([*outputs, *gradients])
    for number, (got, want) in enumerate(zip(*results, strict=True)):
        error = ((got.double() - want).abs().max() / want.abs().max().clamp_min(1e-30)).item()
        if not error <= TOLERANCE[case.dtype]:
            return f"result {number} is off by {error:.1e}, allowed {TOLERANCE[case.dtype]:.0e}"
    return ""


def milliseconds(function: Callable[[], Any], repeats: int = 30) -> float:
    """Median time on the GPU, with a cold L2 cache."""
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device="cuda")
    for _ in range(5):
        function()
    times = []
    for _ in range(repeats):
        flushed.zero_()
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


def measure(case: Case, copy: float) -> list[Row]:
    found = []
    for name, implementation, function in (
        ("ours", "triton", case.run),
        ("eager", "reference", case.run),
        ("compile", "reference", torch.compile(case.run, dynamic=False)),
    ):
        torch.compiler.reset()
        with registry.use(implementation):
            inputs = case.make()
            for number, x in enumerate(inputs):
                if x.is_floating_point() and number not in case.constant:
                    x.requires_grad_()

            def forward(function: Callable[..., Any] = function, inputs: list[Tensor] = inputs) -> Any:
                return function(*inputs)

            times = {"forward": (milliseconds(forward), case.forward_bytes)}
            wanted = [x for x in inputs if x.requires_grad]
            if wanted and case.backward_bytes:
                outputs = as_tuple(function(*inputs))
                seeds = [torch.randn_like(y) for y in outputs]

                def backward(
                    outputs: tuple[Tensor, ...] = outputs,
                    wanted: list[Tensor] = wanted,
                    seeds: list[Tensor] = seeds,
                ) -> Any:
                    return torch.autograd.grad(outputs, wanted, seeds, retain_graph=True)

                times["backward"] = (milliseconds(backward), case.backward_bytes)
            elif case.op == "cross_entropy":
                times = {"forward and backward": times["forward"]}
        for direction, (time, size) in times.items():
            rate = size / time / 1e6
            dtype = str(case.dtype).removeprefix("torch.")
            found.append(Row(case.op, case.shape, dtype, direction, name, time, rate, rate / copy))
    return found


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def plot(rows: list[Row], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = list(dict.fromkeys(f"{r.op} {r.shape} {r.dtype} {r.direction}" for r in rows))
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.32 * len(labels)))
    for offset, name in enumerate(("ours", "eager", "compile")):
        own = {f"{r.op} {r.shape} {r.dtype} {r.direction}": r.share_of_copy for r in rows if r.implementation == name}
        places = [labels.index(label) + 0.27 * (offset - 1) for label in own]
        axes.barh(places, [100 * share for share in own.values()], height=0.25, label=name)
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("% of the measured copy rate")
    axes.set_title(title, fontsize=9)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only ops whose name contains this")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--json", type=Path, default=Path("build/kernels.json"))
    parser.add_argument("--plot", type=Path, default=Path("build/kernels.png"))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print(NOT_MEASURED)
        return 0
    import triton

    machine = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "copy GB/s": copy_rate(),
        "bf16 matmul TFLOP/s": matmul_rate(),
    }
    print(", ".join(f"{k} {v:.0f}" if isinstance(v, float) else f"{k} {v}" for k, v in machine.items()))
    rows: list[Row] = []
    wrong: dict[str, str] = {}
    for case in cases(getattr(torch, arguments.dtype)):
        if arguments.only not in case.op:
            continue
        fault = check(case)
        torch.cuda.empty_cache()
        if fault:
            wrong[f"{case.op} {case.shape}"] = fault
            print(f"WRONG {case.op} {case.shape}: {fault}")
            continue
        for row in measure(case, machine["copy GB/s"]):
            rows.append(row)
            print(
                f"{row.op:20} {row.shape:22} {row.direction:21} {row.implementation:8} {row.milliseconds:8.3f} ms "
                f"{row.gigabytes_a_second:6.0f} GB/s {row.share_of_copy:5.0%} of copy",
                flush=True,
            )
        torch.cuda.empty_cache()
    for path in (arguments.json, arguments.plot):
        path.parent.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine, "rows": [asdict(row) for row in rows], "wrong": wrong}
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    if rows:
        plot(rows, arguments.plot, f"{machine['gpu']}, torch {machine['torch']}, triton {machine['triton']}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
