"""A third family, which is no language model: an MLP-mixer on scikit-learn's digits, with its own sections and data.

Tolstikhin et al. 2021 (arXiv 2105.01601): a block mixes the patches of an image, then the channels of each patch, by an
MLP each. The whole family is in this file; the trainer is the library's.

Shapes: ``s`` patches, ``b`` batch, ``h`` hidden.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from megatron_ds.config import BaseModelConfig, BaseRunConfig, parse
from megatron_ds.data.order import order
from megatron_ds.data.samples import Batch, Sources
from megatron_ds.errors import divisors
from megatron_ds.layers.linear import replicated_parameter
from megatron_ds.layers.mlp import MLP
from megatron_ds.layers.norms import Norm
from megatron_ds.mesh import Mesh, MeshShape
from megatron_ds.pipeline.stage import Activations, LayerCosts, StageSpan
from megatron_ds.rng import initialize_parameters
from megatron_ds.train.launch import RankInfo
from megatron_ds.train.pretrain import pretrain

PIXELS, PATCHES, CLASSES = 4, 16, 10  # 8 x 8 images in patches of 2 x 2
VALID = 50  # images kept for validation: no multiple of what the ranks read together


class MixerConfig(BaseModelConfig):
    """The mixer."""

    num_layers: int = 4
    hidden_size: int = 12
    features: int = 20


class MixerRun(BaseRunConfig):
    """Train a mixer on the digits."""

    model: MixerConfig = MixerConfig()

    def faults(self, shape: MeshShape, needs_data: bool) -> Iterator[str]:
        if self.model.features % shape.tp:
            yield (
                f"model.features={self.model.features} cannot be split over mesh.tp={shape.tp}; tp may be "
                f"{divisors(self.model.features)}"
            )


class Affine(nn.Module):
    """A linear layer that every tensor-parallel rank holds whole."""

    def __init__(self, name: str, inputs: int, outputs: int, where: Mapping[str, Any]):
        super().__init__()
        tp, place = where["tp"], {"device": where["device"], "dtype": where["dtype"]}
        self.weight = replicated_parameter(f"{name}.weight", (outputs, inputs), "normal", tp, False, std=0.3, **place)
        self.bias = replicated_parameter(f"{name}.bias", (outputs,), "zeros", tp, False, **place)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Block(nn.Module):
    def __init__(self, c: MixerConfig, index: int, where: Mapping[str, Any]):
        super().__init__()
        name = f"layers.{index}"
        sizes: dict[str, Any] = {"bias": True, "sequence_parallel": False, "stds": (0.3, 0.3), **where}
        self.patch_norm = Norm(f"{name}.patch_norm", "layernorm", c.hidden_size, 1e-5, partial=False, **where)
        self.patches = MLP(f"{name}.patches", PATCHES, c.features, "gelu", **sizes)
        self.channel_norm = Norm(f"{name}.channel_norm", "layernorm", c.hidden_size, 1e-5, partial=False, **where)
        self.channels = MLP(f"{name}.channels", c.hidden_size, c.features, "gelu", **sizes)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.patches(self.patch_norm(x).transpose(0, 2).contiguous()).transpose(0, 2)
        return x + self.channels(self.channel_norm(x))


class Mixer(nn.Module):
    """One pipeline stage."""

    def __init__(self, c: MixerConfig, span: StageSpan, where: Mapping[str, Any]):
        super().__init__()
        self.span = span
        if span.embedding:
            self.embed = Affine("embed", PIXELS, c.hidden_size, where)
        self.layers = nn.ModuleDict({str(i): Block(c, i, where) for i in range(span.first, span.last)})
        if span.head:
            self.classify = Affine("classify", c.hidden_size, CLASSES, where)

    def initialize(self, seed: int) -> None:
        initialize_parameters(self.parameters(), seed)

    def compile_blocks(self) -> None: ...

    def forward(self, micro_batch: Mapping[str, Tensor], hidden: Tensor | None = None) -> Tensor:
        if self.span.embedding:
            x = self.embed(micro_batch["patches"].to(self.embed.weight.dtype).transpose(0, 1))
        else:
            assert hidden is not None
            x = hidden
        for block in self.layers.values():
            x = block(x)
        if not self.span.head:
            return x
        losses = F.cross_entropy(self.classify(x.mean(0)), micro_batch["digits"], reduction="none")
        return (losses * micro_batch["counts"]).sum()


class Digits:
    """Some of the images, in the order of the run's seed; every fifth counts nothing."""

    def __init__(self, first: int, last: int, seed: int):
        images, digits = load_digits(return_X_y=True)
        pixels = images[first:last].reshape(-1, 4, 2, 4, 2) / 16.0
        self.patches = pixels.transpose(0, 1, 3, 2, 4).reshape(-1, PATCHES, PIXELS)
        self.digits, self.seed = digits[first:last].astype(np.int64), seed

    def __len__(self) -> int:
        return len(self.digits)

    def batch(self, indices: npt.ArrayLike) -> Batch:
        return self.rows(order(self.seed, indices, len(self)))

    def rows(self, rows: npt.ArrayLike) -> Batch:
        wanted = np.asarray(rows, np.int64)
        return {"patches": self.patches[wanted], "digits": self.digits[wanted], "counts": wanted % 5 != 1}


class MixerTask:
    """A :class:`~megatron_ds.train.task.Task`."""

    tokens_per_sample = PATCHES
    tables: Mapping[str, str] = MappingProxyType({})

    def __init__(self, config: MixerRun):
        self.config, self.num_layers = config, config.model.num_layers
        h, f = config.model.hidden_size, config.model.features
        block = 2.0 * (2 * h * f + 2 * h * f)  # of a patch: its channels, and its share of what mixes the patches
        self.costs = LayerCosts(block, embedding=2.0 * PIXELS * h, head=2.0 * h * CLASSES / PATCHES)
        self.flops_per_token = 3.0 * (self.num_layers * block + self.costs.embedding + self.costs.head)

    def make_stage(self, span: StageSpan, mesh: Mesh, device: torch.device, dtype: torch.dtype) -> Mixer:
        return Mixer(self.config.model, span, {"tp": mesh.tp, "device": device, "dtype": dtype})

    def activation_shape(self, mesh: Mesh, micro_batch: Mapping[str, Tensor]) -> tuple[int, ...]:
        return PATCHES, self.config.train.micro_batch, self.config.model.hidden_size

    def activations(self, span: StageSpan, tp: int, device: str) -> Activations | None:
        return None

    def open_sources(self) -> Sources:
        seed = self.config.seed
        return Sources(Digits(VALID, 1797, seed), Digits(0, VALID, seed), identity={"images": "digits"})

    def count(self, micro_batches: Sequence[Mapping[str, Tensor]]) -> Tensor:
        return torch.stack([batch["counts"].sum() for batch in micro_batches]).sum()

    def tokens(self, samples: int, targets: int) -> float:
        return samples * self.tokens_per_sample

    def leave_out(self, batch: Batch, real: npt.NDArray[np.bool_]) -> None:
        batch["counts"] &= real


def main(place: RankInfo) -> int:
    config = parse(sys.argv[1:], config_class=MixerRun)
    pretrain(config, place, MixerTask(config))
    return 0
