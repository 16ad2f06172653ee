"""Which layers a pipeline stage holds, what it offers, and what a layer costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


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
    """FLOPs a token, for splitting layers by cost: of one block, of the embedding and of the output head.

    A token is a position that the model computes: of a text, or a patch of an image.
    """

    block: float = 1.0
    embedding: float = 0.0
    head: float = 0.0


class StageModule(Protocol):
    """What a model gives for one pipeline stage."""

    def initialize(self, seed: int) -> None: ...

    def compile_blocks(self) -> None: ...

    def __call__(self, micro_batch: Mapping[str, Tensor], hidden: Tensor | None = None) -> Tensor: ...


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch on one rank, from its forward to its backward pass.

    Attributes:
        no_recompute: what would be stored without recomputation.
        stored: what is stored with the configured recomputation.
        recompute_peak: what exists besides while one part is computed again.
        loss: what of ``stored`` the loss holds of the output weights' gradients, which one micro-batch has at a time.
    """

    no_recompute: int
    stored: int
    recompute_peak: int
    loss: int = 0

    def of(self, in_flight: int) -> int:
        """Bytes that so many micro-batches store, whose losses are computed one at a time."""
        return self.stored * in_flight - self.loss * max(0, in_flight - 1)
