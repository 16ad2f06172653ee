"""Parameters move to other buckets between two steps: they were unfrozen, or have another shape now."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from megatron_ds.optim.rule import UpdateRule
from megatron_ds.shard import spec_of
from megatron_ds.zero.allocate import take_values
from megatron_ds.zero.buckets import ParameterInfo
from megatron_ds.zero.flat import FlatBucket
from megatron_ds.zero.gatherer import Gatherer
from megatron_ds.zero.layout import ZeroLayout
from megatron_ds.zero.reducer import Phase, Reducer


@dataclass(frozen=True)
class Replacement:
    """``new`` takes the place of ``old`` with ``value``, on all ranks alike. It may be the same object."""

    old: nn.Parameter
    new: nn.Parameter
    value: torch.Tensor

    def put(self) -> None:
        """``new`` gets its value, and with it another accumulator of gradients.

        Torch keeps the one of the old shape while a graph of before lives, such as that of the last loss; not so where
        the dtype changes.
        """
        other = torch.float32 if self.value.dtype == torch.float64 else torch.float64
        self.new.data = self.value.new_empty(0, dtype=other)
        self.new.data = self.value


class MovableParameters:
    """The methods of a :class:`~megatron_ds.zero.optimizer.ZeroOptimizer` that give parameters other buckets.

    Each is called between two steps, on all ranks alike. Values stay, and all other buckets are left alone.
    """

    layout: ZeroLayout
    reducer: Reducer
    gatherer: Gatherer | None
    _parameters: list[nn.Parameter]
    _all: list[FlatBucket]
    _rule: UpdateRule

    if TYPE_CHECKING:  # the optimizer's

        def _before_change(self) -> None: ...
        def _allocate(self, layout: ZeroLayout) -> list[FlatBucket]: ...
        def _attach(self) -> None: ...
        def _publish(self) -> None: ...
        def _choose_units(self) -> None: ...
        def gathered(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]: ...

    def train_also(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give gradients and state to parameters that were frozen so far, in buckets of their own."""
        self.reducer.expect(Phase.IDLE, "train_also")
        self._before_change()
        wanted = {id(parameter) for parameter in parameters}
        infos = {
            number: ParameterInfo.of(p, info.shared, info.unit, info.stage, self._rule, trainable=True)
            for number, (info, p) in enumerate(zip(self.layout.parameters, self._parameters))
            if id(p) in wanted
        }
        self._move(infos)

    def beside(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """All parameters in the buckets of these: their state is lost in :meth:`replace`."""
        wanted = {id(parameter) for parameter in parameters}
        touched = (bucket for bucket in self._all if any(id(p) in wanted for p in bucket.tensors))
        return [parameter for bucket in touched for parameter in bucket.tensors]

    def replace(self, replacements: Sequence[Replacement]) -> None:
        """Parameters of another shape take the places of others, with their specs. Their whole buckets are made anew.

        The state of all parameters of those buckets is as at the start afterwards, for the caller to fill.
        """
        self.reducer.expect(Phase.IDLE, "replace")
        self._before_change()
        moved = {id(parameter) for parameter in self.beside(each.old for each in replacements)}
        of_old = {id(each.old): each for each in replacements}
        infos, made = {}, {}
        for number, (info, parameter) in enumerate(zip(self.layout.parameters, self._parameters)):
            each = of_old.get(id(parameter))
            if each is not None:
                made[number] = each
            if each is not None or id(parameter) in moved:
                infos[number] = replace(info, spec=spec_of(parameter if each is None else each.new))
        self._move(infos, made)

    def _move(self, infos: Mapping[int, ParameterInfo], replaced: Mapping[int, Replacement] | None = None) -> None:
        """The parameters of these numbers go to buckets of their own, as ``infos`` describes them."""
        replaced, before = replaced or {}, list(self._parameters)
        for number, each in replaced.items():
            self._parameters[number] = each.new
        buckets = self._allocate(added := self.layout.of_these(infos))
        self.reducer.close()
        inside = {slot.parameter for bucket in buckets for slot in bucket.layout.slots}
        for number in replaced.keys() - inside:  # frozen, and in no bucket
            replaced[number].put()
        for unit in dict.fromkeys(bucket.layout.key.unit for bucket in buckets):
            mine = [bucket for bucket in buckets if bucket.layout.key.unit == unit]
            moved = {slot.parameter for bucket in mine for slot in bucket.layout.slots}
            with self.gathered([before[number] for number in moved]):
                for number in moved & replaced.keys():
                    replaced[number].put()
                take_values(mine, None)
                for bucket in self._all:
                    bucket.forget(moved)
        if self.gatherer is not None:
            self.gatherer.detach()
        self.layout = self.layout.with_added(added, infos)
        self._all = sorted([b for b in self._all if b.tensors] + buckets, key=lambda b: b.layout.due)
        self._choose_units()
        self._attach()
        self._publish()
