"""Numbers in 8 or 4 bits: exact on the grid, within half a step elsewhere, overflows seen, chance without bias."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from megatron_ds.kernels.quantized_blocks import BLOCK, LARGEST, pack, packed_bytes, row_keys, unpack

FORMS = ["int8", "int4", "fp8"]


def keys(seed: int, rows: int, first: int = 0) -> torch.Tensor:
    return row_keys(seed, first, rows, torch.device("cpu"))


def through(x: torch.Tensor, form: str, keys: torch.Tensor | None = None) -> torch.Tensor:
    packed = pack(x, form, keys)
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
    for chance in (None, keys(1, 3)):
        assert torch.equal(through(x, form, chance), x)


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_whole_numbers_never_go_up_by_chance(dtype: torch.dtype) -> None:
    """A random number added in fp32 would round up with the largest of them: one whole number of 260,000."""
    x = torch.arange(-127, 128, dtype=dtype).repeat(8000).view(1, -1)
    x = torch.cat((x, x.new_full((1, -x.shape[1] % BLOCK), 127.0)), dim=1)
    assert torch.equal(through(x, "int8", keys(3, 1)), x)


def rounded(x: torch.Tensor, form: str, seeds: range) -> torch.Tensor:
    """``[len(seeds), rows, n]``: what comes of the same numbers with each seed."""
    return torch.stack([through(x, form, keys(seed, len(x))) for seed in seeds])


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_chance_has_no_bias_over_the_steps(form: str) -> None:
    """The mean error over ``t`` steps is that of one over the root of ``t``; with one key for all it would stay."""
    x = torch.randn(2, 8 * BLOCK, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scale = x.unflatten(1, (-1, BLOCK)).abs().amax(2, keepdim=True) / LARGEST[form]
    fraction = (x.unflatten(1, (-1, BLOCK)) / scale) % 1
    deviation = (fraction * (1 - fraction)).mul(scale**2).mean().sqrt()
    errors = rounded(x, form, range(256)) - x
    for steps in (1, 16, 256):
        mean = errors[:steps].mean(0).square().mean().sqrt()
        assert mean == pytest.approx(deviation.item() / steps**0.5, rel=0.06), f"{steps} steps"
    fixed = torch.stack([through(x, form, keys(7, 2)) for _ in range(16)]).mean(0) - x
    assert fixed.square().mean().sqrt() > 0.9 * deviation, "so a key that stays shows"


def test_equal_rows_are_rounded_independently() -> None:
    x = torch.randn(1, 32 * BLOCK, generator=torch.Generator().manual_seed(0)).repeat(2, 1)
    first, second = (through(x, "int4", keys(5, 2)) - x).unbind()
    later, same = through(x[:1], "int4", keys(5, 1, first=9))[0] - x[0], through(x[:1], "int4", keys(5, 1))[0] - x[0]
    assert torch.equal(first, same), "a row is rounded by its number, whatever is beside it"
    for other in (second, later):
        together = torch.stack((first, other))
        # Of 8,192 independent pairs the correlation is within 5 / 90 of 0.
        assert abs(torch.corrcoef(together)[0, 1]) < 5 / x.shape[1] ** 0.5


def test_to_the_nearest_what_is_small_is_lost_and_by_chance_it_is_not() -> None:
    x = torch.full((1, 100 * BLOCK), 0.3, dtype=torch.float64)
    x[:, ::BLOCK] = 7.0
    rest = torch.ones(x.shape[1], dtype=torch.bool)
    rest[::BLOCK] = False
    # The standard error of 25,500 draws of 0 or 1: 0.003.
    assert abs(through(x, "int4", keys(0, 1))[0, rest].mean() - 0.3) < 0.012
    assert through(x, "int4")[0, rest].abs().max() == 0


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_the_largest_finite_number_stays_finite(form: str, dtype: torch.dtype) -> None:
    """Times its rounded scale it would be infinite, and a step be skipped that need not be."""
    x = torch.zeros(1, BLOCK + 3, dtype=dtype)
    x[0, 1], x[0, -1] = torch.finfo(dtype).max, -torch.finfo(dtype).max
    torch.testing.assert_close(through(x, form), x, rtol=1e-6, atol=0)


def test_keys_of_rows_follow_from_all_bits_of_the_seed_and_from_the_row() -> None:
    seeds = [0, *(1 << bit for bit in range(2, 63))]
    assert len(torch.cat([keys(seed, 4) for seed in seeds]).unique()) == 4 * len(seeds)
    assert torch.equal(keys(7, 3, first=2), keys(7, 5)[2:])
