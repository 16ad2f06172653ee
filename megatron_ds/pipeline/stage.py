"""Which layers a pipeline stage holds, and what a model has to offer to be cut into stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from megatron_ds.config import RunConfig
from megatron_ds.mesh import Mesh


@dataclass(frozen=True)
class StageSpan:
    """The part of a model that one stage holds: blocks ``first .. last - 1``, perhaps the embedding and the head."""

    first: int
    last: int
    embedding: bool = True
    head: bool = True


def stage_spans(layers_per_stage: Sequence[int]) -> list[StageSpan]:
    """One span a stage, in order; the first has the embedding and the last the head."""
    spans = []
    first = 0
    for stage, layers in enumerate(layers_per_stage):
        spans.append(StageSpan(first, first + layers, embedding=stage == 0, head=stage == len(layers_per_stage) - 1))
        first += layers
    return spans


@dataclass(frozen=True)
class LayerCosts:
    """FLOPs a token, for splitting layers by cost: of one block, of the embedding and of the output head."""

    block: float = 1.0
    embedding: float = 0.0
    head: float = 0.0


class StageModule(Protocol):
    """What a model gives for one pipeline stage."""

    def initialize(self, seed: int) -> None: ...

    def compile_blocks(self) -> None: ...

    def activation_shape(self, micro_batch: int, sequence_length: int) -> tuple[int, ...]: ...

    def __call__(self, micro_batch: Mapping[str, Tensor], hidden: Tensor | None = None) -> Tensor: ...


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch on one rank, from its forward to its backward pass.

    Attributes:
        no_recompute: what would be stored without recomputation.
        stored: what is stored with the configured recomputation.
        recompute_peak: what exists besides while one part is computed again.
    """

    no_recompute: int
    stored: int
    recompute_peak: int


StageFactory = Callable[[RunConfig, StageSpan, Mesh, torch.device, torch.dtype], nn.Module]


@dataclass(frozen=True)
class Model:
    """What training needs to know of a model: how to build a stage of it, and what its layers cost.

    ``flops_per_token`` counts forward and backward; the model states its convention. ``activations`` estimates those
    of a stage, from its span, the size of tp and the type of the device; None: the model does not know.
    ``tables`` are the tensors that may gain rows (for new tokens, for longer sequences): a tensor's name to the model
    setting that says how many of its rows are in use.
    """

    make_stage: StageFactory
    num_layers: int
    costs: LayerCosts
    flops_per_token: float
    activations: Callable[[StageSpan, int, str], Activations] | None = None
    tables: Mapping[str, str] = field(default_factory=dict)


def largest_activations(model: Model, spans: Sequence[StageSpan], tp: int, device: str) -> Activations | None:
    """Of the one that keeps most, among a rank's stages; None where the model does not know."""
    if model.activations is None:
        return None
    return max((model.activations(span, tp, device) for span in spans), key=lambda stage: stage.stored)
