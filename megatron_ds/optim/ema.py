"""An exponential moving average (EMA) of the weights, kept as one more kind of optimizer state.

So it is sharded, offloaded, counted in bytes, saved and loaded as AdamW's moments are, and moves in the update itself:
a step that is skipped does not move it, and no loop can forget to.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch

from megatron_ds.config import OptimizerConfig
from megatron_ds.optim.rule import Late, OptimizerSegment, RuleGroup, Update, UpdateRule

EMA = "ema"
"""The kind of state: the averaged weights, in the master weights' dtype."""


def averaged(rule: UpdateRule, config: OptimizerConfig) -> UpdateRule:
    """The rule, with an average of the weights beside it if ``config.ema_decay`` asks for one."""
    return AveragedRule(rule, config.ema_decay, config.ema_warmup) if config.ema_decay else rule


def decay_of(update: int, decay: float, warmup: bool) -> float:
    """The average's decay in an update, the first being 1: there it becomes the weights themselves.

    With ``warmup`` update n + 1 has at most (1 + n) / (10 + n), so that early weights are forgotten soon.
    """
    if update <= 1:
        return 0.0
    return min(decay, update / (9.0 + update)) if warmup else decay


class AveragedRule:
    """Another rule's updates, each followed by ``ema = d ema + (1 - d) weight``."""

    def __init__(self, rule: UpdateRule, decay: float, warmup: bool):
        self._rule, self._decay, self._warmup = rule, decay, warmup

    def group_of(self, name: str) -> RuleGroup:
        group = self._rule.group_of(name)
        return replace(group, kinds=(*group.kinds, EMA))

    def begin_step(self) -> None:
        self._rule.begin_step()

    def over(self, segments: Sequence[OptimizerSegment]) -> AveragedUpdate:
        update = self._rule.over(_without_average(segments))
        return AveragedUpdate(update, segments, self._decay, self._warmup)


class AveragedUpdate:
    """An :class:`~megatron_ds.optim.rule.Update`. Weights that are frozen for a while are averaged all the same."""

    def __init__(self, update: Update, segments: Sequence[OptimizerSegment], decay: float, warmup: bool):
        self._update, self._decay, self._warmup = update, decay, warmup
        self._count = 0
        self._take(segments)

    def _take(self, segments: Sequence[OptimizerSegment]) -> None:
        self._averages = [segment.state[EMA] for segment in segments]
        self._masters = [segment.master for segment in segments]
        self._names = [segment.name for segment in segments]

    @property
    def frozen(self) -> frozenset[str]:
        return self._update.frozen

    @frozen.setter
    def frozen(self, names: frozenset[str]) -> None:
        self._update.frozen = names

    def bind(self, segments: Sequence[OptimizerSegment]) -> None:
        self._update.bind(_without_average(segments))
        self._take(segments)

    @torch.no_grad()
    def step(self, lr: float, scale: float | torch.Tensor = 1.0) -> None:
        self._update.step(lr, scale)
        self._count += 1
        share = 1.0 - decay_of(self._count, self._decay, self._warmup)
        if not isinstance(scale, torch.Tensor):
            torch._foreach_lerp_(self._averages, self._masters, share)
            return
        own = torch.full_like(scale, share).masked_fill_(scale.isnan(), 0.0)
        shares = {average.dtype: own.to(average.dtype) for average in self._averages}
        for average, master in zip(self._averages, self._masters):
            average.lerp_(master, shares[average.dtype])  # one launch a bucket: foreach takes no share on the device

    def run(self, method: str) -> None:
        """A method of an optimizer of the caller's own, see ``torch_rule.py``."""
        self._update.run(method)  # type: ignore[attr-defined]

    @torch.no_grad()
    def begin(self, names: Collection[str]) -> None:
        """The average of these parameters is their weights, as if it had followed them from the first update on."""
        for name, average, master in zip(self._names, self._averages, self._masters):
            if name in names:
                average.copy_(master)

    def set_count(self, updates: int) -> None:
        self._count = updates
        self._update.set_count(updates)

    def late(self, updates: int) -> Late:
        return self._update.late(updates)

    def load_late(self, late: Late) -> None:
        self._update.load_late(late)


def _without_average(segments: Sequence[OptimizerSegment]) -> list[OptimizerSegment]:
    """What the averaged rule's own update sees."""
    return [
        replace(segment, state={kind: state for kind, state in segment.state.items() if kind != EMA})
        for segment in segments
    ]
