"""Attention of the last token of each text to a cache of blocks, as sums that Inductor makes loops of.

Keys are read where they lie: a matrix product would need a copy of them. Each block is attended to for itself, and what
was found is weighed afterwards ("flash decoding"), so texts of any lengths stand side by side.

Shapes: ``b`` texts of up to ``m`` blocks, ``p`` blocks of all texts together, of ``s`` tokens each; ``n`` heads and
``g`` key/value heads, ``d`` head dim.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

_UNROLLED = 8
"""Parts of a key/value head's heads, at most, whose sums are written out: one loop over the keys makes them all."""


class DecodedBlocks(NamedTuple):
    """Which blocks the texts of a step have, int64.

    Attributes:
        places: ``[b]`` of the queries in their texts, from 0.
        blocks, texts, firsts: ``[p]`` where each block is in the cache, whose it is, and the place of its first key.
        of_text: ``[b, m]`` each text's blocks by their number in ``p``, the last one's repeated at the end.
    """

    places: Tensor
    blocks: Tensor
    texts: Tensor
    firsts: Tensor
    of_text: Tensor


def decode_attention(
    q: Tensor, keys: Tensor, values: Tensor, at: DecodedBlocks, window: int | None, softcap: float | None
) -> Tensor:
    """``softmax(q k^T / sqrt(d)) v`` over the keys up to each query, in fp32 or wider.

    Args:
        q: ``[b, n, d]``. keys, values: ``[blocks, g, s, d]``; query head ``h`` uses key/value head ``h // (n / g)``.
        window: a query sees only the keys that are fewer places than this before it.
        softcap: scores are ``softcap * tanh(scores / softcap)``.

    Returns:
        ``[b, n, d]`` in ``q``'s dtype.
    """
    from torch._inductor.inductor_prims import force_stride_order

    b, n, d = q.shape
    _, g, size, _ = keys.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    queries = q.to(wide) * (1.0 / math.sqrt(d))
    # Made once: otherwise the loop over keys makes each element again and again, its rotation included.
    queries = force_stride_order(queries, queries.stride())
    k, v = (pages[at.blocks].unsqueeze(2).to(wide) for pages in (keys, values))  # [p, g, 1, s, d]
    places = at.places[at.texts, None]
    own = at.firsts[:, None] + torch.arange(size, device=q.device)  # [p, s]
    seen = own <= places if window is None else (own <= places) & (own > places - window)
    parts = []
    for of_heads in queries.view(b, g, n // g, d)[at.texts].split(-(-n // g // _UNROLLED), 2):
        scores = (of_heads.unsqueeze(3) * k).sum(-1)  # [p, g, heads, s]
        if softcap is not None:
            scores = (scores / softcap).tanh() * softcap
        scores = torch.where(seen[:, None, None], scores, float("-inf"))
        highest = scores.amax(-1).clamp(min=torch.finfo(wide).min)  # a window may hide a whole block
        weights = (scores - highest.unsqueeze(3)).exp()
        parts.append((highest, weights.sum(-1), (weights.unsqueeze(4) * v).sum(3)))
    # [b, m, g, n / g, ...] from here on
    highest, totals, found = (torch.cat(of_heads, 2)[at.of_text] for of_heads in zip(*parts))
    there = torch.arange(at.of_text.shape[1], device=q.device) <= (at.places // size)[:, None]
    shares = torch.where(there[:, :, None, None], (highest - highest.amax(1, keepdim=True)).exp(), 0.0)
    out = (shares.unsqueeze(4) * found).sum(1) / (shares * totals).sum(1).unsqueeze(3)
    return out.to(q.dtype).reshape(b, n, d)
