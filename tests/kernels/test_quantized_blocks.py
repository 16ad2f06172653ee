"""Numbers in 8 or 4 bits: exact on the grid, within half a step elsewhere, overflows seen, chance without bias."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from megatron_ds.kernels.quantized_blocks import BLOCK, LARGEST, pack, packed_bytes, unpack

FORMS = ["int8", "int4", "fp8"]


def through(x: torch.Tensor, form: str, **settings: bool) -> torch.Tensor:
    packed = pack(x, form, **settings)
    assert packed.dtype == torch.uint8 and packed.shape == (len(x), packed_bytes(x.shape[1], form, x.dtype))
    return unpack(packed, x.shape[1], form, x.dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_numbers_on_the_grid_come_back_bit_for_bit(form: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    most = int(LARGEST[form])
    x = torch.randint(-min(most, 15), min(most, 15) + 1, (3, 2 * BLOCK + 7)).double()
    x[:, ::BLOCK] = most  # of each block, the last one padded, the largest
    x[1] *= 0.25
    x[2] = 0.0
    x = x.to(dtype)
    for stochastic in (False, True):
        assert torch.equal(through(x, form, stochastic=stochastic), x)


@pytest.mark.parametrize("count", [1, BLOCK - 1, BLOCK, 5 * BLOCK + 3])
@pytest.mark.parametrize("form", FORMS)
def test_others_are_off_by_half_a_step_at_most(form: str, count: int) -> None:
    torch.manual_seed(count)
    x = torch.randn(2, count, dtype=torch.float64) * torch.logspace(-9, 9, count, dtype=torch.float64)
    found = through(x, form)
    for start in range(0, count, BLOCK):
        own, came = x[:, start : start + BLOCK], found[:, start : start + BLOCK]
        amax = own.abs().amax(1, keepdim=True)
        step = amax / LARGEST[form]
        bound = step * (1 + 1e-12) / 2 if form != "fp8" else torch.maximum(own.abs() / 16, step * 2.0**-9 / 2) * 1.0001
        assert ((came - own).abs() <= bound).all()
        assert torch.allclose(came.abs().amax(1, keepdim=True), amax, rtol=1e-12)
    assert (found != x).any() or count == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("form", FORMS)
def test_an_overflow_is_seen(form: str, value: float) -> None:
    x = torch.randn(2, 2 * BLOCK)
    x[1, BLOCK + 5] = value
    found = through(x, form)
    assert not found[1, BLOCK:].isfinite().any(), "of its block nothing finite is left"
    assert found[0].isfinite().all() and found[1, :BLOCK].isfinite().all()


def test_chance_has_no_bias_and_the_same_numbers_the_same_bytes() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 100 * BLOCK, dtype=torch.float64).fill_(0.3)
    x[:, ::BLOCK] = torch.rand(100, dtype=torch.float64) + 7.0  # scales of a little above 1, all different
    found = through(x, "int4", stochastic=True)
    assert torch.equal(found, through(x, "int4", stochastic=True))
    rest = torch.ones(x.shape[1], dtype=torch.bool)
    rest[::BLOCK] = False
    mean = found[0, rest].mean()
    # The standard error of 25,500 draws of 0 or about 1.07: 0.003.
    assert abs(mean - 0.3) < 0.012 and through(x, "int4")[0, rest].abs().max() == 0, "to the nearest, all is lost"


class NoNumbers(TorchFunctionMode):
    """Refuses what makes a number of Python's of a tensor: a graph that is recorded has it as a constant."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.Tensor.__len__, torch.Tensor.item, torch.Tensor.__bool__), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("form", FORMS)
def test_a_recorded_graph_takes_any_number_of_rows(form: str) -> None:
    x = torch.randn(3, 300)
    with NoNumbers():
        found = unpack(pack(x, form), 300, form, x.dtype)
        with pytest.raises(AssertionError, match="__len__"):
            len(x)
    assert torch.equal(found, through(x, form))
