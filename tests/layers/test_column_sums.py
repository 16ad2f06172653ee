"""Bias gradients that the kernel behind a linear layer makes: as the layer's own, whoever takes them.

The kernels are stood in for by plain torch: what is tested is who computes which gradient, and where it goes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ds.config import ModelConfig, RecomputeConfig
from megatron_ds.kernels import registry
from megatron_ds.kernels.dropout import dropout_add_reference
from megatron_ds.layers.linear import BiasOffer
from megatron_ds.models.gpt import GPT
from megatron_ds.models.transformer import StageSettings
from megatron_ds.zero.main_grad import MainGradient

SINGLE = torch.float32


def normed(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rms: bool) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps) if rms else F.layer_norm(x, weight.shape, weight, bias, eps)


def norm(x: Any, residual: Any, keys: Any, weight: Any, bias: Any, eps: float, p: float, _: int, rms: bool) -> Any:
    summed = x if residual is None else residual + (x if keys is None else dropout_add_reference(x, None, p, keys))
    rows = summed.flatten(0, -2)
    mean = rows.new_empty(0) if rms else rows.mean(1)
    rstd = ((rows.square() if rms else rows.var(1, False, keepdim=True)).mean(1) + eps).rsqrt()
    return normed(summed, weight, bias, eps, rms), rows.new_empty(0) if residual is None else summed.clone(), mean, rstd


def norm_backward(
    grad: Any, grad_summed: Any, summed: Any, keys: Any, weight: Any, mean: Any, rstd: Any, totals: Sequence[Tensor],
    keep: Sequence[bool], p: float, _: int, rms: bool, has_bias: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    row = rstd.view(*grad.shape[:-1], 1)
    unit = (summed if rms else summed - mean.view(row.shape)) * row
    g = grad * weight
    d = (g - unit * (g * unit).mean(-1, keepdim=True) - (0.0 if rms else g.mean(-1, keepdim=True))) * row
    d = d if grad_summed is None else d + grad_summed
    dropped = d.new_empty(0) if keys is None else dropout_add_reference(d, None, p, keys)
    sums = [grad * unit, *([grad] if has_bias else []), d if keys is None else dropped]
    add(sums, totals, keep)
    return d, dropped


def add(rows: Sequence[Tensor], totals: Sequence[Tensor], keep: Sequence[bool]) -> None:
    for some, total, own in zip(rows, totals, keep):
        sums = some.flatten(0, -2).sum(0)
        total.copy_(total + sums if own else sums)


def bias_gelu_backward(
    grad: Any, x: Any, bias: Any, totals: Sequence[Tensor], keep: Sequence[bool], approximate: str
) -> Tensor:
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        out = F.gelu(leaf if bias is None else leaf + bias, approximate=approximate)
    (d,) = torch.autograd.grad(out, leaf, grad)
    add([d], totals, keep)
    return d


TWINS = SimpleNamespace(
    norm=norm,
    norm_backward=norm_backward,
    bias_gelu=lambda x, bias, approximate: F.gelu(x if bias is None else x + bias, approximate=approximate),
    bias_gelu_backward=bias_gelu_backward,
)


@contextmanager
def fused() -> Iterator[None]:
    with registry.use({"norm": "triton", "bias_gelu": "triton"}), patch.object(registry, "load_twin", lambda *_: TWINS):
        yield


def gradients(settings: dict[str, Any], recompute: RecomputeConfig, main: bool) -> dict[str, Tensor]:
    """Of two micro-batches."""
    sizes = {"num_layers": 3, "hidden_size": 16, "num_heads": 2, "vocab_size": 40, "max_positions": 8, "init_std": 0.3}
    model = GPT(ModelConfig(**{**sizes, **settings}), StageSettings(dtype=SINGLE, recompute=recompute))
    model.initialize(7)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data.add_(torch.linspace(-0.3, 0.3, len(parameter)))
        if main:
            parameter.main_grad = MainGradient(name, lambda _: None, lambda _: None)  # type: ignore[attr-defined]
            parameter.main_grad.view = torch.full_like(parameter, torch.nan)  # type: ignore[attr-defined]
    for number in range(2):
        tokens = torch.arange(16).view(2, 8) * 7 % 40 + number
        batch = {
            "tokens": tokens % 40,
            "labels": (tokens + 1) % 40,
            "position_ids": torch.arange(8).expand(2, 8),
            "loss_mask": torch.ones(2, 8, dtype=torch.bool),
            "sample_index": torch.arange(2) + 2 * number,
        }
        model(batch).backward()
        for parameter in model.parameters() if main else ():  # as an optimizer's hook does
            if parameter.grad is not None:
                parameter.main_grad.add(parameter.grad)  # type: ignore[attr-defined]
                parameter.grad = None
    found = {name: parameter.main_grad.view if main else parameter.grad for name, parameter in model.named_parameters()}
    return {name: gradient for name, gradient in found.items() if gradient is not None}


SETTINGS: dict[str, dict[str, Any]] = {
    "GPT-2": {},
    "with dropout": {"hidden_dropout": 0.3},
    "biases and RMSNorm": {"norm": "rmsnorm"},
    "Llama": {"norm": "rmsnorm", "activation": "swiglu", "bias": False, "position": "rope"},
    "norms last": {"norm_position": "post"},
    "norms around": {"norm_position": "sandwich"},
    "norms of outputs": {"norm_position": "output"},
    "side by side": {"residual": "parallel"},
    "side by side, one norm": {"residual": "parallel_one_norm"},
}


@pytest.mark.parametrize("main", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_every_gradient_is_made_once(name: str, main: bool) -> None:
    for recompute in (RecomputeConfig(), RecomputeConfig(mode="every_n", every=2)):
        want = gradients(SETTINGS[name], recompute, main)
        with fused():
            got = gradients(SETTINGS[name], recompute, main)
        assert got.keys() == want.keys()
        for key in want:
            error = (got[key] - want[key]).norm() / want[key].norm()
            assert error < 2e-5, f"{key} of {name}, {recompute.mode}: {error:.1e}"


def test_a_frozen_bias_is_not_taken() -> None:
    offer = BiasOffer()
    assert offer.take() is None
    bias = torch.zeros(3)
    offer.made(bias)
    assert offer.take() is None and not offer.taken
    bias.requires_grad_()
    with torch.no_grad():
        assert offer.take() is None and not offer.taken
    assert offer.take() is bias and offer.taken
