"""Whether a user's optimizer can update sharded parameters, and what it keeps of each: found out by running it.

A rank holds flat parts of parameters, bucket by bucket. So the update of a part must not depend on what else is
updated with it. That is *tried*, in float64: twins of the optimizer update a matrix (and a tensor of as many dims as
the model's have), its two flattened parts together, and each of the parts alone. All must come out the same: the
elements, what is kept of each parameter, and what is kept once for all of them. A norm of a matrix differs between the
first two, a sum over all parameters (Prodigy's ``d``) between the last two.

Where parts of a matrix come to something else than the matrix, the group's parameters are updated as wholes, each on
one rank. Then each of them alone must come to what it comes to together with others.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch.optim import Optimizer

from megatron_ds.errors import ConfigError
from megatron_ds.optim.twin import IMPLEMENTATION, Common, Twin, changed, copied
from megatron_ds.shard import real_dtype

_WHY_NOT = {
    "LBFGS": "its line search evaluates the loss again and again through a closure",
    "SparseAdam": "it takes sparse gradients, and flat gradients are dense",
}
_INSTEAD = "use an elementwise one such as AdamW, SGD or Lion, or one of whole parameters such as Muon, LAMB or LARS"
# Gradients of each step. They have one direction, along which distance estimates grow; they differ in size, so that
# what is clipped or damped above or below some size is met.
_SIZES = (1.0, 1.0, 0.5, 30.0, 1e-3, 1e3)
_SMALL, _LARGE = 3, 1 << 14  # elements: an optimizer may keep another kind of state of large parameters
# Two shapes of a parameter of so many dims.
_SHAPES = ((6, 4, 2, 3, 2), (3, 5, 2, 2, 2))
# Shapes of 24 elements by their number of dims.
_OF_24 = {2: (4, 6), 3: (4, 3, 2), 4: (2, 3, 2, 2), 5: (2, 3, 2, 2, 1)}

Sample = Mapping[str, Any]
Shape = tuple[int, ...]


@dataclass
class StateTemplate:
    """What the optimizer keeps of one parameter.

    Attributes:
        kinds: tensors of the parameter's shape.
        numbers: single ones, plain or in a tensor of one element; their values are those after one step.
        rest: other plain values.
        whole: the update is of whole parameters.
        shape: of a small parameter that the optimizer can update.
    """

    kinds: list[str] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    rest: dict[str, Any] = field(default_factory=dict)
    whole: bool = False
    shape: Shape = (_SMALL,)

    def fresh(self, numbers: Mapping[str, float]) -> dict[str, Any]:
        """A parameter's state but for its tensors, with the given numbers."""
        state = copy.deepcopy(self.rest)
        for key, value in self.numbers.items():
            given = numbers.get(key, value)
            state[key] = torch.full_like(value, given) if isinstance(value, torch.Tensor) else type(value)(given)
        return state


def templates_of(
    optimizer: Optimizer, samples: Sequence[Sample], shapes: Sequence[Sequence[Shape]]
) -> list[StateTemplate]:
    """What the optimizer keeps of a parameter of each group.

    Args:
        samples: of each group, the state of one of its parameters if steps have been taken already, else nothing.
        shapes: of each group's parameters.

    Raises:
        ConfigError: the optimizer cannot update sharded parameters; by its name, with the reason.
    """
    name = type(optimizer).__name__
    if name in _WHY_NOT and type(optimizer).__module__.startswith("torch.optim"):
        raise refusal(optimizer, _WHY_NOT[name])
    for attribute, value in vars(optimizer).items():
        if isinstance(value, Optimizer):
            raise refusal(optimizer, f"it wraps another optimizer, {attribute}, whose parameters are the whole ones")
    if _own_step(optimizer) is not None:
        raise refusal(optimizer, "its step() is one that this object alone has; make a subclass with it")
    with _unchanged_objects(optimizer):
        return _try_groups(optimizer, samples, shapes)


def _own_step(optimizer: Optimizer) -> Any:
    """What somebody has put in the place of the class's ``step``; schedulers and a compiler only wrap it."""
    step: Any = vars(optimizer).get("step")
    if hasattr(step, "_wrapped_by_lr_sched"):
        step = step.__wrapped__
    step = getattr(step, "_torchdynamo_orig_callable", step)
    return None if getattr(step, "__func__", step) is type(optimizer).step else step


@contextmanager
def _unchanged_objects(optimizer: Optimizer) -> Iterator[None]:
    """Steps inside write no object that is an attribute: all twins have the same one.

    Raises:
        ConfigError: one did; it is as it was before.
    """
    objects = {name: value for name, value in vars(optimizer).items() if type(getattr(value, "__dict__", None)) is dict}
    before = {name: {key: copied(part) for key, part in vars(value).items()} for name, value in objects.items()}
    yield
    for name, value in objects.items():
        if changed(vars(value), before[name]):
            vars(value).clear()
            vars(value).update(before[name])
            raise refusal(optimizer, f"it keeps numbers in its attribute {name}, a {type(value).__name__}")


def _try_groups(
    optimizer: Optimizer, samples: Sequence[Sample], shapes: Sequence[Sequence[Shape]]
) -> list[StateTemplate]:
    found = []
    for index, (sample, members) in enumerate(zip(samples, shapes)):
        if why_whole := _why_not_elementwise(optimizer, index, sample, {len(shape) for shape in members}):
            tried = _tried_shapes(members)
            _check_independent(optimizer, index, sample, tried, why_whole)
        else:
            tried = [(_SMALL,), (max(_SMALL, min(max(map(prod, members), default=0), _LARGE)),)]
        first, *others = (_template(optimizer, index, sample, shape) for shape in tried)
        for other in others:
            if (first.kinds, list(first.numbers)) != (other.kinds, list(other.numbers)):
                reason = f"it keeps {other.kinds} of a parameter of shape {list(other.shape)} and {first.kinds} of one"
                dims = "" if len(other.shape) == len(first.shape) else ", so matrices need a group of their own"
                raise refusal(optimizer, f"{reason} of shape {list(first.shape)}{dims}")
        first.whole = bool(why_whole)
        found.append(first)
    _check_places(optimizer, samples, found)
    return found


def refusal(optimizer: Optimizer, reason: str) -> ConfigError:
    return ConfigError(f"{type(optimizer).__name__} cannot update sharded parameters: {reason}; {_INSTEAD}")


def other_shape(optimizer: Optimizer, key: str, value: torch.Tensor, parameter: torch.Tensor) -> ConfigError:
    return refusal(optimizer, f"it keeps {key!r}, {_kind(value)}, for a parameter that is {_kind(parameter)}")


def _tried_shapes(members: Sequence[Shape]) -> list[Shape]:
    """Small shapes of each number of dims that the parameters have, and one like the largest, of not too many."""
    dims = {max(len(shape), 1) for shape in members} or {2}
    largest = max(members, key=prod, default=())
    each = round(_LARGE ** (1 / max(len(largest), 1)))
    like_largest = [tuple(min(size, each) for size in largest)] if prod(largest) > _SMALL else []
    return [shape[:dim] + (2,) * (dim - len(shape)) for dim in sorted(dims) for shape in _SHAPES] + like_largest


@dataclass
class _Outcome:
    values: torch.Tensor
    states: list[dict[str, Any]]
    common: Common
    keys: list[set[str]]  # of the first parameter's state, after each step


def _run(
    optimizer: Optimizer,
    index: int,
    sample: Sample,
    starts: Sequence[torch.Tensor],
    gradients: Sequence[Sequence[torch.Tensor]],
    plain: bool = True,
) -> _Outcome:
    """Steps of a twin over parameters that begin as ``starts``.

    Args:
        gradients: of each step, one for each parameter.
        plain: by the plain loop over parameters. What runs on a GPU alone does not change what is computed.
    """
    parameters = [start.clone() for start in starts]
    twin = _twin(optimizer, {index: parameters}, {index: sample}, plain)
    keys = []
    for of_step in gradients:
        for parameter, gradient in zip(parameters, of_step):
            parameter.grad = gradient.clone()
        twin.call("step")
        keys.append(set(twin.state.get(parameters[0], {})))
    states = [dict(twin.state.get(parameter, {})) for parameter in parameters]
    return _Outcome(torch.cat([p.flatten() for p in parameters]), states, twin.common, keys)


def _twin(
    optimizer: Optimizer,
    parameters: Mapping[int, Sequence[torch.Tensor]],
    samples: Mapping[int, Sample],
    plain: bool = True,
) -> Twin:
    """A twin over parameters by group, in training mode, with state like that of each group's sample."""
    common = Common.of(optimizer)
    for index in parameters if plain else ():
        settings = common.groups[index]
        settings.update({key: False for key in IMPLEMENTATION if key in settings})
    twin = Twin(optimizer, parameters, common)
    if callable(getattr(twin.optimizer, "train", None)):  # of Schedule-Free, which refuses to step without
        twin.call("train")
    for index, members in parameters.items():
        twin.state.update({p: shaped(samples[index], p) for p in members if samples[index]})
    return twin


def _check_places(optimizer: Optimizer, samples: Sequence[Sample], found: Sequence[StateTemplate]) -> None:
    """Each group is updated as if it were the only one: a twin has the groups of its bucket alone."""

    def over(indices: Sequence[int]) -> list[torch.Tensor]:
        parameters = {index: [torch.ones(found[index].shape, dtype=torch.float64)] for index in indices}
        twin = _twin(optimizer, parameters, dict(enumerate(samples)))
        every = [parameter for members in parameters.values() for parameter in members]
        for size in _SIZES:
            for parameter in every:
                parameter.grad = torch.full_like(parameter, size)
            twin.call("step")
        return every

    everywhere = range(len(found))
    with torch.no_grad():
        for index, together in zip(everywhere, over(everywhere)) if len(found) > 1 else ():
            if not _equal(over([index])[0], together):
                raise refusal(
                    optimizer,
                    f"its update of group {index} depends on the groups beside it, as where it takes a setting of the "
                    "first one for all or keeps a list with a value for each; give it one group",
                )


def _check_independent(
    optimizer: Optimizer, index: int, sample: Sample, shapes: Sequence[Shape], why_whole: str
) -> None:
    """Each whole parameter is updated as if there were no other."""
    generator = torch.Generator().manual_seed(2)
    starts = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    gradients = [
        [size * torch.randn(start.shape, generator=generator, dtype=torch.float64) for start in starts]
        for size in _SIZES
    ]
    try:
        with torch.no_grad():
            together = _run(optimizer, index, sample, starts, gradients)
            alone = [
                _run(optimizer, index, sample, [start], [[of_step[place]] for of_step in gradients])
                for place, start in enumerate(starts)
            ]
    except Exception as error:
        raise refusal(optimizer, f"{why_whole}, nor on whole parameters: {type(error).__name__}: {error}") from error
    moved = next((text for one in alone if (text := one.common.difference(together.common))), None)
    if not _equal(torch.cat([one.values for one in alone]), together.values) or moved is not None:
        raise _dependent(optimizer, moved)
    for one in alone:
        _check_kept_at_once(optimizer, one)


def _dependent(optimizer: Optimizer, moved: str | None) -> ConfigError:
    seen = f" ({moved})" if moved else ""
    return refusal(optimizer, f"its update of a parameter depends on the others that are updated with it{seen}")


def _check_kept_at_once(optimizer: Optimizer, outcome: _Outcome) -> None:
    late = set.union(*outcome.keys) ^ outcome.keys[0]
    if late:
        raise refusal(optimizer, f"it keeps {', '.join(sorted(map(str, late)))} only from a later step on")


def _why_not_elementwise(optimizer: Optimizer, index: int, sample: Sample, dims: set[int]) -> str | None:
    """Why the group's parameters, of these numbers of dims, are to be updated as wholes, or None."""
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    sizes = torch.ones(24, dtype=torch.float64)
    sizes[10:] = 3.0  # the two parts differ in their norms
    direction = torch.randn(24, generator=generator, dtype=torch.float64).sign() * sizes
    gradients = [
        (size * direction * (0.5 + torch.rand(24, generator=generator, dtype=torch.float64))).view(4, 6)
        for size in _SIZES
    ]
    # Some elements turn round, once with a small gradient after a large one: against their momentum.
    gradients[2][::2] *= -1
    gradients[4][1::2] *= -1
    # Almost across the weights, row by row: what is projected only then (AdamP, SGDP) is.
    gradients[0] -= 0.99 * start * ((gradients[0] * start).sum(1, True) / start.square().sum(1, True))
    parts = (slice(0, 10), slice(10, 24))

    def over(*chosen: slice) -> _Outcome:
        cut = [[gradient.flatten()[part] for part in chosen] for gradient in gradients]
        return _run(optimizer, index, sample, [start.flatten()[part] for part in chosen], cut)

    try:
        with torch.no_grad():
            wholes = [
                _run(optimizer, index, sample, [start.view(shape)], [[g.view(shape)] for g in gradients])
                for shape in (_OF_24[dim] for dim in sorted({2, *dims} & _OF_24.keys()))
            ]
            both, first, second = over(*parts), over(parts[0]), over(parts[1])
    except Exception as error:
        return f"it does not run on 1-D tensors and their gradients alone ({type(error).__name__}: {error})"
    for whole in wholes:  # some treat convolutions alone as wholes
        if not _equal(whole.values, both.values) or not _equal_numbers(whole.states[0], both.states):
            return "its update of a matrix is not that of its elements, one by one"
    apart = torch.cat([first.values, second.values])
    moved = first.common.difference(second.common) or first.common.difference(both.common)
    if not _equal(both.values, apart) or moved is not None:
        raise _dependent(optimizer, moved)
    _check_kept_at_once(optimizer, both)
    return None


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-12, atol=1e-12, equal_nan=True)


def _equal_numbers(of_matrix: Mapping[str, Any], of_parts: Sequence[Mapping[str, Any]]) -> bool:
    """Single numbers that are kept of each parameter must be the same of any part: of a group they are saved once."""
    return all(
        is_number(state.get(key)) and abs(float(value) - float(state[key])) <= 1e-12 * max(1.0, abs(float(value)))
        for key, value in of_matrix.items()
        if is_number(value)
        for state in of_parts
    )


def _template(optimizer: Optimizer, index: int, sample: Sample, shape: Shape) -> StateTemplate:
    """Of a parameter of the group's dtype and device, after one step."""
    group = optimizer.param_groups[index]
    like = group["params"][0] if group["params"] else torch.empty(0)
    device = torch.device("cpu") if like.is_meta else like.device
    start = torch.ones(
        shape, dtype=torch.float64 if real_dtype(like.dtype) == torch.float64 else torch.float32, device=device
    )
    with torch.no_grad():
        state = _run(optimizer, index, sample, [start], [[torch.full_like(start, 0.5)]], plain=False).states[0]
    found = StateTemplate(shape=shape)
    for key, value in state.items():
        if isinstance(value, torch.Tensor) and type(value) not in (torch.Tensor, torch.nn.Parameter):
            # It may look like the parameter and keep fewer bits, as torchao's 8-bit state does.
            raise refusal(optimizer, f"it keeps {key!r}, a {type(value).__name__}, of each parameter")
        if isinstance(value, torch.Tensor) and value.shape == start.shape and value.dtype == start.dtype:
            found.kinds.append(key)
        elif is_number(value):
            found.numbers[key] = value
        elif isinstance(value, torch.Tensor):
            raise other_shape(optimizer, key, value, start)
        elif value is None or isinstance(value, str):
            found.rest[key] = value
        else:
            raise refusal(optimizer, f"it keeps {key!r}, a {type(value).__name__}, of each parameter")
    return found


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {list(tensor.shape)}"


def is_number(value: Any) -> bool:
    return (isinstance(value, torch.Tensor) and value.numel() == 1) or isinstance(value, int | float)


def shaped(sample: Sample, parameter: torch.Tensor) -> dict[str, Any]:
    """State like that of another parameter: its first element everywhere."""
    return {
        key: value.flatten()[0].to(parameter).expand(parameter.shape).clone()
        if isinstance(value, torch.Tensor) and value.dim() > 0
        else copy.deepcopy(value)
        for key, value in sample.items()
    }
