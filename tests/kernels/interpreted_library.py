"""The operators as torch.library and torch.compile see them, under Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from interpreted_inputs import keys, normal, table
from interpreter_worker import close
from torch import Tensor

from megatron_ds.kernels import registry
from megatron_ds.kernels.activation import bias_gelu, gated
from megatron_ds.kernels.dropout import dropout_add
from megatron_ds.kernels.norm import add_norm, layer_norm, rms_norm
from megatron_ds.kernels.rotary import rotary
from megatron_ds.kernels.softmax import scaled_masked_softmax

LIBRARY: dict[str, Callable[[], None]] = {}


def op_check(name: str, *arguments: Any) -> None:
    operator = getattr(torch.ops.megatron_ds, name).default
    given = [
        a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() and "backward" not in name else a
        for a in arguments
    ]
    torch.library.opcheck(operator, tuple(given))


X, W, R, LONG = normal(3, 8), normal(8), torch.rand(3), torch.tensor([1, 2, 9])
OPERATORS: dict[str, tuple[Any, ...]] = {
    "norm": (X.clone(), X.clone(), keys(3), W.clone(), W.clone(), W.clone(), 1e-5, 0.2, False),
    "norm_backward": (X, X, X, keys(3), W, R, R, [W.clone() for _ in "wbx"], [True, False, True], 0.2, False, True),
    "dropout_add": (X.clone(), X.clone(), keys(3), 0.2),
    "gated": (X.clone(), "silu"),
    "gated_backward": (X[:, :4].contiguous(), X, "silu"),
    "bias_gelu": (X.clone(), W.clone(), "none", False),
    "bias_gelu_backward": (X, X, W, [W.clone()], [True], "none"),
    "softmax": (normal(1, 1, 3, 8), None, None, 0.5, True),
    "softmax_backward": (normal(1, 1, 3, 8), torch.rand(1, 1, 3, 8), 0.5, True),
    "rotary": (normal(3, 1, 2, 4), normal(3, 1, 1, 4), *table(3, 1, 4, torch.float32), False, 0, False),
}
for operator, arguments in OPERATORS.items():
    LIBRARY[f"opcheck {operator}"] = partial(op_check, operator, *arguments)


def op_check_statistics() -> None:
    torch.library.opcheck(torch.ops.megatron_ds.token_statistics.default, (X.detach().clone(), LONG, True))
    given = (X.detach().clone(), R, LONG, torch.ones(3, dtype=torch.bool), torch.tensor(0.5), 0.1, 0.0, 8)
    torch.library.opcheck(torch.ops.megatron_ds.logit_gradient_.default, given)
    given = (X.detach().clone(), LONG, torch.ones(3, dtype=torch.bool), torch.tensor(0.5), 0.1, 0.0, 8)
    torch.library.opcheck(torch.ops.megatron_ds.token_losses_.default, given)
    torch.library.opcheck(torch.ops.megatron_ds.square_sum.default, (R,))


LIBRARY["opcheck norm alone"] = partial(op_check, "norm", X.clone(), None, None, W.clone(), None, None, 1e-5, 0.0, True)
LIBRARY["opcheck cross entropy"] = op_check_statistics


def compiled() -> None:
    """One graph of every differentiable op, forward and backward, without a break."""

    def layer(x: Tensor, w: Tensor, row_keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y, x = add_norm(layer_norm(x, w, w, 1e-5), x, w, None, 1e-5, kind="rmsnorm", p=0.2, row_keys=row_keys)
        q, k = rotary(y.view(3, 1, 2, 4), x.view(3, 1, 2, 4), cos, sin)
        a = scaled_masked_softmax(torch.einsum("sbnd,tbnd->bnst", q, k), 0.5, causal=True)
        y = torch.einsum("bnst,tbnd->sbnd", a, k).reshape(3, 1, 8)
        y = dropout_add(bias_gelu(y, w), x, 0.1, row_keys)
        return gated(torch.cat((y, rms_norm(y, w, 1e-5)), dim=-1))

    x, w = normal(3, 1, 8).requires_grad_(), normal(8).requires_grad_()
    others = (keys(3, 1), *table(3, 1, 4, torch.float32))
    results = []
    for function in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        with registry.use("triton"):
            y = function(x, w, *others)
            results.append((y.detach(), *torch.autograd.grad(y.square().sum(), (x, w))))
    reference = layer(x, w, *others)
    for got, want in zip(results[1], results[0]):
        assert torch.equal(got, want)
    close("layer", results[0][0], reference.detach().double(), 1e-5)


LIBRARY["torch.compile"] = compiled


def compiled_code_follows_the_selection() -> None:
    calls = []

    def backend(graph: Any, inputs: Any) -> Any:
        calls.append(any("megatron_ds.gated" in str(node.target) for node in graph.graph.nodes))
        return graph

    function = torch.compile(lambda x: gated(x), backend=backend, fullgraph=True)
    x = normal(2, 8)
    function(x)
    with registry.use("triton"):
        function(x)
    assert calls == [False, True], calls


LIBRARY["torch.compile follows the selection"] = compiled_code_follows_the_selection
