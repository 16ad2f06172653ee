"""Self-attention split over heads, causal or not: GQA, rotary, ALiBi, document masking, QK-norm, dropout.

Shapes: ``s`` sequence, ``b`` batch, ``h`` hidden, ``g`` key/value groups on this rank, ``q`` queries a group,
``n = g * q`` heads on this rank, ``d`` head dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_ds.errors import ConfigError
from megatron_ds.kernels.block_layout import BlockLayout
from megatron_ds.kernels.causal_attention import causal_attention, is_faster
from megatron_ds.kernels.rotary import rotary
from megatron_ds.kernels.softmax import scaled_masked_softmax
from megatron_ds.kernels.sparse_attention import sparse_attention
from megatron_ds.layers.linear import ColumnParallelLinear, RowParallelLinear
from megatron_ds.layers.norm import Norm
from megatron_ds.layers.position import alibi_bias, alibi_slopes
from megatron_ds.mesh import Axis
from megatron_ds.rng import DropoutKeys, keep_mask


@dataclass(frozen=True)
class AttentionInputs:
    """What every block of a stage shares for one micro-batch, computed once.

    Attributes:
        positions: ``[s, b]`` int64.
        rotary: cos and sin ``[s, b, 1, d]``, or None.
        same_document: ``[b, 1, s, s]`` bool, True where query and key are of one document; None: no boundaries.
        keys: dropout keys, None in evaluation.
        layout: the blocks that this rank's heads compute; None: all. Not with documents, ALiBi or attention dropout.
    """

    positions: Tensor
    rotary: tuple[Tensor, Tensor] | None = None
    same_document: Tensor | None = None
    keys: DropoutKeys | None = None
    layout: BlockLayout | None = None


class SelfAttention(nn.Module):
    """``[s(/tp), b, h] -> [s(/tp), b, h]``.

    Args:
        groups: key/value heads of the whole model; tensor parallelism splits by group.
        causal: whether a token sees itself and those before it only. With a layout, the layout decides.
        site: dropout site number of the attention probabilities.
        recompute_core: compute the attention core again in the backward pass (selective recomputation,
            Korthikanti et al. 2022, section 5).
    """

    def __init__(
        self,
        name: str,
        hidden_size: int,
        groups: int,
        queries_per_kv_head: int,
        head_dim: int,
        *,
        causal: bool = True,
        bias: bool,
        qkv_bias: bool,
        alibi: bool,
        qk_norm: bool,
        norm_eps: float,
        dropout: float,
        site: int,
        recompute_core: bool,
        tp: Axis,
        sequence_parallel: bool,
        init_std: float,
        out_std: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.queries_per_kv_head, self.head_dim, self.causal = queries_per_kv_head, head_dim, causal
        self.local_groups = groups // tp.size
        self.dropout, self.site, self.recompute_core = dropout, site, recompute_core
        self.first_head = tp.rank * self.local_groups * queries_per_kv_head
        local_heads = self.local_groups * queries_per_kv_head
        slopes = alibi_slopes(groups * queries_per_kv_head)[self.first_head : self.first_head + local_heads]
        self.slopes: Tensor | None
        self.register_buffer("slopes", slopes.to(device) if alibi else None, persistent=False)
        make: dict[str, Any] = {"tp": tp, "sequence_parallel": sequence_parallel, "device": device, "dtype": dtype}
        self.qkv = ColumnParallelLinear(
            f"{name}.qkv",
            hidden_size,
            (groups, queries_per_kv_head + 2, head_dim),
            shard_dim=0,
            bias=qkv_bias,
            init_std=init_std,
            **make,
        )
        # Each rank's gradient of these weights covers its own heads only, with or without sequence parallelism.
        norm = partial(
            Norm, kind="rmsnorm", size=head_dim, eps=norm_eps, tp=tp, partial=True, device=device, dtype=dtype
        )
        self.q_norm = norm(f"{name}.q_norm") if qk_norm else None
        self.k_norm = norm(f"{name}.k_norm") if qk_norm else None
        self.out = RowParallelLinear(
            f"{name}.out",
            groups * queries_per_kv_head * head_dim,
            hidden_size,
            bias=bias,
            init_std=out_std,
            **make,
        )

    def forward(self, x: Tensor, inputs: AttentionInputs) -> Tensor:
        qkv = self.qkv(x)
        s, b, _ = qkv.shape
        qkv = qkv.view(s, b, self.local_groups, self.queries_per_kv_head + 2, self.head_dim)
        # One split: slices would each fill a gradient of the whole with zeros in the backward pass.
        q, k, v = qkv.split([self.queries_per_kv_head, 1, 1], dim=-2)
        heads = self.local_groups * self.queries_per_kv_head
        q, k, v = q.reshape(s, b, heads, self.head_dim), k.squeeze(-2), v.squeeze(-2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if inputs.rotary is not None:
            q, k = rotary(q, k, *inputs.rotary)
        if self.recompute_core and torch.is_grad_enabled():
            core = checkpoint(self._core, q, k, v, inputs, use_reentrant=False, preserve_rng_state=False)
        else:
            core = self._core(q, k, v, inputs)
        return self.out(core)

    def _core(self, q: Tensor, k: Tensor, v: Tensor, inputs: AttentionInputs) -> Tensor:
        """``q [s, b, n, d]``, ``k, v [s, b, g, d]`` -> ``[s, b, n * d]``."""
        s, b, n, d = q.shape
        dropped = self.dropout > 0.0 and inputs.keys is not None
        plain = self.slopes is None and inputs.same_document is None and not dropped
        if inputs.layout is not None:
            if not plain:
                raise ConfigError(
                    "block-sparse attention has no ALiBi, document masks or attention dropout: a layout is the same "
                    "for every sample; use rotary or learned positions, no document_ids and attention_dropout=0"
                )
            q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
            out = sparse_attention(q, k, v, inputs.layout)
            return out.permute(2, 0, 1, 3).reshape(s, b, n * d)
        if plain and self.causal and is_faster(q):
            return causal_attention(q, k, v)
        if self.queries_per_kv_head > 1:
            k, v = (t.repeat_interleave(self.queries_per_kv_head, dim=2) for t in (k, v))
        q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))  # [b, n, s, d]
        if dropped and inputs.keys is not None:
            out = self._dropout_attention(q, k, v, inputs, inputs.keys)
        else:
            bias = self._bias(inputs, q)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=self.causal and bias is None)
        return out.permute(2, 0, 1, 3).reshape(s, b, n * d)

    def _bias(self, inputs: AttentionInputs, q: Tensor) -> Tensor | None:
        """``[b, n or 1, s, s]`` added to the scores, -inf where attention is not allowed; None: causality at most."""
        if self.slopes is None and inputs.same_document is None:
            return None
        s = q.shape[2]
        allowed = torch.ones(s, s, dtype=torch.bool, device=q.device)
        if self.causal:
            allowed = allowed.tril()
        if inputs.same_document is not None:
            allowed = allowed & inputs.same_document
        bias = torch.zeros((), dtype=q.dtype, device=q.device)
        if self.slopes is not None:
            bias = alibi_bias(self.slopes, inputs.positions, q.dtype)
        return torch.where(allowed, bias, float("-inf"))

    def _dropout_attention(self, q: Tensor, k: Tensor, v: Tensor, inputs: AttentionInputs, keys: DropoutKeys) -> Tensor:
        """The same attention with dropped probabilities, in plain matmuls: O(s^2) memory, but the same elements are
        dropped on every mesh, which a fused kernel's own generator does not give."""
        s = q.shape[2]
        # Scores of fp16, which ends at 65,504, are fp32; and scaled before they are summed, as in a fused kernel.
        wide = torch.float32 if q.dtype == torch.float16 else q.dtype
        scores = (q.to(wide) * (1.0 / math.sqrt(q.shape[-1]))) @ k.to(wide).transpose(-2, -1)
        # ALiBi by place and not by position: where positions begin anew, a mask lies between.
        probabilities = scaled_masked_softmax(
            scores, causal=self.causal, mask=inputs.same_document, slopes=self.slopes
        ).to(q.dtype)
        # The sequence is whole here, so rows start at position 0; the element within a row is (global head, key).
        rows = keys.row_keys(self.site, s, 0).t()  # [b, s]
        heads = torch.arange(self.first_head, self.first_head + q.shape[1], device=q.device)
        columns = torch.arange(s, device=q.device) + heads.unsqueeze(1) * s  # [n, s]
        mask = torch.stack([keep_mask(rows, head_columns, self.dropout) for head_columns in columns], dim=1)
        return (probabilities * mask.to(q.dtype) / (1.0 - self.dropout)) @ v
