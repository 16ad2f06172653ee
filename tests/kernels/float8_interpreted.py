"""What test_float8_triton.py runs under Triton's interpreter: casts bit for bit, products against float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import torch
from interpreter_worker import Canaries
from torch import Tensor

from megatron_ds.kernels import float8_product, registry
from megatron_ds.kernels.float8 import (
    E4M3,
    E5M2,
    Block,
    Float8,
    block_amax,
    block_amax_both,
    quantize,
    quantize_both,
    scale_of,
)
from megatron_ds.kernels.float8_product import product
from megatron_ds.kernels.float8_weight import Float8Format, add_amax, cast

SIDE = 16
WHOLE, ROWS, LINES, SQUARES = Block(None, None), Block(1, None), Block(1, SIDE), Block(SIDE, SIDE)
CASES: dict[str, Callable[[], None]] = {}


@contextmanager
def right_casts() -> Iterator[None]:
    """The interpreter's own cast to FP8 forgets to carry into the exponent: 7.8 becomes 4."""
    from triton.runtime import interpreter

    original = interpreter.InterpreterBuilder.create_fp_to_fp

    def cast(self: Any, source: Any, kind: Any, rounding: Any) -> Any:
        dtype = {"fp8e4nv": E4M3, "fp8e5": E5M2}.get(str(kind.scalar))
        if dtype is None:
            return original(self, source, kind, rounding)
        data = torch.from_numpy(source.data).to(dtype).view(torch.uint8).numpy()
        return interpreter.TensorHandle(data, kind.scalar)

    with patch.object(interpreter.InterpreterBuilder, "create_fp_to_fp", cast):
        yield


@contextmanager
def triton() -> Iterator[Canaries]:
    canaries = Canaries()
    with right_casts(), registry.use({"float8": "triton"}), canaries.around_allocations():
        yield canaries


def spread(*shape: int) -> Tensor:
    """Magnitudes over six decades."""
    return torch.randn(shape) * 10.0 ** (torch.rand(shape) * 6 - 3)


def same(got: Float8, want: Float8) -> None:
    """Bit for bit; where the reference's scale is NaN any scale that shows is right."""
    assert got.values.shape == want.values.shape and got.scale.shape == want.scale.shape
    shows = want.dequantize(torch.float64).isfinite()
    assert torch.equal(got.dequantize(torch.float64).isfinite(), shows)
    finite = want.scale.isfinite()
    assert torch.equal(got.scale[finite], want.scale[finite]) and not got.scale[~finite].isfinite().any()
    assert torch.equal(got.values.float()[shows], want.values.float()[shows])


def casts(make: Callable[[], Tensor], block: Block, dtype: torch.dtype, power_of_two: bool = False) -> None:
    x = make()
    want, want_t = quantize(x, None, block, dtype, power_of_two), quantize(x.mT, None, block, dtype, power_of_two)
    with triton() as canaries:
        given = canaries.around(x)
        both = quantize_both(given, (None, None), block, dtype, power_of_two)
        alone, alone_t = (quantize(y, None, block, dtype, power_of_two) for y in (given, given.mT))
    canaries.check()
    for got, wanted in ((both[0], want), (both[1], want_t), (alone, want), (alone_t, want_t)):
        same(got, wanted)


def given_amax(block: Block) -> None:
    """A larger one than its own, as after a reduction over ranks."""
    x = spread(2, 9, 21)
    both = tuple(a * 3 for a in (block_amax(x, block), block_amax(x.mT, block)))
    with triton():
        found = block_amax_both(x, block)
        got = quantize_both(x, both, block, E4M3)
    for have, amax, want in zip(got, both, (x, x.mT)):
        same(have, quantize(want, amax, block, E4M3))
    for have, amax in zip(found, both):
        assert torch.equal(have * 3, amax)


def special() -> Tensor:
    """Zeros, the largest number, subnormals of the format, infinities and NaN, each in blocks of its own."""
    x = torch.ones(3 * SIDE + 1, 3 * SIDE + 3)
    x[:SIDE, :SIDE] = 0.0
    x[SIDE, :4] = torch.tensor([448.0, 2.0**-10, 1.5 * 2.0**-10, -(2.0**-9)])
    x[2, 2 * SIDE], x[SIDE + 1, 2 * SIDE + 1], x[2 * SIDE + 3, 0] = math.inf, -math.inf, math.nan
    x[-1, -1] = 1e-30
    return x


def tile(rows: int, columns: int) -> Tensor:
    return spread(rows, columns)


def ranges(block: Block, finite: bool) -> None:
    """A matrix of which ranks have flat ranges, some within a row, has the amax and codes of the plain operators."""
    form = Float8Format(block, power_of_two=finite)
    weight = spread(3 * SIDE + 5, 9 * SIDE + 3)
    weight[:3, 40:70], weight[-1, -1] = 0.0, 1e-42
    if not finite:
        weight[7, 11], weight[2 * SIDE, SIDE] = math.nan, math.inf
    (rows, k), flat = weight.shape, weight.view(-1)
    ends = [0, 1, 5, 61, k, k + 3, 2 * k, 5 * k + 7, 20 * k, 33 * k + 140, len(flat)]
    shapes = form.scale_shapes(rows, k)
    results = []
    for twin in (False, True):
        with triton() if twin else nullcontext(Canaries()) as canaries:
            amax = [canaries.around(torch.zeros(shape)) for shape in shapes]
            given = [canaries.around(flat[start:stop]) for start, stop in pairwise(ends)]
            for start, part in zip(ends, given):
                add_amax(form, part, start, k, amax)
            scales = [canaries.around(scale_of(found, E4M3, form.power_of_two)) for found in amax]
            codes = [canaries.around(torch.zeros(len(flat), dtype=torch.uint8)) for _ in shapes]
            for start, part in zip(ends, given):
                cast(form, part, start, k, scales, [each.view(E4M3)[start : start + len(part)] for each in codes])
        canaries.check()
        results.append((amax, scales, codes))
    (want_amax, want_scales, want), (amax, scales, got) = results
    for a, b in zip([*amax, *scales], [*want_amax, *want_scales]):
        assert torch.equal(a.nan_to_num(-1.0), b.nan_to_num(-1.0)) and torch.equal(a.isnan(), b.isnan())
    for a, b in zip(got, want):
        shows = b.view(E4M3).float().isnan()
        assert torch.equal(a.view(E4M3).float().isnan(), shows) and torch.equal(a[~shows], b[~shows])


for name, block in {"whole": WHOLE, "rows": ROWS, "squares": SQUARES}.items():
    CASES[f"ranges of {name}"] = partial(ranges, block, False)
    CASES[f"ranges of {name}, finite"] = partial(ranges, block, True)
for name, block in {"whole": WHOLE, "rows": ROWS, "lines": LINES, "squares": SQUARES}.items():
    odd = partial(tile, 70, 133) if block.k is None else partial(tile, 37, 45)
    CASES[f"cast {name}"] = partial(casts, odd, block, E4M3)
    CASES[f"cast {name} special"] = partial(casts, special, block, E5M2 if block.k is None else E4M3)
    layout = (lambda: spread(9, 2, 21).transpose(0, 1).bfloat16()) if block.k else (lambda: spread(2, 21, 9).mT)
    CASES[f"cast {name} strided powers of two"] = partial(casts, layout, block, E5M2, True)
for name, block in {"whole": WHOLE, "rows": ROWS}.items():
    CASES[f"given amax {name}"] = partial(given_amax, block)


def multiplies(m: int, n: int, k: int, blocks: tuple[Block, Block], out: torch.dtype) -> None:
    a = quantize(spread(m, k), None, blocks[0], E5M2 if blocks[1] is LINES else E4M3)
    b = quantize(spread(n, k), None, blocks[1], E4M3)
    exact = [x.dequantize(torch.float64) for x in (a, b)]
    with triton():
        got = product(a, b, out)
    bound = exact[0].abs() @ exact[1].abs().t() * 1e-6
    assert got.dtype == out and ((got.double() - exact[0] @ exact[1].t()).abs() <= bound).all()


def shows() -> None:
    a, b = torch.ones(8, 2 * SIDE), torch.ones(8, 2 * SIDE)
    a[2, 3] = math.inf
    with triton():
        got = product(quantize(a, None, LINES, E4M3), quantize(b, None, LINES, E4M3), torch.float32)
    assert not got[2].isfinite().any() and got[[0, 1, 3, 4, 5, 6, 7]].isfinite().all()


def sums(block: Block) -> None:
    """Over the tokens of three sequences, as layers have them: ``[s, b, features]``."""
    length = 128 if block.k is None else 3 * SIDE
    x, grad = (spread(length, 3, features).permute(1, 2, 0) for features in (20, 37))
    want = sum(
        quantize(g, None, block, E5M2).dequantize(torch.float64)
        @ quantize(y, None, block, E4M3).dequantize(torch.float64).t()
        for g, y in zip(grad, x)
    )
    bound = grad.abs().double() @ x.abs().double().mT * 1e-6
    with triton(), patch.object(float8_product, "product", side_effect=product) as products:
        operands = quantize(grad, None, block, E5M2), quantize(x, None, block, E4M3)
        got = float8_product.sum_of_products(*operands, torch.float32)
    assert products.call_count == 1 and ((got - want).abs() <= bound.sum(0)).all()


for name, block in {"whole": WHOLE, "rows": ROWS, "lines": LINES}.items():
    CASES[f"sum of products {name}"] = partial(sums, block)
CASES["product of lines and squares"] = partial(multiplies, 37, 133, 40, (LINES, SQUARES), torch.float32)
CASES["product of squares and lines"] = partial(multiplies, 70, 9, 48, (SQUARES, LINES), torch.float32)
CASES["product of lines"] = partial(multiplies, 5, 3, 19, (LINES, LINES), torch.float32)
CASES["product with an infinity"] = shows
