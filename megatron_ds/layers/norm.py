"""LayerNorm and RMSNorm whose weights know that under sequence parallelism they see only part of the sequence."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_ds.kernels.norm import add_norm, layer_norm, rms_norm
from megatron_ds.layers.linear import replicated_parameter
from megatron_ds.mesh import Axis


class Norm(nn.Module):
    """Normalise the last dim: ``kind="layernorm"`` (weight and bias) or ``"rmsnorm"`` (weight).

    Args:
        partial: each tensor-parallel rank sees only its share of what the weight acts on (its part of the sequence,
            or its heads), so the weight's gradient is summed over tp.
    """

    def __init__(
        self,
        name: str,
        kind: str,
        size: int,
        eps: float,
        *,
        tp: Axis,
        partial: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.kind, self.shape, self.eps = kind, (size,), eps
        self.weight = replicated_parameter(
            f"{name}.weight", self.shape, "ones", tp, partial, device=device, dtype=dtype
        )
        self.bias = (
            replicated_parameter(f"{name}.bias", self.shape, "zeros", tp, partial, device=device, dtype=dtype)
            if kind == "layernorm"
            else None
        )

    def forward(
        self, x: Tensor, residual: Tensor | None = None, p: float = 0.0, row_keys: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The norm of ``x``; with a residual, the norm of ``residual + dropout(x)``, and that sum itself."""
        if residual is not None:
            return add_norm(x, residual, self.weight, self.bias, self.eps, kind=self.kind, p=p, row_keys=row_keys)
        if self.kind == "layernorm":
            return layer_norm(x, self.weight, self.bias, self.eps)
        return rms_norm(x, self.weight, self.eps)
