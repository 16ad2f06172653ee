"""Every kernel compiled for an H100 as a launch there would: no spills, shared memory, 128-bit loads and stores.

`make test-hopper TRITON=3.6.0` does the same with another Triton than the one of the tests: that of torch 2.11, which
was on the H200.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable
from importlib.metadata import version
from unittest.mock import patch

import pytest
import torch
from interpreter_worker import NO_TRITON
from torch import Tensor

from megatron_ds.kernels.adaln import MOST_BYTES

pytestmark = pytest.mark.skipif(bool(NO_TRITON), reason=NO_TRITON)

HALF, SINGLE = torch.bfloat16, torch.float32
# A load of a kernel that walks over rows goes into shared memory: LDGSTS.
LOAD, WIDE_LOAD = r"LDG(STS)?\.E", r"LDG(STS)?\.E\S*\.128"
STORE, WIDE_STORE = r"STG\.E", r"STG\.E\S*\.128"
# Loads and stores that may be narrow: one value a row or token (statistics, keys, labels), tables, partial sums. All of
# the data must be wide. Where a loop runs ahead of itself, each of its loads stands in the code three times.
NARROW = {
    "norm_kernel": (12, 2),
    "norm_backward_kernel": (9, 3),
    "modulated_norm_kernel": (0, 2),
    "modulated_norm_backward_kernel": (6, 0),
    "partial_sums_kernel": (1, 1),
    "bias_gelu_sums_kernel": (0, 1),
    "norm_backward_parts_kernel": (5, 0),
    "norm_tiled_kernel": (1, 2),
    "norm_backward_tiled_kernel": (3, 0),
    "norm_weight_kernel": (4, 2),
    "dropout_add_kernel": (1, 0),
    "softmax_kernel": (1, 0),
    "softmax_causal_kernel": (1, 0),
    "token_statistics_kernel": (2, 4),
    "logit_gradient_kernel": (4, 0),
    "token_losses_kernel": (4, 1),
    "rotary_kernel": (2, 0),
    "pack_heads_kernel": (4, 0),
    "square_sum_kernel": (16, 1),  # the rest
    "attend_kernel": (6, 1),  # the table's numbers
    "join_kernel": (20, 1),
    "adamw_kernel": (1, 0),
    "add_rows_kernel": (6, 2),  # indices, and the table, of which a thread takes one column
    "add_parts_kernel": (6, 1),
}
# With Triton 3.6 numbers of the table come into each layout that uses them, past shared memory.
NARROW_BEFORE_3_7 = {"attend_kernel": (27, 1)}
# Walk over rows or tiles, of which the next ones are under way into shared memory while one is computed. All programs
# are on an SM at once: were one to wait until another ends, the last ones would run alone.
AHEAD = {
    "norm_kernel", "norm_backward_kernel", "modulated_norm_backward_kernel", "scaled_add_backward_kernel",
    "bias_gelu_sums_kernel", "token_losses_kernel", "square_sum_kernel",
}  # fmt: skip
# The last, masked tile of a vocabulary that is no multiple of 16 is narrow, and only that.
RAGGED_TILE = 32


MANY = 2**32  # elements of a tensor of activations: their places need 64 bits


def meta(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.empty(shape, device="meta", dtype=dtype)


def norm(columns: int, dtype: torch.dtype, rms: bool, fused: bool = False, sums: bool = False) -> None:
    from megatron_ds.kernels.triton import norm

    rows = MANY // columns // 16 * 16
    x = meta(rows, columns, dtype=dtype)
    w = meta(columns, dtype=dtype)
    also, keys = (x, meta(rows, dtype=torch.int32)) if fused else (None, None)
    mean, rstd = meta(0 if rms else rows, dtype=SINGLE), meta(rows, dtype=SINGLE)
    norm.norm(x, also, keys, w, None if rms else w, 1e-5, 0.1, 200, rms)
    if sums:  # a seam without dropout, whose layer before has a bias
        also, keys = x, None
    totals = [meta(columns, dtype=SINGLE) for _ in range(1 + (not rms) + sums)]
    norm.norm_backward(x, also, x, keys, w, mean, rstd, totals, [True] * len(totals), 0.1, 200, rms, not rms)


def activations(features: int, activation: str) -> None:
    from megatron_ds.kernels.triton import activation as module

    rows = MANY // features // 16 * 16
    x, both = meta(rows, features), meta(rows, 2 * features)
    if activation == "bias_gelu":
        module.bias_gelu(x, meta(features), "tanh")
        for totals in ([], [meta(features, dtype=SINGLE)]):
            bias = None if totals else meta(features)
            module.bias_gelu_backward(x, x, bias, totals, [True], "tanh")
    else:
        module.gated(both, activation)
        module.gated_backward(x, both, activation)


def modulation(columns: int, dtype: torch.dtype) -> None:
    """A norm of a residual sum, and what is added behind it, of 32 samples: shifts, scales and gates of one layer."""
    from megatron_ds.kernels.triton import adaln as module

    tokens = MANY // columns // 32
    x, (shift, scale, gate) = meta(tokens, 32, columns, dtype=dtype), meta(32, 3, columns, dtype=dtype).unbind(1)
    statistics = [meta(tokens * 32, dtype=SINGLE)] * 2
    module.modulated_norm(x, shift, scale, x, gate, 1e-6)
    module.modulated_norm_backward(x, x, x, *statistics, scale, x, gate)
    module.scaled_add_backward(x, x, scale)


def dropout(features: int) -> None:
    from megatron_ds.kernels.triton.dropout import dropout_add

    x = meta(4096, MANY // 4096 // features, features)
    dropout_add(x, x, meta(*x.shape[:2], dtype=torch.int32), 0.1, 200)


def softmax(keys: int, masked: bool) -> None:
    from megatron_ds.kernels.triton import softmax

    batch = MANY // 16 // keys**2
    x = meta(batch, 16, keys, keys)
    mask = meta(batch, 1, 1, keys, dtype=torch.bool).expand(x.shape) if masked else None
    softmax.softmax(x, mask, meta(16, dtype=SINGLE) if masked else None, 0.125, not masked)
    softmax.softmax_backward(x, x, 0.125, not masked)


def cross_entropy(columns: int, stride: int, dtype: torch.dtype) -> None:
    from megatron_ds.kernels.triton import cross_entropy

    tokens = MANY // stride // 16 * 16
    logits, target = meta(tokens, stride, dtype=dtype)[:, :columns], meta(tokens, dtype=torch.int64)
    cross_entropy.token_statistics(logits, target, True)
    mask = meta(tokens, dtype=torch.bool)
    seed = meta(1, dtype=torch.float64)
    cross_entropy.logit_gradient_(logits, meta(tokens, dtype=SINGLE), target, mask, seed, 0.1, 1e-4, columns)
    cross_entropy.token_losses_(logits, target, mask, meta(1, dtype=torch.float64), 0.1, 1e-4, columns)


def rotary() -> None:
    from megatron_ds.kernels.triton import rotary

    q, k, cos = meta(4096, 256, 32, 128), meta(4096, 256, 8, 6, 128)[:, :, :, -2], meta(4096, 1, 1, 128)
    rotary.rotary(q, k, cos, cos, True, 0, False)


def heads(groups: int, queries: int, dim: int, turned: int, bias: bool, batch: int = 2) -> None:
    from megatron_ds.kernels.triton import rotary

    length = 2 * MANY // batch // (groups * (queries + 2) * dim)
    packed = meta(length, batch, groups, queries + 2, dim)
    tables = [meta(length, 1, 1, turned)] * 2 if turned else [None, None]
    totals = [meta(packed[0, 0].numel(), dtype=SINGLE)] if bias else []
    if turned:
        rotary.rotary(packed[..., :-2, :], packed[..., -2, :], *tables, False, 0, False)
    # As attention gives them: ``[b, n, s, d]`` in memory.
    q, k = (meta(batch, heads, length, dim).permute(2, 0, 1, 3) for heads in (groups * queries, groups))
    rotary.pack_heads(q, k, k, *tables, totals, [True], False)


def add_rows(columns: int) -> None:
    from megatron_ds.kernels.triton.add_rows import add_rows_

    places = meta(MANY // columns, dtype=torch.int64)
    add_rows_(meta(50304, columns, dtype=SINGLE), meta(len(places), columns), places, places)


def square_sum(count: int) -> None:
    from megatron_ds.kernels.triton import square_sum as module

    module.square_sum(meta(count, dtype=SINGLE))


def adamw(count: int, low: torch.dtype | None) -> None:
    from megatron_ds.kernels.triton.adamw import adamw_

    x = meta(count, dtype=SINGLE)
    half = None if low is None else meta(count, dtype=low)
    adamw_(x, x, x, x, half, meta(1, dtype=SINGLE), 1e-4, 0.9, 0.95, 1e-8, 0.1, 3)


def paged_attention(heads: int, groups: int, head_dim: int) -> None:
    """A step with prompts and decoding over a cache of 2^31 elements and more."""
    from megatron_ds.kernels.paged_attention import PagedKV, PagedTexts
    from megatron_ds.kernels.triton import paged_attention as module

    slots = 1 << 22
    pages = PagedKV(meta(slots, groups, head_dim))
    texts = PagedTexts(meta(64, 256, dtype=torch.int32), meta(64, 3, dtype=torch.int32), 32, 2048, True)
    q = meta(4096, heads, head_dim)
    module.attend(q, pages, pages, texts, None, None, None, torch.empty_like(q))


# Shapes of models that people train: Llama 8B and 70B, GPT-3, BLOOM, QK-norm of heads of 128, a 16k hidden size.
LAUNCHES: dict[str, Callable[[], None]] = {
    "rms_norm 4096": lambda: norm(4096, HALF, rms=True),
    "layer_norm 8192 residual dropout": lambda: norm(8192, HALF, rms=False, fused=True),
    "layer_norm 8192 fp32": lambda: norm(8192, SINGLE, rms=False),
    "layer_norm 16384": lambda: norm(16384, HALF, rms=False),
    "layer_norm 14336 residual dropout": lambda: norm(14336, HALF, rms=False, fused=True),
    "layer_norm 4096 residual dropout": lambda: norm(4096, HALF, rms=False, fused=True),
    "rms_norm 16384 fp32": lambda: norm(16384, SINGLE, rms=True),
    "layer_norm 20480 residual dropout": lambda: norm(20480, HALF, rms=False, fused=True),
    "rms_norm 128": lambda: norm(128, HALF, rms=True),
    "layer_norm 128 seam": lambda: norm(128, HALF, rms=False, sums=True),
    "layer_norm 512 seam": lambda: norm(512, HALF, rms=False, sums=True),
    "layer_norm 2048 residual dropout": lambda: norm(2048, HALF, rms=False, fused=True),
    "layer_norm 768 seam": lambda: norm(768, HALF, rms=False, sums=True),
    "rms_norm 4096 seam": lambda: norm(4096, HALF, rms=True, sums=True),
    "rms_norm 2048 seam": lambda: norm(2048, HALF, rms=True, sums=True),
    "adaLN 1152": lambda: modulation(1152, HALF),
    "adaLN of the widest rows": lambda: modulation(MOST_BYTES // 2, HALF),
    "adaLN of the widest rows in fp32": lambda: modulation(MOST_BYTES // 4, SINGLE),
    "adaLN 3072 fp32": lambda: modulation(3072, SINGLE),
    "swiglu 14336": lambda: activations(14336, "silu"),
    "bias_gelu 12288": lambda: activations(12288, "bias_gelu"),
    "dropout_add 4096": lambda: dropout(4096),
    "softmax 2048 causal": lambda: softmax(2048, masked=False),
    "softmax 8192 padding alibi": lambda: softmax(8192, masked=True),
    "cross entropy 128256": lambda: cross_entropy(128256, 128256, HALF),
    # A vocabulary that is no multiple of 16 in a table padded to one: the whole tiles load wide all the same.
    "cross entropy 50257 of 50304": lambda: cross_entropy(50257, 50304, HALF),
    "cross entropy 50257 fp32": lambda: cross_entropy(50257, 50304, SINGLE),
    "square sum beyond 2^31": lambda: square_sum(2**31 + 1024),
    "rotary 128 interleaved": rotary,
    "heads of Llama 70B": lambda: heads(8, 8, 128, 128, bias=False),
    "heads of GPT-2": lambda: heads(12, 1, 64, 0, bias=True, batch=64),
    "heads of GPT-NeoX": lambda: heads(64, 1, 96, 32, bias=True),
    "add_rows 768": lambda: add_rows(768),
    "paged attention, Llama 8B": lambda: paged_attention(32, 8, 128),
    "adamw": lambda: adamw(1 << 20, None),
    "adamw in half precision": lambda: adamw(1 << 20, HALF),
    "adamw beyond 2^31": lambda: adamw(MANY, HALF),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_compiled_for_hopper(name: str) -> None:
    from hopper import PROCESSORS, SHARED_LIMIT, captured

    older = tuple(map(int, version("triton").split(".")[:2])) < (3, 7)
    narrow = {**NARROW, **(NARROW_BEFORE_3_7 if older else {})}
    with captured() as kernels:
        LAUNCHES[name]()
    assert kernels
    for kernel in kernels:
        what = f"{kernel.name} of {name}: {kernel.registers} registers, {kernel.warps} warps"
        assert not kernel.overflows, f"{what}: {kernel.overflows}"
        assert kernel.spills == 0, f"{what}: {kernel.stack} bytes of stack"
        assert kernel.shared <= SHARED_LIMIT, f"{what}: {kernel.shared} bytes of shared memory"
        # A block that does not fit on an SM would fail at launch.
        assert kernel.registers * kernel.warps * 32 <= 65536, what
        assert kernel.name not in AHEAD or kernel.count("LDGSTS"), f"{what}: nothing is loaded ahead"
        if kernel.name in AHEAD or (kernel.name == "pack_heads_kernel" and kernel.count("LDGSTS")):
            programs = -(-math.prod(kernel.grid) // PROCESSORS)
            assert programs <= kernel.resident, f"{what}: {programs} programs an SM, which holds {kernel.resident}"
        loads, stores = narrow.get(kernel.name, (0, 0))
        if "50257" in name:
            loads, stores = loads + RAGGED_TILE, stores + RAGGED_TILE
        counts = [kernel.count(pattern) for pattern in (WIDE_LOAD, LOAD, WIDE_STORE, STORE)]
        assert counts[0] > 0 and counts[1] - counts[0] <= loads, f"{what}: {counts[0]} wide of {counts[1]} loads"
        assert counts[3] - counts[2] <= stores, f"{what}: {counts[2]} wide of {counts[3]} stores"


def test_a_norms_backward_pass_is_one_kernel_and_one_that_finishes() -> None:
    """The gradients of weight, bias and the bias before it included."""
    from hopper import captured

    with captured() as kernels:
        LAUNCHES["layer_norm 768 seam"]()
    assert [kernel.name for kernel in kernels] == ["norm_kernel", "norm_backward_kernel", "partial_sums_kernel"]


def test_every_kernel_is_compiled() -> None:
    """But for those of FP8 and of sparse attention, which have files of their own."""
    import hopper
    from triton.runtime.jit import JITFunction

    from megatron_ds.kernels import triton as folder

    elsewhere = {"float8", "sparse_attention", "specialized_attention"}
    modules = [f"{folder.__name__}.{m.name}" for m in pkgutil.iter_modules(folder.__path__) if m.name not in elsewhere]
    values = [value for module in modules for value in vars(importlib.import_module(module)).values()]
    known = {v.__name__ for v in values if isinstance(v, JITFunction) and v.__name__.endswith("_kernel")}
    with patch.object(hopper, "read", lambda name, *_: name), hopper.captured() as names:
        for launch in LAUNCHES.values():
            launch()
    assert known == set(names)


@pytest.mark.parametrize(("columns", "rows"), [(64, 32), (128, 16), (1024, 2), (2048, 1)])
def test_a_program_of_a_norm_takes_several_short_rows(columns: int, rows: int) -> None:
    """Such as those of QK-norm, one a head: enough of them that each thread loads 16 bytes."""
    from megatron_ds.kernels.triton.norm import tile_of
    from megatron_ds.kernels.triton.norm_backward import whole_row_tile

    _, forward, warps = tile_of(columns, 2048)
    backward = whole_row_tile(columns, HALF.itemsize, False)
    assert forward == rows and forward * columns >= 8 * 32 * warps
    assert backward["ROWS"] * columns >= 8 * 32 * backward["num_warps"]
    assert columns > 512 or backward["ROWS"] == rows
