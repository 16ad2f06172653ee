"""An engine's checkpoints: the format and the names of a pretraining run's, with what a user's own parts add to it.

Besides master weights and optimizer state there are persistent buffers (kind ``"buffer"``), and in the meta data the
settings and numbers of a torch optimizer, the scheduler's state, modules' extra state (rank 0's) and the caller's own,
which come back as they were.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX

from megatron_ds import checkpoint
from megatron_ds.comm.together import exchange
from megatron_ds.engine.wrapped import plain_name
from megatron_ds.errors import CheckpointError
from megatron_ds.optim.ema import EMA
from megatron_ds.shard import as_real, spec_of
from megatron_ds.shard.flat_shards import FlatShard
from megatron_ds.train.keeping import Keeper
from megatron_ds.zero.main_grad import is_trained

if TYPE_CHECKING:
    from megatron_ds.engine.engine import Engine

log = logging.getLogger(__name__)

_REMEDY = (
    "where other parameters are trained than before, load the weights alone: load_checkpoint(..., weights_only=True); "
    "where the model has others, such as a new head, those of the same name: weights_only=True, strict=False"
)


def save(engine: Engine, directory: str | Path, client_state: dict[str, Any], keep_last: int | None) -> Path:
    engine.take_unfrozen()  # whoever resumes has it unfrozen from the start
    flat_shards = engine.zero.flat_shards() + _own_buffers(engine)
    meta: dict[str, Any] = {
        "config": {"engine": engine.config.to_dict()},
        "step": engine.steps,
        "skipped_steps": engine.skipped,
        "optimizer_count": engine.zero.count,
        "loss_scaler": engine.train_step.scaler.state_dict(),
        "client_state": client_state,
        "trained": sorted(name for name, p in _parameters(engine).items() if is_trained(p)),
    }
    if engine.rule is not None:
        meta["torch_optimizer"] = engine.rule.state_dict()
    if extra := _extra_state(engine):
        meta["extra_state"] = extra
    meta["late_parameters"] = late_parameters(engine)
    keeper = Keeper(Path(directory), keep_last, engine.mesh.world, log.warning)
    keeper.unproven = meta["unproven"] = engine.keeper.unproven
    if hasattr(engine.lr_scheduler, "state_dict"):
        meta["lr_scheduler"] = engine.lr_scheduler.state_dict()
    saved = checkpoint.save(directory, engine.steps, flat_shards, meta, engine.mesh.world, replace=True)
    keeper.saved(engine.steps)
    engine.keeper = keeper
    return saved


def late_parameters(engine: Engine) -> dict[str, Any]:
    """What :meth:`ZeroOptimizer.load_late` takes, of all ranks."""
    late: dict[str, Any] = {}
    for text in exchange(engine.mesh.world, json.dumps(engine.zero.late())):
        late.update(json.loads(text))
    return late


def load(engine: Engine, path: str | Path, weights_only: bool, strict: bool) -> dict[str, Any]:
    if not (strict or weights_only):
        raise CheckpointError(
            "load_checkpoint(strict=False) takes weights by name, and a step of the optimizer belongs to all of them; "
            "add weights_only=True"
        )
    if not weights_only:
        meta = checkpoint.read_meta(path)
        _check(engine, meta)
        _train_as_saved(engine, meta)
    flat_shards = [p for p in engine.zero.flat_shards(for_load=True) if not weights_only or p.kind == "param"]
    buffers = _buffers(engine)
    meta = checkpoint.load(path, flat_shards + buffers, engine.mesh.world, strict=strict, remedy=_REMEDY)
    _take_copies(engine, buffers)
    _take_extra_state(engine, meta.get("extra_state", {}), strict)
    if not weights_only:
        engine.zero.count = int(meta["optimizer_count"])
    engine.zero.refresh_parameters()
    if weights_only:
        _take_average(engine, path, meta)
        return dict(meta.get("client_state", {}))
    saved = meta.get("torch_optimizer")
    if engine.rule is not None and saved is not None:
        engine.rule.load_state_dict(saved)
    engine.zero.load_late(meta.get("late_parameters", {}))
    if hasattr(engine.lr_scheduler, "load_state_dict") and "lr_scheduler" in meta:
        engine.lr_scheduler.load_state_dict(meta["lr_scheduler"])
    engine.train_step.scaler.load_state_dict(meta["loss_scaler"])
    engine.steps, engine.skipped = int(meta["step"]), int(meta.get("skipped_steps", 0))
    engine.keeper = Keeper(Path(path), None, engine.mesh.world, log.warning)
    engine.keeper.started_from(engine.steps, meta.get("unproven"))
    return dict(meta.get("client_state", {}))


def begin_average(engine: Engine, names: Collection[str]) -> None:
    """The moving average of these parameters goes on from their weights, in as many updates as that of the others."""
    if not (engine.keeps_average and engine.zero.count):
        return
    # Setting the count tells it to the averages of buckets that are new, and has the optimizer's rules forget which of
    # their parameters have had fewer updates.
    late = late_parameters(engine)
    engine.zero.count = engine.zero.count
    engine.zero.load_late(late)
    engine.zero.change(lambda update: update.begin(names))  # type: ignore[attr-defined]


def _take_average(engine: Engine, path: str | Path, meta: dict[str, Any]) -> None:
    """With the weights alone: the average that belongs to them, or where there is none they themselves."""
    trained = [name for name, p in _parameters(engine).items() if is_trained(p)]
    if engine.keeps_average and engine._seed is not None:  # of a forward pass that no backward pass has followed
        engine._drop_gradients()
    begin_average(engine, trained)
    if engine.keeps_average and _has_average(meta) and meta.get("trained") == sorted(trained):
        averages = [p for p in engine.zero.flat_shards(for_load=True) if p.kind == EMA]
        checkpoint.load(path, averages, engine.mesh.world, remedy=_REMEDY)
        engine.zero.refresh_parameters()


def _has_average(meta: dict[str, Any]) -> bool:
    settings = meta.get("config", {}).get("engine", {}).get("optimizer", {})
    return bool(settings.get("ema_decay"))


def _train_as_saved(engine: Engine, meta: dict[str, Any]) -> None:
    """What had been unfrozen when the checkpoint was written has its state here too, frozen or not."""
    mine, rule = _parameters(engine), engine.rule
    known = None if rule is None else {id(p) for group in rule.optimizer.param_groups for p in group["params"]}
    late = {name: mine[name] for name in meta.get("trained", ()) if name in mine and not is_trained(mine[name])}
    late = {name: p for name, p in late.items() if known is None or id(p) in known}
    if late:
        engine.train_also(late)


def _parameters(engine: Engine) -> dict[str, nn.Parameter]:
    return {spec_of(parameter).name: parameter for parameter in engine.module.parameters()}


def _check(engine: Engine, meta: dict[str, Any]) -> None:
    """The update rules must be of one kind: state of the same name means another thing in another rule."""
    saved = (meta.get("torch_optimizer") or {}).get("class")
    mine = None if engine.rule is None else type(engine.rule.optimizer).__name__
    if saved != mine:
        raise CheckpointError(
            f"the checkpoint's optimizer state is of {saved or 'the built-in optimizer'}, this engine's optimizer is "
            f"{mine or 'the built-in one'}; use the same, or load_checkpoint(..., weights_only=True)"
        )


def _own_buffers(engine: Engine) -> list[FlatShard]:
    """Those that this rank saves: of each pipeline stage one rank, without what an earlier stage has too."""
    mesh = engine.mesh
    found = _buffers(engine)
    earlier = exchange(mesh.pp, "\n".join(buffer.name for buffer in found))[: mesh.pp.rank]
    saved = {name for text in earlier for name in text.split("\n")}
    first = mesh.data.is_first and mesh.tp.is_first
    return [buffer for buffer in found if first and buffer.name not in saved]


def _buffers(engine: Engine) -> list[FlatShard]:
    """Each in its own memory, or in a copy where that is not contiguous; :func:`_take_copies` is for those."""
    return [FlatShard.whole(name, "buffer", buffer.contiguous()) for name, buffer in _named_buffers(engine)]


def _take_copies(engine: Engine, read: Sequence[FlatShard]) -> None:
    """Buffers that are not contiguous become what was read into their copies."""
    for (_, buffer), copy in zip(_named_buffers(engine), read):
        if not buffer.is_contiguous():
            buffer.copy_(copy.tensor(None).view(buffer.shape))


def _extra_state(engine: Engine) -> dict[str, Any]:
    """What modules give by ``get_extra_state()``, by its key in ``state_dict()``."""
    others = engine.tensors().others().items()
    return {plain_name(key): value for key, value in others if key.rpartition(".")[2] == _EXTRA_STATE_KEY_SUFFIX}


def _take_extra_state(engine: Engine, saved: Mapping[str, Any], strict: bool) -> None:
    named = engine.module.named_modules()
    modules = {plain_name(f"{name}.{_EXTRA_STATE_KEY_SUFFIX}".lstrip(".")): module for name, module in named}
    if strict and (lost := [key for key in saved if key not in modules]):
        raise CheckpointError(f"the checkpoint has {lost[0]}, of a module that is not there; {_REMEDY}")
    for key, value in saved.items():
        if key in modules:
            modules[key].set_extra_state(value)


def _named_buffers(engine: Engine) -> list[tuple[str, Tensor]]:
    tensors, named = engine.tensors(), dict(engine.module.named_parameters(remove_duplicate=False))
    return [(plain_name(name), as_real(tensors.buffer(name))) for name in tensors.names() if name not in named]
