"""Update rules: what ZeRO asks of an optimizer, and several of them for one model.

A rule answers for each parameter by name which :class:`RuleGroup` it is in: which state tensors are kept for it, and
whether its update is of single elements or of whole matrices. A flat bucket holds parameters of one group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Protocol

import torch

from megatron_ds.errors import ConfigError

Late = Mapping[str, Mapping[str, float] | None]
"""Numbers, such as AdamW's count of updates, of parameters that were frozen for a while and so have had fewer than the
others; by name. None: no update yet."""


@dataclass(frozen=True)
class RuleGroup:
    """What parameters have in common that may lie in one bucket.

    Attributes:
        number: of the rule that updates them, among several.
        kinds: names of the state tensors that it keeps for each of them, each of the parameter's shape.
        whole: an update needs all of a parameter, so that ZeRO cuts none between ranks. Else it is elementwise.
        gathers: and the rule itself brings together what other axes cut, such as tensor parallelism.
    """

    number: int = 0
    kinds: tuple[str, ...] = ()
    whole: bool = False
    gathers: bool = False


STATELESS = RuleGroup()
"""Of frozen parameters."""


@dataclass
class OptimizerSegment:
    """One 1-D range of master weights with its gradient and its state, all views of flat buffers.

    Where the group's updates are of whole parameters, it is all of one, in its shape. ``state`` has one tensor for each
    of the group's kinds, zero at the start of a run. ``name`` and ``start`` say of which parameter, and from which of
    its elements on, it is the range; ``order`` in which order of its dims they lie (empty: row-major). ``low``: the
    same weights in half precision, where the master weights are of their own.
    """

    master: torch.Tensor
    gradient: torch.Tensor
    state: dict[str, torch.Tensor]
    weight_decay: bool
    name: str = ""
    start: int = 0
    order: tuple[int, ...] = ()
    low: torch.Tensor | None = None


class Update(Protocol):
    """The update of one bucket's segments.

    Attributes:
        frozen: names of parameters that the next step leaves alone, with their state: they are frozen for a while.
    """

    frozen: frozenset[str]

    def bind(self, segments: Sequence[OptimizerSegment]) -> None:
        """Take the same segments in other memory: what is offloaded lies in another buffer at each step."""

    def step(self, lr: float, scale: float | torch.Tensor = 1.0) -> None:
        """One update with gradients multiplied by ``scale``. The gradients are no longer needed and may be changed.

        A tensor is known to the device alone. Where it is NaN, weights and state stay as they are, and the caller takes
        the update back from the count when it knows; a rule that cannot do so is not given a tensor.
        """

    def set_count(self, updates: int) -> None:
        """Say how many updates the state has seen (AdamW's bias correction), after loading a checkpoint."""

    def late(self, updates: int) -> Late:
        """The parameters that have not had all of these updates."""
        ...

    def load_late(self, late: Late) -> None:
        """Take what :meth:`late` gave, after :meth:`set_count`."""


class UpdateRule(Protocol):
    """Makes the updates of buckets."""

    def group_of(self, name: str) -> RuleGroup:
        """Of the parameter of this global name, the same on every rank.

        Raises:
            ConfigError: no rule updates it.
        """
        ...

    def begin_step(self) -> None:
        """A step begins, on this rank and all others: every :class:`Update` made here will be stepped once."""

    def over(self, segments: Sequence[OptimizerSegment]) -> Update:
        """The update of ``segments`` (at least one), all of one group, dtype and device."""
        ...


class RulesByName:
    """Several rules for one model, by the names of its parameters.

    Args:
        rules: shell-style pattern of names (``"*.bias"``) to rule. The first pattern that fits decides.
    """

    def __init__(self, rules: Mapping[str, UpdateRule]):
        self._patterns = dict(rules)
        self._rules = list({id(rule): rule for rule in rules.values()}.values())

    def _rule(self, name: str) -> UpdateRule:
        for pattern, rule in self._patterns.items():
            if fnmatchcase(name, pattern):
                return rule
        raise ConfigError(
            f"no update rule for {name}, which fits none of {', '.join(map(repr, self._patterns))}; add a last '*'"
        )

    def group_of(self, name: str) -> RuleGroup:
        rule = self._rule(name)
        return replace(rule.group_of(name), number=self._rules.index(rule))

    def begin_step(self) -> None:
        for rule in self._rules:
            rule.begin_step()

    def over(self, segments: Sequence[OptimizerSegment]) -> Update:
        return self._rule(segments[0].name).over(segments)
