"""Rotary embeddings and ALiBi.

Shapes: ``s`` sequence, ``b`` batch, ``d`` head dim, ``n`` heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def rotary_frequencies(head_dim: int, theta: float, scaling: Mapping[str, Any] | None = None) -> Tensor:
    """``[d / 2]`` fp32 angles a position (Su et al. 2021, eq. 15).

    ``scaling`` is Llama 3.1's: wavelengths longer than the original context are stretched by ``factor``, short ones
    kept, and those between blended.
    """
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if not scaling:
        return frequencies
    factor, low, high = (float(scaling[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    context = float(scaling["original_max_position_embeddings"])
    periods_in_context = context * frequencies / (2 * math.pi)
    keep = ((periods_in_context - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * keep + frequencies / factor * (1.0 - keep)


def rotary_table(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin ``[s, b, 1, d]`` of positions ``[s, b]``, in the "half" layout (dim i pairs with i + d / 2)."""
    angles = positions.unsqueeze(-1).to(torch.float32) * frequencies.to(positions.device)
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(-2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def alibi_slopes(num_heads: int) -> Tensor:
    """``[n]`` fp32 slopes (Press et al. 2021, section 3): a geometric sequence; where n is no power of two, the
    sequence for the power below, then every other slope of the one above."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    slopes += [2.0 ** (-4.0 * (2 * i + 1) / power) for i in range(num_heads - power)]
    return torch.tensor(slopes)


def alibi_bias(slopes: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """``[n, s, s]``: ``slope * (key - query)`` for ``slopes [n]``."""
    places = torch.arange(length, dtype=torch.float32, device=slopes.device)
    return (slopes.view(-1, 1, 1) * (places - places.unsqueeze(1))).to(dtype)
