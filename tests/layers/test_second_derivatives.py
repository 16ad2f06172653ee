"""Gradients of gradients through functions with a backward of their own: refused, never wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ds import comm
from megatron_ds.kernels import block_patterns
from megatron_ds.kernels.block_attention import block_attention
from megatron_ds.kernels.norm import layer_norm
from megatron_ds.kernels.sparse_attention import sparse_attention
from megatron_ds.layers.embedding import lookup
from megatron_ds.layers.linear import ColumnParallelLinear, RowParallelLinear
from megatron_ds.layers.loss import cross_entropy, linear_cross_entropy
from megatron_ds.mesh import Axis

S, H = 6, 8
ALONE = Axis("tp")
WHERE: dict[str, Any] = {"bias": True, "tp": ALONE, "sequence_parallel": False, "init_std": 1.0}


def linear(kind: type[ColumnParallelLinear] | type[RowParallelLinear]) -> Callable[[Tensor], Tensor]:
    if kind is ColumnParallelLinear:
        layer: torch.nn.Module = ColumnParallelLinear("l", H, (H,), shard_dim=0, **WHERE)
    else:
        layer = RowParallelLinear("l", H, H, **WHERE)
    torch.nn.init.ones_(layer.weight)  # type: ignore[arg-type]
    torch.nn.init.ones_(layer.bias)  # type: ignore[arg-type]
    return layer


def heads(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return x.view(S, 1, 2, 4).permute(dims)


LABELS, MASK = torch.zeros(S, 1, dtype=torch.int64), torch.ones(S, 1, dtype=torch.bool)
LAYOUT = block_patterns.dense(S, 16, 2)
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "column linear": linear(ColumnParallelLinear),
    "row linear": linear(RowParallelLinear),
    "lookup": lambda x: lookup(torch.zeros(3, dtype=torch.int64), x.view(S, H)),
    "block attention": lambda x: block_attention(*[heads(x, (0, 1, 2, 3))] * 3, causal=True),
    "sparse attention": lambda x: sparse_attention(*[heads(x, (1, 2, 0, 3))] * 3, LAYOUT),
    "linear cross entropy": lambda x: linear_cross_entropy(
        x, torch.eye(H).requires_grad_(), LABELS, MASK, vocab_size=H, tp=ALONE
    ),
    "cross entropy": lambda x: cross_entropy(x.clone(), LABELS, MASK, vocab_size=H, tp=ALONE),
    "layer norm in half precision": lambda x: layer_norm(x.bfloat16(), torch.ones(H).bfloat16(), None, 1e-5),
    **{
        name: lambda x, function=function: function.apply(x, ALONE)
        for name, function in vars(comm).items()
        if isinstance(function, type) and issubclass(function, torch.autograd.Function)
    },
}


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_refused(name: str, squared: bool) -> None:
    """Also where the function is the last one: then no incoming gradient requires gradients itself."""
    x = torch.linspace(0.1, 1.0, S * H).view(S, 1, H).requires_grad_()
    out = FUNCTIONS[name](x * x)
    loss = out.square().sum() if squared else out.sum()
    with pytest.raises(RuntimeError, match=r"create_graph=True, but \w+ has no second derivative.*torch's own modules"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_torch_compile_goes_through() -> None:
    x, w, b = (torch.randn(*shape, H).bfloat16().requires_grad_() for shape in ((S,), (), ()))

    def function(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return layer_norm(2 * x, w, b, 1e-5)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for got, want in zip(*(torch.autograd.grad(f(x, w, b).sum(), (x, w, b)) for f in (compiled, function))):
        assert torch.equal(got, want)
