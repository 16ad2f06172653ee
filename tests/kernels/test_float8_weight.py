"""A weight that is quantised in flat ranges, part by part, has the bits of one that is quantised whole."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from megatron_ds.kernels.float8 import E4M3, Block, quantize_both, scale_of
from megatron_ds.kernels.float8_weight import Float8Format, Float8Weight, add_amax, cast

FORMATS = {
    "tensorwise": Float8Format(Block(None, None), False),
    "rowwise": Float8Format(Block(1, None), True),
    "blockwise": Float8Format(Block(4, 4), False),
}
CUTS = [0, 1, 5, 61, 100, 103, 190, 273]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("recipe", FORMATS)
def test_ranges_have_the_bits_of_the_whole(recipe: str, dtype: torch.dtype) -> None:
    form, (rows, k) = FORMATS[recipe], (21, 13)
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(rows, k, generator=generator, dtype=dtype) * torch.rand(rows, 1, generator=generator) ** 8
    weight[2, 3:9] = 0
    weight[17, 11] = float("nan")
    flat, ends = weight.view(-1), list(pairwise(CUTS))
    shapes = form.scale_shapes(rows, k)
    of_ranges = []
    for start, stop in ends:
        of_ranges.append([torch.zeros(shape) for shape in shapes])
        add_amax(form, flat[start:stop], start, k, of_ranges[-1])
    amax = [torch.stack(every).view(torch.int32).amax(0).view(torch.float32) for every in zip(*of_ranges)]
    scales = [scale_of(found, E4M3, form.power_of_two) for found in amax]
    codes = [torch.zeros(rows * k, dtype=E4M3) for _ in shapes]
    for start, stop in reversed(ends):
        cast(form, flat[start:stop], start, k, scales, [each[start:stop] for each in codes])
    given = Float8Weight(form)
    given.give([each.view(rows, k) for each in codes], scales)
    for got, want in zip(
        (given.of(False), given.of(True)), quantize_both(weight, (None, None), form.block, E4M3, form.power_of_two)
    ):
        assert torch.equal(got.values.view(torch.uint8), want.values.view(torch.uint8))
        assert torch.equal(got.scale.nan_to_num(-1), want.scale.nan_to_num(-1)) and got.scale.isnan().any()
        assert got.values.is_contiguous() and got.block == want.block


def test_the_transpose_is_made_once_while_nothing_changes() -> None:
    form = FORMATS["rowwise"]
    given = Float8Weight(form)
    assert not given.is_given
    first, second = (torch.arange(6.0).view(2, 3).mul(factor).to(E4M3) for factor in (1, 2))
    given.give([first, second], [torch.ones(2, 1), torch.ones(3, 1)])
    assert given.of(True) is not given.of(True)
    given.keep_transposed(True)
    kept = given.of(True)
    assert given.of(True) is kept and torch.equal(kept.dequantize(torch.float32), second.float().t())
    given.keep_transposed(False)
    assert given.of(True) is not kept
