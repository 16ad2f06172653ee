"""Parts of `make bench-gpu`: the machine, the products and the attention of both models, our kernels."""

from __future__ import annotations

import contextlib
import platform
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import kernel_benchmark
import kernel_cases
import torch
import torch.nn.functional as F
from gpu_clock import Bench, Row
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_ds.kernels import block_layout, block_patterns, registry
from megatron_ds.kernels.accumulate import add_product

MIB = 1 << 20
# Rows and columns of the weights of a block's four products, by model; tokens of a micro-batch; layers; vocabulary.
GPT2 = ({"qkv": (2304, 768), "out": (768, 768), "up": (3072, 768), "down": (768, 3072)}, 32768, 12, 50304)
LLAMA = ({"qkv": (6144, 2048), "out": (2048, 2048), "gate_up": (11008, 2048), "down": (2048, 5504)}, 8192, 24, 32000)
MODELS = {"GPT-2": GPT2, "Llama": LLAMA}
MICRO_BATCHES = 4


def machine(bench: Bench) -> None:
    """What this GPU is and what it can reach at all: the targets of the other parts are shares of it."""

    def about() -> Row:
        import triton

        gpu = torch.cuda.get_device_name() if bench.cuda else "CPU"
        versions = {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}
        return {"gpu": gpu, **versions, "cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}

    def clocks() -> Row:
        query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.max.sm,clocks.mem,power.limit", "--format=csv,noheader"]
        values = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
        return dict(zip(("SM now", "SM most", "memory", "power"), (v.strip() for v in values.split(","))))

    def copy(mib: int) -> Row:
        source = torch.empty(bench.size(mib * MIB, MIB), dtype=torch.int8, device=bench.device)
        target = torch.empty_like(source)
        time = bench.milliseconds(lambda: target.copy_(source), 5)
        return {"ms": time, "GB/s": 2 * source.numel() / time / 1e6}

    def product() -> Row:
        side = bench.size(8192, 32)
        a, b = bench.normal(side, side), bench.normal(side, side)
        time = bench.milliseconds(lambda: a @ b, 10)
        return {"ms": time, "TFLOP/s": 2 * side**3 / time / 1e9}

    bench.each("versions", about)
    bench.each("clocks", clocks)
    for mib in (1024, 256, 128, 64, 32):
        bench.each(f"copy of {mib} MiB", partial(copy, mib))
    bench.each("product of 8192-square bf16", product)


def products(bench: Bench) -> None:
    """Every product of a step: does a sum in fp32 cost, does cuBLASLt gain, at which chunk is the head fast?"""
    sums: dict[tuple[str, str], float] = {}
    for library in ("cublas", "cublaslt") if bench.cuda else ("cpu",):
        if bench.cuda:
            torch.backends.cuda.preferred_blas_library(library)
        for model, (weights, tokens, layers, vocabulary) in MODELS.items():
            shapes = {name: (tokens, *sides, layers) for name, sides in weights.items()}
            width = weights["out"][0]
            for rows in (2668, 4194, 5632, 8192, tokens):
                shapes[f"head, {rows} rows"] = (rows, vocabulary, width, 1)
            for name, (rows, outputs, inputs, count) in shapes.items():
                rows, outputs, inputs = (bench.size(side, 16) for side in (rows, outputs, inputs))
                for direction, call in product_calls(bench, rows, outputs, inputs).items():

                    def one(call: Callable[[], Any] = call, work: float = 2.0 * rows * outputs * inputs) -> Row:
                        time = bench.milliseconds(call)
                        return {"ms": time, "TFLOP/s": work / time / 1e9}

                    bench.each(f"{library} {model} {name} {direction}", one)
                    bench.empty_cache()
                    if "ms" in bench.rows[-1] and "head" not in name:
                        key = f"{library} {model}", direction
                        sums[key] = sums.get(key, 0.0) + bench.rows[-1]["ms"] * count * MICRO_BATCHES
    for (model, direction), time in sums.items():
        bench.row(f"{model}: blocks, {direction}, a step", ms=time)


def product_calls(bench: Bench, rows: int, outputs: int, inputs: int) -> dict[str, Callable[[], Any]]:
    x, weight, grad = bench.normal(rows, inputs), bench.normal(outputs, inputs), bench.normal(rows, outputs)
    low, wide = bench.normal(outputs, inputs), bench.normal(outputs, inputs, dtype=torch.float32)
    return {
        "forward": lambda: torch.mm(x, weight.t()),
        "input gradient": lambda: torch.mm(grad, weight),
        "weight gradient, bf16": lambda: torch.mm(grad.t(), x, out=low),
        "weight gradient, fp32": lambda: add_product(wide, grad.t(), x, True),
        "weight gradient, added in fp32": lambda: add_product(wide, grad.t(), x, False),
    }


ATTENTION = {"GPT-2": (32, 12, 1024, 64), "Llama": (4, 16, 2048, 128)}  # b, n, s, d


def attention(bench: Bench) -> None:
    """cuDNN's and flash's attention, and whether the layout of their operands costs."""
    backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION] if bench.cuda else [SDPBackend.MATH]
    for model, (b, n, s, d) in ATTENTION.items():
        b, n, s = bench.size(b, 2), bench.size(n, 2), bench.size(s, 8)
        for backend in backends:
            for layout, (q, k, v) in operands(bench, b, n, s, d).items():
                q, k, v = leaves = tuple(x.detach().requires_grad_() for x in (q, k, v))

                def forward(q: Tensor = q, k: Tensor = k, v: Tensor = v, backend: SDPBackend = backend) -> Tensor:
                    with sdpa_kernel(backend):
                        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

                def both(
                    leaves: tuple[Tensor, ...] = leaves,
                    forward: Callable[[], Tensor] = forward,
                    work: float = 2.0 * b * n * s * s * d,
                ) -> Row:
                    with torch.no_grad():
                        first = bench.milliseconds(forward)
                    grad = torch.randn_like(forward())

                    def step() -> None:
                        torch.autograd.grad(forward(), leaves, grad)

                    second = bench.milliseconds(step) - first
                    return {
                        "forward ms": first, "TFLOP/s": work / first / 1e9,
                        "backward ms": second, "backward TFLOP/s": 2.5 * work / max(second, 1e-9) / 1e9,
                    }  # fmt: skip

                bench.each(f"{model} {backend.name.lower()} {layout}", both)


def operands(bench: Bench, b: int, n: int, s: int, d: int) -> dict[str, tuple[Tensor, ...]]:
    """Queries, keys and values ``[b, n, s, d]`` as the model has them, as other models do, and contiguous."""
    fused = bench.normal(s, b, n, 3, d)
    return {
        "views of [s, b, n, 3, d]": tuple(fused[..., i, :].permute(1, 2, 0, 3) for i in range(3)),
        "views of [b, s, n, d]": tuple(bench.normal(b, s, n, d).transpose(1, 2) for _ in range(3)),
        "contiguous": tuple(bench.normal(b, n, s, d) for _ in range(3)),
    }


# By the module and constant that it changes.
VARIANTS: dict[str, dict[str, int]] = {
    "as it is": {},
    "2 stages": {"norm.STAGES": 2, "norm_backward.STAGES": 2},
    "4 stages": {"norm.STAGES": 4, "norm_backward.STAGES": 4},
    "16 warps an SM": {"norm.RESIDENT_WARPS": 16},
    "32 warps an SM": {"norm.RESIDENT_WARPS": 32},
}
LOSS_VARIANTS: dict[str, dict[str, int]] = {
    "1 program an SM": {"cross_entropy.PROGRAMS": 1},
    "4 programs of 8 warps an SM": {"cross_entropy.PROGRAMS": 4, "cross_entropy.WARPS": 8},
}
DENSE_VARIANTS = {"one loop": False, "specialised warps": True}


@contextlib.contextmanager
def variant(constants: dict[str, int]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for place, value in constants.items():
            module, name = place.split(".")
            twin = registry.load_twin("norm", module, "cuda")
            stack.enter_context(patch.object(twin, name, value))
        yield


def our_kernels(bench: Bench) -> None:
    """Each kernel against its reference in float64, then its share of the copy or matmul rate; some in variants."""
    dtype = torch.bfloat16
    if bench.cuda:
        kernel_benchmark.compile_ahead(16, ["--implementations", "ours", "--dtype", "bfloat16"])
        rates = {kernel_cases.BYTES: kernel_benchmark.copy_rate(), kernel_cases.FLOPS: kernel_benchmark.matmul_rate()}
    else:
        rates = {kernel_cases.BYTES: 1.0, kernel_cases.FLOPS: 1.0}
    scale = 1 if bench.cuda else 64
    norms = [case for case in kernel_cases.streaming_cases(dtype, scale) if "norm" in case.op]
    losses = [case for case in kernel_cases.loss_cases(dtype, scale) if case.op == "token_losses"]
    chosen = kernel_cases.cases(dtype) if bench.cuda else norms[:1]
    for case in chosen:
        bench.each(f"{case.op} {case.shape}", partial(kernel_row, bench, case, rates))
    for variants, cases in ((VARIANTS, norms), (LOSS_VARIANTS, losses)):
        for name, constants in variants.items():
            for case in cases if bench.cuda else cases[:1]:
                with variant(constants):
                    row = partial(kernel_row, bench, case, rates, checked=False)
                    bench.each(f"{case.op} {case.shape}, {name}", row)
    for name, specialized in DENSE_VARIANTS.items():  # a dense layout as a window as long as the sequence
        with patch.object(block_layout, "_WINDOW", 1 << 30), variant({"sparse_attention.SPECIALIZED": specialized}):
            length, heads = bench.size(8192, 32), bench.size(16, 4)
            layout = block_patterns.dense(length, bench.size(128, 16), heads)
            case = kernel_cases.attention_case("dense", layout, 1, heads // 4, 128, dtype)
            bench.each(f"{case.op} {case.shape}, {name}", partial(kernel_row, bench, case, rates))


def kernel_row(bench: Bench, case: kernel_cases.Case, rates: dict[str, float], checked: bool = True) -> Row:
    implementation = "triton" if bench.cuda else "reference"
    if checked and bench.cuda and (fault := kernel_benchmark.fault_of(case)):
        return {"note": f"WRONG: {fault}"}
    row: Row = {}
    clock = kernel_benchmark.milliseconds if bench.cuda else lambda function, repeats: bench.milliseconds(function)
    with registry.use(implementation), patch.object(kernel_benchmark, "milliseconds", clock):
        for direction, (time, work) in kernel_benchmark.time_of(case, case.run, 10).items():
            rate = work / time / (1e6 if case.unit == kernel_cases.BYTES else 1e9)
            row |= {
                f"{direction} ms": time,
                f"{direction} {case.unit}": rate,
                f"{direction} share": rate / rates[case.unit],
            }
    bench.empty_cache()
    return row
