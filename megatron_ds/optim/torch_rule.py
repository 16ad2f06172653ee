"""Any elementwise ``torch.optim`` optimizer as an update rule over flat segments.

The user's optimizer object stays the place of its settings: learning rates and all else in ``param_groups`` are read at
every step, so that torch's LR schedulers work on it. Its update runs in *twins* of it, one a bucket, whose parameters
are the segments. What it keeps for each parameter is found out by running it on a small tensor: tensors of the
parameter's shape become flat state like Adam's moments; single numbers (``step``, NAdam's ``mu_product``) are the same
for all parameters of a group, and a checkpoint keeps them once a group.

A segment is a part of a flattened parameter. So the update must be elementwise, and whether it is gets *tried*: the
optimizer is run on a matrix and on its two flattened halves, and both have to come out the same.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from megatron_ds.errors import ConfigError
from megatron_ds.optim.factory import OptimizerSegment
from megatron_ds.shard import as_real, real_dtype

_WHY_NOT = {
    "LBFGS": "its line search evaluates the loss again and again through a closure",
    "Adafactor": "it factors the second moment of a matrix into rows and columns",
    "Muon": "it orthogonalises a matrix as a whole",
    "SparseAdam": "it takes sparse gradients, and flat gradients are dense",
}
_INSTEAD = "use an elementwise one such as AdamW, SGD, RMSprop, Adagrad or NAdam"
_PROBE = 3  # elements: more than one, so that a number is told from a tensor of the parameter's shape

Scalars = dict[str, float]


class TorchRule:
    """An update rule made of ``optimizer``, for :class:`~megatron_ds.zero.optimizer.ZeroOptimizer`.

    Args:
        optimizer: over the model's own parameters. It is never stepped itself, and what state it holds of parameters
            (Adagrad's sums, or that of steps already taken) is taken over.
        parameters: name to parameter, each parameter once.

    Attributes:
        kinds: names of the state tensors it keeps for each parameter, of the parameter's size.

    Raises:
        ConfigError: the optimizer is not elementwise, or it and the model do not hold the same parameters.
    """

    def __init__(self, optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]):
        self.optimizer = optimizer
        self._group_of = _groups(optimizer, parameters)
        self._initial = {name: _real(optimizer.state.get(parameters[name], {})) for name in self._group_of}
        optimizer.state.clear()
        self._templates: list[dict[str, Any]] = []
        for index, group in enumerate(optimizer.param_groups):
            members = [name for name, of in self._group_of.items() if of == index]
            # Not of a 0-d parameter: its tensors could not be told from numbers.
            candidates = [n for n in [*members, *self._group_of] if parameters[n].dim() and parameters[n].numel()]
            sample = next((self._initial[name] for name in candidates if self._initial[name]), {})
            _check_elementwise(optimizer, group, sample)
            self._templates.append(_probe(optimizer, group, sample))
        self.kinds = tuple(
            dict.fromkeys(kind for template in self._templates for kind, value in template.items() if _is_kind(value))
        )
        self._updates: list[_TorchUpdate] = []

    @property
    def learning_rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def over(self, segments: Sequence[OptimizerSegment]) -> _TorchUpdate:
        update = _TorchUpdate(self, segments)
        self._updates.append(update)
        return update

    def group_of(self, name: str) -> int:
        return self._group_of[name]

    def take_initial(self, name: str) -> dict[str, Any]:
        """The state that the user's optimizer held of a parameter before."""
        return self._initial[name]

    def fresh_state(self, group: int, scalars: Mapping[str, float]) -> dict[str, Any]:
        """What is in a parameter's state besides its flat tensors, with the given numbers."""
        state = {}
        for key, value in self._templates[group].items():
            if _is_kind(value):
                continue
            if isinstance(value, torch.Tensor):
                state[key] = torch.full_like(value, scalars[key])
            else:
                state[key] = type(value)(scalars[key]) if key in scalars else value
        return state

    # For a checkpoint

    def settings(self) -> list[dict[str, Any]]:
        """Every group's settings, as JSON can hold them."""
        return [
            {key: _plain(value) for key, value in group.items() if key != "params"}
            for group in self.optimizer.param_groups
        ]

    def load_settings(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Take saved settings, as ``Optimizer.load_state_dict`` does."""
        if len(groups) != len(self.optimizer.param_groups):
            raise ConfigError(
                f"the checkpoint's optimizer has {len(groups)} parameter groups, this one "
                f"{len(self.optimizer.param_groups)}; make it with the same groups, or load the weights alone"
            )
        for mine, saved in zip(self.optimizer.param_groups, groups):
            for key, value in saved.items():
                old = mine.get(key)
                if isinstance(old, torch.Tensor):
                    old.fill_(value)
                else:
                    mine[key] = tuple(value) if isinstance(value, list) else value

    def scalars(self) -> dict[int, Scalars]:
        """The numbers of each group that has a segment on this rank and has been updated."""
        found: dict[int, Scalars] = {}
        for update in self._updates:
            for group, state in update.states():
                numbers = {k: float(v) for k, v in state.items() if _is_number(v)}
                if found.setdefault(group, numbers) != numbers:
                    raise RuntimeError(f"parameters of group {group} differ in {numbers} and {found[group]}")
        return found

    def load_scalars(self, scalars: Mapping[int, Scalars]) -> None:
        """After the flat state has been filled from a checkpoint; nothing for groups that had taken no step."""
        for update in self._updates:
            update.load_scalars(scalars)


class _TorchUpdate:
    """A twin of the optimizer over one bucket's segments."""

    def __init__(self, rule: TorchRule, segments: Sequence[OptimizerSegment]):
        self._rule = rule
        self._groups = [rule.group_of(segment.name) for segment in segments]
        self._parameters = [segment.master.detach() for segment in segments]
        self._used = sorted(set(self._groups))
        self._twin = _twin(
            rule.optimizer,
            [
                {**_fast_settings(rule.optimizer, rule.optimizer.param_groups[index]), "params": self._of_group(index)}
                for index in self._used
            ],
        )
        self.bind(segments)
        for segment, parameter in zip(segments, self._parameters):
            initial = rule.take_initial(segment.name)
            if initial:
                self._twin.state[parameter] = self._adopt(segment, _cut(initial, segment, rule.kinds))

    def _of_group(self, index: int) -> list[torch.Tensor]:
        return [parameter for parameter, group in zip(self._parameters, self._groups) if group == index]

    def set_count(self, updates: int) -> None:
        """The count is one of the numbers that ``load_scalars`` sets."""

    def bind(self, segments: Sequence[OptimizerSegment]) -> None:
        self._segments = list(segments)
        for segment, parameter in zip(segments, self._parameters):
            parameter.data = segment.master.detach()
            parameter.grad = segment.gradient.detach()
            state = self._twin.state.get(parameter)
            if state:
                for kind in self._rule.kinds:
                    if isinstance(state.get(kind), torch.Tensor):
                        state[kind] = segment.state[kind]

    @torch.no_grad()
    def step(self, lr: float, scale: float | torch.Tensor = 1.0) -> None:
        """One update with gradients multiplied by ``scale``, at the groups' own rates: ``lr`` is not asked."""
        for index, group in zip(self._used, self._twin.param_groups):
            group.update(_fast_settings(self._rule.optimizer, self._rule.optimizer.param_groups[index]))
        if isinstance(scale, torch.Tensor) or scale != 1.0:
            torch._foreach_mul_([segment.gradient for segment in self._segments], scale)
        fresh = {id(parameter) for parameter in self._parameters if not self._twin.state.get(parameter)}
        self._twin.step()
        for segment, parameter in zip(self._segments, self._parameters):
            if id(parameter) in fresh:
                self._twin.state[parameter] = self._adopt(segment, self._twin.state[parameter])

    def _adopt(self, segment: OptimizerSegment, state: dict[str, Any]) -> dict[str, Any]:
        """The optimizer's own tensors move into the flat state, once: after the first step, which made them."""
        for kind in self._rule.kinds:
            if isinstance(state.get(kind), torch.Tensor):
                segment.state[kind].copy_(state[kind])
                state[kind] = segment.state[kind]
        return state

    def states(self) -> Iterable[tuple[int, dict[str, Any]]]:
        for parameter, group in zip(self._parameters, self._groups):
            state = self._twin.state.get(parameter)
            if state:
                yield group, state

    def load_scalars(self, scalars: Mapping[int, Scalars]) -> None:
        for segment, parameter, group in zip(self._segments, self._parameters, self._groups):
            self._twin.state.pop(parameter, None)
            if group in scalars:
                state = self._rule.fresh_state(group, scalars[group])
                kinds = self._rule._templates[group]
                state.update({k: segment.state[k] for k in self._rule.kinds if _is_kind(kinds.get(k))})
                self._twin.state[parameter] = state


def _real(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: as_real(value) if isinstance(value, torch.Tensor) else value for key, value in state.items()}


def _groups(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, int]:
    """Name to group of every parameter that is updated."""
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
            if parameter.requires_grad:
                found[name] = index
    lost = [name for name, parameter in parameters.items() if parameter.requires_grad and name not in found]
    if lost:
        raise ConfigError(
            f"{', '.join(lost[:5])}{f' and {len(lost) - 5} more' if len(lost) > 5 else ''} would get gradients but are "
            "in no group of the optimizer; add them, or freeze them with requires_grad_(False)"
        )
    return found


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _fast_settings(optimizer: Optimizer, group: Mapping[str, Any]) -> dict[str, Any]:
    """The group's settings, with torch's fused update where it has one and nobody chose another implementation.

    Over flat segments it is always possible; torch's own choice on a CPU is a loop of several passes over memory.
    """
    settings = _settings(group)
    chosen = any(settings.get(key) for key in ("foreach", "fused", "capturable", "differentiable"))
    unsaid = settings.get("foreach", True) is None and settings.get("fused", True) is None
    if unsaid and not chosen and type(optimizer) in (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD):
        settings["fused"] = True
    return settings


def _twin(optimizer: Optimizer, groups: list[dict[str, Any]]) -> Optimizer:
    """Another optimizer of the same kind over ``groups``, which have every setting. Its constructor is not run."""
    twin = copy.copy(optimizer)  # by the class's own protocol: settings, but no hooks and no scheduler's wrapping
    for key, value in vars(optimizer).items():
        if key != "step" and not hasattr(twin, key):
            setattr(twin, key, value)
    twin.state = defaultdict(dict)
    twin.param_groups = groups
    return twin


def _probe(optimizer: Optimizer, group: Mapping[str, Any], sample: Mapping[str, Any]) -> dict[str, Any]:
    """The state of one parameter after one step."""
    like = group["params"][0] if group["params"] else torch.empty(0)
    device = torch.device("cpu") if like.is_meta else like.device
    wide = torch.float64 if real_dtype(like.dtype) == torch.float64 else torch.float32
    parameter = torch.ones(_PROBE, dtype=wide, device=device)
    parameter.grad = torch.full_like(parameter, 0.5)
    twin = _twin(optimizer, [{**_fast_settings(optimizer, group), "params": [parameter]}])
    if sample:
        twin.state[parameter] = _shaped(sample, parameter)
    twin.step()
    state = dict(twin.state[parameter])
    odd = {k: list(v.shape) for k, v in state.items() if isinstance(v, torch.Tensor) and v.shape not in ((), (_PROBE,))}
    if odd:
        raise _refusal(optimizer, f"it keeps state of shape {odd} for a parameter of shape [{_PROBE}]")
    return state


def _check_elementwise(optimizer: Optimizer, group: Mapping[str, Any], sample: Mapping[str, Any]) -> None:
    name = type(optimizer).__name__
    if name in _WHY_NOT and type(optimizer).__module__.startswith("torch.optim"):
        raise _refusal(optimizer, _WHY_NOT[name])
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    gradients = [torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(2)]
    # What runs on a GPU alone does not change what is computed.
    plain = {**_settings(group), **{key: False for key in ("fused", "capturable", "foreach") if key in group}}

    def run(slices: Sequence[slice] | None) -> torch.Tensor:
        whole = [start.clone()] if slices is None else [start.flatten()[part].clone() for part in slices]
        twin = _twin(optimizer, [{**plain, "params": whole}])
        for parameter in whole:
            if sample:
                twin.state[parameter] = _shaped(sample, parameter)
        for gradient in gradients:
            cut = [gradient] if slices is None else [gradient.flatten()[part] for part in slices]
            for parameter, own in zip(whole, cut):
                parameter.grad = own.clone()
            twin.step()
        return torch.cat([parameter.flatten() for parameter in whole])

    try:
        with torch.no_grad():
            matrix, parts = run(None), run([slice(0, 10), slice(10, 24)])
    except Exception as error:
        raise _refusal(optimizer, f"it does not run on a 1-D tensor: {type(error).__name__}: {error}") from error
    if not torch.allclose(matrix, parts, rtol=1e-12, atol=1e-12):
        raise _refusal(optimizer, "its update of a matrix is not that of its elements, one by one")


def _refusal(optimizer: Optimizer, reason: str) -> ConfigError:
    return ConfigError(
        f"{type(optimizer).__name__} cannot update sharded parameters: a rank holds a flat part of each and never the "
        f"matrix, and {reason}; {_INSTEAD}"
    )


def _shaped(sample: Mapping[str, Any], parameter: torch.Tensor) -> dict[str, Any]:
    """State like that of another parameter: its first element everywhere."""
    return {
        key: value.flatten()[0].to(parameter).expand(parameter.shape).clone()
        if isinstance(value, torch.Tensor) and value.dim() > 0
        else copy.deepcopy(value)
        for key, value in sample.items()
    }


def _cut(state: Mapping[str, Any], segment: OptimizerSegment, kinds: Sequence[str]) -> dict[str, Any]:
    """The segment's part of a whole parameter's state."""
    stop = segment.start + segment.master.numel()
    return {
        key: value.flatten()[segment.start : stop].to(segment.master)
        if key in kinds and isinstance(value, torch.Tensor)
        else copy.deepcopy(value)
        for key, value in state.items()
    }


def _is_kind(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0


def _is_number(value: Any) -> bool:
    return (isinstance(value, torch.Tensor) and value.dim() == 0) or isinstance(value, int | float)


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"an optimizer setting of {value} cannot be saved")
    return list(value) if isinstance(value, tuple) else value
