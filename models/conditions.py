"""What a diffusion transformer is told besides the noisy image: the time, and a class or a text.

Shapes: ``b`` batch, ``h`` hidden. Every tensor-parallel rank holds the whole condition ``[b, h]``. Its gradient is a
rank's share alone, since adaLN's weights are split, so that the gradients of what is here are summed over tp.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ds.config.diffusion import DiTConfig
from megatron_ds.layers.affine import Affine
from megatron_ds.layers.embedding import lookup
from megatron_ds.layers.linear import replicated_parameter
from megatron_ds.models.transformer import MicroBatch, StageSettings, Table

TIME_CHANNELS = 256


class TimeEmbedding(nn.Module):
    """The time to ``[b, h]``: two layers over its sines.

    Args:
        slowest: the slowest sine has exactly a ten-thousandth of the first one's frequency, as in DiT; else the next
            one would have it, as in Stable Diffusion 3.
    """

    def __init__(self, c: DiTConfig, s: StageSettings, *, slowest: bool):
        super().__init__()
        h, self.slowest, self.make = c.hidden_size, slowest, {"partial": s.mesh.tp.size > 1, **s.where}
        self.time_in = Affine("condition.time_in", TIME_CHANNELS, h, 0.02, **self.make)
        self.time_out = Affine("condition.time_out", h, h, 0.02, **self.make)

    def of_time(self, time: Tensor) -> Tensor:
        sines = time_sines(time, self.slowest).to(self.time_in.weight.dtype)
        return self.time_out(F.silu(self.time_in(sines)))


class ClassCondition(TimeEmbedding):
    """Time, plus a row of the class's table."""

    def __init__(self, c: DiTConfig, s: StageSettings):
        super().__init__(c, s, slowest=True)
        shape = (c.num_classes + 1, c.hidden_size)
        rows = replicated_parameter("condition.classes.weight", shape, "normal", weight_decay=True, **self.make)
        self.classes = Table(rows)

    def forward(self, seen: MicroBatch) -> Tensor:
        return self.of_time(seen["time"]) + lookup(seen["labels"], self.classes.weight)


class TextCondition(TimeEmbedding):
    """Time, plus two layers over the text's one embedding ``pooled`` (Esser et al. 2024, figure 2)."""

    def __init__(self, c: DiTConfig, s: StageSettings):
        super().__init__(c, s, slowest=False)
        self.pooled_in = Affine("condition.pooled_in", c.pooled_size, c.hidden_size, **self.make)
        self.pooled_out = Affine("condition.pooled_out", c.hidden_size, c.hidden_size, **self.make)

    def forward(self, seen: MicroBatch) -> Tensor:
        pooled = seen["pooled"].to(self.pooled_in.weight.dtype)
        return self.of_time(seen["time"]) + self.pooled_out(F.silu(self.pooled_in(pooled)))


def time_sines(time: Tensor, slowest: bool = True) -> Tensor:
    """``[b] -> [b, 256]`` fp32, cosines first. In half precision times above 256 would be the same."""
    half = TIME_CHANNELS // 2
    exponents = -math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=time.device) / (half - slowest)
    angles = time.float().unsqueeze(1) * exponents.exp()
    return torch.cat([angles.cos(), angles.sin()], dim=1)
