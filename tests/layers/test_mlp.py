"""The MLP's activations, compiled and not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ds.layers.mlp import MLP
from megatron_ds.mesh import Axis
from megatron_ds.rng import initialize_parameters


def mlp_of(activation: str, dtype: torch.dtype) -> MLP:
    mlp = MLP(
        "mlp",
        16,
        64,
        activation,
        bias=True,
        tp=Axis("tp"),
        sequence_parallel=False,
        stds=(1.0, 1.0),
        dtype=dtype,
    )
    initialize_parameters(mlp.parameters(), 1)
    return mlp


@pytest.mark.parametrize(("activation", "act"), [("swiglu", F.silu), ("geglu", F.gelu)])
def test_gated_activations_from_their_definition(activation: str, act: Callable[[Tensor], Tensor]) -> None:
    mlp, x = mlp_of(activation, torch.float64), torch.randn(6, 2, 16, dtype=torch.float64)
    gate, up = mlp.gate_up.weight
    want = F.linear(act(F.linear(x, gate)) * F.linear(x, up), mlp.down.weight)
    torch.testing.assert_close(mlp(x), want, rtol=1e-13, atol=1e-12)


@pytest.mark.skipif(" " in torch.__file__, reason="torch's compiler takes no path with a space")
@pytest.mark.parametrize(("activation", "dtype"), [("gelu_tanh", torch.float64), ("swiglu", torch.float32)])
def test_a_compiled_activation_is_the_same_function(activation: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    mlp = mlp_of(activation, dtype)
    x = torch.randn(6, 2, 16, dtype=dtype, requires_grad=True)
    outputs, gradients = [], []
    for compiled in (False, True):
        if compiled:
            mlp.compile_activation()
        y = mlp(x)
        outputs.append(y.detach())
        gradients.append(torch.autograd.grad(y.square().sum(), [x, *mlp.parameters()]))
    bound = 1e-5 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(outputs[1], outputs[0], rtol=bound, atol=bound * 100)
    for got, want in zip(gradients[1], gradients[0]):
        torch.testing.assert_close(got, want, rtol=bound, atol=bound * float(want.abs().max()))


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "swiglu", "geglu_tanh"])
def test_an_activation_that_is_computed_again(activation: str) -> None:
    """The same bits, and one tensor less that autograd keeps."""
    mlp = mlp_of(activation, torch.bfloat16)
    x = torch.randn(6, 2, 16, dtype=torch.bfloat16, requires_grad=True)
    kept: list[dict[int, int]] = []

    def keep(t: Tensor) -> Tensor:
        kept[-1][t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    results = []
    for mlp.recompute_activation in (False, True):
        kept.append({})
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = mlp(x)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), [x, *mlp.parameters()])])
    assert sum(kept[0].values()) - sum(kept[1].values()) == 2 * 6 * 2 * 64
    assert all(again.equal(once) for once, again in zip(*results, strict=True))
