"""torch's own fused optimizers over flat segments: which state they keep, and one update.

Everything is allocated by the caller and handed in, so that the state lives in flat buffers, exists before the first
step (a checkpoint at step 0 is like any other) and can be moved or saved without asking the optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from megatron_ds.config import OptimizerConfig

Late = Mapping[str, Mapping[str, float] | None]
"""Numbers, such as AdamW's count of updates, of parameters that were frozen for a while and so have had fewer than the
others; by name. None: no update yet."""


class Update(Protocol):
    """An update rule over the segments of one bucket; :class:`SegmentOptimizer` says what the methods do.

    Attributes:
        frozen: names of parameters that the next step leaves alone, with their state: they are frozen for a while.
    """

    frozen: frozenset[str]

    def set_count(self, updates: int) -> None: ...

    def late(self, updates: int) -> Late: ...

    def load_late(self, late: Late) -> None: ...

    def bind(self, segments: Sequence[OptimizerSegment]) -> None: ...

    def step(self, lr: float, scale: float | torch.Tensor = 1.0) -> None: ...


class UpdateRule(Protocol):
    """An update rule of the user's own, in place of an :class:`~megatron_ds.config.OptimizerConfig`.

    Attributes:
        kinds: see :func:`state_kinds`.
    """

    kinds: tuple[str, ...]

    def begin_step(self) -> None:
        """A step begins, on this rank and all others: every :class:`Update` made here will be stepped once."""

    def over(self, segments: Sequence[OptimizerSegment]) -> Update: ...


def make_update(rule: OptimizerConfig | UpdateRule, segments: Sequence[OptimizerSegment]) -> Update:
    """The rule over ``segments`` (at least one), all of one dtype and device."""
    return SegmentOptimizer(rule, segments) if isinstance(rule, OptimizerConfig) else rule.over(segments)


def state_kinds(config: OptimizerConfig | UpdateRule) -> tuple[str, ...]:
    """Names of the state tensors the optimizer keeps for each parameter, each of the parameter's size."""
    if not isinstance(config, OptimizerConfig):
        return config.kinds
    if config.name == "adamw":
        return ("exp_avg", "exp_avg_sq")
    return ("momentum_buffer",) if config.momentum > 0 else ()


@dataclass
class OptimizerSegment:
    """One 1-D range of master weights with its gradient and its state, all views of flat buffers.

    ``state`` has one tensor for each of :func:`state_kinds`, zero at the start of a run. ``name`` and ``start`` say of
    which parameter, and from which of its elements on, it is the range.
    """

    master: torch.Tensor
    gradient: torch.Tensor
    state: dict[str, torch.Tensor]
    weight_decay: bool
    name: str = ""
    start: int = 0


class SegmentOptimizer:
    """A ``torch.optim`` update rule over ``segments`` (at least one), all of one dtype and device.

    AdamW: ``m = b1 m + (1 - b1) g``, ``v = b2 v + (1 - b2) g^2``, ``w -= lr (wd w + m^ / (sqrt(v^) + eps))``
    (Loshchilov & Hutter 2019, algorithm 2). SGD: ``g += wd w``, ``m = mu m + g``, ``w -= lr m``.

    torch's functional forms are called and not its optimizer classes: those import ``torch._dynamo``, which takes
    100 MB and 1.4 s a rank.
    """

    def __init__(self, config: OptimizerConfig, segments: Sequence[OptimizerSegment]):
        self._config = config
        self.frozen: frozenset[str] = frozenset()
        # AdamW counts the updates of each of its parameters in a tensor; here they are all one number.
        self._counts = torch.zeros(len(segments), dtype=torch.float32, device=segments[0].master.device)
        self.bind(segments)

    def bind(self, segments: Sequence[OptimizerSegment]) -> None:
        """Take the same segments in other memory: what is offloaded lies in another buffer at each step."""
        config = self._config
        both = [(s, count) for s, count in zip(segments, self._counts.unbind())]
        self._groups = [
            _Group(
                weight_decay=config.weight_decay if decayed else 0.0,
                masters=[s.master for s, _ in both if s.weight_decay == decayed],
                gradients=[s.gradient for s, _ in both if s.weight_decay == decayed],
                states={
                    kind: [s.state[kind] for s, _ in both if s.weight_decay == decayed] for kind in state_kinds(config)
                },
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
        """Say how many updates the state has seen (AdamW's bias correction), after loading a checkpoint."""
        self._counts.fill_(updates)

    def late(self, updates: int) -> Late:
        """The parameters that have not had all of these updates."""
        counts = dict(zip(self._names, self._counts.tolist()))
        return {name: {"step": count} for name, count in counts.items() if count != updates}

    def load_late(self, late: Late) -> None:
        """Take what :meth:`late` gave, after :meth:`set_count`."""
        for name, count in zip(self._names, self._counts.unbind()):
            if (numbers := late.get(name)) is not None:
                count.fill_(numbers["step"])

    @torch.no_grad()
    def step(self, lr: float, scale: float | torch.Tensor = 1.0) -> None:
        """One update with gradients multiplied by ``scale``. The gradients are no longer needed and may be changed."""
        inverse = None
        if isinstance(scale, torch.Tensor) or scale != 1.0:
            if self._wide:
                # The kernel takes its divisor in fp32, which would cost fp64 half its digits.
                torch._foreach_mul_(self._gradients, scale)
            else:
                # torch.amp.GradScaler's own protocol: the fused kernel divides while it reads, with no pass of its own.
                # A number is filled in on the device: copying it there would wait for all that is queued.
                divisor = self._counts.new_empty(())
                divisor.copy_(scale) if isinstance(scale, torch.Tensor) else divisor.fill_(scale)
                inverse = 1.0 / divisor
        for group in self._groups:
            updated = group.without(self.frozen) if self.frozen else group
            if updated.masters:
                self._update(updated, lr, inverse)

    def _update(self, group: _Group, lr: float, inverse: torch.Tensor | None) -> None:
        c = self._config
        if c.name == "adamw":
            adamw(
                group.masters,
                group.gradients,
                group.states["exp_avg"],
                group.states["exp_avg_sq"],
                [],
                group.counts,
                fused=True,
                grad_scale=inverse,
                found_inf=None,
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
            found_inf=None,
            weight_decay=group.weight_decay,
            momentum=c.momentum,
            lr=lr,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )


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
