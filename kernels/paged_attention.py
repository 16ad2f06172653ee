"""Paged attention: the tokens of a step against the keys and values of their texts, which lie in blocks of a cache.

The block tables say where (Kwon et al. 2023, PagedAttention). Here is the GPU's kernel; elsewhere
:mod:`megatron_ds.inference.paged_cache` gathers the keys and calls torch's attention.

Shapes: ``t`` tokens of a step, ``m`` texts, ``w`` blocks of the longest, ``n`` heads and ``g`` key/value heads,
``d`` head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ds.kernels.alibi import Alibi
from megatron_ds.kernels.registry import Op

PAGED_ATTENTION = Op("paged_attention", twin="paged_attention")


@dataclass(frozen=True)
class PagedTexts:
    """The texts of a step, and where their keys and values are.

    Attributes:
        tables: ``[m, w]`` int32, the numbers of each text's blocks.
        spans: ``[m, 3]`` int32, of each text: its first row in the step, how many it has, the first one's place in
            the text. A row sees the keys up to its own place.
        size: tokens of a block.
        longest: rows that a text has at most.
        decodes: whether a text may have a single row.
    """

    tables: Tensor
    spans: Tensor
    size: int
    longest: int
    decodes: bool


@dataclass(frozen=True)
class PagedKV:
    """Keys or values of a layer: ``[slots, g, d]``. Bytes of e4m3 have a ``scale [slots, g, 1]`` fp32."""

    data: Tensor
    scale: Tensor | None = None


def paged_attention(
    q: Tensor,
    keys: PagedKV,
    values: PagedKV,
    texts: PagedTexts,
    window: int | None = None,
    alibi: Alibi | None = None,
    softcap: float | None = None,
) -> Tensor:
    """``softmax(q k^T / sqrt(d) + bias) v`` over each row's own text, by the Triton kernel.

    Args:
        q: ``[t, n, d]``; query head ``h`` uses key/value head ``h // (n / g)``.
        window: a query sees only the keys that are fewer places than this before it.
        softcap: scores are ``softcap * tanh(scores / softcap)``, before ALiBi's biases are added.

    Returns:
        ``[t, n, d]``. A row depends on its own text alone, bit for bit, and on whether the text has one row or more."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    PAGED_ATTENTION.load(q).attend(q, keys, values, texts, window, alibi, softcap, out)
    return out
