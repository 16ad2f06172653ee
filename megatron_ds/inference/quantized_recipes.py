"""Products with weights of fewer bits, for linear layers that only compute forward.

=========  =======================================  ===========================
scheme     weights                                  inputs
=========  =======================================  ===========================
``int8``   int8, a scale for each output            as they are
``w8a8``   int8, a scale for each output            int8, a scale for each token
``fp8``    e4m3, a scale for each output            e4m3, a scale for each token
``int4``   4 bits, a scale for 32 of an output's    as they are
=========  =======================================  ===========================

The vocabulary's projection has 8 bits under ``int4`` too, unless a folder says otherwise; embeddings, norms and biases
keep their dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from megatron_ds.errors import ConfigError
from megatron_ds.inference.quantized_weights import LARGEST, QuantizedWeight, largest, quantize
from megatron_ds.kernels.cpu import int4_product, onednn
from megatron_ds.kernels.float8 import E4M3
from megatron_ds.layers.linear import RepeatedKVLinear, RowParallelLinear
from megatron_ds.layers.recipe import Recipe, linear
from megatron_ds.mesh import Axis
from megatron_ds.models.transformer import Transformer

_HALF = (torch.bfloat16, torch.float16)
_DIGIT = 254
"""Units of a low digit in one of the high digit: what is left of that, half a unit at most, is 127 at most."""


class _Quantized(Recipe):
    """The forward product of a linear layer whose weight has fewer bits.

    Args:
        weight: of this rank. tp: the ranks among which the inputs are split, or None.
        dtype: of inputs and products.
    """

    has_weight = True

    def __init__(self, weight: QuantizedWeight, tp: Axis | None, dtype: torch.dtype):
        super().__init__()
        self.tp = tp

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``weight`` is not read: the recipe has it in fewer bits."""
        out = self.rows(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)
        return out if bias is None else out + bias

    def rows(self, x: Tensor) -> Tensor:
        """``[t, in] -> [t, out]``."""
        raise NotImplementedError


class _ScaledOutputs(_Quantized):
    """A scale for each output."""

    def __init__(self, weight: QuantizedWeight, tp: Axis | None, dtype: torch.dtype):
        super().__init__(weight, tp, dtype)
        self.register_buffer("scale", weight.scale.squeeze(1))
        self.packs = dtype in _HALF and onednn.can_multiply_int8(weight.values)
        if self.packs:
            self.packed = onednn.packed_int8(weight.values)
            self.register_buffer("wide_scale", self.scale.float())
            self.register_buffer("zeros", torch.zeros_like(self.scale, dtype=torch.int32))
        else:
            self.register_buffer("values", weight.values)

    values: Tensor
    scale: Tensor
    wide_scale: Tensor
    zeros: Tensor

    def sums(self, x: Tensor) -> Tensor:
        """``x [t, in]`` whole numbers of eight bits, times the packed weight -> ``[t, out]`` fp32."""
        return onednn.int8_product((x + onednn.INT8_ZERO).to(torch.uint8), self.packed, self.wide_scale, self.zeros)


def _unit(values: Tensor, dtype: torch.dtype) -> float:
    """What one of ``values`` is in ``dtype``. Sums of fp16 end at 65,504, so there it is small."""
    return 1.0 if dtype is not torch.float16 else 2.0**-7 if values.dtype is torch.int8 else 2.0**-8


def _terms(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Of a product in ``dtype``: the values, exactly, each of so many units."""
    terms, unit = values.to(dtype), _unit(values, dtype)
    return terms if unit == 1.0 else terms * unit


class Int8(_ScaledOutputs):
    """Weights only. On a CPU an input is two digits of seven bits and a sign, relative to its token's largest."""

    def rows(self, x: Tensor) -> Tensor:
        if not self.packs:
            # Whole numbers up to 127 are exact in every dtype; the scale comes last.
            scale = self.scale / _unit(self.values, x.dtype)
            return linear(x, _terms(self.values, x.dtype), None) * scale.to(x.dtype)
        scale = largest(x, 1, None) / 127
        relative = x / scale
        high = relative.round()
        low = relative.sub_(high).mul_(_DIGIT).round_()
        of_high, of_low = self.sums(torch.cat((high, low))).chunk(2)
        return of_high.add_(of_low, alpha=1 / _DIGIT).mul_(scale).to(x.dtype)


class Int8Inputs(_ScaledOutputs):
    """Weights and inputs: products of whole numbers, exact in int32."""

    def __init__(self, weight: QuantizedWeight, tp: Axis | None, dtype: torch.dtype):
        inputs = weight.values.shape[1]
        if inputs > onednn.MOST_INT8_PRODUCTS:
            raise ConfigError(
                f"quantization='w8a8' sums {inputs} int8 products of a layer in int32, which may overflow beyond "
                f"{onednn.MOST_INT8_PRODUCTS}; use 'int8' or 'fp8', or more tensor-parallel ranks"
            )
        super().__init__(weight, tp, dtype)

    def rows(self, x: Tensor) -> Tensor:
        scale = largest(x, 1, self.tp) / LARGEST["w8a8"]
        whole = (x.to(scale.dtype) / scale).round_()
        if self.packs:
            return self.sums(whole).mul_(scale).to(x.dtype)
        values = whole.to(torch.int8)
        count = values.shape[0]
        if x.device.type == "cuda" and count <= 16:  # where cuBLAS takes 17 rows at least
            values = torch.cat((values, values.new_zeros(32 - count, values.shape[1])))
        sums = torch._int_mm(values, self.values.t())[:count]
        return (sums.to(scale.dtype) * scale * self.scale.to(scale.dtype)).to(x.dtype)


class Float8Inputs(_ScaledOutputs):
    """Weights and inputs in e4m3."""

    def rows(self, x: Tensor) -> Tensor:
        scale = largest(x, 1, self.tp) / LARGEST["fp8"]
        values = (x.to(scale.dtype) / scale).to(E4M3)
        if x.device.type == "cuda" and x.dtype is torch.bfloat16:
            scales = scale.float(), self.scale.float().unsqueeze(0)
            return torch._scaled_mm(values, self.values.t(), *scales, out_dtype=x.dtype)
        # On a CPU a product of widened values is twenty times as fast as torch's of FP8, and as exact.
        sums = linear(_terms(values, x.dtype), _terms(self.values, x.dtype), None)
        scale = scale / _unit(values, x.dtype) ** 2
        return (sums.to(scale.dtype) * scale * self.scale.to(scale.dtype)).to(x.dtype)


class Int4(_Quantized):
    """Weights only, in groups of inputs."""

    def __init__(self, weight: QuantizedWeight, tp: Axis | None, dtype: torch.dtype):
        super().__init__(weight, tp, dtype)
        values, scale = weight.values, weight.scale
        self.group = values.shape[1] // scale.shape[1]
        can_pack = values.device.type == "cpu" and int4_product.can_pack(values, self.group)
        self._packs = dtype is torch.bfloat16 and can_pack
        if self._packs:
            in_order, pairs = int4_product.packed(values, scale)
            self.register_buffer("pairs", pairs)
            self.register_buffer("values", in_order)
            self._widens = int4_product.can_widen(values, in_order)
            return
        self.register_buffer("scale", scale)
        low, high = (values + 8).to(torch.uint8).view(len(values), -1, 2).unbind(2)
        self.register_buffer("values", low | high << 4)

    values: Tensor
    scale: Tensor
    pairs: Tensor

    def rows(self, x: Tensor) -> Tensor:
        if self._packs:
            return int4_product.product(x, self.values, self.pairs, self._widens)
        pairs = torch.stack((self.values & 15, self.values >> 4), dim=2).to(torch.int8).flatten(1) - 8
        groups = pairs.view(len(pairs), -1, self.group).to(x.dtype)
        return linear(x, (groups * self.scale.to(x.dtype).unsqueeze(2)).flatten(1), None)


RECIPES: Mapping[str, Callable[[QuantizedWeight, Axis | None, torch.dtype], Recipe]] = MappingProxyType(
    {"int8": Int8, "w8a8": Int8Inputs, "fp8": Float8Inputs, "int4": Int4}
)


def require_scheme(scheme: str) -> None:
    """Raises :class:`ConfigError` where there is no such scheme."""
    if scheme not in RECIPES:
        raise ConfigError(f"quantization={scheme!r}; use one of {', '.join(map(repr, RECIPES))}, or None")


def quantize_model(model: Transformer, scheme: str) -> Recipe | None:
    """Give every linear layer of ``model`` its weight in fewer bits, and the memory of the old ones back.

    A head's that is the embedding's too stays as it is.

    Returns:
        The recipe of the vocabulary's projection, where the stage has it.

    Raises:
        ConfigError: no such scheme, or a layer that it cannot serve.
    """
    require_scheme(scheme)
    for module in linear_layers(model):
        weight: Tensor = module.weight  # type: ignore[assignment]
        use_weight(module, quantize(rows_of(module, weight.detach()), scheme, _split(module)))
    if not model.span.head:
        return None
    head, of_head = model.output_weight, "int8" if scheme == "int4" else scheme
    recipe = RECIPES[of_head](quantize(head.detach(), of_head), None, head.dtype)
    release_head(model)
    return recipe


def linear_layers(model: nn.Module) -> list[nn.Module]:
    """Those with a recipe, which a scheme replaces."""
    return [module for module in model.modules() if isinstance(getattr(module, "recipe", None), Recipe)]


def rows_of(module: nn.Module, of_weight: Tensor) -> Tensor:
    """``[out, ...]`` of what a layer computes with, of its weight's values or scales on this rank."""
    own = module.own(of_weight) if isinstance(module, RepeatedKVLinear) else of_weight
    return own.reshape(-1, own.shape[-1])


def use_weight(module: nn.Module, quantized: QuantizedWeight) -> None:
    """Let a linear layer multiply by ``quantized``; its parameter keeps its shape and the memory of one element."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    module.recipe = RECIPES[quantized.scheme](quantized, _split(module), weight.dtype)
    release(weight)


def release(weight: Tensor) -> None:
    """Give back the memory of a weight that a recipe has in another form; it keeps its shape."""
    weight.data = weight.new_zeros(()).expand(weight.shape)


def release_head(model: Transformer) -> None:
    """Give back the memory of the vocabulary's projection, unless it is the embedding's too."""
    if not model.config.tied_embeddings:
        release(model.output_weight)


def _split(module: nn.Module) -> Axis | None:
    """The ranks among which a layer's inputs are split."""
    return module.tp if isinstance(module, RowParallelLinear) else None
