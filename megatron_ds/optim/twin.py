"""Copies of a user's optimizer over other parameters: *twins*.

Besides state of each parameter, an optimizer keeps values once for many of them (:class:`Common`): the settings of its
groups, among which some count steps or write what they found (``group["step"]``, Schedule-Free's ``weight_sum`` and
``train_mode``), entries of ``optimizer.state`` under a key that is no parameter (MADGRAD's ``"k"``), and numbers in
attributes of the optimizer itself (StableSPAM's ``total_step``). All twins begin a step with the same ones, whatever
they did with them before.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

IMPLEMENTATION = ("foreach", "fused", "capturable", "differentiable")
"""Settings that say how an update is computed, and not what."""


@dataclass
class Common:
    """What an optimizer keeps once for many parameters; see above.

    Attributes:
        groups: index of a group to its settings, all but ``"params"``.
        state: what ``optimizer.state`` holds under keys that are no parameters.
        attributes: numbers among the optimizer's own attributes.
    """

    groups: dict[int, dict[str, Any]]
    state: dict[Any, Any]
    attributes: dict[str, float]

    @staticmethod
    def of(optimizer: Optimizer) -> Common:
        """A copy, which no later step changes."""
        return Common(
            {
                index: {key: copied(value) for key, value in group.items() if key != "params"}
                for index, group in enumerate(optimizer.param_groups)
            },
            {key: copied(value) for key, value in optimizer.state.items() if not isinstance(key, torch.Tensor)},
            {key: value for key, value in vars(optimizer).items() if type(value) in (int, float)},
        )

    def changes_from(self, before: Common) -> Common:
        """What is not as it was."""
        return Common(
            {index: changed(group, before.groups[index]) for index, group in self.groups.items()},
            changed(self.state, before.state),
            changed(self.attributes, before.attributes),
        )

    def difference(self, other: Common) -> str | None:
        """The first value that the two do not share, in words; groups that only one of them has do not count."""
        pairs = [(f"group {i} ", self.groups[i], other.groups[i]) for i in self.groups if i in other.groups]
        pairs += [("state ", self.state, other.state), ("attribute ", self.attributes, other.attributes)]
        for where, mine, others in pairs:
            for key in dict.fromkeys([*mine, *others]):
                if key not in mine or key not in others or _differ(mine[key], others[key]):
                    return f"{where}{key!r}: {_in_words(mine.get(key))} and {_in_words(others.get(key))}"
        return None


class Twin:
    """An optimizer of the same class and with the same settings, over ``parameters`` (group index to its own).

    Its constructor is not run, and it has no hooks and no scheduler's wrapping.
    """

    def __init__(self, optimizer: Optimizer, parameters: Mapping[int, Sequence[torch.Tensor]], common: Common):
        self._of = optimizer
        self.optimizer = copy.copy(optimizer)
        for key, value in vars(optimizer).items():
            if key not in ("step", "train", "eval") and not hasattr(self.optimizer, key):
                setattr(self.optimizer, key, copied(value))
        self.optimizer.state = defaultdict(dict)
        self.optimizer.param_groups = [{"params": list(own)} for own in parameters.values()]
        self._indices = list(parameters)
        self.take(common)

    @property
    def state(self) -> dict[Any, Any]:
        return self.optimizer.state

    def call(self, method: str) -> None:
        """Call ``step``, ``train`` or ``eval``, without the hooks of all optimizers: this is a part of one."""
        function = getattr(type(self.optimizer), method)
        (function.__wrapped__ if getattr(function, "hooked", False) else function)(self.optimizer)

    def take(self, common: Common) -> None:
        """Every setting and number is that of ``common`` from now on."""
        for index, group in zip(self._indices, self.optimizer.param_groups):
            parameters = group["params"]
            group.clear()
            group.update({key: copied(value) for key, value in common.groups[index].items()})
            self._choose_implementation(group, parameters)
            group["params"] = parameters
        state = self.optimizer.state
        for key in [key for key in state if not isinstance(key, torch.Tensor)]:
            del state[key]
        state.update({key: copied(value) for key, value in common.state.items()})
        vars(self.optimizer).update(common.attributes)

    @property
    def common(self) -> Common:
        """What the twin has made of them, but for how it is computed."""
        mine = Common.of(self.optimizer)
        groups = {
            self._indices[place]: {key: value for key, value in group.items() if key not in IMPLEMENTATION}
            for place, group in mine.groups.items()
        }
        return Common(groups, mine.state, mine.attributes)

    def _choose_implementation(self, group: dict[str, Any], parameters: Sequence[torch.Tensor]) -> None:
        """torch's fused update where it has one and nobody chose another implementation.

        Over flat segments it is always possible; torch's own choice on a CPU is a loop of several passes over memory.
        """
        chosen = any(group.get(key) for key in IMPLEMENTATION)
        unsaid = group.get("foreach", True) is None and group.get("fused", True) is None
        if type(self._of) is torch.optim.SGD:  # its fused update takes momentum of all parameters or of none
            started = {self.state.get(p, {}).get("momentum_buffer") is None for p in parameters}
            unsaid = unsaid and len(started) < 2
        if unsaid and not chosen and type(self._of) in (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD):
            group["fused"] = True


def copied(value: Any) -> Any:
    """Plain containers are built anew and single numbers in tensors copied; the rest is the same object."""
    if type(value) is dict:
        return {key: copied(part) for key, part in value.items()}
    if type(value) in (list, set, tuple):
        return type(value)(copied(part) for part in value)
    return value.clone() if isinstance(value, torch.Tensor) and value.numel() == 1 else value


def changed(now: Mapping[Any, Any], before: Mapping[Any, Any]) -> dict[Any, Any]:
    """What ``now`` has besides, or otherwise."""
    return {key: value for key, value in now.items() if key not in before or _differ(value, before[key])}


def _in_words(value: Any) -> str:
    short = value.numel() == 1 if isinstance(value, torch.Tensor) else isinstance(value, (int, float, str))
    return str(value) if short or value is None else f"a {type(value).__name__}"


def _differ(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        both = isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
        return a is not b and not (both and a.shape == b.shape and bool((a == b).all()))
    if type(a) in (list, tuple) and type(a) is type(b):
        return len(a) != len(b) or any(_differ(x, y) for x, y in zip(a, b))
    return bool(a != b) and not (a != a and b != b)
