"""The units of stage 3: which modules are gathered and freed as one, and which parameters each needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from megatron_ds.config import ZeroConfig
from megatron_ds.optim.rule import UpdateRule
from megatron_ds.zero.buckets import ParameterInfo
from megatron_ds.zero.flat import FlatBucket

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_HOLDERS = (nn.ParameterList, nn.ParameterDict)


class Unit:
    """One hooked module, the buckets it needs, and how many uses hold them."""

    def __init__(self, name: str, module: nn.Module, buckets: Sequence[FlatBucket]):
        self.name, self.module = name, module
        self.buckets = list(buckets)
        self.running = 0  # forwards under way
        self.backward = 0  # uses in their backward pass
        self.unseen = False  # a backward pass may use it that calls no hook: it is held until the step is over

    @property
    def holds(self) -> bool:
        return self.running > 0 or self.backward > 0 or self.unseen


class Use:
    """One forward of a unit, and whether its backward has begun."""

    def __init__(self, unit: Unit):
        self.unit = unit
        self.in_backward = False


def choose_units(
    config: ZeroConfig, shard_ranks: int, root: nn.Module | None, classes: Sequence[type[nn.Module]]
) -> dict[nn.Module, list[nn.Parameter]]:
    """The units of stage 3 and what each needs; none at other stages."""
    if config.stage < 3:
        return {}
    if root is None:
        raise ValueError("zero.stage=3 needs root=, the module whose units are gathered and freed")
    if shard_ranks == 1 and config.offload_parameters.device == "none":
        return {}  # nothing to gather
    return find_units(root, config.persistence_threshold, classes)


def describe(
    parameters: Sequence[nn.Parameter],
    units: Mapping[nn.Module, Sequence[nn.Parameter]],
    threshold: int,
    rule: UpdateRule,
    shared: Mapping[int, int],
    stage_of: Mapping[int, int],
) -> list[ParameterInfo]:
    """What the layout needs to know of each parameter.

    Args:
        units: of :func:`choose_units`. A parameter of at least ``threshold`` elements belongs to the first unit that
            needs it; a smaller one stays whole.
        shared, stage_of: by the parameter's ``id``; see :class:`ParameterInfo`.
    """
    unit_of: dict[int, int] = {}
    for number, needed in enumerate(units.values()):
        for parameter in needed:
            if parameter.numel() >= max(threshold, 1):
                unit_of.setdefault(id(parameter), number)
    return [
        ParameterInfo.of(p, shared.get(id(p)), unit_of.get(id(p)), stage_of.get(id(p), 0), rule) for p in parameters
    ]


def find_units(
    root: nn.Module, threshold: int, wanted: Sequence[type[nn.Module]] = ()
) -> dict[nn.Module, list[nn.Parameter]]:
    """The modules of ``root`` that are gathered and freed as one, in registration order, with what each needs.

    Units are the members of lists of modules (transformer blocks, experts) that hold no such list themselves, and
    what lies outside of them by single modules (embeddings, heads). ``wanted`` names the classes of blocks instead.
    Modules without a parameter of at least ``threshold`` elements of their own are none; what is in a list or a
    dictionary of parameters, which nobody calls, is the own of the module that has it.
    """
    blocks = [m for m in root.modules() if m is not root and isinstance(m, tuple(wanted))] if wanted else _blocks(root)
    inside = {id(m) for block in blocks for m in block.modules()}
    chosen = {id(block) for block in blocks if _is_large(block.parameters(), threshold)}
    units = {}
    for module in root.modules():
        if isinstance(module, _HOLDERS) and module is not root:
            continue
        parameters = list(module.parameters()) if id(module) in chosen else _own(module)
        if id(module) in chosen or (id(module) not in inside and _is_large(parameters, threshold)):
            units[module] = parameters
    return units


def _blocks(root: nn.Module) -> list[nn.Module]:
    """Members of lists of modules, where they have members in turn but no such list below them."""
    found: list[nn.Module] = []

    def descend(module: nn.Module) -> bool:
        """Whether a block was found in ``module`` or below it."""
        any_below = False
        for child in module.children():
            below = descend(child)
            is_member = isinstance(module, _CONTAINERS) and len(module) > 1 and any(True for _ in child.children())
            if is_member and not below and not isinstance(child, _CONTAINERS):
                found.append(child)
                below = True
            any_below |= below
        return any_below

    descend(root)
    return found


def _own(module: nn.Module) -> list[nn.Parameter]:
    holders = [child for child in module.children() if isinstance(child, _HOLDERS)]
    return [*module.parameters(recurse=False), *(p for holder in holders for p in holder.parameters())]


def _is_large(parameters: Iterable[nn.Parameter], threshold: int) -> bool:
    return any(p.numel() >= max(threshold, 1) for p in parameters)


def unique(parameters: Iterable[nn.Parameter] | Iterable[tuple[str, nn.Parameter]]) -> list[nn.Parameter]:
    """The parameters in order, each once; pairs give their second part."""
    seen: dict[int, nn.Parameter] = {}
    for item in parameters:
        parameter = item[1] if isinstance(item, tuple) else item
        seen.setdefault(id(parameter), parameter)
    return list(seen.values())
