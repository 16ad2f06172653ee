"""A toy update rule of whole matrices, and the same on plain tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from megatron_ds.optim.rule import OptimizerSegment, RuleGroup

MOMENTUM = 0.9


def normalized_step(weight: Tensor, gradient: Tensor, momentum: Tensor, lr: float) -> None:
    """The gradient over its Frobenius norm, and what of it lies in each row: no part of a matrix knows these."""
    direction = gradient / (gradient.norm() + 1e-8)
    direction = direction + 0.1 * direction.mean(-1, keepdim=True)
    momentum.mul_(MOMENTUM).add_(direction)
    weight.sub_(lr * momentum)


class Normalized(torch.optim.Optimizer):
    """The same in torch's form."""

    def __init__(self, params: Iterable[Tensor], lr: float):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                normalized_step(p, p.grad, momentum, group["lr"])


class NormalizedRule:
    """For ZeroOptimizer."""

    def group_of(self, name: str) -> RuleGroup:
        return RuleGroup(kinds=("momentum",), whole=True)

    def begin_step(self) -> None:
        pass

    def over(self, segments: Sequence[OptimizerSegment]) -> NormalizedUpdate:
        return NormalizedUpdate(segments)


class NormalizedUpdate:
    frozen: frozenset[str] = frozenset()

    def __init__(self, segments: Sequence[OptimizerSegment]):
        self.bind(segments)

    def bind(self, segments: Sequence[OptimizerSegment]) -> None:
        self._segments = list(segments)

    def step(self, lr: float, scale: float | Tensor = 1.0) -> None:
        for segment in self._segments:
            assert segment.start == 0 and segment.master.dim() > 1
            normalized_step(segment.master, segment.gradient * scale, segment.state["momentum"], lr)

    def set_count(self, updates: int) -> None:
        pass

    def late(self, updates: int) -> Mapping[str, None]:
        return {}

    def load_late(self, late: Mapping[str, object]) -> None:
        pass
