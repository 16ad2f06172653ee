"""adaLN's operators, whose backward passes are written out, against what autograd makes of their formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_ds.layers.modulation import modulated_norm, scaled_add


def norm_by_formula(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("operator", ["norm", "gate"])
def test_values_and_gradients_are_those_of_the_formula(operator: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 3, 24), (3, 24), (3, 24)] if operator == "norm" else [(5, 3, 24), (5, 3, 24), (3, 24)]
    inputs = [torch.randn(shape, generator=generator, dtype=dtype, requires_grad=True) for shape in shapes]
    weight = torch.randn(5, 3, 24, generator=generator, dtype=dtype)
    if operator == "norm":
        found = modulated_norm(*inputs, 1e-6)
        expected = norm_by_formula(*(tensor.double() for tensor in inputs))
    else:
        found, expected = scaled_add(*inputs), inputs[0].double() + inputs[1].double() * inputs[2].double()
    tolerance = {"rtol": 0, "atol": 1e-12 if dtype == torch.float64 else 2e-5}
    torch.testing.assert_close(found.double(), expected, **tolerance)
    with torch.no_grad():
        again = modulated_norm(*inputs, 1e-6) if operator == "norm" else scaled_add(*inputs)
    assert again.equal(found)
    gradients = torch.autograd.grad(found, inputs, weight)
    for own, other in zip(gradients, torch.autograd.grad(expected, inputs, weight.double())):
        torch.testing.assert_close(own, other.to(dtype), **tolerance)
