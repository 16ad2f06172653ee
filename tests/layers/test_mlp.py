"""The MLP's activations, compiled and not."""

from __future__ import annotations

import pytest
import torch

from megatron_ds.layers.mlp import MLP
from megatron_ds.mesh import Axis
from megatron_ds.rng import initialize_parameters


@pytest.mark.parametrize(("activation", "dtype"), [("gelu_tanh", torch.float64), ("swiglu", torch.float32)])
def test_a_compiled_activation_is_the_same_function(activation: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    mlp = MLP(
        "mlp",
        16,
        64,
        activation,
        bias=True,
        tp=Axis("tp"),
        sequence_parallel=False,
        init_std=1.0,
        out_std=1.0,
        dtype=dtype,
    )
    initialize_parameters(mlp.parameters(), 1)
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
