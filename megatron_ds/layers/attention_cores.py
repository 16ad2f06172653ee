"""Attention cores: what happens to queries, keys and values, apart from the projections that make them.

A core is made once a micro-batch, by :func:`make_core`, and serves all layers of a stage: it holds what they share
(document bounds, ALiBi biases, a sparse layout) and knows no layer.

Shapes: ``s`` sequence, ``b`` batch, ``n`` heads and ``g`` key/value heads on this rank, ``d`` head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ds.errors import ConfigError
from megatron_ds.kernels.alibi import Alibi
from megatron_ds.kernels.block_attention import Dropout, block_attention, is_preferred, keeps_probabilities
from megatron_ds.kernels.block_layout import BlockLayout
from megatron_ds.kernels.documents import Documents
from megatron_ds.kernels.sparse_attention import sparse_attention
from megatron_ds.kernels.varlen_attention import HALF, takes_varlen, varlen_attention
from megatron_ds.rng import DropoutKeys


class AttentionCore(Protocol):
    """``softmax(q k^T / sqrt(d)) v`` over the keys that a query sees."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: int = 0) -> Tensor:
        """``q [s, b, n, d]``, ``k, v [s, b, g, d]``, any strides -> ``[s, b, n * d]``.

        Query head ``h`` uses key/value head ``h // (n / g)``. ``site`` is the number of this attention among the
        model's dropouts.
        """
        ...


@dataclass(frozen=True)
class AttentionRules:
    """Which keys a query sees, how scores are biased and which probabilities are dropped.

    Attributes:
        causal: a query sees itself and those before it only.
        documents: a query sees its own document only.
        alibi: the biases of this rank's heads.
        window: a query sees only the keys that are fewer places than this away from it.
        softcap: scores are ``softcap * tanh(scores / softcap)``, before any mask.
        dropout: probability of dropping a probability, with ``keys``; without them nothing is dropped.
        first_head: number of this rank's first head in the whole model.
        layout: the blocks that this rank's heads compute, in place of all other rules.
    """

    causal: bool = True
    documents: Documents | None = None
    alibi: Alibi | None = None
    window: int | None = None
    softcap: float | None = None
    dropout: float = 0.0
    keys: DropoutKeys | None = None
    first_head: int = 0
    layout: BlockLayout | None = None

    @property
    def drops(self) -> bool:
        return self.dropout > 0.0 and self.keys is not None

    @property
    def only_causal(self) -> bool:
        """Whether nothing but causality is asked for."""
        rules = (self.alibi, self.documents, self.window, self.softcap)
        return all(rule is None for rule in rules) and not self.drops


MakeCore = Callable[[AttentionRules, int, int, torch.device, torch.dtype], AttentionCore]
"""Makes a core of the rules, the sequence's length, the head dim, the device and the dtype."""


def make_core(
    rules: AttentionRules, length: int, head_dim: int, device: torch.device, dtype: torch.dtype
) -> AttentionCore:
    """The core for queries of ``length`` tokens."""
    if rules.window is not None and rules.window >= length:
        rules = replace(rules, window=None)
    if rules.layout is not None:
        if not rules.only_causal:
            raise ConfigError(
                "block-sparse attention has no ALiBi, window, softcap, document masks or attention dropout: a layout "
                "is all there is, and the same for every sample; use rotary or learned positions, and none of these"
            )
        return SparseCore(rules.layout)
    if is_preferred(
        device.type == "cpu",
        dtype,
        keeps_probabilities(length, head_dim),
        rules.causal,
        not rules.only_causal,
        rules.drops or rules.softcap is not None,
    ):
        return BlockCore(rules)
    cut = rules.documents is not None or rules.window is not None
    if takes_varlen(device.type == "cuda", dtype in HALF, head_dim, cut, rules.alibi is not None):
        return VarlenCore(rules.causal, rules.window, rules.documents)
    bias = None if rules.only_causal else _bias(rules, length, device, dtype)
    return FusedCore(rules.causal, bias)


@dataclass(frozen=True)
class FusedCore:
    """Torch's fused kernel, with a bias where there are other rules than causality.

    Attributes:
        bias: ``[b or 1, n or 1, s, s]`` added to the scores, -inf where a query does not see the key; else None.
    """

    causal: bool
    bias: Tensor | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: int = 0) -> Tensor:
        s, b, n, d = q.shape
        # Of the GPU's kernels only those for half precision without a bias group queries themselves.
        groups = q.device.type == "cpu" or (q.dtype in HALF and self.bias is None)
        if n > k.shape[2] and not groups:
            k, v = (t.repeat_interleave(n // t.shape[2], dim=2) for t in (k, v))
        q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
        causal = self.causal and self.bias is None
        out = F.scaled_dot_product_attention(q, k, v, self.bias, is_causal=causal, enable_gqa=n > k.shape[1])
        return out.permute(2, 0, 1, 3).reshape(s, b, n * d)


class VarlenCore:
    """Variable-length attention over the rows of a batch, or over the documents packed into them; it makes no mask."""

    def __init__(self, causal: bool, window: int | None = None, documents: Documents | None = None):
        self.causal, self.window = causal, window
        self.bounds = None if documents is None else documents.cumulative

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: int = 0) -> Tensor:
        s, b, n, d = q.shape
        if self.bounds is None:
            self.bounds = torch.arange(0, b * s + 1, s, dtype=torch.int32, device=q.device), s
        q, k, v = (t.transpose(0, 1).reshape(b * s, -1, d) for t in (q, k, v))
        out = varlen_attention(q, k, v, *self.bounds, causal=self.causal, window=self.window)
        return out.view(b, s, n * d).transpose(0, 1).contiguous()


@dataclass(frozen=True)
class BlockCore:
    """One block of queries at a time against the keys that it sees; keeps no ``[s, s]`` matrix."""

    rules: AttentionRules

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: int = 0) -> Tensor:
        r = self.rules
        dropout = None
        if r.dropout > 0.0 and r.keys is not None:
            # The sequence is whole here, so rows start at position 0.
            dropout = Dropout(r.dropout, r.keys.row_keys(site, q.shape[0], 0), r.first_head)
        return block_attention(
            q, k, v, causal=r.causal, documents=r.documents, alibi=r.alibi, dropout=dropout, window=r.window,
            softcap=r.softcap,
        )  # fmt: skip


@dataclass(frozen=True)
class SparseCore:
    """The live blocks of a layout and no others."""

    layout: BlockLayout

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: int = 0) -> Tensor:
        s, b, n, d = q.shape
        q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
        return sparse_attention(q, k, v, self.layout).permute(2, 0, 1, 3).reshape(s, b, n * d)


def _bias(rules: AttentionRules, length: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """``[b or 1, n or 1, s, s]``: ALiBi, and -inf where a query does not see the key."""
    seen = torch.ones(1, 1, length, length, dtype=torch.bool, device=device)
    places = torch.arange(length, device=device)
    if rules.causal:
        seen = seen.tril()
    if rules.window is not None:
        seen = seen & ((places - places.unsqueeze(1)).abs() < rules.window)
    if rules.documents is not None:
        seen = seen & rules.documents.same()
    zero = torch.zeros((), dtype=dtype, device=device)
    if rules.alibi is not None:
        wide = torch.promote_types(dtype, torch.float32)
        zero = rules.alibi.bias(places, places, wide).to(dtype)
    return torch.where(seen, zero, float("-inf"))
