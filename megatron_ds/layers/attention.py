"""Self-attention split over heads: the projections, QK-norm and rotary around an attention core.

Shapes: ``s`` sequence, ``b`` batch, ``h`` hidden, ``g`` key/value heads on this rank, ``q`` queries a key/value head,
``n = g * q`` heads on this rank, ``d`` head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_ds.kernels.rotary import rotary
from megatron_ds.layers.attention_cores import AttentionCore
from megatron_ds.layers.linear import ColumnParallelLinear, RowParallelLinear
from megatron_ds.layers.norm import Norm
from megatron_ds.mesh import Axis
from megatron_ds.rng import DropoutKeys
from megatron_ds.shard import Matrices, consists_of


@dataclass(frozen=True)
class AttentionInputs:
    """What every block of a stage shares for one micro-batch, computed once.

    Attributes:
        positions: ``[s, b]`` int64.
        core: what happens to queries, keys and values.
        rotary: cos and sin ``[s, b, 1, d]``, or None.
        keys: of the dropouts outside the core; None in evaluation.
    """

    positions: Tensor
    core: AttentionCore
    rotary: tuple[Tensor, Tensor] | None = None
    keys: DropoutKeys | None = None


@dataclass(frozen=True)
class AttentionConfig:
    """Sizes of the whole model's self-attention.

    Attributes:
        kv_heads: key/value heads; tensor parallelism splits by them.
        init_std: of the first projection's weight; ``out_std`` of the second's.
    """

    hidden_size: int
    kv_heads: int
    queries_per_kv_head: int
    head_dim: int
    bias: bool
    qkv_bias: bool
    qk_norm: bool
    norm_eps: float
    init_std: float
    out_std: float


class SelfAttention(nn.Module):
    """``[s(/tp), b, h] -> [s(/tp), b, h]``.

    Args:
        site: dropout site number of the attention probabilities.
        recompute_core: compute the attention core again in the backward pass (selective recomputation,
            Korthikanti et al. 2022, section 5).
    """

    def __init__(
        self,
        name: str,
        config: AttentionConfig,
        *,
        site: int,
        recompute_core: bool,
        tp: Axis,
        sequence_parallel: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        c = self.config = config
        self.local_kv_heads = c.kv_heads // tp.size
        self.site, self.recompute_core = site, recompute_core
        make: dict[str, Any] = {"tp": tp, "sequence_parallel": sequence_parallel, "device": device, "dtype": dtype}
        self.qkv = ColumnParallelLinear(
            f"{name}.qkv",
            c.hidden_size,
            (c.kv_heads, c.queries_per_kv_head + 2, c.head_dim),
            shard_dim=0,
            bias=c.qkv_bias,
            init_std=c.init_std,
            **make,
        )
        consists_of(self.qkv.weight, Matrices(1, (c.queries_per_kv_head, 1, 1)))
        # Each rank's gradient of these weights covers its own heads only, with or without sequence parallelism.
        norm = partial(
            Norm, kind="rmsnorm", size=c.head_dim, eps=c.norm_eps, tp=tp, partial=True, device=device, dtype=dtype
        )
        self.q_norm = norm(f"{name}.q_norm") if c.qk_norm else None
        self.k_norm = norm(f"{name}.k_norm") if c.qk_norm else None
        self.out = RowParallelLinear(
            f"{name}.out",
            c.kv_heads * c.queries_per_kv_head * c.head_dim,
            c.hidden_size,
            bias=c.bias,
            init_std=c.out_std,
            **make,
        )

    def forward(self, x: Tensor, inputs: AttentionInputs) -> Tensor:
        c, qkv = self.config, self.qkv(x)
        s, b, _ = qkv.shape
        qkv = qkv.view(s, b, self.local_kv_heads, c.queries_per_kv_head + 2, c.head_dim)
        # One split: slices would each fill a gradient of the whole with zeros in the backward pass.
        q, k, v = qkv.split([c.queries_per_kv_head, 1, 1], dim=-2)
        q, k, v = q.reshape(s, b, self.local_kv_heads * c.queries_per_kv_head, c.head_dim), k.squeeze(-2), v.squeeze(-2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if inputs.rotary is not None:
            q, k = rotary(q, k, *inputs.rotary)
        attend = inputs.core.attend
        if self.recompute_core and torch.is_grad_enabled():
            attended = checkpoint(attend, q, k, v, self.site, use_reentrant=False, preserve_rng_state=False)
        else:
            attended = attend(q, k, v, self.site)
        return self.out(attended)
