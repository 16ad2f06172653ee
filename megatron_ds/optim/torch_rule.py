"""Any ``torch.optim`` optimizer whose update is elementwise, or of whole parameters, as an update rule.

The user's optimizer object stays the place of what is kept once for many parameters: learning rates and all else in
``param_groups``, so that torch's LR schedulers work on it and what an optimizer writes there can be read there. Its
update runs in twins of it (:mod:`megatron_ds.optim.twin`), one a bucket, whose parameters are the segments. Tensors
that it keeps of a parameter become flat state like Adam's moments; single numbers (``step``, NAdam's ``mu_product``)
are the same for all parameters of a group, and a checkpoint keeps them once a group.

One more twin, the *leader*, has a small parameter in every group. It steps first, on every rank alike, and what it
writes into the groups is what holds: a rank may have no segment of a group. Another twin that comes to other numbers
is an error; :mod:`megatron_ds.optim.probe` refuses such optimizers beforehand.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from enum import Enum
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.optim import Optimizer

from megatron_ds.errors import ConfigError, listed
from megatron_ds.optim.probe import StateTemplate, is_number, other_shape, shaped, templates_of
from megatron_ds.optim.rule import Late, OptimizerSegment, RuleGroup, Update
from megatron_ds.optim.twin import Common, Twin
from megatron_ds.shard import as_real, real_dtype

Scalars = dict[str, float]


class TorchRule:
    """An update rule made of ``optimizer``, for :class:`~megatron_ds.zero.optimizer.ZeroOptimizer`.

    Args:
        optimizer: over the model's own parameters. It is never stepped itself, and what state it holds of parameters
            (Adagrad's sums, or that of steps already taken) is taken over.
        parameters: name to parameter, each parameter once.

    Attributes:
        templates: of each group, what is kept of a parameter.
        before: what was kept once for many parameters when the step began; after: what the leader made of it.

    Raises:
        ConfigError: its update of a parameter depends on others or keeps what is no tensor of its shape, or it and the
            model do not hold the same parameters.
    """

    def __init__(self, optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]):
        self.optimizer = optimizer
        self._group_of = _groups(optimizer, parameters, [name for name, p in parameters.items() if p.requires_grad])
        self._initial = {name: _real(optimizer.state.get(p, {})) for name, p in parameters.items()}
        for parameter in parameters.values():
            optimizer.state.pop(parameter, None)
        for name, state in self._initial.items():
            _require_shape(optimizer, state, as_real(parameters[name]))
        self.templates: list[StateTemplate] = []
        self._updates: WeakSet[_TorchUpdate] = WeakSet()  # the buckets keep them
        self._mode = ""  # that was called last; a checkpoint may have been taken in another
        self._try_groups(parameters)

    def _try_groups(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """What each group keeps of a parameter, and a leader with a parameter in each."""
        optimizer = self.optimizer
        samples, shapes = [], []
        for index in range(len(optimizer.param_groups)):
            members = [name for name, of in self._group_of.items() if of == index]
            # Not of a 0-d parameter: its tensors could not be told from numbers.
            of_group = [name for name in members if parameters[name].dim() and parameters[name].numel()]
            candidates = of_group or [n for n in self._group_of if parameters[n].dim() and parameters[n].numel()]
            samples.append(next((self._initial[name] for name in candidates if self._initial[name]), {}))
            shapes.append([tuple(parameters[name].shape) for name in members])
        self.templates = templates_of(optimizer, samples, shapes)
        for name, index in self._group_of.items():
            if self.templates[index].whole and parameters[name].is_complex():
                raise ConfigError(
                    f"{name} is complex, and {type(optimizer).__name__} updates whole parameters, which are real here; "
                    "use an elementwise optimizer such as AdamW"
                )
        self.before = self.after = Common.of(optimizer)
        self._leader = self._make_leader(samples)

    def train_also(self, names: Collection[str], parameters: Mapping[str, nn.Parameter]) -> None:
        """Parameters are trained that were frozen so far; the optimizer may have got groups for them meanwhile.

        Raises:
            ConfigError: it cannot update them, or has them in no group.
        """
        numbers = self.numbers()
        found = _groups(self.optimizer, parameters, [*self._group_of, *names])
        if moved := [name for name, index in self._group_of.items() if found[name] != index]:
            raise ConfigError(
                f"{moved[0]} is in another group of the optimizer than at initialize(); add new groups after the others"
            )
        self._group_of = found
        self._try_groups(parameters)
        self._leader.load_numbers(numbers)

    def replace(self, old: nn.Parameter, new: nn.Parameter, name: str) -> None:
        """``new`` takes the place of ``old`` in its group, without what was held of that before the first step."""
        for group in self.optimizer.param_groups:
            group["params"][:] = [new if parameter is old else parameter for parameter in group["params"]]
        self._initial[name] = {}

    def _make_leader(self, samples: Sequence[Mapping[str, Any]]) -> _TorchUpdate:
        segments = []
        for index, group in enumerate(self.optimizer.param_groups):
            like = next((p for p in group["params"] if not p.is_meta), torch.empty(0))
            wide = torch.float64 if real_dtype(like.dtype) == torch.float64 else torch.float32
            master = torch.ones(self.templates[index].shape, dtype=wide, device=like.device)
            state = {kind: torch.zeros_like(master) for kind in self.templates[index].kinds}
            segments.append(OptimizerSegment(master, torch.zeros_like(master), state, True, f"group {index}"))
        initial = [shaped(sample, segment.master) for sample, segment in zip(samples, segments)]
        return _TorchUpdate(self, segments, list(range(len(segments))), initial)

    @property
    def keeps_state(self) -> bool:
        """Whether it keeps more than the groups' settings."""
        return any(template.kinds or template.numbers or template.rest for template in self.templates)

    @property
    def learning_rate(self) -> float:
        lr = self.optimizer.param_groups[0].get("lr")
        return math.nan if lr is None else float(lr)

    def group_of(self, name: str) -> RuleGroup:
        template = self.templates[self._group_of[name]]
        return RuleGroup(kinds=tuple(template.kinds), whole=template.whole)

    def over(self, segments: Sequence[OptimizerSegment]) -> _TorchUpdate:
        # What the user's optimizer held of each parameter before, the segment's part of it.
        initial = [_cut(self._initial[segment.name], segment) for segment in segments]
        update = _TorchUpdate(self, segments, [self._group_of[segment.name] for segment in segments], initial)
        self._updates.add(update)
        return update

    def begin_step(self) -> None:
        """Before the updates of a step's buckets, on all ranks."""
        for segment in self._leader.segments:
            segment.master.fill_(1.0)
            segment.gradient.fill_(0.5)
        self._lead("step")

    def _lead(self, method: str) -> None:
        self.before = Common.of(self.optimizer)
        self.after = self._leader.run(method)
        changes = self.after.changes_from(self.before)
        for index, group in changes.groups.items():
            self.optimizer.param_groups[index].update(group)
        self.optimizer.state.update(changes.state)
        vars(self.optimizer).update(changes.attributes)

    def serve_modes(self, change: Callable[[Callable[[], None], Callable[[Update], None]], None]) -> None:
        """``optimizer.train()`` and ``.eval()``, of an optimizer that has both, act on the weights that it updates.

        A mode that it is in already changes nothing: transformers' Trainer calls ``train()`` before each micro-batch.

        Args:
            change: between two steps, calls a function, and another with every bucket's update; the parameters follow.
        """
        if not all(callable(getattr(self.optimizer, name, None)) for name in ("train", "eval")):
            return

        def mode(name: str) -> Callable[[], None]:
            def switch() -> None:
                if name != self._mode:
                    change(lambda: self._lead(name), lambda update: update.run(name))  # type: ignore[attr-defined]
                    self._mode = name

            return switch

        for name in ("train", "eval"):
            setattr(self.optimizer, name, mode(name))

    # For a checkpoint

    def state_dict(self) -> dict[str, Any]:
        """All that is not a tensor of a parameter's size: settings, and the numbers of each group after a step."""
        common = Common.of(self.optimizer)
        return {
            "class": type(self.optimizer).__name__,
            "groups": [{key: _in_words(value) for key, value in group.items()} for group in common.groups.values()],
            "state": common.state,
            "attributes": common.attributes,
            "numbers": self.numbers(),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take what :meth:`state_dict` gave, as ``Optimizer.load_state_dict`` does.

        After the flat state has been filled from a checkpoint; groups that had taken no step have no numbers.
        """
        groups = saved["groups"]
        if len(groups) != len(self.optimizer.param_groups):
            raise ConfigError(
                f"the checkpoint's optimizer has {len(groups)} parameter groups, this one "
                f"{len(self.optimizer.param_groups)}; make it with the same groups, or load the weights alone"
            )
        made = self.after.changes_from(self.before)
        for index, (mine, values) in enumerate(zip(self.optimizer.param_groups, groups)):
            for key in made.groups[index]:  # by a step that is undone
                mine.pop(key, None)
            _restore(mine, values)
        state: dict[Any, Any] = self.optimizer.state
        for key in made.state:
            state.pop(key, None)
        _restore(state, saved.get("state", {}))
        vars(self.optimizer).update(saved.get("attributes", {}))
        self._mode = ""
        self.load_numbers({int(group): of_group for group, of_group in saved["numbers"].items()})

    def load_numbers(self, numbers: Mapping[int, Scalars]) -> None:
        """Give the parameters of each group these :meth:`numbers`; a group without has not been updated."""
        for update in [self._leader, *self._updates]:
            update.load_numbers(numbers)

    def numbers(self) -> dict[int, Scalars]:
        """The numbers of each group that has been updated: the leader's, which are those of all but late parameters."""
        return {group: of_group for _, group, of_group in self._leader.numbers() if of_group is not None}


class _TorchUpdate:
    """A twin of the optimizer over one bucket's segments.

    Args:
        groups: of each segment, the index of its group. initial: and the state that it has, or nothing.
    """

    def __init__(
        self,
        rule: TorchRule,
        segments: Sequence[OptimizerSegment],
        groups: Sequence[int],
        initial: Sequence[dict[str, Any]],
    ):
        self._rule, self._groups = rule, groups
        self._parameters = [segment.master.detach() for segment in segments]
        of_group: dict[int, list[torch.Tensor]] = {index: [] for index in sorted(set(groups))}
        for index, parameter in zip(groups, self._parameters):
            of_group[index].append(parameter)
        self._twin = Twin(rule.optimizer, of_group, rule.before)
        self.frozen: frozenset[str] = frozenset()
        self.bind(segments)
        for parameter, state in zip(self._parameters, initial):
            if state:
                self._twin.state[parameter] = state
        self._keep()

    def set_count(self, updates: int) -> None:
        """The count is one of the numbers that :meth:`load_numbers` sets."""

    def bind(self, segments: Sequence[OptimizerSegment]) -> None:
        self.segments = list(segments)
        for segment, parameter, group in zip(segments, self._parameters, self._groups):
            parameter.data = segment.master.detach()
            parameter.grad = segment.gradient.detach()
            state = self._twin.state.get(parameter)
            if state:
                state.update({kind: segment.state[kind] for kind in self._rule.templates[group].kinds if kind in state})

    @torch.no_grad()
    def step(self, lr: float, scale: float | torch.Tensor = 1.0) -> None:
        """One update with gradients multiplied by ``scale``, at the groups' own rates: ``lr`` is not asked."""
        if isinstance(scale, torch.Tensor) or scale != 1.0:
            torch._foreach_mul_([segment.gradient for segment in self.segments], scale)
        for segment, parameter in zip(self.segments, self._parameters):
            if segment.name in self.frozen:
                parameter.grad = None
        found = self.run("step").difference(self._rule.after)
        if found is not None:
            raise RuntimeError(
                f"{type(self._rule.optimizer).__name__} came to other numbers for some parameters than for others "
                f"({found}), and a rank sees a part of them; use one whose update of a parameter depends on no other"
            )

    @torch.no_grad()
    def run(self, method: str) -> Common:
        """Call the optimizer's ``step``, ``train`` or ``eval``; what it has made of the groups' settings."""
        self._twin.take(self._rule.before)
        self._twin.call(method)
        self._keep()
        return self._twin.common

    def _keep(self) -> None:
        """The optimizer's own tensors, made in its first step or put in place of others, move into the flat ones."""
        for segment, parameter, group in zip(self.segments, self._parameters, self._groups):
            if parameter.data_ptr() != segment.master.data_ptr():
                segment.master.copy_(parameter)
                parameter.data = segment.master.detach()
            parameter.grad = segment.gradient.detach()
            state = self._twin.state.get(parameter, {})
            for kind in self._rule.templates[group].kinds:
                if kind in state and state[kind] is not segment.state[kind]:
                    segment.state[kind].copy_(state[kind])
                    state[kind] = segment.state[kind]

    def numbers(self) -> Iterable[tuple[str, int, Scalars | None]]:
        """Of each segment its parameter's name, its group, and its numbers: None before its first update."""
        for segment, parameter, group in zip(self.segments, self._parameters, self._groups):
            state = self._twin.state.get(parameter)
            known = self._rule.templates[group].numbers
            yield segment.name, group, {key: float(state[key]) for key in known} if state else None

    def late(self, updates: int) -> Late:
        usual = self._rule.numbers()
        return {name: numbers for name, group, numbers in self.numbers() if numbers != usual.get(group)}

    def load_late(self, late: Late) -> None:
        for place, segment in enumerate(self.segments):
            if segment.name in late:
                self._load(place, late[segment.name])

    def load_numbers(self, numbers: Mapping[int, Scalars]) -> None:
        for place, group in enumerate(self._groups):
            self._load(place, numbers.get(group))

    def _load(self, place: int, numbers: Mapping[str, float] | None) -> None:
        segment, parameter = self.segments[place], self._parameters[place]
        self._twin.state.pop(parameter, None)
        if numbers is not None:
            template: StateTemplate = self._rule.templates[self._groups[place]]
            state = template.fresh(numbers)
            state.update({kind: segment.state[kind] for kind in template.kinds})
            self._twin.state[parameter] = state


def _require_shape(optimizer: Optimizer, state: Mapping[str, Any], parameter: torch.Tensor) -> None:
    """ConfigError for a tensor that the optimizer has kept of the parameter and that has another shape."""
    for key, value in state.items():
        if isinstance(value, torch.Tensor) and value.shape != parameter.shape and not is_number(value):
            raise other_shape(optimizer, key, value, parameter)


def _real(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: as_real(value) if isinstance(value, torch.Tensor) else value for key, value in state.items()}


def _groups(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], trained: Collection[str]) -> dict[str, int]:
    """Name to group of every parameter that is ``trained``."""
    name_of = {id(parameter): name for name, parameter in parameters.items()}
    found: dict[str, int] = {}
    for index, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            name = name_of.get(id(parameter))
            if name is None:
                raise ConfigError(
                    f"group {index} of the optimizer holds a parameter of shape {list(parameter.shape)} that is not "
                    "the model's; make the optimizer of model.parameters(), after the model has its final parameters"
                )
            found[name] = index
    lost = [name for name in trained if name not in found]
    if lost:
        raise ConfigError(
            f"{listed(lost, 5)} would get gradients but are in no group of the optimizer; add them, or freeze them "
            "with requires_grad_(False)"
        )
    return {name: found[name] for name in trained}


def _cut(state: Mapping[str, Any], segment: OptimizerSegment) -> dict[str, Any]:
    """The segment's part of a whole parameter's state."""
    return {
        key: _part(value, segment) if key in segment.state and isinstance(value, torch.Tensor) else copy.deepcopy(value)
        for key, value in state.items()
    }


def _part(value: torch.Tensor, segment: OptimizerSegment) -> torch.Tensor:
    if value.shape == segment.master.shape:
        return value.to(segment.master)
    flat = (value.permute(segment.order) if segment.order else value).flatten()
    return flat[segment.start : segment.start + segment.master.numel()].to(segment.master).view_as(segment.master)


def _in_words(value: Any) -> Any:
    """A setting that says how to compute, and never changes: no file holds the object."""
    return str(value) if isinstance(value, torch.dtype | Enum) else value


def _restore(mine: dict[Any, Any], saved: Mapping[Any, Any]) -> None:
    """Values that are in tensors stay in them."""
    for key, value in saved.items():
        old = mine.get(key)
        if isinstance(old, torch.Tensor):
            old.fill_(value)
        elif isinstance(old, torch.dtype | Enum):
            if str(old) != value:
                raise ConfigError(
                    f"the checkpoint's optimizer has {key}={value}, this one {old}; make it with the same, or load the "
                    "weights alone"
                )
        else:
            mine[key] = value
