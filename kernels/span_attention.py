"""Attention of the last tokens of texts to all of them: what a step of generation computes.

Shapes: ``b`` texts, ``c`` queries and ``l`` keys of each, ``n`` heads and ``g`` key/value heads, ``d`` head dim.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ds.kernels.alibi import Alibi


def span_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool = False, softcap: float | None = None
) -> Tensor:
    """``softmax(q k^T / sqrt(d) + bias) v``.

    Args:
        q: ``[b, c, n, d]``. k, v: ``[b, l, g, d]``; query head ``h`` uses key/value head ``h // (n / g)``.
        bias: of :func:`span_bias`. causal: instead of it, where ``c = l``: a query sees no key behind its own place.
        softcap: scores are ``softcap * tanh(scores / softcap)``, before the bias is added.

    Returns:
        ``[b, c, n, d]``.
    """
    b, c, n, d = q.shape
    length, groups = k.shape[1], k.shape[2]
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    if softcap is not None:
        return _capped(q, k, v, bias, softcap)
    if c == 1:
        # The queries of a key/value head together: its keys are read once.
        q = q.view(b, groups, n // groups, d)
        if bias is not None and bias.shape[1] > 1:
            bias = bias.view(b, groups, n // groups, length)
        return F.scaled_dot_product_attention(q, k, v, bias).reshape(b, 1, n, d)
    q = q.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, bias, is_causal=causal, enable_gqa=n > groups).transpose(1, 2)


def _capped(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, softcap: float) -> Tensor:
    """``k, v [b, g, l, d]``."""
    b, c, n, d = q.shape
    groups, length = k.shape[1:3]
    q = q.transpose(1, 2).reshape(b, groups, n // groups * c, d)
    scores = (q @ k.transpose(2, 3)).view(b, n, c, length) / math.sqrt(d)
    scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(-1, dtype=wide).to(v.dtype).view(b, groups, n // groups * c, length)
    return (weights @ v).view(b, n, c, d).transpose(1, 2)


def span_bias(
    queries: Tensor, keys: Tensor, dtype: torch.dtype, window: int | None = None, alibi: Alibi | None = None
) -> Tensor:
    """What is added to scores: -inf where a query does not see a key, else what ALiBi says or 0.

    Args:
        queries, keys: places in the text, ``[b, c]`` and ``[b, l]`` int64.
        window: a query sees only the keys that are fewer places than this before it.
        alibi: biases of the ``n`` heads.

    Returns:
        ``[b, n or 1, c, l]``.
    """
    distance = keys.unsqueeze(1) - queries.unsqueeze(2)
    seen = distance <= 0
    if window is not None:
        seen &= distance > -window
    zero = torch.zeros((), dtype=dtype, device=keys.device)
    if alibi is not None:
        wide = torch.promote_types(dtype, torch.float32)
        zero = torch.stack([alibi.bias(*places, wide) for places in zip(queries, keys)]).to(dtype)
    return zero.where(seen.unsqueeze(1), float("-inf"))
