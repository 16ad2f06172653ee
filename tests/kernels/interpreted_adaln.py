"""Cases of adaLN's kernels: streams and vectors of any layout, whose gradients are sums over the tokens of a sample."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from interpreted_inputs import LAYOUTS
from interpreter_worker import compare
from torch import Tensor

from megatron_ds.layers.modulation import modulated_norm, scaled_add

ADALN: dict[str, Callable[[], None]] = {}
TOKENS, SAMPLES = 5, 3


def norm(
    x: Tensor, vectors: Tensor, branch: Tensor | None = None, *, norm_alone: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    shift, scale, gate = vectors.unbind(1)
    both = modulated_norm(x, shift, scale, 1e-6, branch, None if branch is None else gate)
    return both[0] if norm_alone else both


def gated(x: Tensor, y: Tensor, vectors: Tensor) -> Tensor:
    return scaled_add(x, y, vectors.unbind(1)[1])


def case(name: str, function: Callable[..., object], streams: int, columns: int, dtype: torch.dtype) -> None:
    for layout, make in LAYOUTS.items():
        if layout and dtype != torch.float32:
            continue

        def run(make: Callable[..., Tensor] = make) -> None:
            x, *others = (make(TOKENS, SAMPLES, columns, dtype=dtype) for _ in range(streams))
            vectors = make(SAMPLES, 3, columns, dtype=dtype)
            compare(function, [x, *others, vectors] if function is gated else [x, vectors, *others])

        ADALN[f"{name} {columns} {dtype}{layout}"] = run


for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for columns in (37, 1100)[: 1 + (dtype == torch.bfloat16)]:
        case("modulated norm", norm, 1, columns, dtype)
        case("modulated norm of a sum", norm, 2, columns, dtype)
        case("gated sum", gated, 2, columns, dtype)
case("modulated norm of a sum", norm, 2, 4100, torch.float16)  # a sample's vectors are loaded again for each token
case("modulated norm without the stream", partial(norm, norm_alone=True), 2, 37, torch.float32)
