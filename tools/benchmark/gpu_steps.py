"""Training steps of both models in `make bench-gpu`: where their time goes, the host's for an update, and plain torch.

MFU follows the PaLM paper (arXiv 2204.02311, appendix B) against the device's dense bf16 peak. The plain loop keeps
fp32 weights and casts by autocast; ours keeps bf16 weights and fp32 masters.
"""

from __future__ import annotations

import gc
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, Protocol
from unittest.mock import patch

import ours
import plain
import torch
from gpu_clock import Bench, Row
from setting import Workload

from megatron_ds.kernels import registry
from megatron_ds.layers import loss, recipe
from megatron_ds.train.metrics import peak_tflops
from megatron_ds.zero import layout, main_grad

GPT2 = Workload(layers=12, hidden=768, heads=12, sequence=1024, vocab=50304, dtype="bf16")
LLAMA = Workload(family="llama", layers=24, hidden=2048, heads=16, sequence=2048, vocab=32000, dtype="bf16")
LLAMA_8B_BLOCKS = replace(
    LLAMA, layers=4, hidden=4096, heads=32, kv_heads=8, ffn_hidden=14336, sequence=8192, vocab=2048
)
ACCUMULATE = 4
# Sequences a micro-batch, by the device's memory in GiB.
MICRO_BATCH = {"gpt2": ((70, 32), (35, 16), (20, 8), (0, 2)), "llama": ((70, 4), (35, 1), (0, 1))}
WARMUP, STEPS = 3, 5

# Time on the GPU by class: the first pattern that a kernel's name has.
CLASSES: Mapping[str, str] = {
    "casts to FP8": r"amax_kernel|cast_kernel",
    "attention": r"fmha|flash|cudnn.*(attn|sdpa|mha)|sdpa",
    "products": r"gemm|cutlass|cublas|nvjet|xmma|sm90_|splitk|addmm|::mm",
    "norms": r"norm_",
    "partial sums": r"partial_sums",
    "activation": r"gated|gelu|silu",
    "rotary": r"rotary|pack_heads",
    "loss": r"token_|logit_",
    "update": r"adam|square_sum|multi_tensor",
    "reductions": r"reduce|sum",
    "embedding": r"embedding|index|sort|radix|add_rows",
    "copies": r"memcpy|memset|copy|cat",
    "elementwise": r"elementwise|vectorized|add|mul|triton_",
}


def of_model(bench: Bench, w: Workload, micro_batch: int | None = None) -> Workload:
    """With a micro-batch that the memory holds."""
    if bench.tiny:
        small: dict[str, Any] = {
            "layers": 2,
            "hidden": 64,
            "heads": 2,
            "kv_heads": None,
            "ffn_hidden": None,
            "vocab": 256,
        }
        return replace(w, **small, sequence=32, batch=4, accumulate=2)
    if micro_batch is None:
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        micro_batch = next(size for least, size in MICRO_BATCH[w.family] if memory >= least)
    return replace(w, batch=micro_batch * ACCUMULATE, accumulate=ACCUMULATE)


def model_row(bench: Bench, title: str, measure: Callable[[], Row]) -> None:
    """A row of a model that ``measure`` builds, and whose memory is free again afterwards."""
    torch.manual_seed(0)
    bench.each(title, measure)
    gc.collect()
    torch.compiler.reset()
    bench.empty_cache()


class Work(Protocol):
    """Of one step: what counts as its tokens, and the FLOPs of each, forward and backward."""

    @property
    def tokens(self) -> int: ...

    @property
    def flops_per_token(self) -> float: ...


def timed(bench: Bench, w: Work, step: Callable[[], Any]) -> Row:
    """Median of the timed steps: tokens/s, MFU, peak memory, first and last loss."""
    if bench.cuda:
        torch.cuda.reset_peak_memory_stats()
    losses, times = [], []
    for number in range((WARMUP + STEPS) if not bench.tiny else 2):
        bench.synchronize()
        start = time.perf_counter()
        losses.append(float(step()))
        bench.synchronize()
        if number >= WARMUP or bench.tiny:
            times.append(time.perf_counter() - start)
    rate = w.tokens / statistics.median(times)
    peak = peak_tflops(torch.device(bench.device))
    row: Row = {"ms": 1e3 * statistics.median(times), "tokens/s": rate}
    if peak:
        row["MFU %"] = 100 * rate * w.flops_per_token / 1e12 / peak
    if bench.cuda:
        row["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
    return row | {"first loss": losses[0], "last loss": losses[-1]}


def profile(bench: Bench, step: Callable[[], Any]) -> None:
    """One step's time on the GPU by class of kernel, the time between kernels, and how many there are."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if bench.cuda else []
    with torch.profiler.profile(activities=activities) as found:
        step()
        bench.synchronize()
    kind = torch.autograd.DeviceType.CUDA if bench.cuda else torch.autograd.DeviceType.CPU
    events = [e for e in found.events() if e.device_type == kind]
    spans = sorted((e.time_range.start, e.time_range.end, e.name) for e in events)
    for name, (microseconds, count) in sorted(by_class(spans).items(), key=lambda item: -item[1][0]):
        bench.row(f"  {name}", ms=microseconds / 1e3, launches=count)
    busy, gaps = busy_and_gaps(spans)
    bench.row("  on the GPU", ms=busy / 1e3, launches=len(spans))
    bench.row("  between kernels", ms=gaps / 1e3)


Span = tuple[float, float, str]


def by_class(spans: Iterable[Span]) -> dict[str, tuple[float, int]]:
    """Microseconds and launches."""
    sums: dict[str, tuple[float, int]] = {}
    for start, end, name in spans:
        known = next((title for title, pattern in CLASSES.items() if re.search(pattern, name, re.IGNORECASE)), "other")
        total, count = sums.get(known, (0.0, 0))
        sums[known] = total + end - start, count + 1
    return sums


def busy_and_gaps(spans: Iterable[Span]) -> tuple[float, float]:
    """Time in which any kernel runs, and in which none does, between the first and the last; ``spans`` by start."""
    busy = gaps = 0.0
    last: float | None = None
    for start, end, _ in spans:
        if last is None or start > last:
            gaps += 0.0 if last is None else start - last
            busy, last = busy + end - start, end
        elif end > last:
            busy, last = busy + end - last, end
    return busy, gaps


def step_of(bench: Bench, title: str, w: Workload, profiled: bool, **layout: Any) -> None:
    def run() -> Row:
        step = ours.training_step(w, bench.device, **layout)
        row = timed(bench, w, step)
        if profiled:
            profile(bench, step)
        return row

    model_row(bench, title, run)


def gpt2(bench: Bench) -> None:
    step_of(bench, "GPT-2, fused kernels", of_model(bench, GPT2), profiled=True)


def llama(bench: Bench) -> None:
    step_of(bench, "Llama, fused kernels", of_model(bench, LLAMA), profiled=True)
    for size in (8, 16):
        step_of(bench, f"Llama, micro-batch {size}", of_model(bench, LLAMA, size), profiled=False)


def update(bench: Bench) -> None:
    """The host's time for the norm, the clipping and the update: the tensors of both models, of next to no elements."""
    for title, w in (("GPT-2", GPT2), ("Llama", LLAMA)):
        small = replace(w, hidden=16, heads=2, sequence=8, vocab=64, batch=1)
        bench.each(f"{title}, {small.layers} layers", partial(host_time_of_update, bench, small))


def host_time_of_update(bench: Bench, w: Workload) -> Row:
    _, _, parts = ours.built(w, bench.device)
    one, times = torch.ones((), dtype=torch.float64, device=bench.device), []
    for _ in range(3 if bench.tiny else 50):
        parts.step.begin(one)
        parts.optimizer.start_backward(True)
        parts.optimizer.end_backward()
        parts.step.reduce()
        bench.synchronize()
        start = time.perf_counter()
        parts.step.finish(one, one)
        times.append(time.perf_counter() - start)
    return {"host ms": 1e3 * statistics.median(times), "tensors": len(list(parts.optimizer.reducer.main_grads()))}


# Constants of the library that a row changes: the most tokens of a chunk, and the bytes of its logits.
CHUNKS = {
    "loss in chunks of 2,048 tokens": (2048, loss.GPU_CHUNK_BYTES),
    "loss in chunks of 5,632 tokens": (5632, loss.GPU_CHUNK_BYTES),
    "loss in chunks of 8,192 tokens, GELU kept": (8192, 1 << 50),
    "loss of a micro-batch at once": (1 << 30, 1 << 50),
}


def through_half(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, first: bool) -> None:
    """A weight gradient that is rounded to the activations' dtype before it is added, as in plain torch."""
    product = left @ right
    if first:
        total.copy_(product)
    else:
        total.add_(product)


# What a row changes of the library's modules besides.
CHANGES: Mapping[str, Sequence[tuple[Any, str, Any]]] = {
    "weight gradients in bf16": [(module, "add_product", through_half) for module in (loss, recipe, main_grad)],
    "buckets of 40 MB": [(layout, "BYTES_ALONE", 4e7)],
}
# Operators in plain torch instead of the fused kernel: what each of them gains.
PLAIN_OPERATORS = ("norm", "bias_gelu", "rotary", "gated", "cross_entropy", "adamw", "square_sum")


def flags(bench: Bench) -> None:
    """One choice at a time, on the same model: what is it worth?"""
    w = of_model(bench, GPT2)
    step_of(bench, "GPT-2, as it is", w, profiled=False)
    for title, (tokens, size) in CHUNKS.items():
        with patch.object(loss, "GPU_CHUNK_TOKENS", tokens), patch.object(loss, "GPU_CHUNK_BYTES", size):
            step_of(bench, f"GPT-2, {title}", w, profiled=False)
    for title, changes in CHANGES.items():
        with ExitStack() as stack:
            for module, name, value in changes:
                stack.enter_context(patch.object(module, name, value))
            step_of(bench, f"GPT-2, {title}", w, profiled=False)
    if bench.cuda:
        step_of(bench, "GPT-2, CUDA graphs", w, profiled=False, graphs=True)
    else:
        bench.row("GPT-2, CUDA graphs", note="there is no GPU")
    known = {op.name for op in registry.all_ops()}
    for name in PLAIN_OPERATORS[: 4 if bench.tiny else None : 2 if bench.tiny else 1]:
        model, own = ("Llama", of_model(bench, LLAMA)) if name in ("rotary", "gated") else ("GPT-2", w)
        if name not in known:
            bench.row(f"{model}, {name} in plain torch", note="there is no such operator yet")
            continue
        with registry.use({name: "reference"}):
            step_of(bench, f"{model}, {name} in plain torch", own, profiled=False)


def float8(bench: Bench) -> None:
    """Blocks as wide as Llama 8B's in FP8 over those in bf16: 8,192 tokens of one sequence, and of four.

    A recipe that has a scale a sequence makes a weight gradient of each sequence and adds them up.
    """
    for sequences in (1, 4):
        of_shape = replace(LLAMA_8B_BLOCKS, sequence=LLAMA_8B_BLOCKS.sequence // sequences)
        w, in_bf16 = of_model(bench, of_shape, sequences), None
        for fp8 in ("none", "tensorwise", "rowwise", "blockwise"):
            title = f"{w.layers} blocks, {sequences} x {w.sequence}, " + ("bf16" if fp8 == "none" else fp8)
            step_of(bench, title, replace(w, fp8=fp8), profiled=sequences == 1 and fp8 in ("none", "tensorwise"))
            rate = next((row.get("tokens/s") for row in reversed(bench.rows) if row["name"] == title), None)
            in_bf16 = rate if fp8 == "none" else in_bf16
            if rate and in_bf16 and fp8 != "none":
                bench.row(f"{title} over bf16", ratio=rate / in_bf16)


def compiled(bench: Bench) -> None:
    """Compiled blocks beside the fused kernels."""
    for title, w in (("GPT-2", GPT2), ("Llama", LLAMA)):
        step_of(bench, f"{title}, compiled blocks", of_model(bench, w), profiled=True, compiled=not bench.tiny)


def beside_plain(bench: Bench) -> None:
    """A compiled loop of plain torch and ours, in turn; a ratio is taken within a pair. Llama also with the largest
    micro-batch that fits, where fewer updates stand beside as many products."""
    models = ("GPT-2", of_model(bench, GPT2), 2), ("Llama", of_model(bench, LLAMA), 1)
    largest = "Llama, micro-batch 16", of_model(bench, LLAMA, 16), 1
    for title, w, rounds in (*models, largest):
        for number in range(1, rounds + 1):
            if bench.cuda:
                torch.set_float32_matmul_precision("high")

            def yardstick(w: Workload = w) -> Row:
                return timed(bench, w, plain.plain(w, not bench.tiny, bench.device))

            model_row(bench, f"{title}, plain torch, compiled, {number}", yardstick)
            step_of(bench, f"{title}, ours, {number}", w, profiled=False)
            theirs, mine = (row.get("tokens/s") for row in bench.rows[-2:])
            if theirs and mine:
                bench.row(f"{title}, ours over plain, {number}", ratio=mine / theirs)
