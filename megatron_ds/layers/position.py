"""Rotary embeddings and ALiBi.

Shapes: ``s`` sequence, ``b`` batch, ``d`` head dim, ``n`` heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """The rotary embedding of some layers (Su et al. 2021).

    Attributes:
        dim: rotated dims of a head. theta: base wavelength.
        scaling: how a model trained on short sequences is stretched to longer ones; ``rope_type`` is

            * linear (Chen et al. 2023): all wavelengths times ``factor``;
            * dynamic: theta grows with the sequence where that is longer than the original context;
            * llama3 (the default): wavelengths longer than the original context times ``factor``, short ones kept,
              and those between blended;
            * yarn (Peng et al. 2023): the same by dims instead of wavelengths, and cos and sin scaled;
            * longrope (Ding et al. 2024): each wavelength times its own factor, of which there is one list for
              sequences of the original context and one for longer ones, and cos and sin scaled.
    """

    dim: int
    theta: float
    scaling: Mapping[str, Any] | None = None

    @property
    def kind(self) -> str | None:
        return None if self.scaling is None else str(self.scaling.get("rope_type", "llama3"))

    def depends_on(self, length: int) -> bool:
        """Whether the frequencies of a sequence of ``length`` tokens are not those of shorter ones."""
        return self.kind in ("dynamic", "longrope") and length > self._context

    @property
    def _context(self) -> float:
        return float((self.scaling or {})["original_max_position_embeddings"])

    def frequencies(self, length: int = 0) -> Tensor:
        """``[dim / 2]`` fp32 angles a position (eq. 15), in a sequence of ``length`` tokens."""
        scaling, theta = self.scaling or {}, self.theta
        factor = float(scaling.get("factor", 1.0))
        if self.kind == "dynamic" and self.depends_on(length):
            theta *= (factor * length / self._context - (factor - 1.0)) ** (self.dim / (self.dim - 2))
        plain = 1.0 / theta ** (torch.arange(0, self.dim, 2, dtype=torch.float32) / self.dim)
        if self.kind == "linear":
            return plain / factor
        if self.kind == "longrope":
            return plain / torch.tensor(scaling["long_factor" if self.depends_on(length) else "short_factor"])
        if self.kind == "llama3":
            low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
            periods_in_context = self._context * plain / (2 * math.pi)
            keep = ((periods_in_context - low) / (high - low)).clamp(0.0, 1.0)
        elif self.kind == "yarn":
            keep = self._kept_by_yarn(scaling)
        else:
            return plain
        return plain * keep + plain / factor * (1.0 - keep)

    def _kept_by_yarn(self, scaling: Mapping[str, Any]) -> Tensor:
        """``[dim / 2]``: 1 where a wavelength stays, 0 where it is stretched (section 3.2)."""

        def dim_that_turns(times: float) -> float:
            return self.dim * math.log(self._context / (times * 2 * math.pi)) / (2 * math.log(self.theta))

        low = dim_that_turns(float(scaling.get("beta_fast", 32)))
        high = dim_that_turns(float(scaling.get("beta_slow", 1)))
        if scaling.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dim - 1)
        places = torch.arange(self.dim // 2, dtype=torch.float32)
        return 1.0 - ((places - low) / (high - low or 0.001)).clamp(0.0, 1.0)

    @property
    def amplitude(self) -> float:
        """Factor of cos and sin (YaRN, eq. 22; LongRoPE, as published with Phi-3)."""
        if self.kind not in ("yarn", "longrope") or self.scaling is None:
            return 1.0
        scaling, factor = self.scaling, float(self.scaling["factor"])
        if "attention_factor" in scaling:
            return float(scaling["attention_factor"])
        if self.kind == "longrope":
            return math.sqrt(1.0 + max(0.0, math.log(factor)) / math.log(self._context))

        def of(scale: float) -> float:
            return 1.0 if factor <= 1.0 else 0.1 * scale * math.log(factor) + 1.0

        if "mscale" in scaling and "mscale_all_dim" in scaling:
            return of(float(scaling["mscale"])) / of(float(scaling["mscale_all_dim"]))
        return of(1.0)


def rotary_table(
    positions: Tensor, frequencies: Tensor, dtype: torch.dtype, amplitude: float = 1.0
) -> tuple[Tensor, Tensor]:
    """cos and sin ``[s, b, 1, d]``, times ``amplitude``, of positions ``[s, b]``: the angles of d / 2 planes, twice."""
    angles = positions.unsqueeze(-1).to(torch.float32) * frequencies.to(positions.device)
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(-2)
    return (angles.cos() * amplitude).to(dtype), (angles.sin() * amplitude).to(dtype)


def alibi_slopes(num_heads: int) -> Tensor:
    """``[n]`` fp32 slopes (Press et al. 2021, section 3): a geometric sequence; where n is no power of two, the
    sequence for the power below, then every other slope of the one above."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    slopes += [2.0 ** (-4.0 * (2 * i + 1) / power) for i in range(num_heads - power)]
    return torch.tensor(slopes)
