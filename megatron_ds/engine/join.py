"""Uneven inputs: a rank without further batches takes part in what the others still do, as with DDP's join.

An engine is a ``torch.distributed.algorithms.join.Joinable``. Inside ``with Join([engine]):`` every rank says before
each forward, backward and step what it is about to do. A rank that has left its loop does the same without a batch: its
gradients are zero, and it updates its part of the state.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.algorithms.join import Join, Joinable, JoinHook

from megatron_ds import comm
from megatron_ds.comm.together import exchange
from megatron_ds.errors import EngineError
from megatron_ds.zero.gatherer import FORWARD_END

if TYPE_CHECKING:
    from megatron_ds.engine.engine import Engine

_KINDS = ("no further batch", "forward", "backward", "step", "buffers", "zero_grad")


class Mode(IntEnum):
    """Of a forward pass: each is what the one before is, and more."""

    EVALUATION = 0
    TRAINING = 1
    WITH_GRADIENTS = 2
    LAST = 3  # of the step

    @staticmethod
    def of(training: bool, with_gradients: bool, last: bool) -> Mode:
        if not training:
            return Mode.EVALUATION
        return Mode.TRAINING if not with_gradients else Mode.LAST if last else Mode.WITH_GRADIENTS


class UnevenInputs:
    """What the ranks of an engine tell each other while some of them may have run out of batches.

    Attributes:
        active: ranks of the data axis that had a batch when they last spoke.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        self.by_active = False
        self.active = list(range(engine.mesh.data.size))

    @property
    def divisor(self) -> int:
        """The number of ranks whose gradients are averaged."""
        return len(self.active) if self.by_active else self._engine.mesh.data.size

    def announce(self, kind: str, detail: int = 0) -> None:
        """This rank, which has a batch, is about to do this. Outside of a join nothing is sent."""
        if self._engine._join_config.enable:
            if (work := Join.notify_join_context(self._engine)) is not None:
                work.wait()
            self.hear(kind, detail)
            if kind == "step":
                self.share_settings()

    def hear(self, kind: str = _KINDS[0], detail: int = 0) -> tuple[str, int]:
        """What those ranks do that have a batch. On all ranks."""
        axis, device = self._engine.mesh.data, self._engine.mesh.device
        mine = torch.tensor([[_KINDS.index(kind), detail]], device=device)
        everyone = comm.gather_dim0(mine, axis).wait().tolist()
        self.active = [rank for rank, (number, _) in enumerate(everyone) if number]
        first, *others = (everyone[rank] for rank in self.active)
        if any(other != first for other in others):
            did = [f"{_KINDS[everyone[rank][0]]} on rank {axis.ranks[rank]}" for rank in self.active[:8]]
            raise EngineError(
                f"ranks inside a join did not do the same: {', '.join(did)}; those that have a batch call forward, "
                "backward and step alike"
            )
        self._engine._buffers.source = self.active[-1]
        return _KINDS[first[0]], first[1]

    def share_settings(self) -> None:
        """Learning rates and the like: the loop's own schedulers stand still on ranks that have left it."""
        optimizer, axis = self._engine.optimizer, self._engine.mesh.data
        if optimizer is None or len(self.active) == axis.size:
            return
        mine = [{k: _plain(v) for k, v in group.items() if _is_number(v)} for group in optimizer.param_groups]
        said = exchange(axis, json.dumps(mine) if axis.rank in self.active else "")
        if axis.rank not in self.active:
            for group, theirs in zip(optimizer.param_groups, json.loads(said[self.active[-1]])):
                group.update({key: _like(group.get(key), value) for key, value in theirs.items()})

    def hook(self, **keywords: Any) -> JoinHook:
        self.by_active = not keywords.get("divide_by_initial_world_size", True)
        return _Shadow(self._engine, self)


def _is_number(value: Any) -> bool:
    """Or several in a tuple; as they are or in tensors."""
    if isinstance(value, torch.Tensor):
        return value.numel() == 1
    return isinstance(value, int | float) or (isinstance(value, tuple) and all(map(_is_number, value)))


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.item()
    return [_plain(part) for part in value] if isinstance(value, tuple) else value


def _like(mine: Any, plain: Any) -> Any:
    """What :func:`_plain` made of another rank's value; a tensor keeps being one."""
    if isinstance(plain, list):
        parts = mine if isinstance(mine, tuple) and len(mine) == len(plain) else [None] * len(plain)
        return tuple(map(_like, parts, plain))
    return mine.fill_(plain) if isinstance(mine, torch.Tensor) else plain


class _Shadow(JoinHook):
    """A rank without batches, until no rank has any."""

    def __init__(self, engine: Engine, inputs: UnevenInputs):
        self._engine, self._inputs = engine, inputs

    def main_hook(self) -> None:
        engine, (kind, detail) = self._engine, self._inputs.hear()
        if kind == "forward":
            engine._placeholders.remove()
            engine._before_forward(Mode(detail))
            if engine.zero.gatherer is not None:
                engine.zero.gatherer.meet(FORWARD_END)
        elif kind == "backward":
            engine._backward(bool(detail), lambda seed: None)
        elif kind == "step":
            self._inputs.share_settings()
            engine._update()
        elif kind == "buffers":
            engine._buffers.share()
        else:
            engine._drop()

    def post_hook(self, is_last_joiner: bool) -> None:
        """All ranks have the buffers of the last to join, as in DDP."""
        engine = self._engine
        mine = torch.tensor([int(is_last_joiner)], device=engine.mesh.device)
        last = comm.gather_dim0(mine, engine.mesh.data).wait().tolist()
        engine._buffers.source = max(rank for rank, flag in enumerate(last) if flag)
        engine._buffers.share()
        engine._buffers.source = 0
        engine._uneven = UnevenInputs(engine)
        engine._join_config = engine._join_config._replace(enable=False)


class JoinableEngine(Joinable):
    """The part of an engine that torch's ``Join`` knows."""

    mesh: Any
    _uneven: UnevenInputs

    def join(
        self, divide_by_initial_world_size: bool = True, throw_on_early_termination: bool = False
    ) -> contextlib.AbstractContextManager[object]:
        """Around a loop in which ranks may have different numbers of batches, as DDP's ``join()``.

        Args:
            divide_by_initial_world_size: ranks without a batch count as a gradient of zero. Else the mean is over the
                ranks that have one.
            throw_on_early_termination: raise on all ranks as soon as one has no batch.
        """
        if self.mesh.data.size == 1:
            return contextlib.nullcontext()
        join: Callable[..., Any] = Join
        return join(
            [self],
            throw_on_early_termination=throw_on_early_termination,
            divide_by_initial_world_size=divide_by_initial_world_size,
        )

    def join_hook(self, **kwargs: Any) -> JoinHook:
        return self._uneven.hook(**kwargs)

    @property
    def join_device(self) -> torch.device:
        device: torch.device = self.mesh.device
        return device

    @property
    def join_process_group(self) -> Any:
        return self.mesh.data.group
