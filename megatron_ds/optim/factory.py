"""torch's own fused optimizers over flat segments: which state they keep, and one update.

Everything is allocated by the caller and handed in, so that the state lives in flat buffers, exists before the first
step (a checkpoint at step 0 is like any other) and can be moved or saved without asking the optimizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from megatron_ds.config import OptimizerConfig
from megatron_ds.kernels.adamw import ADAMW, AdamWNumbers, adamw_
from megatron_ds.mesh import Axis
from megatron_ds.optim.ema import averaged
from megatron_ds.optim.muon import MuonRule
from megatron_ds.optim.rule import Late, OptimizerSegment, RuleGroup, UpdateRule
from megatron_ds.shard import spec_of

_PADDING = 32  # elements, at most as many lie unused between two segments


def as_rule(optimizer: OptimizerConfig | UpdateRule, parameters: Iterable[torch.Tensor], tp: Axis) -> UpdateRule:
    """A rule of one's own as it is, or that of the settings for these parameters of a rank."""
    if not isinstance(optimizer, OptimizerConfig):
        return optimizer
    rule: UpdateRule = ConfigRule(optimizer)
    if optimizer.name == "muon":
        rule = MuonRule(optimizer, [spec_of(parameter) for parameter in parameters], tp, others=rule)
    return averaged(rule, optimizer)


class ConfigRule:
    """The settings' AdamW or SGD for every parameter; AdamW beside Muon.

    Args:
        lr_factor: the learning rate as a multiple of the one that :meth:`SegmentOptimizer.step` is given.
    """

    def __init__(self, config: OptimizerConfig, lr_factor: float = 1.0):
        self._config, self._lr_factor = config, lr_factor
        kinds: tuple[str, ...] = ("momentum_buffer",) if config.momentum > 0 else ()
        self.group = RuleGroup(kinds=kinds if config.name == "sgd" else ("exp_avg", "exp_avg_sq"))

    def group_of(self, name: str) -> RuleGroup:
        return self.group

    def begin_step(self) -> None:
        """Nothing is kept once for several buckets."""

    def over(self, segments: Sequence[OptimizerSegment]) -> SegmentOptimizer:
        return SegmentOptimizer(self._config, segments, self.group.kinds, self._lr_factor)


class SegmentOptimizer:
    """A ``torch.optim`` update rule over ``segments`` (at least one), all of one dtype and device.

    AdamW: ``m = b1 m + (1 - b1) g``, ``v = b2 v + (1 - b2) g^2``, ``w -= lr (wd w + m^ / (sqrt(v^) + eps))``
    (Loshchilov & Hutter 2019, algorithm 2). SGD: ``g += wd w``, ``m = mu m + g``, ``w -= lr m``.

    torch's functional forms are called and not its optimizer classes: those import ``torch._dynamo``, which takes
    memory and a second of every rank.
    """

    def __init__(
        self,
        config: OptimizerConfig,
        segments: Sequence[OptimizerSegment],
        kinds: Sequence[str],
        lr_factor: float = 1.0,
    ):
        self._config, self._kinds, self._lr_factor = config, kinds, lr_factor
        self.frozen: frozenset[str] = frozenset()
        # torch's AdamW counts the updates of each of its parameters in a tensor.
        self._counts = torch.zeros(len(segments), dtype=torch.float32, device=segments[0].master.device)
        self._updates = [0] * len(segments)  # the same numbers, known without a wait for the device
        self.writes_low = config.name != "sgd" and ADAMW.choose(segments[0].master) == "triton"
        self.bind(segments)

    def bind(self, segments: Sequence[OptimizerSegment]) -> None:
        config, self._segments = self._config, list(segments)
        self._ranges: list[_Range] | None = None
        self._ranges_without: frozenset[str] = frozenset()
        both = [(s, count) for s, count in zip(segments, self._counts.unbind())]
        self._groups = [
            _Group(
                weight_decay=config.weight_decay if decayed else 0.0,
                masters=[s.master for s, _ in both if s.weight_decay == decayed],
                gradients=[s.gradient for s, _ in both if s.weight_decay == decayed],
                states={kind: [s.state[kind] for s, _ in both if s.weight_decay == decayed] for kind in self._kinds},
                counts=[count for s, count in both if s.weight_decay == decayed],
                names=[s.name for s, _ in both if s.weight_decay == decayed],
            )
            for decayed in (True, False)
            if any(s.weight_decay == decayed for s in segments)
        ]
        self._gradients = [segment.gradient for segment in segments]
        self._names = [segment.name for segment in segments]
        self._wide = segments[0].master.dtype == torch.float64

    def set_count(self, updates: int) -> None:
        self._set_counts([updates] * len(self._names))

    def late(self, updates: int) -> Late:
        return {name: {"step": float(count)} for name, count in zip(self._names, self._updates) if count != updates}

    def load_late(self, late: Late) -> None:
        counts = zip(self._names, self._updates)
        self._set_counts([count if (own := late.get(name)) is None else int(own["step"]) for name, count in counts])

    def _set_counts(self, counts: list[int]) -> None:
        self._updates, self._ranges = counts, None
        for count, value in zip(self._counts.unbind(), counts):
            count.fill_(value)

    @torch.no_grad()
    def step(self, lr: float, scale: float | torch.Tensor = 1.0) -> None:
        if self.writes_low:
            self._update_ranges(lr * self._lr_factor, scale)
        else:
            self._update_segments(lr, scale)
        self._updates = [n + (name not in self.frozen) for n, name in zip(self._updates, self._names)]

    def _update_ranges(self, lr: float, scale: float | torch.Tensor) -> None:
        """In one pass over each range of flat memory; half-precision weights follow, and are followed."""
        c = self._config
        if self._ranges is None or self._ranges_without != self.frozen:
            live = [i for i, name in enumerate(self._names) if name not in self.frozen]
            self._ranges = _ranges([self._segments[i] for i in live], [self._updates[i] for i in live])
            self._ranges_without = self.frozen
        factor = self._on_device(scale)
        for one in self._ranges:
            one.updates += 1
            decay = c.weight_decay if one.weight_decay else 0.0
            adamw_(*one.tensors, one.low, factor, AdamWNumbers(lr, c.beta1, c.beta2, c.eps, decay, one.updates))

    def _on_device(self, scale: float | torch.Tensor) -> torch.Tensor:
        """0-d fp32. A number is filled in there: to copy it would wait for all that is queued."""
        found = self._counts.new_empty(())
        return found.copy_(scale) if isinstance(scale, torch.Tensor) else found.fill_(scale)

    def _update_segments(self, lr: float, scale: float | torch.Tensor) -> None:
        inverse = None
        skipped = scale.isnan().float() if isinstance(scale, torch.Tensor) else None
        if skipped is not None or scale != 1.0:
            if self._wide:
                # The kernel takes its divisor in fp32, which would cost fp64 half its digits.
                torch._foreach_mul_(self._gradients, scale)
            else:
                # torch.amp.GradScaler's own protocol: the fused kernel divides while it reads, with no pass of its own.
                inverse = 1.0 / self._on_device(scale)
        for group in self._groups:
            updated = group.without(self.frozen) if self.frozen else group
            if updated.masters:
                self._update(updated, lr * self._lr_factor, inverse, skipped)

    def _update(self, group: _Group, lr: float, inverse: torch.Tensor | None, skipped: torch.Tensor | None) -> None:
        c = self._config
        if c.name != "sgd":
            adamw(
                group.masters,
                group.gradients,
                group.states["exp_avg"],
                group.states["exp_avg_sq"],
                [],
                group.counts,
                fused=True,
                grad_scale=inverse,
                found_inf=skipped,
                amsgrad=False,
                beta1=c.beta1,
                beta2=c.beta2,
                lr=lr,
                weight_decay=group.weight_decay,
                eps=c.eps,
                maximize=False,
            )
            return
        sgd(
            group.masters,
            group.gradients,
            list(group.states.get("momentum_buffer", [None] * len(group.masters))),
            fused=True,
            grad_scale=inverse,
            found_inf=skipped,
            weight_decay=group.weight_decay,
            momentum=c.momentum,
            lr=lr,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )


@dataclass
class _Range:
    """Segments beside each other in flat memory, with one weight decay and as many updates.

    ``tensors``: master weights, gradient, first and second moment. ``low``: half-precision weights, if they are others.
    """

    weight_decay: bool
    updates: int
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
    low: torch.Tensor | None


def _ranges(segments: Sequence[OptimizerSegment], updates: Sequence[int]) -> list[_Range]:
    """Between two segments there may be padding, which is zero and stays so."""
    found: list[_Range] = []
    for segment, count in zip(segments, updates):
        own = segment.master, segment.gradient, segment.state["exp_avg"], segment.state["exp_avg_sq"]
        last = found[-1] if found else None
        if last is not None and (last.weight_decay, last.updates) == (segment.weight_decay, count):
            pairs = [*zip(last.tensors, own), *([(last.low, segment.low)] if last.low is not None else [])]
            gaps = {_gap(a, b) for a, b in pairs}
            gap = gaps.pop()
            if not gaps and 0 <= gap <= _PADDING:
                a, b, c, d = (_longer(tensor, gap + segment.master.numel()) for tensor in last.tensors)
                last.tensors = a, b, c, d
                last.low = None if last.low is None else _longer(last.low, gap + segment.master.numel())
                continue
        found.append(_Range(segment.weight_decay, count, own, segment.low))
    return found


def _gap(a: torch.Tensor, b: torch.Tensor | None) -> int:
    """Elements between two tensors in one piece of memory; -1: they are in two."""
    if b is None or a._base is None or a._base is not b._base:
        return -1
    return int(b.storage_offset()) - int(a.storage_offset()) - a.numel()


def _longer(a: torch.Tensor, more: int) -> torch.Tensor:
    assert a._base is not None
    return a._base.as_strided((a.numel() + more,), (1,), a.storage_offset())


@dataclass
class _Group:
    """Segments with one weight decay, as the functional optimizers take them."""

    weight_decay: float
    masters: list[torch.Tensor]
    gradients: list[torch.Tensor]
    states: dict[str, list[torch.Tensor]]
    counts: list[torch.Tensor]
    names: list[str]

    def without(self, frozen: frozenset[str]) -> _Group:
        def kept(values: list[Any]) -> list[Any]:
            return [value for value, name in zip(values, self.names) if name not in frozen]

        states = {kind: kept(tensors) for kind, tensors in self.states.items()}
        lists = kept(self.masters), kept(self.gradients), states, kept(self.counts), kept(self.names)
        return _Group(self.weight_decay, *lists)
