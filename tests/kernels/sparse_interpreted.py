"""The Triton twin of block-sparse attention under Triton's interpreter, against the reference in float64.

Run as a program with TRITON_INTERPRET=1, because that must be set before the kernels are decorated; prints one line of
JSON: for each case the largest errors relative to the tolerance, and whether everything around the results was left.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

import torch
from interpreter_speed import speed_up
from interpreter_worker import Canaries, sum_products_in_float64
from torch import Tensor

from megatron_ds.kernels import block_patterns as patterns
from megatron_ds.kernels import registry
from megatron_ds.kernels.block_layout import BlockLayout, from_mask
from megatron_ds.kernels.sparse_attention import _flat, reference_backward, reference_forward, sparse_attention

GUARD = 64
NAMES = ("out", "lse", "dq", "dk", "dv")


def empty_rows(length: int, block: int, heads: int) -> BlockLayout:
    """Whole rows of blocks without keys, and single queries without keys inside partial blocks."""
    allowed = torch.zeros(heads, length, length, dtype=torch.bool)
    allowed[:, block + 3 :, : block + 5] = True
    allowed[1:, :5, 3:9] = True
    return from_mask(allowed, block)


def from_causal_columns(length: int, block: int, heads: int, columns: int) -> BlockLayout:
    """The first keys and a diagonal, of single tokens: each block has a mask, and the first columns are long."""
    query, key = torch.arange(length).view(-1, 1), torch.arange(length)
    return from_mask(((key < columns) & (key % 3 < query % 5) | (query == key)).expand(heads, -1, -1), block)


def windows(length: int, block: int, heads: int) -> BlockLayout:
    """Rows of one to three blocks, which begin where those above do."""
    query, key, width = torch.arange(length).view(-1, 1), torch.arange(length), 3 * block
    return from_mask(((key >= query // width * width) & (key <= query)).expand(heads, -1, -1), block)


@dataclass(frozen=True)
class Case:
    layout: Callable[..., BlockLayout]
    block: int = 16
    length: int = 48
    heads: int = 2
    groups: int = 1
    head_dim: int = 16
    dtype: str = "float32"
    batch: int = 2
    long: bool = False  # some columns are, and are cut into parts
    window: bool = False  # the kernels take it as one, by places and without masks
    specialized: bool = False  # the forward pass is that of specialised warps
    factor: float = 1.0  # of the queries: large logits overflow without the running maximum


CASES = {
    "sliding": Case(patterns.sliding_window, window=True),
    "sliding, odd length, half": Case(patterns.sliding_window, block=32, length=75, dtype="float16", window=True),
    "local windows, grouped": Case(windows, length=80, heads=4, groups=2, window=True),
    "half": Case(partial(patterns.bigbird, different_layout_per_head=True), dtype="float16"),
    "grouped": Case(partial(patterns.bigbird, different_layout_per_head=True, seed=2), heads=4, groups=2),
    "odd length": Case(patterns.fixed, length=37),
    "odd length both ways": Case(partial(patterns.bslongformer, causal=False), length=37, head_dim=24),
    "padded head dim": Case(patterns.variable, head_dim=20, dtype="float16"),
    "empty rows": Case(empty_rows, length=45),
    "shorter than a block": Case(patterns.dense, length=5, head_dim=8, window=True),
    "several tiles a block": Case(patterns.dense, block=64, length=128, heads=1, head_dim=64, window=True),
    "several tiles a block, half": Case(patterns.dense, block=128, length=200, heads=1, head_dim=64, dtype="float16"),
    "long columns": Case(patterns.bigbird, length=330, batch=1, long=True),
    "long columns, all of them partial": Case(partial(from_causal_columns, columns=20), length=320, batch=1, long=True),
    "specialised warps": Case(
        windows,
        block=128,
        length=512,
        heads=2,
        head_dim=64,
        dtype="float16",
        batch=1,
        window=True,
        specialized=True,
    ),
    "large logits": Case(patterns.sliding_window, factor=200.0, window=True),
}


def guarded(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A tensor of NaN inside a larger buffer of NaN, which is returned too."""
    count = torch.Size(shape).numel()
    buffer = torch.full((count + 2 * GUARD,), torch.nan, dtype=dtype)
    return buffer, buffer[GUARD : GUARD + count].view(shape)


def run(case: Case) -> dict[str, float]:
    """Error over tolerance of each result; infinite where a result has NaN or a guard was written."""
    from megatron_ds.kernels.triton import sparse_attention as twin

    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, case.dtype)
    layout = case.layout(case.length, case.block, case.heads)
    assert len(layout.long_columns) > 0 or not case.long
    assert layout.is_window or not case.window
    b, s, d = case.batch, case.length, case.head_dim

    def draw(heads: int, factor: float = 1.0) -> tuple[Tensor, Tensor]:
        """Inputs as a model has them: sequence first, side by side with others. NaN wherever they do not reach."""
        buffer, x = guarded((s, b, heads, 2 * d), dtype)
        x = x[..., :d].permute(1, 2, 0, 3)
        x.copy_(factor * torch.randn(b, heads, s, d, generator=generator))
        return buffer, x

    (_, q), (_, k), (_, v), (_, grad) = (
        draw(case.heads, case.factor),
        *(draw(heads) for heads in (case.groups, case.groups, case.heads)),
    )
    wide = [x.double() for x in (q, k, v, grad)]
    scale, flat = d**-0.5, _flat(layout)
    want = list(reference_forward(*wide[:3], flat, case.block, scale))
    want += reference_backward(wide[3], *wide[:3], *want, flat, case.block, scale)

    shapes = [(s, b, x.shape[1], d) for x in (q, q, k, v)]
    buffers = [guarded(shape, dtype) for shape in shapes]
    buffers.insert(1, guarded((b, case.heads, s), torch.float32))
    out, dq, dk, dv = (buffers[i][1].permute(1, 2, 0, 3) for i in (0, 2, 3, 4))
    lse = buffers[1][1]
    canaries = Canaries()
    flat = [canaries.around(x) for x in flat]
    with canaries.around_allocations():  # which also refuses loads from outside of the lists
        with patch.object(twin, "SPECIALIZED", case.specialized):
            assert not case.specialized or twin.specialized_attention.fits(q, k, v, case.block)
            twin.forward(q, k, v, flat, case.block, case.window, scale, out, lse)
        twin.backward(grad, q, k, v, out, lse, flat, case.block, case.window, scale, dq, dk, dv)
    canaries.check()
    tolerance = 2e-5 if case.dtype == "float32" else 4e-3
    result = {}
    for name, got, wanted, (buffer, _) in zip(NAMES, (out, lse, dq, dk, dv), want, buffers):
        scaled = (got.double() - wanted).abs() / (tolerance * wanted.abs().nan_to_num(posinf=1.0).amax().clamp(min=1.0))
        same = (got == wanted) | (scaled <= 1e30)  # both infinite, or both numbers
        scaled = torch.where(got == wanted, 0.0, scaled)
        model_guard = bool(buffer[:GUARD].isnan().all() and buffer[-GUARD:].isnan().all())
        result[name] = float(scaled.max()) if bool(same.all()) and model_guard else float("inf")
    return result


def run_public() -> dict[str, float]:
    """The op as users call it, with gradients by autograd, on the twin and on the reference."""
    layout = patterns.bigbird(40, 16, 4, different_layout_per_head=True)
    found = []
    for implementation in ("triton", "reference"):
        generator = torch.Generator().manual_seed(1)
        q, k, v = (torch.randn(2, heads, 40, 16, generator=generator).requires_grad_() for heads in (4, 2, 2))
        with registry.use({"sparse_attention": implementation}):
            out = sparse_attention(q, k, v, layout)
        found.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    return {name: float((a - b).abs().max() / 2e-5) for name, a, b in zip(("out", "dq", "dk", "dv"), *found)}


if __name__ == "__main__":
    speed_up()
    sum_products_in_float64()
    results = {name: run(CASES[name]) for name in sys.argv[1:] or CASES}
    if len(sys.argv) == 1:
        results["the public op"] = run_public()
    json.dump(results, sys.stdout)
