"""The two-matmul MLP: GELU, or SwiGLU with gate and up projection in one matmul."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megatron_ds.kernels.activation import bias_gelu, gated
from megatron_ds.layers.linear import ColumnParallelLinear, RowParallelLinear
from megatron_ds.mesh import Axis


class MLP(nn.Module):
    """``[s(/tp), b, h] -> [s(/tp), b, h]`` through ``ffn`` features split over tp.

    ``activation``: ``"gelu"`` (erf), ``"gelu_tanh"``, or ``"swiglu"`` (Shazeer 2020, eq. 6), whose weight is
    ``[2, ffn, h]``, gate first.
    """

    def __init__(
        self,
        name: str,
        hidden_size: int,
        ffn_size: int,
        activation: str,
        *,
        bias: bool,
        tp: Axis,
        sequence_parallel: bool,
        init_std: float,
        out_std: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.activation = activation
        make: dict[str, Any] = {
            "bias": bias,
            "tp": tp,
            "sequence_parallel": sequence_parallel,
            "device": device,
            "dtype": dtype,
        }
        if activation == "swiglu":
            self.gate_up = ColumnParallelLinear(
                f"{name}.gate_up", hidden_size, (2, ffn_size), shard_dim=1, init_std=init_std, **make
            )
        else:
            self.up = ColumnParallelLinear(
                f"{name}.up", hidden_size, (ffn_size,), shard_dim=0, init_std=init_std, **make
            )
        self.down = RowParallelLinear(f"{name}.down", ffn_size, hidden_size, init_std=out_std, **make)

    def forward(self, x: Tensor) -> Tensor:
        if self.activation == "swiglu":
            return self.down(gated(self.gate_up(x)))
        # The bias is already in: the matmul adds it at no cost.
        return self.down(bias_gelu(self.up(x), None, "tanh" if self.activation == "gelu_tanh" else "none"))
