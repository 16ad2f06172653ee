"""Weights of linear layers in fewer bits, and the products with them, of layers that only compute forward.

=========  =======================================  ===========================
scheme     weights                                  inputs
=========  =======================================  ===========================
``int8``   int8, a scale for each output            as they are
``w8a8``   int8, a scale for each output            int8, a scale for each token
``fp8``    e4m3, a scale for each output            e4m3, a scale for each token
``int4``   4 bits, a scale for 32 of an output's    as they are
=========  =======================================  ===========================

Scales are over what tensor parallelism does not cut: of a layer that is split along its inputs the largest magnitude is
taken over all ranks, so that the quantised weights are those of one process on every mesh. A scale has the precision in
which it is kept and multiplied by; the values are rounded after it is (rounded later, it would be another weight's
scale). Embeddings, norms and biases keep their dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_ds import comm
from megatron_ds.errors import ConfigError
from megatron_ds.kernels.cpu import int4_product, onednn
from megatron_ds.kernels.float8 import E4M3, SMALLEST_AMAX
from megatron_ds.layers.recipe import Recipe, linear
from megatron_ds.mesh import Axis

_HALF = (torch.bfloat16, torch.float16)
_DIGIT = 254
"""Units of a low digit in one of the high digit: what is left of that, half a unit at most, is 127 at most."""
_INT8_MAX, _E4M3_MAX = 127.0, torch.finfo(E4M3).max


@dataclass(frozen=True)
class QuantizedWeight:
    """``values [out, in]`` int8 or e4m3, times ``scale [out, groups]``, each of ``in / groups`` inputs.

    Four bits are kept as int8 from -8 to 7 here; how a recipe or a file packs them is its own affair.
    """

    scheme: str
    values: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Scheme:
    """How weights are quantised.

    Attributes:
        recipe: of the products with a rank's weight; of the ranks among which the inputs are split, or None; and of the
            dtype of inputs and products.
        bits: of a weight; floating: e4m3, no whole number. group: inputs that share a scale; None: all of an output's.
        inputs: whether each token's inputs are quantised too, with a scale, as they come.
    """

    recipe: Callable[[QuantizedWeight, Axis | None, torch.dtype], Recipe]
    bits: int = 8
    floating: bool = False
    group: int | None = None
    inputs: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return E4M3 if self.floating else torch.int8

    @property
    def largest(self) -> float:
        """The value that the largest magnitude becomes."""
        return _E4M3_MAX if self.floating else 2.0 ** (self.bits - 1) - 1


def largest(x: Tensor, dim: int, tp: Axis | None) -> Tensor:
    """The largest magnitudes along ``dim``, fp32 or wider, over the ranks of ``tp``: 1 along ``dim``."""
    wide = torch.promote_types(x.dtype, torch.float32)
    amax = x.abs().amax(dim, keepdim=True).to(wide).clamp(min=SMALLEST_AMAX)
    return amax if tp is None or tp.size == 1 else comm.all_reduce(amax, tp, dist.ReduceOp.MAX)


def scale_dtype(weight: torch.dtype) -> torch.dtype:
    """Of the scales of weights of a dtype. bf16 has the range of fp32; fp16 has not."""
    return torch.float32 if weight is torch.float16 else weight


def quantize(weight: Tensor, scheme: str, tp: Axis | None = None) -> QuantizedWeight:
    """``[out, in]`` of this rank in fewer bits.

    Args:
        tp: the ranks among which the inputs are split, where they are.

    Raises:
        ConfigError: the inputs cannot be cut into groups.
    """
    s, inputs = SCHEMES[scheme], weight.shape[1]
    if s.group and inputs % s.group:
        raise ConfigError(
            f"quantization={scheme!r} shares scales among {s.group} inputs, and a layer here has {inputs} on a rank; "
            "use 'int8', or fewer ranks"
        )
    groups = weight.view(len(weight), -1, s.group or inputs)
    amax = largest(groups, 2, None if s.group else tp)
    scale = (amax / s.largest).to(scale_dtype(weight.dtype))
    relative = groups.to(amax.dtype) / scale.to(amax.dtype)
    if not s.floating:
        relative = relative.round()
    lowest = -s.largest - (s.bits == 4)  # eight bits leave out -128
    return QuantizedWeight(scheme, relative.clamp(lowest, s.largest).to(s.dtype).flatten(1), scale.squeeze(2))


def packed(values: Tensor, bits: int) -> Tensor:
    """int8 ``[out, in]`` of 4 or 8 bits in int32 ``[out, in * bits / 32]``, rounded up.

    They have no sign there (the value plus 8, or plus 128), and the first is in the lowest bits.
    """
    unsigned = (values.to(torch.int16) + (1 << bits - 1)).to(torch.uint8)
    unsigned = F.pad(unsigned, (0, -values.shape[1] % (32 // bits)))
    if bits == 4:
        low, high = unsigned.view(len(values), -1, 2).unbind(2)
        unsigned = low | high << 4
    return unsigned.contiguous().view(torch.int32)


def unpacked(words: Tensor, bits: int, inputs: int) -> Tensor:
    """The inverse of :func:`packed`: int8 ``[out, inputs]``."""
    unsigned = words.contiguous().view(torch.uint8)
    if bits == 4:
        unsigned = torch.stack((unsigned & 15, unsigned >> 4), dim=2).flatten(1)
    return (unsigned.to(torch.int16) - (1 << bits - 1)).to(torch.int8)[:, :inputs]


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
        scale = largest(x, 1, None) / _INT8_MAX
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
        scale = largest(x, 1, self.tp) / _INT8_MAX
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
        scale = largest(x, 1, self.tp) / _E4M3_MAX
        values = (x.to(scale.dtype) / scale).to(E4M3)
        if x.device.type == "cuda" and x.dtype is torch.bfloat16:
            scales = scale.float(), self.scale.float().unsqueeze(0)
            return torch._scaled_mm(values, self.values.t(), *scales, out_dtype=x.dtype)
        # On a CPU a product of widened values is much faster than torch's of FP8, and as exact.
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
        self.register_buffer("values", packed(values, 4))

    values: Tensor
    scale: Tensor
    pairs: Tensor

    def rows(self, x: Tensor) -> Tensor:
        if self._packs:
            return int4_product.product(x, self.values, self.pairs, self._widens)
        groups = unpacked(self.values, 4, x.shape[1]).view(len(self.values), -1, self.group).to(x.dtype)
        return linear(x, (groups * self.scale.to(x.dtype).unsqueeze(2)).flatten(1), None)


SCHEMES: Mapping[str, Scheme] = MappingProxyType(
    {
        "int8": Scheme(Int8),
        "w8a8": Scheme(Int8Inputs, inputs=True),
        "fp8": Scheme(Float8Inputs, floating=True, inputs=True),
        "int4": Scheme(Int4, bits=4, group=32),
    }
)
