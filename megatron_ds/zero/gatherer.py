"""Stage 3: a unit's parameters are whole while somebody computes with them, and a slice of them at all other times.

A *unit* is what is gathered and freed together: a transformer block, an embedding, a head. Hooks on the unit's module
gather before its forward and free after it; gather again when the first gradient of its outputs comes, and free when
the gradients of its inputs are there. Everything is counted by use, so that a module may be used twice, be nested in
another, be recomputed in the backward pass, or not be used at all.

A parameter that is used outside of its own module (a tied head, say) is noticed when a running module touches it: it is
gathered there and then, and belongs to what that module needs from then on.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from megatron_ds import comm
from megatron_ds.errors import EngineError
from megatron_ds.mesh import Axis
from megatron_ds.zero.flat import FlatBucket
from megatron_ds.zero.gather_order import OrderComparison
from megatron_ds.zero.output_hooks import AfterBackward, register_first, tensors_in
from megatron_ds.zero.placeholder import CodesAlone, ShardedPlaceholder, explained
from megatron_ds.zero.saved_parameters import SavedParameters
from megatron_ds.zero.units import Unit, Use

FORWARD_END = "the end of a forward pass"
_NEEDS = "gather "


class Gatherer:
    """Gathers and frees the buckets of units on this rank.

    Args:
        units: all hooked modules, the root first; parameters touched outside of their module are added to what the
            innermost running one needs.
        prefetch: how many units ahead are gathered, in the order of the step before.
        axis: the ranks that gather together.
        ends: modules after whose forward the ranks come together.

    Ranks may use different modules, or the same in another order. Within one host a gather is each rank's own affair.
    Elsewhere it takes all ranks: before each the ranks say what they need, and all take part in what any of them
    needs; who waits for something else, at a place that all come to (:meth:`meet`), does so too. Where the host must
    not wait for that (NCCL) the order has to be the same on all ranks; see ``gather_order.py``.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        buckets: Sequence[FlatBucket],
        prefetch: int,
        axis: Axis,
        ends: Collection[nn.Module] = (),
    ):
        self.units = list(units)
        self.prefetch = prefetch
        self.axis = axis
        self.keep = False  # what was gathered stays until free_all()
        self._buckets = [b for b in buckets if b.parameters.transient]
        self._numbers = {id(b): number for number, b in enumerate(self._buckets) if b.parameters.is_collective}
        self._agreement = comm.open_agreement(axis) if self._numbers else None
        self._owner = {id(p): bucket for bucket in self._buckets for p in bucket.tensors}
        self._classes = {id(p): type(p) for bucket in self._buckets for p in bucket.tensors}
        self._codes: dict[int, bool] = {}  # of each gathered bucket: as FP8 codes alone
        self._users = {id(b): [unit for unit in units if b in unit.buckets] for b in self._buckets}
        self._explicit: Counter[int] = Counter()  # bucket -> gathered() contexts open on it
        self._idle: list[FlatBucket] = []  # nobody holds them; freed when the next gather needs memory
        self._order: list[FlatBucket] = []  # of this step's gathers
        self._expected: list[FlatBucket] = []  # of the step before
        self._comparison: OrderComparison | None = None  # of the ranks' orders of this step
        self._running: list[tuple[Unit, Use | None]] = []  # forwards under way, and what is to know of their backward
        self._hooks: list[Any] = []
        for bucket in self._buckets:
            self._mark_sharded(bucket)
        for unit in units:
            before, after = _untraced(self._before(unit)), _untraced(self._after(unit))
            self._hooks.append(unit.module.register_forward_pre_hook(before, with_kwargs=True))
            self._hooks.append(unit.module.register_forward_hook(after, always_call=True))
        for module in ends:  # not after one that failed: the other ranks may wait for what it has not gathered
            self._hooks.append(module.register_forward_hook(lambda m, *_, end=module: self._at_end(m is end)))

    @staticmethod
    def over(
        root: nn.Module,
        modules: Mapping[nn.Module, Sequence[nn.Parameter]],
        buckets: Sequence[FlatBucket],
        prefetch: int,
        axis: Axis,
    ) -> Gatherer:
        """Of the units ``modules`` of ``root``, each with the parameters that it needs."""
        names = {id(module): name for name, module in root.named_modules()}
        owner = {id(p): bucket for bucket in buckets if bucket.layout.key.unit is not None for p in bucket.tensors}
        # What is called first; a list of pipeline stages never is, its members are.
        called = list(root) if isinstance(root, nn.ModuleList) else [root]
        units = []
        for module, parameters in {**{module: [] for module in called}, **modules}.items():
            needed = {id(owner[id(p)]): owner[id(p)] for p in parameters if id(p) in owner}
            units.append(Unit(names[id(module)], module, list(needed.values())))
        return Gatherer(units, buckets, prefetch, axis, called)

    def close(self) -> None:
        """Remove the hooks; every parameter is left whole."""
        self._gather(self._buckets)
        self.detach()

    def detach(self) -> None:
        """Remove the hooks, and leave the parameters as they are to another gatherer."""
        for hook in self._hooks:
            hook.remove()
        for parameter in (p for bucket in self._buckets for p in bucket.tensors):
            parameter.__class__ = self._classes[id(parameter)]

    # What the owner of the step calls

    def start_step(self) -> None:
        self._expected, self._order = self._order, []

    def meet(self, place: str) -> None:
        """Wait until all ranks are at this place, and until then take part in what they gather on their way.

        For what all ranks do together, and whoever has not come to it may still need a gather. Only there a rank waits
        where a gather takes all ranks.

        Raises:
            EngineError: on all ranks, if some of them are at another place, with nothing to gather.
        """
        while self._agreement is not None and (said := self._agreement.differences(place)):
            for bucket in self._needed(said):
                bucket.parameters.serve()

    def _agreed(self, wanted: Sequence[FlatBucket]) -> list[FlatBucket]:
        """What is gathered next where that takes all ranks: what this rank wants, and what any other does."""
        numbers = [self._numbers[id(bucket)] for bucket in wanted if id(bucket) in self._numbers]
        if self._agreement is None or not numbers:
            return list(wanted)
        said = self._agreement.differences(_NEEDS + " ".join(map(str, numbers)))
        return self._needed(said) if said else list(wanted)

    def _needed(self, said: Sequence[str]) -> list[FlatBucket]:
        """What any rank has said that it needs, in one order on all of them."""
        needed = {int(number) for text in said if text.startswith(_NEEDS) for number in text[len(_NEEDS) :].split()}
        if not needed:
            other = next(rank for rank, text in enumerate(said) if text != said[0])
            raise EngineError(
                f"rank {self.axis.ranks[0]} is at {said[0]}, rank {self.axis.ranks[other]} at {said[other]}: at stage "
                "3 a gather takes all ranks, which have to go the same way through forward, backward and step; let "
                "every rank do so, with `with engine.join():` around the loop where some have fewer batches"
            )
        return [self._buckets[number] for number in sorted(needed)]

    def compare_orders_start(self) -> None:
        """Start to compare what the ranks gathered in this step, where they have not agreed on it before."""
        if self._agreement is None and self._numbers:
            names = [bucket.layout.slots[0].spec.name for bucket in self._order]
            self._comparison = OrderComparison(self.axis, names, self._buckets[0].tensors[0].device)

    def require_one_order(self) -> None:
        """Raise on all ranks if they gathered other units than each other in this step, or in other order."""
        if self._comparison is not None:
            comparison, self._comparison = self._comparison, None
            comparison.require_one()

    def end_backward(self) -> None:
        """A backward pass is over: units whose inputs need no gradient could not tell."""
        for unit in self.units:
            unit.backward = 0
        self._free_idle()

    def free_all(self) -> None:
        """Before parameters change, or when a batch is over."""
        for unit in self.units:
            unit.running, unit.backward, unit.unseen = 0, 0, False
        self._running.clear()
        self._cancel(self._buckets)
        for bucket in filter(self._is_gathered, self._buckets):
            self._free(bucket)
        self._idle.clear()

    @contextmanager
    def gathered(self, buckets: Sequence[FlatBucket], exactly: AbstractContextManager[None]) -> Iterator[None]:
        """Hold these buckets whole. ``exactly``: a context around gathers in no forward, which all ranks make.

        What a graph has saved of them inside stays whole until the step is over: its backward pass calls no hook.
        """
        mine = [b for b in buckets if id(b) in self._users]
        self._cancel(mine)  # what comes ahead of a forward, or is left of one, may be in fewer bits
        self._free_unheld(mine)
        self._explicit.update(map(id, mine))
        with nullcontext() if self._running else exactly:
            self._gather(mine, ahead=False)
        saved = SavedParameters(mine)
        try:
            with saved.noting():
                yield
        finally:
            for bucket in saved.alive():
                self._users[id(bucket)][0].unseen = True
            self._explicit.subtract(map(id, mine))
            self._free_unheld(mine)

    def takes_all_ranks(self) -> bool:
        """Whether a forward pass is one of all ranks, which gather by messages and not out of shared memory."""
        return bool(self._numbers)

    def bucket_of(self, parameter: nn.Parameter) -> FlatBucket | None:
        """The bucket that has to be gathered for this parameter; None where it is whole all the time."""
        return self._owner.get(id(parameter))

    # Hooks. They are functions, which a copy of the model shares, and do nothing there.

    def _before(self, unit: Unit) -> Any:
        def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if module is not unit.module:
                return None
            use = Use(unit) if torch.is_grad_enabled() else None
            unit.running += 1
            self._running.append((unit, use))
            with explained():
                self._gather(unit.buckets)
                if use is None:
                    return None
                leaves, spec = tree_flatten((args, kwargs))
                # Each once: attention asks whether its query is its key.
                inputs = {id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad}
                if inputs:
                    marked = dict(zip(inputs, AfterBackward.apply(self._end_backward, use, *inputs.values())))
                    args, kwargs = tree_unflatten([marked.get(id(leaf), leaf) for leaf in leaves], spec)
            return args, kwargs

        return before

    def _after(self, unit: Unit) -> Any:
        def after(module: nn.Module, args: Any, output: Any) -> None:
            use, found = None, False
            if module is not unit.module:
                return
            # An exception (recomputation stops early by one) may have left inner modules on the list.
            while self._running and not found:
                running, use = self._running.pop()
                found = running is unit
            unit.running = max(0, unit.running - 1)
            tensors = list(tensors_in(output)) if found else []
            # An iterator, say, in which nobody sees the tensors whose gradients will come.
            unit.unseen |= use is not None and output is not None and not tensors
            for tensor in tensors:
                if use is not None and tensor.requires_grad:
                    register_first(tensor, lambda gradient, use=use: self._begin_backward(use))
                self._acquire_for_caller(tensor)
            self._release(unit)

        return after

    def _acquire_for_caller(self, tensor: Tensor) -> None:
        """A view of a parameter that a module returns, such as rows of a table: its caller computes with it."""
        parameter: Any = tensor if tensor._base is None else tensor._base
        if id(parameter) in self._owner and not self.adopt(parameter):
            self._users[id(self._owner[id(parameter)])][0].unseen = True

    def _at_end(self, here: bool) -> None:
        if here and not self._running:
            self.meet(FORWARD_END)

    def _begin_backward(self, use: Use) -> None:
        if not use.in_backward:
            use.in_backward = True
            use.unit.backward += 1
            # With create_graph: this pass is differentiated in turn, and that pass calls no hook.
            use.unit.unseen |= torch.is_grad_enabled()
            self._gather(use.unit.buckets)

    def _end_backward(self, use: Use) -> None:
        if use.in_backward:
            use.in_backward = False
            use.unit.backward = max(0, use.unit.backward - 1)
            self._release(use.unit)

    # Gathering

    def _gather(self, buckets: Sequence[FlatBucket], ahead: bool = True) -> None:
        """Make them whole: all of them are under way before the first is waited for. ``ahead``: and start the next."""
        missing = [bucket for bucket in buckets if not self._is_gathered(bucket)]
        for bucket in [bucket for bucket in self._idle if bucket in buckets]:
            self._idle.remove(bucket)
            self._mark_whole(bucket)
        if not missing:
            return
        self._free_idle()
        self._start_all(missing)
        away = [bucket for bucket in missing if not bucket.parameters.holding.resident]
        for bucket in self._agreed(away):
            bucket.finish_gather() if bucket in away else bucket.parameters.serve()
        for bucket in missing:
            bucket.finish_gather()
            self._codes[id(bucket)] = not bucket.parameters.exactly
            self._mark_whole(bucket)
        self._order += missing
        if ahead:
            self._start_all(self._ahead())

    def _start_all(self, wanted: Sequence[FlatBucket]) -> None:
        """Start to gather these, or to fetch the shard that is to be gathered."""
        # Each once: what comes next may be the same unit twice, for two micro-batches.
        wanted = [b for b in dict.fromkeys(wanted) if b.gathering is None and not self._is_gathered(b)]
        here = [bucket for bucket in wanted if bucket.parameters.holding.resident]
        for bucket in [*self._agreed(here), *(bucket for bucket in wanted if bucket not in here)]:
            if bucket in wanted:
                bucket.start_gather()
            else:
                bucket.parameters.serve()

    def _cancel(self, buckets: Sequence[FlatBucket]) -> None:
        """Of the gathers that were begun ahead of use."""
        for bucket in buckets:
            if bucket.gathering is not None:
                bucket.cancel_gather()

    def _ahead(self) -> list[FlatBucket]:
        """What the step before gathered next, ``prefetch`` units of it, if this step has taken the same way so far."""
        done = len(self._order)
        found: list[FlatBucket] = []
        if self.prefetch == 0 or self.keep or self._order[-1:] != self._expected[done - 1 : done]:
            return found
        units, last = 0, self._order[-1].layout.key.unit
        for bucket in self._expected[done:]:
            units += bucket.layout.key.unit != last
            if units > self.prefetch:
                break
            last = bucket.layout.key.unit
            found.append(bucket)
        return found

    def _release(self, unit: Unit) -> None:
        """Its buckets, where nobody needs them any more, are freed when another one is gathered, at the latest.

        They are marked at once: whoever touches one of their parameters until then has to be noticed.
        """
        for bucket in unit.buckets:
            if not (self._is_acquired(bucket) or self.keep or bucket in self._idle) and self._is_gathered(bucket):
                self._idle.append(bucket)
                self._mark_sharded(bucket)

    def _is_acquired(self, bucket: FlatBucket) -> bool:
        return any(user.holds for user in self._users[id(bucket)]) or self._explicit[id(bucket)] > 0

    def _free_unheld(self, buckets: Sequence[FlatBucket]) -> None:
        self._idle = [bucket for bucket in self._idle if bucket not in buckets]
        for bucket in buckets:
            if self._is_gathered(bucket):
                self._mark_whole(bucket) if self._is_acquired(bucket) else self._free(bucket)

    def _free_idle(self) -> None:
        self._free_unheld(self._idle)

    def _free(self, bucket: FlatBucket) -> None:
        self._mark_whole(bucket)  # it looks at what was written
        bucket.release()
        del self._codes[id(bucket)]
        self._mark_sharded(bucket)

    def _is_gathered(self, bucket: FlatBucket) -> bool:
        return bool(bucket.tensors) and id(bucket) in self._codes

    def _mark_whole(self, bucket: FlatBucket) -> None:
        for parameter in bucket.tensors:
            parameter.__class__ = CodesAlone if self._codes[id(bucket)] else self._classes[id(parameter)]

    def _mark_sharded(self, bucket: FlatBucket) -> None:
        for parameter in bucket.tensors:
            parameter.__class__ = ShardedPlaceholder
            parameter.zero_gatherer = self  # type: ignore[attr-defined]

    def adopt(self, parameter: nn.Parameter) -> bool:
        """Gather a released parameter for the innermost running module; False if none is running.

        True, too, of one that no gather has freed yet: it stays until the step is over, whoever computes with it.
        """
        bucket = self._owner[id(parameter)]
        if not (self._running or bucket in self._idle):
            return False
        unit = self._running[-1][0] if self._running else self._users[id(bucket)][0]
        unit.unseen |= not self._running
        if bucket not in unit.buckets:
            unit.buckets.append(bucket)
            self._users[id(bucket)].append(unit)
        self._gather([bucket])
        return True


def _untraced(hook: Any) -> Any:
    """The hook, which a compiler does not follow: it would compile it for each parameter and each output anew."""
    return torch.compiler.disable(hook) if "torch._dynamo" in sys.modules else hook  # which is slow to load
