"""adaLN's operators, whose backward passes are written out, against what autograd makes of their formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_ds.kernels.cpu.compiled_modulation import CompiledModulation
from megatron_ds.layers.modulation import modulated_norm, scaled_add

COMPILES = pytest.mark.skipif(" " in torch.__file__, reason="torch's compiler takes no path with a space")


def norm_by_formula(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift


@pytest.mark.parametrize(
    ("dtype", "graphs"),
    [(torch.float64, None), (torch.float32, None), (torch.float64, CompiledModulation(compiled=False))],
    ids=["float64", "float32", "float64 by graphs"],
)
@pytest.mark.parametrize("operator", ["norm", "norm of a sum", "gate"])
def test_values_and_gradients_are_those_of_the_formula(
    operator: str, dtype: torch.dtype, graphs: CompiledModulation | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    stream, row = (5, 3, 24), (3, 24)
    shapes = {
        "norm": [stream, row, row],
        "norm of a sum": [stream, row, row, stream, row],
        "gate": [stream, stream, row],
    }
    inputs = [torch.randn(shape, generator=generator, dtype=dtype, requires_grad=True) for shape in shapes[operator]]
    wide = [tensor.double() for tensor in inputs]

    def compute() -> tuple[Tensor, ...]:
        own = graphs if graphs is not None and graphs.takes(inputs[0]) else None
        if operator == "gate":
            return (scaled_add(*inputs, operators=own),)
        x, shift, scale, *sums = inputs
        return modulated_norm(x, shift, scale, 1e-6, *sums, operators=own)

    if operator == "gate":
        expected: tuple[Tensor, ...] = (wide[0] + wide[1] * wide[2],)
    else:
        summed = wide[0] + wide[3] * wide[4] if len(wide) > 3 else wide[0]
        expected = norm_by_formula(summed, *wide[1:3]), summed
    found = compute()
    weights = [torch.randn(stream, generator=generator, dtype=dtype) for _ in found]
    tolerance = {"rtol": 0, "atol": 1e-12 if dtype == torch.float64 else 2e-5}
    with torch.no_grad():
        again = compute()
    for own, other, without in zip(found, expected, again, strict=True):
        torch.testing.assert_close(own.double(), other, **tolerance)
        torch.testing.assert_close(without, own, rtol=0, atol=1e-14 if graphs is not None else 0)
    for used in ([0], [1], [0, 1])[: 2 ** len(found) - 1]:  # the norm, the stream, both
        gradients = [
            torch.autograd.grad(
                [of[i] for i in used], inputs, [weights[i].to(of[i].dtype) for i in used],
                retain_graph=True, allow_unused=True, materialize_grads=True,
            )
            for of in (found, expected)
        ]  # fmt: skip
        for own, other in zip(*gradients):
            torch.testing.assert_close(own, other.to(dtype), **tolerance)


@pytest.mark.parametrize(
    ("branch", "compiled"),
    [(False, False), (True, False), pytest.param(True, True, marks=COMPILES)],
    ids=["norm", "norm of a sum", "compiled"],
)
def test_a_stream_in_half_precision_takes_modulation_in_fp32(branch: bool, compiled: bool) -> None:
    """The norm comes out in fp32, as autograd's own operators have it; every gradient in its input's dtype."""
    generator = torch.Generator().manual_seed(0)
    stream, row = (5, 3, 24), (3, 24)
    shapes = [stream, row, row, *([stream, row] if branch else [])]
    wide = [torch.randn(shape, generator=generator).bfloat16().float().requires_grad_() for shape in shapes]
    inputs = [tensor.detach().to(torch.bfloat16 if len(tensor.shape) == 3 else torch.float32) for tensor in wide]
    x, shift, scale, *sums = (tensor.requires_grad_() for tensor in inputs)
    found = modulated_norm(x, shift, scale, 1e-6, *sums, operators=CompiledModulation() if compiled else None)
    summed = wide[0] + wide[3] * wide[4] if branch else wide[0]
    expected = norm_by_formula(summed, wide[1], wide[2]), summed
    assert found[0].dtype == torch.float32
    weights = [torch.randn(stream, generator=generator) for _ in found]
    gradients = torch.autograd.grad(found, inputs, [w.to(out.dtype) for w, out in zip(weights, found)])
    assert [gradient.dtype for gradient in gradients] == [tensor.dtype for tensor in inputs]
    for own, other in zip([*found, *gradients], [*expected, *torch.autograd.grad(expected, wide, weights)]):
        assert (own.float() - other).norm() < 0.01 * other.norm()


@pytest.mark.parametrize("operator", ["norm", "gate"])
def test_gradients_over_tokens_are_made_of_the_columns_asked_for(operator: str) -> None:
    generator = torch.Generator().manual_seed(0)
    stream, row, columns = (5, 3, 24), (3, 24), slice(6, 18)
    shapes = [stream, row, row, stream, row] if operator == "norm" else [stream, stream, row]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    weight = torch.randn(stream, generator=generator, dtype=torch.float64)

    def gradients(*of: slice) -> tuple[Tensor, ...]:
        if operator == "gate":
            return torch.autograd.grad(scaled_add(*inputs, *of), inputs, weight)
        x, shift, scale, *sums = inputs
        return torch.autograd.grad(modulated_norm(x, shift, scale, 1e-6, *sums, *of)[0], inputs, weight)

    for own, whole in zip(gradients(columns), gradients(), strict=True):
        if own.dim() == 2:
            assert not own[:, :6].any() and not own[:, 18:].any()
            own, whole = own[:, columns], whole[:, columns]
        torch.testing.assert_close(own, whole, rtol=0, atol=1e-13)


def test_graphs_are_made_for_few_shapes_and_for_training_alone() -> None:
    graphs = CompiledModulation(compiled=False)
    streams = [torch.zeros(length, 1, 2) for length in range(1, 10)]
    with torch.no_grad():
        assert not graphs.takes(streams[8])
    assert [graphs.takes(stream) for stream in streams] == [True] * 8 + [False]
    assert graphs.takes(streams[0])
