"""Parameters of a model in training get another shape, as tables of tokens by ``model.resize_token_embeddings()``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megatron_ds import comm
from megatron_ds.engine import checkpoint
from megatron_ds.errors import EngineError
from megatron_ds.optim.ema import EMA
from megatron_ds.shard import as_real, spec_of
from megatron_ds.zero.main_grad import is_trained
from megatron_ds.zero.moves import Replacement

if TYPE_CHECKING:
    from megatron_ds.engine.engine import Engine


@dataclass(frozen=True)
class _Before:
    """A parameter as it was. ``data``: a view of its values, in the engine's memory."""

    parameter: nn.Parameter
    data: Tensor


@contextlib.contextmanager
def resizing(engine: Engine) -> Iterator[None]:
    """See :meth:`Engine.resizing`."""
    engine.require_between_steps("resizing()")
    whole = engine.tensors()
    with engine.gathered(write=True):
        before = {name: _Before(p, p.data) for name, p in engine.module.named_parameters()}
        yield
        found = _replacements(engine, before)
    if not found:
        return
    trained = [p for p in engine.zero.beside(each.old for each in found) if is_trained(p)]
    names = [spec_of(parameter).name for parameter in trained]
    kinds = {name: ("param", *engine.zero.kinds_of(name)) for name in names}
    kept = {name: {kind: as_real(whole.get(name, kind)).cpu() for kind in kinds[name]} for name in names}
    late = checkpoint.late_parameters(engine)
    values = {spec_of(each.old).name: as_real(each.value).cpu() for each in found}
    for each in found:
        each.new.shard = replace(spec_of(each.old), global_shape=tuple(as_real(each.value).shape))  # type: ignore[attr-defined]
        each.new.named_by_engine = True  # type: ignore[attr-defined]
    if engine.rule is not None:
        for each in found:
            engine.rule.replace(each.old, each.new, spec_of(each.new).name)
        engine.rule.train_also([], {spec_of(p).name: p for p in engine.module.parameters()})
    engine.zero.replace(found)
    if engine.rule is not None:
        engine.rule.load_numbers(engine.rule.numbers())
    engine.zero.count = engine.zero.count
    engine.zero.load_late(late)
    now = engine.tensors()
    for name, state in kept.items():
        if name in values:
            state["param"] = _with_old(values[name].to(state["param"].dtype), state["param"], values[name].dtype)
        for kind, value in state.items():
            of_new = state["param"] if kind == EMA else torch.zeros_like(state["param"])
            now.set({name: value if kind == "param" else _with_old(of_new, value)}, kind)
    engine.look_at_model()


def _replacements(engine: Engine, before: dict[str, _Before]) -> list[Replacement]:
    """What has another shape now. The old parameters hold their old values again."""
    found = []
    for name, now in engine.module.named_parameters():
        was = before.get(name)
        if was is None or (now is was.parameter and now.shape == was.data.shape):
            continue
        spec = spec_of(was.parameter)
        if now.dim() != was.data.dim() or spec.placements:
            raise EngineError(
                f"{name} has shape {list(now.shape)} now and had {list(was.data.shape)}"
                f"{', a part of a tensor that ranks share' if spec.placements else ''}: resizing() keeps the state of "
                "whole parameters that have as many dims as before; change the model before initialize()"
            )
        value = now.data.to(was.data.device, was.data.dtype).contiguous()
        comm.broadcast(value, engine.mesh.data)
        was.parameter.data = was.data
        found.append(Replacement(was.parameter, now, value))
    return found


def _with_old(new: Tensor, old: Tensor, rounded_to: torch.dtype | None = None) -> Tensor:
    """``new`` with what ``old`` has where both are; ``rounded_to``: only what rounds to what is there."""
    box = tuple(slice(min(sizes)) for sizes in zip(new.shape, old.shape))
    mine, theirs = new[box], old[box]
    new[box] = theirs if rounded_to is None else torch.where(theirs.to(rounded_to) == mine.to(rounded_to), theirs, mine)
    return new
