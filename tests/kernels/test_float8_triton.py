"""The Triton casts to FP8 and the product of blocks: interpreted, compiled for Hopper; and torch's checks for CUDA."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import float8_interpreted
import pytest
import torch
from interpreter_worker import NO_TRITON, run_cases
from torch import Tensor

from megatron_ds.kernels import float8_product
from megatron_ds.kernels.float8 import E4M3, E5M2, Block, Float8, has_tensor_cores
from megatron_ds.kernels.float8_product import scaled_product, torch_multiplies

needs_triton = pytest.mark.skipif(bool(NO_TRITON), reason=NO_TRITON)


@needs_triton
def test_in_the_interpreter_they_are_the_references() -> None:
    results = run_cases(float8_interpreted.__file__)
    assert list(results) == list(float8_interpreted.CASES) and len(results) > 15
    failed = {name: said for name, said in results.items() if said}
    assert not failed, "\n".join(f"{name}: {said}" for name, said in failed.items())


# --- compiled for Hopper -----------------------------------------------------------------------------------------


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, device="meta", dtype=dtype)


TOKENS, WIDTH, BLOCKS = 1 << 20, 4096, 32  # of a Llama 8B; places of its activations need 64 bits


def cast_whole() -> None:
    from megatron_ds.kernels.triton import float8

    scale = meta(1, 1, 1, dtype=torch.float32)
    float8.amax(meta(1, TOKENS, WIDTH), True, True, True)
    float8.cast(meta(1, TOKENS, WIDTH), scale, scale, True, True, True, E4M3, False, 1e-12)


def cast_rows() -> None:
    from megatron_ds.kernels.triton import float8

    scales = meta(1, TOKENS, 1, dtype=torch.float32), meta(1, WIDTH, 1, dtype=torch.float32)
    float8.amax(meta(1, TOKENS, WIDTH), False, True, True)
    float8.cast(meta(1, TOKENS, WIDTH), *scales, False, True, True, E5M2, True, 1e-12)


def cast_blocks() -> None:
    from megatron_ds.kernels.triton import float8

    for square in (False, True):
        float8.block_cast(meta(1, TOKENS, WIDTH), 128, square, True, True, E4M3, square, 1e-12)


def cast_ranges() -> None:
    """A rank's part of a matrix, which begins and ends within a row."""
    from megatron_ds.kernels.triton import float8

    flat, lines = meta(WIDTH * 600 + 1024, dtype=torch.float32), meta(WIDTH, 1, dtype=torch.float32)
    codes = meta(len(flat), dtype=E4M3)
    float8.range_amax(flat, 5 * WIDTH + 512, WIDTH, False, None, [lines, lines])
    float8.range_cast(flat, 5 * WIDTH + 512, WIDTH, False, None, [lines, lines], [codes, codes])


def cast_ranges_of_blocks() -> None:
    from megatron_ds.kernels.triton import float8

    flat, scale = meta(WIDTH * 600 + 1024, dtype=torch.float32), meta(BLOCKS, BLOCKS, dtype=torch.float32)
    start = 2**31 - 5 * WIDTH + 512  # a matrix of more elements than 32 bits count
    float8.range_amax(flat, start, WIDTH, False, 128, [scale])
    float8.range_cast(flat, start, WIDTH, False, 128, [scale], [meta(len(flat), dtype=E4M3)])


def multiply() -> None:
    from megatron_ds.kernels.triton import float8

    weight, scale = meta(WIDTH, WIDTH, dtype=E4M3), meta(BLOCKS, BLOCKS, dtype=torch.float32)
    lines = meta(TOKENS, BLOCKS, dtype=torch.float32)
    float8.block_product(meta(TOKENS, WIDTH, dtype=E4M3), weight, lines, scale, 1, 128, 128, torch.bfloat16)
    left, right = meta(WIDTH, TOKENS, dtype=E5M2), meta(WIDTH, TOKENS, dtype=E4M3)
    lines = meta(WIDTH, TOKENS // 128, dtype=torch.float32)
    float8.block_product(left, right, lines, lines, 1, 1, 128, torch.float32)


@needs_triton
@pytest.mark.parametrize(
    "launch",
    [cast_whole, cast_rows, cast_blocks, cast_ranges, cast_ranges_of_blocks, multiply],
    ids=lambda launch: launch.__name__,
)
def test_compiled_for_hopper(launch: Callable[[], None]) -> None:
    from hopper import SHARED_LIMIT, captured

    with captured() as kernels:
        launch()
    assert len(kernels) == 2
    for kernel in kernels:
        what = f"{kernel.name}: {kernel.registers} registers, {kernel.warps} warps"
        assert not kernel.overflows, f"{what}: {kernel.overflows}"
        assert kernel.spills == 0, f"{what}: {kernel.stack} bytes of stack"
        assert kernel.shared <= SHARED_LIMIT and kernel.registers * kernel.warps * 32 <= 65536, what
        multiplies = kernel.name == "block_product_kernel"
        assert kernel.count(r"LDGSTS\.E\S*\.128" if multiplies else r"LDG\.E\S*\.128") >= 8, what
        assert multiplies == (kernel.count("QGMMA") > 0)
        if kernel.name not in ("amax_kernel", "range_amax_kernel"):  # which write a number a row
            assert kernel.count(r"STG\.E\S*\.128") >= (4 if launch is cast_ranges_of_blocks else 8), what


# --- the calls of torch that a CPU does not check ----------------------------------------------------------------


def quantized(rows: int, k: int, block: Block, dtype: torch.dtype) -> Float8:
    """On the meta device, whose scaled_mm has CUDA's rules for shapes and strides."""
    row_blocks, k_blocks, _, _ = block.grid(rows, k)
    return Float8(meta(rows, k, dtype=dtype), meta(row_blocks, k_blocks, dtype=torch.float32), block)


WHOLE, ROW, LINE, TILE = Block(None, None), Block(1, None), Block(1, 128), Block(128, 128)
PRODUCTS = {  # of every recipe the forward product, the input gradient's and the weight gradient's
    "tensorwise": [(WHOLE, WHOLE, E4M3), (WHOLE, WHOLE, E5M2), (WHOLE, WHOLE, E5M2)],
    "a scale a sequence": [(ROW, WHOLE, E4M3), (ROW, WHOLE, E5M2)],
    "rowwise": [(ROW, ROW, E4M3), (ROW, ROW, E5M2)],
    "blockwise": [(LINE, TILE, E4M3), (LINE, TILE, E5M2), (LINE, LINE, E4M3)],
    "blocks on the left": [(TILE, LINE, E4M3)],
}


@pytest.mark.parametrize("recipe", PRODUCTS)
@pytest.mark.parametrize("shape", [(256, 384, 640), (48, 256, 128), (7, 128, 256)], ids=str)
def test_torch_takes_the_layouts_for_cuda(recipe: str, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    for first, second, dtype in PRODUCTS[recipe]:
        if first is TILE and m % 128:
            continue
        call = scaled_product(quantized(m, k, first, dtype), quantized(n, k, second, E4M3))
        assert call is not None and call(torch.bfloat16).shape == (m, n)


def test_a_k_of_any_length_is_padded_and_other_blocks_are_not_torchs() -> None:
    """Tokens of a sequence, over which the weight gradient sums, are any number."""
    for block in (WHOLE, ROW):
        call = scaled_product(quantized(256, 77, block, E5M2), quantized(128, 77, block, E4M3))
        assert call is not None and call(torch.bfloat16).shape == (256, 128) and call.left.shape == (256, 80)
    for first, second, k in ((LINE, TILE, 200), (LINE, Block(64, 64), 256), (TILE, TILE, 256)):
        assert scaled_product(quantized(256, k, first, E4M3), quantized(256, k, second, E4M3)) is None
    assert scaled_product(quantized(256, 256, LINE, E4M3), quantized(200, 256, TILE, E4M3)) is None


def test_a_layout_that_cuda_refuses_is_refused_by_the_check() -> None:
    """So that the tests above say something."""
    call = scaled_product(quantized(256, 256, LINE, E4M3), quantized(256, 256, TILE, E4M3))
    assert call is not None
    call.scales[0].set_(meta(256, 2, dtype=torch.float32))  # type: ignore[call-overload]
    with pytest.raises(RuntimeError, match="blockwise scaling"):
        call(torch.bfloat16)


# --- which product a GPU takes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "cuda", "rows", "blocks"),
    [
        ((8, 0), "12.9", False, False),  # emulated
        ((8, 9), "12.9", True, False),
        ((9, 0), "12.8", True, False),
        ((9, 0), "13.0", True, True),
        ((10, 0), "13.0", True, False),
    ],
)
def test_torch_multiplies_where_it_has_the_product(
    capability: tuple[int, int], cuda: str, rows: bool, blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties = SimpleNamespace(major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    device = torch.device("cuda")
    assert [torch_multiplies(device, of_blocks) for of_blocks in (False, True)] == [rows, blocks]
    assert has_tensor_cores(device) == rows
    for known in (True, False):  # torch 2.11 has no product for a CPU
        monkeypatch.setattr(float8_product, "CPU_MULTIPLIES", known)
        assert torch_multiplies(torch.device("cpu"), False) == known
        assert not torch_multiplies(torch.device("cpu"), True)
