"""The two-matmul MLP: GELU, or SwiGLU and GeGLU with gate and up projection in one matmul."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ds.kernels.activation import GELU, SILU, bias_gelu, gated, gated_reference
from megatron_ds.layers.linear import ColumnParallelLinear, RowParallelLinear
from megatron_ds.mesh import Axis

# What the gate of a gated MLP goes through.
GATES: Mapping[str, str] = MappingProxyType({"swiglu": SILU, "geglu": GELU})


class MLP(nn.Module):
    """``[s(/tp), b, h] -> [s(/tp), b, h]`` through ``ffn`` features split over tp.

    ``activation``: ``"gelu"`` (erf), ``"gelu_tanh"``, or ``"swiglu"`` and ``"geglu"`` (Shazeer 2020, eq. 6), whose
    weight is ``[2, ffn, h]``, gate first.
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
        self.activation, self.gate = activation, GATES.get(activation)
        make: dict[str, Any] = {
            "bias": bias,
            "tp": tp,
            "sequence_parallel": sequence_parallel,
            "device": device,
            "dtype": dtype,
        }
        if self.gate is not None:
            self.gate_up = ColumnParallelLinear(
                f"{name}.gate_up", hidden_size, (2, ffn_size), shard_dim=1, init_std=init_std, **make
            )
        else:
            self.up = ColumnParallelLinear(
                f"{name}.up", hidden_size, (ffn_size,), shard_dim=0, init_std=init_std, **make
            )
        self.down = RowParallelLinear(f"{name}.down", ffn_size, hidden_size, init_std=out_std, **make)

        self._compiled: Callable[[Tensor], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        # The bias is already in: the matmul adds it at no cost.
        x = self.up(x) if self.gate is None else self.gate_up(x)
        return self.down(self._compiled(x) if self._compiled is not None else self._activate(x))

    def _activate(self, x: Tensor) -> Tensor:
        if self.gate is not None:
            return gated(x, self.gate)
        return bias_gelu(x, None, "tanh" if self.activation == "gelu_tanh" else "none")

    def compile_activation(self) -> None:
        """``torch.compile`` the activation alone."""
        self._compiled = torch.compile(_ACTIVATIONS[self.activation])


def _gelu_tanh(x: Tensor) -> Tensor:
    """GELU's tanh form as ``x sigmoid(2 u)``: the same function, which compiles to half the time of torch's kernel."""
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    return (y * torch.sigmoid(y * (_SLOPE + _SLOPE * 0.044715 * y * y))).to(x.dtype)


_SLOPE = 2.0 * math.sqrt(2.0 / math.pi)
_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "gelu": F.gelu,
        "gelu_tanh": _gelu_tanh,
        **{name: partial(gated_reference, activation=gate) for name, gate in GATES.items()},
    }
)
