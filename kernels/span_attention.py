"""Attention of the last tokens of a text to all of it: what a step of generation computes for one sequence."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ds.kernels.alibi import Alibi


def span_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None = None,
    alibi: Alibi | None = None,
    softcap: float | None = None,
    first: int = 0,
) -> Tensor:
    """Causal attention of the last ``c`` of ``l`` tokens.

    Args:
        q: ``[c, n, d]``. k, v: ``[l, g, d]``; query head ``h`` uses key/value head ``h // (n / g)``.
        window: a query sees only the keys that are fewer places than this before it.
        alibi: biases of the ``n`` heads, added to the scores.
        softcap: scores are ``softcap * tanh(scores / softcap)``, before anything else is done to them.
        first: place of the first key in the text, which biases that are rounded depend on.

    Returns:
        ``[c, n, d]``.
    """
    c, n, d = q.shape
    length, groups = k.shape[0], k.shape[1]
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    hides = c > 1 or (window is not None and window < length)
    bias = _bias(c, length, window, q) if hides else None
    if alibi is not None:
        places = torch.arange(first, first + length, device=q.device)
        of_places = alibi.bias(places[length - c :], places, torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
        bias = of_places if bias is None else of_places + bias
    if softcap is None:
        out = F.scaled_dot_product_attention(
            q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), bias, enable_gqa=n > groups
        )
        return out[0].transpose(0, 1)
    q = q.reshape(groups, n // groups * c, d)
    scores = (q @ k.transpose(1, 2)).view(n, c, length) / math.sqrt(d)
    scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(-1, dtype=wide).to(v.dtype).view(groups, n // groups * c, length)
    return (weights @ v).view(n, c, d).transpose(0, 1)


def _distance(c: int, length: int, device: torch.device) -> Tensor:
    """``[c, l]``: places from a query to a key, negative where the key comes first."""
    keys = torch.arange(length, device=device)
    return keys - keys[length - c :].unsqueeze(1)


def _bias(c: int, length: int, window: int | None, like: Tensor) -> Tensor:
    """``[c, l]``: 0 where a query sees the key, else -inf."""
    distance = _distance(c, length, like.device)
    seen = distance <= 0
    if window is not None:
        seen &= distance > -window
    return torch.zeros((), dtype=like.dtype, device=like.device).where(seen, float("-inf"))
