"""Casts to FP8 and products of such tensors, against slow obvious versions in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ds.kernels import float8_product
from megatron_ds.kernels.float8 import (
    E4M3,
    E5M2,
    SMALLEST_AMAX,
    Block,
    Float8,
    block_amax,
    quantize,
    scale_of,
)
from megatron_ds.kernels.float8_product import product

BLOCKS = [Block(None, None), Block(1, None), Block(1, 4), Block(4, 4)]


def random(*shape: int, seed: int = 0) -> Tensor:
    """Magnitudes over six decades."""
    generator = torch.Generator().manual_seed(seed)
    spread = 10.0 ** (torch.rand(*shape, generator=generator, dtype=torch.float64) * 6 - 3)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * spread


def of_blocks(x: Tensor, block: Block) -> list[tuple[slice, slice]]:
    rows, k = x.shape
    step_rows, step_k = block.rows or rows, block.k or k
    return [
        (slice(i, min(i + step_rows, rows)), slice(j, min(j + step_k, k)))
        for i in range(0, rows, step_rows)
        for j in range(0, k, step_k)
    ]


def numbers_of(dtype: torch.dtype) -> Tensor:
    """Every finite number of the format, in float64, in order."""
    every = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    return every[every.isfinite()].unique()


def slow(x: Tensor, block: Block, dtype: torch.dtype) -> Tensor:
    """What the values stand for: the nearest number of the format, ties to the even one, block by block."""
    grid, out = numbers_of(dtype), torch.empty_like(x)
    for at in of_blocks(x, block):
        amax = max(x[at].abs().max().item(), SMALLEST_AMAX)
        scale = (torch.tensor(amax, dtype=torch.float32) / grid.max().item()).double()
        scaled = (x[at] / scale).clamp(grid.min(), grid.max()).reshape(-1)
        distance = (scaled[:, None] - grid).abs()
        nearest = distance.argmin(dim=1)
        assert (distance.sort(dim=1).values.diff(dim=1)[:, 0] > 0).all(), "a tie would need its rule"
        out[at] = (grid[nearest] * scale).view(x[at].shape)
    return out


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("shape", [(8, 16), (7, 13), (1, 3)], ids=str)
def test_every_value_is_the_nearest_of_its_blocks_scale(
    shape: tuple[int, int], block: Block, dtype: torch.dtype
) -> None:
    x = random(*shape)
    quantized = quantize(x, block_amax(x, block), block, dtype)
    assert quantized.values.dtype == dtype and quantized.scale.dtype == torch.float32
    torch.testing.assert_close(quantized.dequantize(torch.float64), slow(x, block, dtype), rtol=1e-15, atol=0)


def test_batches_are_quantised_one_by_one() -> None:
    x = random(3, 6, 10)
    whole = quantize(x, block_amax(x, Block(None, None)), Block(None, None), E4M3).dequantize(torch.float64)
    for one, part in zip(x, whole):
        torch.testing.assert_close(part, slow(one, Block(None, None), E4M3), rtol=1e-15, atol=0)


def test_the_largest_is_kept_and_zeros_stay() -> None:
    x = torch.tensor([[0.0, 0.0], [3.0, -7.0]])
    quantized = quantize(x, block_amax(x, Block(1, None)), Block(1, None), E4M3)
    assert quantized.values.float().tolist() == [[0.0, 0.0], [192.0, -448.0]]
    assert quantized.scale.flatten().tolist() == pytest.approx([SMALLEST_AMAX / 448, 7 / 448])


def test_subnormals_are_rounded_like_other_numbers() -> None:
    """e4m3's smallest is 2^-9: with a scale of 1 a half of it is a tie and becomes 0, three quarters of it 2^-9."""
    x = torch.tensor([[448.0, 2.0**-10, 1.5 * 2.0**-10, 2.0**-9, -3 * 2.0**-9]])
    quantized = quantize(x, block_amax(x, Block(None, None)), Block(None, None), E4M3)
    assert quantized.values.float().tolist() == [[448.0, 0.0, 2.0**-9, 2.0**-9, -3 * 2.0**-9]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_half_precision_is_cast_by_way_of_fp32(dtype: torch.dtype) -> None:
    x = (random(8, 16) * 1e-2).to(dtype)
    ours = quantize(x, block_amax(x, Block(1, 4)), Block(1, 4), E4M3)
    wide = quantize(x.double(), block_amax(x.double(), Block(1, 4)), Block(1, 4), E4M3)
    assert torch.equal(ours.scale, wide.scale)
    assert torch.equal(ours.values.view(torch.uint8), wide.values.view(torch.uint8))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_shows_in_the_product(bad: float) -> None:
    x, w = torch.ones(4, 32), torch.ones(16, 32)
    x[1, 3] = bad
    for block in (Block(None, None), Block(1, None), Block(1, 8)):
        left = quantize(x, block_amax(x, block), block, E4M3)
        right = quantize(w, block_amax(w, Block(None, None)), Block(None, None), E4M3)
        out = product(left, right, torch.float32)
        assert not out[1].isfinite().any()
        assert out[0].isfinite().all() or block.rows is None


def test_scales_of_a_power_of_two() -> None:
    amax = torch.tensor([448.0, 448.1, 447.9, 1.0, 3e38, 0.0, math.inf])
    scale = scale_of(amax, E4M3, power_of_two=True)
    plain = scale_of(amax, E4M3, power_of_two=False)
    assert scale[:3].tolist() == [1.0, 2.0, 1.0]
    finite = plain.isfinite()
    assert (scale[finite] >= plain[finite]).all() and (scale[finite] < 2 * plain[finite]).all()
    assert (torch.frexp(scale[finite]).mantissa == 0.5).all()
    assert scale[-1] == math.inf


PAIRS = [
    (Block(None, None), Block(None, None)),
    (Block(1, None), Block(1, None)),
    (Block(1, None), Block(None, None)),
    (Block(1, 4), Block(4, 4)),
    (Block(1, 4), Block(1, 4)),
    (Block(1, 32), Block(2, 32)),  # as long as k, or longer, and several of them along the rows
    (Block(3, None), Block(2, None)),
]


@pytest.mark.parametrize("out", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("shape", [(16, 48, 32), (5, 3, 7)], ids=str)
def test_a_product_is_that_of_what_the_values_stand_for(
    shape: tuple[int, int, int], pair: tuple[Block, Block], out: torch.dtype
) -> None:
    m, n, k = shape
    a, b = random(m, k, seed=1), random(n, k, seed=2)
    left = quantize(a, block_amax(a, pair[0]), pair[0], E5M2)
    right = quantize(b, block_amax(b, pair[1]), pair[1], E4M3)
    want = left.dequantize(torch.float64) @ right.dequantize(torch.float64).t()
    got = product(left, right, out)
    assert got.dtype == out
    size = left.dequantize(torch.float64).abs() @ right.dequantize(torch.float64).abs().t()
    rounding = {torch.float64: 1e-15, torch.float32: 1e-6, torch.bfloat16: 2.0**-8}[out]
    assert ((got.double() - want).abs() <= rounding * size).all()


def test_a_torch_without_the_product_on_a_cpu_multiplies_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float8_product, "CPU_MULTIPLIES", False)
    block = Block(1, None)
    left, right = (quantize(x, block_amax(x, block), block, E4M3) for x in (random(5, 32), random(3, 32, seed=1)))
    monkeypatch.setattr(torch.nn.functional, "scaled_mm", None)
    want = left.dequantize(torch.float32) @ right.dequantize(torch.float32).t()
    torch.testing.assert_close(product(left, right, torch.float32), want)


def test_products_of_nothing() -> None:
    empty = Float8(torch.zeros(0, 16).to(E4M3), torch.ones(0, 1), Block(1, None))
    some = Float8(torch.zeros(4, 16).to(E4M3), torch.ones(4, 1), Block(1, None))
    assert product(empty, some, torch.float32).shape == (0, 4)


def test_a_compiler_leaves_scales_alone() -> None:
    """Inductor divides by an approximation on a GPU: the same weight would have other bits in compiled code."""
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(str(graph.graph))
        return graph.forward

    x = random(6, 8).float()
    for power_of_two in (False, True):
        amax = block_amax(x, Block(1, None))
        compiled = torch.compile(scale_of, backend=backend, fullgraph=True)(amax, E4M3, power_of_two)
        assert torch.equal(compiled, scale_of(amax, E4M3, power_of_two))
        cast = torch.compile(quantize, backend=backend, fullgraph=True)(x.t(), None, Block(4, 4), E4M3, power_of_two)
        want = quantize(x.t(), None, Block(4, 4), E4M3, power_of_two)
        assert torch.equal(cast.values.float(), want.values.float()) and cast.values.stride() == want.values.stride()
    assert len(graphs) == 4
    assert all("float8_scale" in graph and "div" not in graph for graph in graphs)
    assert all("float8_plain_cast" in graph for graph in graphs[1::2])
