"""Variable-length (varlen) attention: sequences of any lengths, packed one behind the other; with sliding windows.

The GPU's kernel is torch's (:func:`torch.nn.attention.varlen.varlen_attn`, Flash Attention: Dao 2023); it makes no
mask. Beside it stands the reference, which computes the same on any device.

Shapes: ``t`` tokens of all sequences, ``n`` heads and ``g`` key/value heads, ``d`` head dim, ``m`` sequences.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
MOST_HEAD_DIM = 256  # of the GPU's kernel, which takes multiples of 8


def takes_varlen(on_gpu: bool, half: bool, head_dim: int, cut: bool, other_rules: bool) -> bool:
    """Whether attention goes to the GPU's kernel for sequences of various lengths.

    Args:
        half: inputs are of half precision.
        cut: there are documents or a window. other_rules: ALiBi, a soft cap or dropout, which it does not know.
    """
    return on_gpu and half and cut and not other_rules and head_dim <= MOST_HEAD_DIM and head_dim % 8 == 0


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, *, causal: bool, window: int | None = None
) -> Tensor:
    """``softmax(q k^T / sqrt(d)) v`` within each sequence.

    Args:
        q: ``[t, n, d]``. k, v: ``[t, g, d]``; query head ``h`` uses key/value head ``h // (n / g)``.
        bounds: ``[m + 1]`` int32: sequence ``i`` is tokens ``bounds[i]`` to ``bounds[i + 1]``.
        longest: no sequence has more tokens.
        causal: a query sees itself and those before it only.
        window: a query sees only the keys that are fewer places than this away from it.

    Returns:
        ``[t, n, d]``.
    """
    if not q.is_cuda or q.numel() == 0:
        return varlen_reference(q, k, v, bounds, causal=causal, window=window)
    before = -1 if window is None else window - 1
    options: dict[str, Any] = {"window_size": (before, 0 if causal else before)}
    kernel, told_to_group = gpu_kernel()
    if told_to_group:
        options["enable_gqa"] = q.shape[1] > k.shape[1]
    return kernel(q, k, v, bounds, bounds, longest, longest, **options)


@cache
def gpu_kernel() -> tuple[Callable[..., Tensor], bool]:
    """torch's varlen attention, and whether it must be told (``enable_gqa``) that queries share key/value heads.

    Releases up to torch 2.11 find that out by themselves.
    """
    # Imported here: the module imports torch's compiler, which costs every rank memory and time at the start.
    from torch.nn.attention import varlen

    kernel = cast(Callable[..., Tensor], varlen.varlen_attn)
    return kernel, "enable_gqa" in inspect.signature(kernel).parameters


def varlen_reference(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, *, causal: bool, window: int | None = None
) -> Tensor:
    """One sequence after the other, with a mask for each. Waits for the device: it has to know the bounds."""
    parts = []
    for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist()):
        places = torch.arange(end - begin, device=q.device)
        distance = places.unsqueeze(1) - places
        seen = torch.ones_like(distance, dtype=torch.bool) if window is None else distance.abs() < window
        seen = seen & (distance >= 0) if causal else seen
        own_q, own_k, own_v = (tensor[begin:end].transpose(0, 1).unsqueeze(0) for tensor in (q, k, v))
        grouped = q.shape[1] > k.shape[1]
        out = F.scaled_dot_product_attention(own_q, own_k, own_v, attn_mask=seen, enable_gqa=grouped)
        parts.append(out.squeeze(0).transpose(0, 1))
    return torch.cat(parts) if parts else q
