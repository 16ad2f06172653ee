"""Weights of fewer bits for linear layers that only compute forward.

A weight ``[out, in]`` becomes whole numbers (or FP8) and a scale for each output, over what tensor parallelism does not
cut: of a layer that is split along its inputs the largest magnitude is taken over all ranks. So the quantised weights,
and in float64 the results, are those of one process on every mesh.

=========  =======================================  ===========================
scheme     weights                                  inputs
=========  =======================================  ===========================
``int8``   int8, a scale for each output            as they are
``w8a8``   int8, a scale for each output            int8, a scale for each token
``fp8``    e4m3, a scale for each output            e4m3, a scale for each token
``int4``   4 bits, a scale for 32 of an output's    as they are
=========  =======================================  ===========================

The vocabulary's projection has 8 bits under ``int4`` too; embeddings, norms and biases keep their dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_ds import comm
from megatron_ds.errors import ConfigError
from megatron_ds.kernels.float8 import E4M3, SMALLEST_AMAX
from megatron_ds.layers.linear import RepeatedKVLinear, RowParallelLinear
from megatron_ds.layers.recipe import Recipe, linear
from megatron_ds.mesh import Axis

GROUP = 32
"""Inputs that share a scale in four bits."""
_FEW_ROWS = 8
"""Up to so many rows a CPU reads the packed weights; beyond, it is faster to widen them first (4,096 x 768, bf16)."""


def _largest(x: Tensor, dim: int, tp: Axis | None) -> Tensor:
    """The largest magnitudes along ``dim``, fp32 or wider, over the ranks of ``tp``: ``[..., 1]``."""
    wide = torch.promote_types(x.dtype, torch.float32)
    amax = x.abs().amax(dim, keepdim=True).to(wide).clamp(min=SMALLEST_AMAX)
    return amax if tp is None or tp.size == 1 else comm.all_reduce(amax, tp, dist.ReduceOp.MAX)


class _Quantized(Recipe):
    """Args: ``weight [out, in]`` of this rank; ``tp``: the ranks among which the inputs are split, or None."""

    def __init__(self, weight: Tensor, tp: Axis | None):
        super().__init__()
        self.tp = tp

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``weight`` is not read: the recipe has it in fewer bits."""
        out = self.rows(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)
        return out if bias is None else out + bias

    def rows(self, x: Tensor) -> Tensor:
        """``[t, in] -> [t, out]``."""
        raise NotImplementedError

    def dequantized(self) -> Tensor:
        """``[out, in]`` fp64: the weight that the products are those of."""
        raise NotImplementedError


class Int8(_Quantized):
    """Weights only."""

    def __init__(self, weight: Tensor, tp: Axis | None):
        super().__init__(weight, tp)
        scale = _largest(weight, 1, tp) / 127
        self.register_buffer("values", (weight.to(scale.dtype) / scale).round().to(torch.int8))
        self.register_buffer("scale", scale.squeeze(1))

    values: Tensor
    scale: Tensor

    def rows(self, x: Tensor) -> Tensor:
        if x.shape[0] <= _FEW_ROWS and x.dtype is torch.bfloat16 and x.device.type == "cpu":
            return torch._weight_int8pack_mm(x, self.values, self.scale.to(x.dtype))
        # Whole numbers up to 127 are exact in every dtype; the scale comes last.
        return linear(x, self.values.to(x.dtype), None) * self.scale.to(x.dtype)

    def dequantized(self) -> Tensor:
        return self.values.double() * self.scale.double().unsqueeze(1)


class Int8Inputs(Int8):
    """Weights and inputs: products of whole numbers, exact in int32."""

    def rows(self, x: Tensor) -> Tensor:
        scale = _largest(x, 1, self.tp) / 127
        values = (x.to(scale.dtype) / scale).round().to(torch.int8)
        count = values.shape[0]
        if x.device.type == "cuda" and count <= 16:  # where cuBLAS takes 17 rows at least
            values = torch.cat((values, values.new_zeros(32 - count, values.shape[1])))
        sums = torch._int_mm(values, self.values.t())[:count]
        return (sums.to(scale.dtype) * scale * self.scale.to(scale.dtype)).to(x.dtype)


class Float8Inputs(_Quantized):
    """Weights and inputs in e4m3."""

    def __init__(self, weight: Tensor, tp: Axis | None):
        super().__init__(weight, tp)
        scale = _largest(weight, 1, tp) / torch.finfo(E4M3).max
        self.register_buffer("values", (weight.to(scale.dtype) / scale).to(E4M3))
        self.register_buffer("scale", scale.squeeze(1))

    values: Tensor
    scale: Tensor

    def rows(self, x: Tensor) -> Tensor:
        scale = _largest(x, 1, self.tp) / torch.finfo(E4M3).max
        values = (x.to(scale.dtype) / scale).to(E4M3)
        if x.device.type == "cuda" and x.dtype is torch.bfloat16:
            scales = scale.float(), self.scale.float().unsqueeze(0)
            return torch._scaled_mm(values, self.values.t(), *scales, out_dtype=x.dtype)
        # On a CPU a product of widened values is twenty times as fast as torch's of FP8, and as exact.
        sums = linear(values.to(x.dtype), self.values.to(x.dtype), None)
        return (sums.to(scale.dtype) * scale * self.scale.to(scale.dtype)).to(x.dtype)

    def dequantized(self) -> Tensor:
        return self.values.double() * self.scale.double().unsqueeze(1)


class Int4(_Quantized):
    """Weights only, in groups of inputs."""

    def __init__(self, weight: Tensor, tp: Axis | None):
        super().__init__(weight, tp)
        out, inputs = weight.shape
        if inputs % GROUP:
            raise ConfigError(
                f"quantization='int4' shares scales among {GROUP} inputs, and a layer here has {inputs} on a rank; use "
                "'int8', or fewer ranks"
            )
        groups = weight.view(out, -1, GROUP)
        scale = _largest(groups, 2, None) / 7
        values = (groups.to(scale.dtype) / scale).round().clamp(-8, 7).to(torch.int32).view(out, inputs)
        self._packs = weight.dtype is torch.bfloat16 and weight.device.type == "cpu" and out % 16 == 0
        if self._packs:
            values = torch._convert_weight_to_int4pack_for_cpu(values + 8, 2)
            pairs = torch.stack((scale.squeeze(2).t(), torch.zeros_like(scale.squeeze(2).t())), dim=2)
            self.register_buffer("pairs", pairs.to(torch.bfloat16).contiguous())
            self.register_buffer("values", values)
            return
        self.register_buffer("scale", scale.squeeze(2))
        low, high = values.view(out, -1, 2).unbind(2)
        self.register_buffer("values", ((low + 8) | (high + 8) << 4).to(torch.uint8))

    values: Tensor
    scale: Tensor
    pairs: Tensor

    def rows(self, x: Tensor) -> Tensor:
        if self._packs:
            return torch._weight_int4pack_mm_for_cpu(x.contiguous(), self.values, GROUP, self.pairs)
        return linear(x, self._widened(x.dtype), None)

    def _widened(self, dtype: torch.dtype) -> Tensor:
        pairs = torch.stack((self.values & 15, self.values >> 4), dim=2).to(torch.int8).flatten(1) - 8
        return (pairs.view(len(pairs), -1, GROUP).to(dtype) * self.scale.to(dtype).unsqueeze(2)).flatten(1)

    def dequantized(self) -> Tensor:
        if not self._packs:
            return self._widened(torch.float64)
        whole = torch.eye(self.pairs.shape[0] * GROUP, dtype=torch.bfloat16)
        return self.rows(whole).t().double()


SCHEMES: Mapping[str, Callable[[Tensor, Axis | None], _Quantized]] = MappingProxyType(
    {"int8": Int8, "w8a8": Int8Inputs, "fp8": Float8Inputs, "int4": Int4}
)


def require_scheme(scheme: str) -> None:
    """Raises :class:`ConfigError` where there is no such scheme."""
    if scheme not in SCHEMES:
        raise ConfigError(f"quantization={scheme!r}; use one of {', '.join(map(repr, SCHEMES))}, or None")


def quantize_model(model: nn.Module, head: Tensor | None, scheme: str) -> Recipe | None:
    """Give every linear layer of ``model`` its weight in fewer bits, and the memory of the old ones back.

    Args:
        head: the weight of the vocabulary's projection on this rank, where the stage has it; it stays as it is, for
            it may be the embedding's too.

    Returns:
        The recipe of the vocabulary's projection.

    Raises:
        ConfigError: no such scheme, or a layer that it cannot serve.
    """
    require_scheme(scheme)
    for module in list(model.modules()):
        if not isinstance(getattr(module, "recipe", None), Recipe):
            continue
        weight: Tensor = module.weight  # type: ignore[assignment]
        own = module.own(weight) if isinstance(module, RepeatedKVLinear) else weight
        split = module.tp if isinstance(module, RowParallelLinear) else None
        module.recipe = SCHEMES[scheme](own.detach().reshape(-1, own.shape[-1]), split)
        weight.data = weight.new_zeros(()).expand(weight.shape)  # its shape, and the memory of one element
    if head is None:
        return None
    return (Int8 if scheme == "int4" else SCHEMES[scheme])(head.detach(), None)
