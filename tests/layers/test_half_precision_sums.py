"""Gradients that are sums over tokens, in half precision against float64: they must not stop growing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_ds.config import ModelConfig
from megatron_ds.kernels.accumulate import add_product
from megatron_ds.kernels.activation import bias_gelu
from megatron_ds.kernels.cpu.half_layer_norm import layer_norm_gradients
from megatron_ds.kernels.norm import add_norm, layer_norm, rms_norm
from megatron_ds.layers.embedding import lookup
from megatron_ds.layers.linear import ColumnParallelLinear, RowParallelLinear
from megatron_ds.mesh import Axis
from megatron_ds.models.bert import BERT
from megatron_ds.models.gpt import GPT
from megatron_ds.models.transformer import StageSettings
from megatron_ds.zero.main_grad import MainGradient

TOKENS, H = 16384, 8
HALF = (torch.bfloat16, torch.float16)


def column(x: Tensor, *parameters: Tensor) -> Tensor:
    where: dict[str, Any] = {"bias": True, "tp": Axis("tp"), "sequence_parallel": False, "init_std": 1.0}
    layer = ColumnParallelLinear("c", H, (H,), shard_dim=0, dtype=x.dtype, **where)
    layer.weight, layer.bias = (nn.Parameter(p) if not isinstance(p, nn.Parameter) else p for p in parameters)
    return layer(x)


def row(x: Tensor, *parameters: Tensor) -> Tensor:
    where: dict[str, Any] = {"bias": True, "tp": Axis("tp"), "sequence_parallel": False, "init_std": 1.0}
    layer = RowParallelLinear("r", H, H, dtype=x.dtype, **where)
    layer.weight, layer.bias = (nn.Parameter(p) if not isinstance(p, nn.Parameter) else p for p in parameters)
    return layer(x)


# The layer, and the shapes of its parameters.
LAYERS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "layer_norm": (lambda x, w, b: layer_norm(x, w, b, 1e-5), ((H,), (H,))),
    "layer_norm without bias": (lambda x, w: layer_norm(x, w, None, 1e-5), ((H,),)),
    "add_norm": (lambda x, w, b: add_norm(x, x, w, b, 1e-5)[0], ((H,), (H,))),
    "rms_norm": (lambda x, w: rms_norm(x, w, 1e-5), ((H,),)),
    "bias_gelu": (lambda x, b: bias_gelu(x, b), ((H,),)),
    "column linear": (column, ((H, H), (H,))),
    "row linear": (row, ((H, H), (H,))),
    "lookup": (lambda x, t: lookup((x[..., 0] > 1.0).long(), t), ((2, H),)),
}


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_sums_over_many_tokens(name: str, dtype: torch.dtype) -> None:
    """All terms of a sum are alike: added one by one in half precision they would come to a tenth of it."""
    function, shapes = LAYERS[name]
    x = 1.0 + 0.1 * torch.randn(TOKENS, 1, H, generator=torch.Generator().manual_seed(0))
    x[..., 0] += 1.0
    x = x.to(dtype)
    gradients = []
    for wide in (False, True):
        values = [torch.linspace(0.5, 1.5, torch.Size(shape).numel()).view(shape).to(dtype) for shape in shapes]
        parameters = [nn.Parameter(v.double() if wide else v) for v in values]
        out = function(x.double() if wide else x, *parameters)
        out.backward(torch.full_like(out, 0.01))
        gradients.append([p.grad for p in parameters])
    for got, want in zip(*gradients):
        assert got is not None and want is not None and got.dtype == dtype
        error = (got.double() - want).abs().max() / want.abs().max()
        assert error < 2 * torch.finfo(dtype).eps, f"{error:.1e}: {got.flatten()[:4]} and not {want.flatten()[:4]}"


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("rows", [1, 255, 2000])
def test_layer_norm_gradients_of_rows_far_from_zero(rows: int, dtype: torch.dtype) -> None:
    """Statistics are kept in fp32: a mean rounded to half precision would be off by half a deviation. 2,000 rows are
    taken in several blocks."""
    generator = torch.Generator().manual_seed(rows)
    x = (64.0 + torch.randn(rows, 400, generator=generator)).to(dtype)
    grad, w, b = torch.randn(rows, 400, generator=generator).to(dtype), torch.rand(400).to(dtype), torch.rand(400)
    leaves = [t.to(dtype).requires_grad_() for t in (x, w, b)]
    got = torch.autograd.grad(layer_norm(*leaves, 1e-5), leaves, grad)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    want = torch.autograd.grad(torch.nn.functional.layer_norm(exact[0], (400,), *exact[1:], 1e-5), exact, grad.double())
    for one, other in zip(got, want):
        assert (one.double() - other).abs().max() <= 2 * torch.finfo(dtype).eps * other.abs().max()


def test_layer_norm_gradients_are_fp32_until_they_are_a_parameters() -> None:
    x, w = torch.randn(300, 8).bfloat16(), torch.ones(8).bfloat16()
    y, mean, rstd = torch.native_layer_norm(x, [8], w.float(), w.float(), 1e-5)
    d_x, d_w, d_b = layer_norm_gradients(y, x, w, w, mean, rstd)
    assert d_x.dtype == torch.bfloat16 and d_b is not None and d_w.dtype == d_b.dtype == torch.float32


def main_grad_of(parameter: nn.Parameter) -> Tensor:
    """The parameter's gradient buffer in fp32, attached as an optimizer would."""
    main_grad = MainGradient("p", lambda main_grad: None, lambda main_grad: None)
    main_grad.view = torch.full(parameter.shape, torch.nan)
    parameter.main_grad = main_grad  # type: ignore[attr-defined]
    return main_grad.view


@pytest.mark.parametrize("name", ["column linear", "row linear"])
def test_a_sum_that_fp16_cannot_hold_reaches_the_fp32_buffer(name: str) -> None:
    """4,096 products of 8 x 8 are 262,144, and as many biases' gradients of 32 are 131,072; fp16 ends at 65,504."""
    x = torch.full((4096, 1, H), 8.0, dtype=torch.float16)
    parameters = [nn.Parameter(torch.zeros(shape, dtype=torch.float16)) for shape in LAYERS[name][1]]
    buffers = [main_grad_of(p) for p in parameters]
    for micro_batch in (1, 2):
        LAYERS[name][0](x, *parameters).backward(torch.full_like(x, 32.0))
        assert all(p.grad is None for p in parameters)
        assert buffers[0].unique().tolist() == [micro_batch * 4096 * 8.0 * 32.0]
        assert buffers[1].unique().tolist() == [micro_batch * 4096 * 32.0]


def test_a_product_of_fp16_comes_in_fp32() -> None:
    left, right = torch.full((2, 4096), 16.0).half(), torch.full((4096, 3), 16.0).half()
    assert (left @ right).isinf().all(), "what fp16 makes of it"
    total = torch.ones(2, 3)
    add_product(total, left, right, first=False)
    assert total.unique().tolist() == [1.0 + 4096 * 256.0]


@pytest.mark.parametrize("first", [True, False])
def test_a_large_product_of_bf16_is_added_in_full(first: bool) -> None:
    """Of more rows than are multiplied at a time."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(shape, generator=generator).bfloat16() for shape in ((1200, 5), (5, 1000)))
    total = torch.randn(1200, 1000, generator=generator)
    want = left.double() @ right.double() + (0.0 if first else total.double())
    add_product(total, left, right, first)
    torch.testing.assert_close(total.double(), want, rtol=8e-3, atol=2e-2)


@pytest.mark.parametrize("family", [GPT, BERT])
def test_every_parameter_of_a_model_in_bf16(family: type[GPT] | type[BERT]) -> None:
    """Of 4,096 tokens whose gradients point the same way. Without fp32 sums biases and small tables are lost."""
    sizes: dict[str, Any] = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 32, "max_positions": 128}
    if family is BERT:
        sizes |= {"family": "bert", "token_types": 2, "embedding_norm": True, "attention_dropout": 0.0}
    config = ModelConfig(**{**sizes, "hidden_dropout": 0.0, "attention_dropout": 0.0})
    half, wide = (family(config, StageSettings(dtype=dtype)) for dtype in (torch.bfloat16, torch.float64))
    half.initialize(1)
    with torch.no_grad():
        for ours, exact in zip(half.parameters(), wide.parameters()):
            exact.copy_(ours)
    b, s = 32, 128
    micro_batch = {
        "tokens": torch.randint(32, (b, s), generator=torch.Generator().manual_seed(2)),
        "labels": torch.full((b, s), 5),
        "loss_mask": torch.ones(b, s, dtype=torch.bool),
        "position_ids": torch.arange(s).expand(b, s),
        "sample_index": torch.arange(b),
    }
    for model in (half, wide):
        model(micro_batch).backward()
    for (name, ours), exact in zip(half.named_parameters(), wide.parameters()):
        assert ours.grad is not None and exact.grad is not None
        error = (ours.grad.double() - exact.grad).norm() / exact.grad.norm().clamp(min=1e-3)
        assert error < 0.03, f"{name}: {error:.3f}"
