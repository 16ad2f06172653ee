"""LayerNorm and RMSNorm whose weights know that under sequence parallelism they see only part of the sequence.

Shapes: ``s`` sequence, ``b`` batch, ``f`` features on this rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_ds import comm
from megatron_ds.kernels.norm import NORM, add_norm, layer_norm, rms_norm
from megatron_ds.layers.linear import BiasOffer, replicated_parameter
from megatron_ds.mesh import Axis
from megatron_ds.shard import ShardedDim, ShardSpec, empty_parameter


class Norm(nn.Module):
    """Normalise the last dim: ``kind="layernorm"`` (weight and, with ``bias``, bias) or ``"rmsnorm"`` (weight).

    Args:
        zero_centered: the weight is kept as its difference from 1.
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
        bias: bool = True,
        zero_centered: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.kind, self.shape, self.eps, self.zero_centered = kind, (size,), eps, zero_centered
        self.weight = replicated_parameter(
            f"{name}.weight", self.shape, "zeros" if zero_centered else "ones", tp, partial, device=device, dtype=dtype
        )
        self.bias = (
            replicated_parameter(f"{name}.bias", self.shape, "zeros", tp, partial, device=device, dtype=dtype)
            if kind == "layernorm" and bias
            else None
        )

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        p: float = 0.0,
        row_keys: Tensor | None = None,
        offer: BiasOffer | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The norm of ``x``; with a residual, the norm of ``residual + dropout(x)``, and that sum itself.

        ``offer``: of the linear layer that gave ``x``. The kernel takes it; plain torch would gain nothing by it.
        """
        weight = _from_zero(self.weight) if self.zero_centered else self.weight
        if residual is not None:
            x_bias = offer.take() if offer is not None and NORM.choose(x) == "triton" else None
            return add_norm(
                x, residual, weight, self.bias, self.eps, kind=self.kind, p=p, row_keys=row_keys, x_bias=x_bias
            )
        if self.kind == "layernorm":
            return layer_norm(x, weight, self.bias, self.eps)
        return rms_norm(x, weight, self.eps)


def _from_zero(weight: Tensor) -> Tensor:
    """``1 + weight`` in fp32 at least: half precision would round away what was trained."""
    return 1.0 + weight.to(torch.promote_types(weight.dtype, torch.float32))


class SplitRMSNorm(nn.Module):
    """RMSNorm over features that are split over tp: ``[..., f] -> [..., f]``, with the mean square of all of them.

    Args:
        size: features of all ranks together.
    """

    def __init__(
        self,
        name: str,
        size: int,
        eps: float,
        *,
        tp: Axis,
        zero_centered: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.size, self.eps, self.tp, self.zero_centered = size, eps, tp, zero_centered
        init = "zeros" if zero_centered else "ones"
        spec = ShardSpec(f"{name}.weight", (size,), (ShardedDim.over(tp, 0),), init=init, weight_decay=False)  # type: ignore[arg-type]
        self.weight = empty_parameter(spec, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        square = comm.sum_over_region(wide.square().sum(-1, keepdim=True), self.tp) / self.size
        weight = _from_zero(self.weight) if self.zero_centered else self.weight
        return (wide * torch.rsqrt(square + self.eps) * weight).to(x.dtype)
