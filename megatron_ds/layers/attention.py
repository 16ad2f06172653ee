"""Self-attention split over heads: the projections, QK-norm and rotary around an attention core.

Shapes: ``s`` sequence, ``b`` batch, ``h`` hidden, ``g`` key/value heads on this rank, ``q`` queries a key/value head,
``n = g * q`` heads on this rank, ``d`` head dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_ds.kernels.heads import HEADS, split_heads
from megatron_ds.kernels.rotary import rotary
from megatron_ds.layers.attention_cores import AttentionCore
from megatron_ds.layers.linear import BiasOffer, ColumnParallelLinear, RepeatedKVLinear, RowParallelLinear
from megatron_ds.layers.norms import Norm, SplitRMSNorm
from megatron_ds.mesh import Axis
from megatron_ds.rng import DropoutKeys
from megatron_ds.shard import Matrices, set_matrices


@dataclass(frozen=True)
class AttentionInputs:
    """What the blocks of a stage that see the same keys share for one micro-batch, computed once.

    Attributes:
        positions: ``[s, b]`` int64.
        core: what happens to queries, keys and values.
        rotary: cos and sin ``[s, b, 1, r]`` for the first ``r`` dims of a head, or None.
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
        kv_heads: key/value heads; tensor parallelism splits by them, and repeats them where there are fewer than ranks.
        init_std: of the first projection's weight; ``out_std`` of the second's.
        qk_norm: RMSNorm of queries and keys, of each ``"head"`` or of all heads at once (``"projection"``).
        score_scalar: scores are divided by its square root; None: by that of ``head_dim``, as a core does.
    """

    hidden_size: int
    kv_heads: int
    queries_per_kv_head: int
    head_dim: int
    bias: bool
    qkv_bias: bool
    qk_norm: Literal["head", "projection"] | None
    norm_eps: float
    init_std: float
    out_std: float
    zero_centered_norm: bool = False
    rotary_interleaved: bool = False
    score_scalar: float | None = None

    @property
    def query_factor(self) -> float | None:
        """What queries are multiplied with, so that a core which divides by sqrt(head_dim) divides by another root."""
        return None if self.score_scalar in (None, self.head_dim) else math.sqrt(self.head_dim / self.score_scalar)


class HeadProjection(nn.Module):
    """``[s(/tp), b, h]`` to the queries, keys and values of this rank's heads, with their norms."""

    def __init__(
        self,
        name: str,
        config: AttentionConfig,
        *,
        tp: Axis,
        sequence_parallel: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        c = self.config = config
        self.local_kv_heads = max(1, c.kv_heads // tp.size)
        make: dict[str, Any] = {"tp": tp, "sequence_parallel": sequence_parallel, "device": device, "dtype": dtype}
        shape = (c.kv_heads, c.queries_per_kv_head + 2, c.head_dim)
        make_qkv: dict[str, Any] = {**make, "bias": c.qkv_bias, "init_std": c.init_std}
        self.qkv: ColumnParallelLinear | RepeatedKVLinear
        if c.kv_heads < tp.size:
            self.qkv = RepeatedKVLinear(f"{name}.qkv", c.hidden_size, shape, **make_qkv)
        else:
            self.qkv = ColumnParallelLinear(f"{name}.qkv", c.hidden_size, shape, shard_dim=0, **make_qkv)
        set_matrices(self.qkv.weight, Matrices(1, (c.queries_per_kv_head, 1, 1), heads=2))
        place: dict[str, Any] = {"tp": tp, "device": device, "dtype": dtype}
        self.q_norm = _qk_norm(f"{name}.q_norm", c, c.kv_heads * c.queries_per_kv_head, **place)
        self.k_norm = _qk_norm(f"{name}.k_norm", c, c.kv_heads, **place)

    def heads(self, x: Tensor, table: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """``q [s, b, n, d]``, ``k, v [s, b, g, d]``; rotated by ``table``, cos and sin of the positions, behind the
        norms."""
        c, offer = self.config, BiasOffer()
        qkv = self.qkv(x, offer)
        bias = offer.take() if HEADS.choose(qkv) == "triton" else None
        interleaved = c.rotary_interleaved
        if self.q_norm is None or self.k_norm is None:
            return split_heads(qkv, self.local_kv_heads, c.head_dim, table, interleaved=interleaved, bias=bias)
        q, k, v = split_heads(qkv, self.local_kv_heads, c.head_dim, bias=bias)
        q, k = _normed(self.q_norm, q), _normed(self.k_norm, k)
        if table is not None:
            q, k = rotary(q, k, *table, interleaved=interleaved)
        return q, k, v


class SelfAttention(HeadProjection):
    """``[s(/tp), b, h] -> [s(/tp), b, h]``.

    Args:
        site: dropout site number of the attention probabilities.
        recompute_core: compute the attention core again in the backward pass (selective recomputation,
            Korthikanti et al. 2022, section 5).
    """

    def __init__(self, name: str, config: AttentionConfig, *, site: int, recompute_core: bool, **make: Any):
        super().__init__(name, config, **make)
        c = config
        self.site, self.recompute_core = site, recompute_core
        self.out = RowParallelLinear(
            f"{name}.out",
            c.kv_heads * c.queries_per_kv_head * c.head_dim,
            c.hidden_size,
            bias=c.bias,
            init_std=c.out_std,
            **make,
        )

    def forward(self, x: Tensor, inputs: AttentionInputs, offer: BiasOffer | None = None) -> Tensor:
        """``offer``: for what is the only one to use the output."""
        return self.out(self.attend(*self.heads(x, inputs.rotary), inputs), offer)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, inputs: AttentionInputs) -> Tensor:
        """``[s, b, n * d]``: the attention core, behind the norms and rotary of :meth:`heads`."""
        if self.config.query_factor is not None:
            q = q * self.config.query_factor
        attend = inputs.core.attend
        if self.recompute_core and torch.is_grad_enabled():
            return checkpoint(attend, q, k, v, self.site, use_reentrant=False, preserve_rng_state=False)
        return attend(q, k, v, self.site)


def _qk_norm(name: str, c: AttentionConfig, heads: int, **place: Any) -> Norm | SplitRMSNorm | None:
    """The norm of the queries or keys of ``heads`` heads."""
    if c.qk_norm is None:
        return None
    if c.qk_norm == "projection":
        return SplitRMSNorm(name, heads * c.head_dim, c.norm_eps, zero_centered=c.zero_centered_norm, **place)
    # Each rank's gradient of the weight covers its own heads only, with or without sequence parallelism.
    return Norm(name, "rmsnorm", c.head_dim, c.norm_eps, partial=True, zero_centered=c.zero_centered_norm, **place)


def _normed(norm: Norm | SplitRMSNorm, x: Tensor) -> Tensor:
    """``x [s, b, heads, d]``."""
    if isinstance(norm, Norm):
        return norm(x)
    return norm(x.flatten(2)).view(x.shape)
