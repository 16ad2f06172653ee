"""Attention of the last tokens of texts to all of them: what a step of generation computes.

Shapes: ``b`` texts, ``c`` queries and ``l`` keys of each, ``n`` heads and ``g`` key/value heads, ``d`` head dim.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ds.kernels.alibi import Alibi
from megatron_ds.kernels.cpu.attention_route import QUERIES

_FEW = 32
"""Queries of a key/value head."""
_WHOLE = 1 << 22
"""Multiplications up to which all scores are computed in one product, though the causal mask hides up to half of them:
so small a product costs little more than its call."""
_SMALL = 4.0
"""Scores whose rounding to bf16 changes the result by about as much as that of the probabilities does."""


def span_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, softcap: float | None = None) -> Tensor:
    """``softmax(q k^T / sqrt(d) + bias) v``, the queries being those of the last ``c`` of ``l`` places.

    One batched product of all texts and heads: torch's fused kernel makes a small one for each head of each text. As
    there, scores and softmax are fp32 where the dtype is narrower.

    Args:
        q: ``[b, c, n, d]``. k, v: ``[g, b, l, d]``; query head ``h`` uses key/value head ``h // (n / g)``.
        bias: of :func:`span_bias`; None: every query sees every key.
        softcap: scores are ``softcap * tanh(scores / softcap)``, before the bias is added.

    Returns:
        ``[b, c, n, d]``.
    """
    b, c, n, d = q.shape
    g, length = k.shape[0], k.shape[2]
    group, single = n // g, b * c == 1 and softcap is None
    if bias is not None:
        bias = bias.unflatten(1, (g, group) if bias.shape[1] > 1 else (1, 1)).transpose(0, 1)  # [g, b, n / g, c, l]
    if single:  # where there is little to compute, calls are what takes the time
        return F.scaled_dot_product_attention(
            q.view(g, 1, group, d), k, v, None if bias is None else bias[:, :, :, 0]
        ).reshape(q.shape)
    # In one piece of memory: batched products of strided keys are slow.
    k, v = k.contiguous().flatten(0, 1).transpose(1, 2), v.flatten(0, 1)
    if q.dtype is torch.float16 or (q.dtype is torch.bfloat16 and group * c > _FEW):
        k = k.float()
    queries, parts = q.unflatten(2, (g, group)).permute(2, 0, 3, 1, 4), []  # [g, b, n / g, c, d]
    at_once = max(QUERIES, _WHOLE // (length * n * d))
    for start in range(0, c, at_once):
        end = min(start + at_once, c)
        seen = length - c + end
        own = queries[:, :, :, start:end].reshape(g * b, -1, d)
        scores = _scores(own, k[:, :, :seen], 1.0 / math.sqrt(d))
        if softcap is not None:
            scores.div_(softcap).tanh_().mul_(softcap)
        if bias is not None:
            scores.view(g, b, group, -1, seen).add_(bias[:, :, :, start:end, :seen])
        parts.append((scores.softmax(-1).to(v.dtype) @ v[:, :seen]).view(g, b, group, -1, d).permute(1, 3, 0, 2, 4))
    return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).reshape(q.shape)


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """``scale * q k``, in fp32 where the dtype is narrower: one of 60 that is rounded to bf16 is wrong by up to 0.125.

    torch has no product of bf16 with a result in fp32 on a CPU. For few queries a second product, of what the rounded
    first one lacks, costs less than wider keys; where all scores are small it is not needed.
    """
    q = q.to(k.dtype)
    high = torch.baddbmm(q.new_empty(()), q, k, beta=0.0, alpha=scale)
    if q.dtype is not torch.bfloat16:
        return high
    scores = high.float()
    if max(float(scores.amax()), -float(scores.amin())) <= _SMALL:
        return scores
    return scores.add_(torch.baddbmm(high, q, k, beta=-1.0, alpha=scale))


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
