"""Weights of linear layers in fewer bits: whole numbers or FP8, and scales over what tensor parallelism does not cut.

A scale is that of an output, or of some of an output's inputs. Of a layer that is split along its inputs the largest
magnitude is taken over all ranks, so that the quantised weights are those of one process on every mesh. A scale has the
precision in which it is kept and multiplied by; the values are rounded after it is (rounded later, it would be another
weight's scale).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ds import comm
from megatron_ds.errors import ConfigError
from megatron_ds.kernels.float8 import E4M3, SMALLEST_AMAX
from megatron_ds.mesh import Axis

GROUP = 32
"""Inputs that share a scale in four bits."""
LARGEST: Mapping[str, float] = MappingProxyType(
    {"int8": 127.0, "w8a8": 127.0, "fp8": torch.finfo(E4M3).max, "int4": 7.0}
)
"""By scheme: the value that the largest magnitude becomes."""


@dataclass(frozen=True)
class QuantizedWeight:
    """``values [out, in]`` int8 or e4m3, times ``scale [out, groups]``, each of ``in / groups`` inputs.

    Four bits are kept as int8 from -8 to 7 here; how a recipe or a file packs them is its own affair.
    """

    scheme: str
    values: Tensor
    scale: Tensor

    def dequantized(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """``[out, in]``: the weight that products with this one are those of."""
        values = self.values.to(dtype).unflatten(1, (self.scale.shape[1], -1))
        return (values * self.scale.to(dtype).unsqueeze(2)).flatten(1)


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
    in_groups = scheme == "int4"
    if in_groups and weight.shape[1] % GROUP:
        raise ConfigError(
            f"quantization='int4' shares scales among {GROUP} inputs, and a layer here has {weight.shape[1]} on a "
            "rank; use 'int8', or fewer ranks"
        )
    groups = weight.view(len(weight), -1, GROUP if in_groups else weight.shape[1])
    amax = largest(groups, 2, None if in_groups else tp)
    scale = (amax / LARGEST[scheme]).to(scale_dtype(weight.dtype))
    relative = groups.to(amax.dtype) / scale.to(amax.dtype)
    if scheme == "fp8":
        values = relative.clamp(-LARGEST["fp8"], LARGEST["fp8"]).to(E4M3)
    else:
        values = relative.round().clamp(-LARGEST[scheme] - in_groups, LARGEST[scheme]).to(torch.int8)
    return QuantizedWeight(scheme, values.flatten(1), scale.squeeze(2))
