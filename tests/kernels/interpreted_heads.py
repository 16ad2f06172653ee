"""Cases of the kernel that packs the gradients of queries, keys and values: of every layout that a gradient has."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from interpreted_inputs import normal, sliced, strided, table
from interpreter_worker import Canaries, close, compare
from torch import Tensor

from megatron_ds.kernels import registry
from megatron_ds.kernels.heads import split_heads
from megatron_ds.zero.main_grad import MainGradient

HEADS: dict[str, Callable[[], None]] = {}


def split(qkv: Tensor, bias: Tensor | None, cos: Tensor | None, sin: Tensor | None, **options: Any) -> Any:
    return split_heads(qkv, table=None if cos is None or sin is None else (cos, sin), bias=bias, **options)


def heads_case(
    dtype: torch.dtype, dim: int, turned: int, groups: int, queries: int, bias: bool, interleaved: bool, rows: int = 2
) -> None:
    """Outputs and gradients against views of plain torch and their own gradients."""
    columns = groups * (queries + 2) * dim
    tables = table(3, rows, turned, dtype) if turned else (None, None)
    given = normal(3, 2, columns, dtype=dtype), normal(columns, dtype=dtype) if bias else None, *tables
    compare(partial(split, groups=groups, head_dim=dim, interleaved=interleaved), given, no_gradient=(2, 3))


# Rotated dims of a head: none, some, all; a key/value head each, several queries of one, one of several.
for dtype, bias in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, True)):
    for name, dim, turned in (("no rotary", 6, 0), ("partial", 10, 6), ("whole", 8, 8)):
        HEADS[f"heads {name} {dtype} bias={bias}"] = partial(heads_case, dtype, dim, turned, 2, 3, bias, False)
HEADS["heads interleaved"] = partial(heads_case, torch.float32, 8, 8, 3, 1, True, True)
HEADS["heads interleaved partial"] = partial(heads_case, torch.float16, 9, 4, 1, 5, True, True, rows=1)
HEADS["heads more than a program's"] = partial(heads_case, torch.float32, 2, 2, 17, 2, True, False)
HEADS["heads alone"] = partial(heads_case, torch.float32, 5, 2, 1, 1, True, False)


def packed(lay: Callable[..., Tensor], interleaved: bool, length: int = 5) -> None:
    """Strided gradients, tables with a row a sample, and sums that several programs make, added to what is there."""
    from megatron_ds.kernels.triton.rotary import pack_heads

    canaries, (groups, queries, dim, turned) = Canaries(), (2, 3, 6, 4)
    shape = (length, 2, groups * queries, dim), (length, 2, groups, dim), (length, 2, groups, dim)
    grads = [canaries.around(lay(*each)) for each in shape]
    tables = [canaries.around(t) for t in table(length + 1, 2, turned, torch.float32)]
    columns = groups * (queries + 2) * dim
    total = canaries.around(normal(columns))
    qkv = torch.zeros(length, 2, columns, dtype=torch.float64, requires_grad=True)
    outputs = split_heads(qkv, groups, dim, (tables[0].double(), tables[1].double()), interleaved=interleaved)
    (want,) = torch.autograd.grad(outputs, qkv, [grad.double() for grad in grads])
    sums = total.double() + want.sum((0, 1))
    with canaries.around_allocations():
        got = pack_heads(*grads, *tables, [total], [True], interleaved)
    canaries.check()
    assert got.shape == want.shape
    if length:
        close("packed", got, want, 3e-6)
    close("sums", total, sums, 3e-6)


for name, lay in {"strided": strided, "sliced": sliced}.items():
    HEADS[f"heads packed {name}"] = partial(packed, lay, False)
    HEADS[f"heads packed {name} interleaved"] = partial(packed, lay, True)
HEADS["heads packed of no token"] = partial(packed, normal, False, 0)
HEADS["heads packed of many tokens"] = partial(packed, normal, False, 33)


def main_gradient() -> None:
    """The bias's sums go into its main gradient, which they replace and then add to."""
    bias, main = normal(24).requires_grad_(), MainGradient("bias", lambda main: None, lambda main: None)
    main.view = torch.full((24,), torch.nan)
    bias.main_grad = main
    qkv = normal(3, 2, 24).requires_grad_()
    with registry.use("triton"):
        for _ in range(2):
            q, k, v = split_heads(qkv, 2, 4, bias=bias)
            (q.sum() + k.square().sum() + v.sum()).backward()
    assert bias.grad is None and qkv.grad is not None
    close("main gradient", main.view, qkv.grad.double().sum((0, 1)), 3e-6)


HEADS["heads main gradient"] = main_gradient
