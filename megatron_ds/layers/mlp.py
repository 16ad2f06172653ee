"""The two-matmul MLP: GELU or ReLU, or SwiGLU and GeGLU with gate and up projection in one matmul."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from megatron_ds.kernels.activation import BIAS_GELU, GELU, GELU_TANH, SILU, bias_gelu, gated
from megatron_ds.kernels.cpu.compiled_activation import compiled_activation
from megatron_ds.layers.linear import BiasOffer, ColumnParallelLinear, RowParallelLinear
from megatron_ds.mesh import Axis
from megatron_ds.shard import Matrices, set_matrices

# What the gate of a gated MLP goes through.
GATES: Mapping[str, str] = MappingProxyType({"swiglu": SILU, "geglu": GELU, "geglu_tanh": GELU_TANH})


class MLP(nn.Module):
    """``[s(/tp), b, h] -> [s(/tp), b, h]`` through ``ffn`` features split over tp.

    ``activation``: ``"gelu"`` (erf), ``"gelu_tanh"``, ``"relu"``, or ``"swiglu"``, ``"geglu"`` (erf) and
    ``"geglu_tanh"`` (Shazeer 2020, eq. 6), whose weight is ``[2, ffn, h]``, gate first. ``stds``: initial standard
    deviations of the first and of the second matrix.

    Attributes:
        recompute_activation: the second matrix's input is not kept, but computed again in the backward pass.
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
        stds: tuple[float, float],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.relu = activation == "relu"
        self.gate, self.approximate = GATES.get(activation), "tanh" if activation == "gelu_tanh" else "none"
        make: dict[str, Any] = {
            "bias": bias,
            "tp": tp,
            "sequence_parallel": sequence_parallel,
            "device": device,
            "dtype": dtype,
        }
        if self.gate is not None:
            self.gate_up = ColumnParallelLinear(
                f"{name}.gate_up",
                hidden_size,
                (2, ffn_size),
                shard_dim=1,
                init_std=stds[0],
                **make,
            )
            set_matrices(self.gate_up.weight, Matrices(0, (1, 1)))
        else:
            self.up = ColumnParallelLinear(
                f"{name}.up", hidden_size, (ffn_size,), shard_dim=0, init_std=stds[0], **make
            )
        self.down = RowParallelLinear(f"{name}.down", ffn_size, hidden_size, init_std=stds[1], **make)
        self._activation: Callable[[Tensor], Tensor] | None = None  # in place of the plain one
        self.recompute_activation = False

    def forward(self, x: Tensor, offer: BiasOffer | None = None, unused: bool = False) -> Tensor:
        """``offer``: for what is the only one to use the output. ``unused``: nobody does, see RowParallelLinear."""
        # The bias is already in: the matmul adds it at no cost. Its gradient is the activation's to make.
        between = BiasOffer()
        x = self.gate_up(x) if self.gate is not None else self.up(x, between)
        again = partial(self._activate, x.detach(), BiasOffer()) if self.recompute_activation else None
        activated = self._activation(x) if self._activation is not None else self._activate(x, between)
        return self.down(activated, offer, again, unused)

    def _activate(self, x: Tensor, between: BiasOffer) -> Tensor:
        if self.gate is not None:
            return gated(x, self.gate)
        if self.relu:
            return x.relu()
        bias = between.take() if BIAS_GELU.choose(x) == "triton" else None
        return bias_gelu(x, bias, self.approximate, added=True)

    def compile_activation(self) -> None:
        """``torch.compile`` the activation alone."""
        if not self.relu:  # which has nothing to gain
            self._activation = compiled_activation(self.gate, self.approximate)

    def activate_by_rows(self) -> None:
        """Compute the activation of each row for itself, so that its bits do not depend on how many others there are.

        On a CPU torch cuts a large tensor between threads, wherever that is in a row, and what is left of a vector at a
        cut is computed by other functions than whole vectors are.
        """
        self._activation = lambda x: torch.cat([self._activate(row, BiasOffer()) for row in x.split(1)])
