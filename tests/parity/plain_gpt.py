"""The independent judge of the one-process run: a decoder in plain torch, as a textbook would write it.

Nothing of ours is imported. Batch first, one matrix a projection, attention a loop over samples, documents and heads,
losses from ``F.cross_entropy``.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainAttention(nn.Module):
    def __init__(
        self, width: int, heads: int, kv_heads: int, head_dim: int, bias: bool, position: str, qk_norm: bool
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.position = heads, kv_heads, head_dim, position
        self.query = nn.Linear(width, heads * head_dim, bias=bias)
        self.key = nn.Linear(width, kv_heads * head_dim, bias=bias)
        self.value = nn.Linear(width, kv_heads * head_dim, bias=bias)
        self.output = nn.Linear(heads * head_dim, width, bias=bias)
        if qk_norm:
            self.query_norm = nn.RMSNorm(head_dim, eps=1e-5)
            self.key_norm = nn.RMSNorm(head_dim, eps=1e-5)

    def forward(self, x: Tensor, positions: Tensor, documents: Tensor) -> Tensor:
        query = self.query(x).unflatten(-1, (self.heads, self.head_dim))
        key = self.key(x).unflatten(-1, (self.kv_heads, self.head_dim))
        value = self.value(x).unflatten(-1, (self.kv_heads, self.head_dim))
        if hasattr(self, "query_norm"):
            query, key = self.query_norm(query), self.key_norm(key)
        result = []
        for sample in range(len(x)):
            flat_shards = []
            for document in documents[sample].unique_consecutive():
                here = documents[sample] == document
                heads = [
                    self.head(
                        query[sample, here, head],
                        key[sample, here, head // (self.heads // self.kv_heads)],
                        value[sample, here, head // (self.heads // self.kv_heads)],
                        positions[sample, here],
                        head,
                    )
                    for head in range(self.heads)
                ]
                flat_shards.append(torch.cat(heads, dim=-1))
            result.append(torch.cat(flat_shards))
        return self.output(torch.stack(result))

    def head(self, query: Tensor, key: Tensor, value: Tensor, positions: Tensor, head: int) -> Tensor:
        if self.position == "rope":
            query, key = rotate(query, positions), rotate(key, positions)
        scores = query @ key.T / math.sqrt(self.head_dim)
        if self.position == "alibi":
            slope = 2.0 ** (-8.0 * (head + 1) / self.heads)  # for a power of two
            scores = scores - slope * (positions.unsqueeze(1) - positions.unsqueeze(0))
        future = torch.ones_like(scores, dtype=torch.bool).triu(1)
        return scores.masked_fill(future, -torch.inf).softmax(dim=-1) @ value


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary embedding of ``x`` ``[s, d]``: dims i and i + d / 2 are one complex number; angles are fp32."""
    half = x.shape[-1] // 2
    angles = positions.float().unsqueeze(1) * (1.0 / 10000.0 ** (torch.arange(0, 2 * half, 2).float() / (2 * half)))
    turned = torch.complex(x[:, :half], x[:, half:]) * torch.complex(angles.cos().double(), angles.sin().double())
    return torch.cat((turned.real, turned.imag), dim=-1)


class PlainBlock(nn.Module):
    def __init__(self, width: int, inner: int, attention: PlainAttention, llama: bool, exact_gelu: bool) -> None:
        super().__init__()
        self.exact_gelu = exact_gelu
        self.attention = attention
        self.first_norm = nn.RMSNorm(width, eps=1e-5) if llama else nn.LayerNorm(width)
        self.second_norm = nn.RMSNorm(width, eps=1e-5) if llama else nn.LayerNorm(width)
        self.gate = nn.Linear(width, inner, bias=False) if llama else None
        self.up = nn.Linear(width, inner, bias=not llama)
        self.down = nn.Linear(inner, width, bias=not llama)

    def forward(self, x: Tensor, positions: Tensor, documents: Tensor) -> Tensor:
        x = x + self.attention(self.first_norm(x), positions, documents)
        y = self.second_norm(x)
        if self.gate is not None:
            return x + self.down(F.silu(self.gate(y)) * self.up(y))
        return x + self.down(F.gelu(self.up(y), approximate="none" if self.exact_gelu else "tanh"))


class PlainGPT(nn.Module):
    """``architecture``: ``gpt2``, ``llama`` or ``bloom``."""

    def __init__(
        self,
        architecture: str,
        *,
        layers: int,
        width: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        inner: int,
        vocabulary: int,
        length: int,
        tied: bool,
        qk_norm: bool,
    ) -> None:
        super().__init__()
        llama = architecture == "llama"
        position = {"gpt2": "learned", "llama": "rope", "bloom": "alibi"}[architecture]
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width) if architecture == "gpt2" else None
        self.tokens_norm = nn.LayerNorm(width) if architecture == "bloom" else None
        self.blocks = nn.ModuleList(
            PlainBlock(
                width,
                inner,
                PlainAttention(width, heads, kv_heads, head_dim, not llama, position, qk_norm),
                llama,
                architecture == "bloom",
            )
            for _ in range(layers)
        )
        self.last_norm = nn.RMSNorm(width, eps=1e-5) if llama else nn.LayerNorm(width)
        self.head = None if tied else nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor, positions: Tensor, documents: Tensor) -> Tensor:
        x = self.tokens(tokens)
        if self.positions is not None:
            x = x + self.positions(positions)
        if self.tokens_norm is not None:
            x = self.tokens_norm(x)
        for block in self.blocks:
            x = block(x, positions, documents)
        x = self.last_norm(x)
        return x @ self.tokens.weight.T if self.head is None else self.head(x)


def plain_loss(logits: Tensor, labels: Tensor, counted: Tensor, smoothing: float, z_loss: float) -> Tensor:
    """Mean over the counted tokens of the whole batch."""
    logits, labels = logits[counted], labels[counted]
    loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    return loss + z_loss * logits.logsumexp(dim=-1).square().mean()
