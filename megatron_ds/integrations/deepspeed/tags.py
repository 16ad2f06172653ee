"""Checkpoints by tag: ``DIRECTORY/TAG`` holds one of this library's, ``DIRECTORY/latest`` the newest tag."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from megatron_ds import checkpoint
from megatron_ds.comm.together import exchange, together
from megatron_ds.engine import Engine
from megatron_ds.engine.wrapped import plain_name
from megatron_ds.errors import CheckpointError, ConfigError, RaisedAs
from megatron_ds.files import print_line, read_bytes, replacing, sync_directory, write_text_durably
from megatron_ds.mesh import Axis
from megatron_ds.shard import spec_of

_LATEST = "latest"
_LONGEST_TAG = 4096


class TaggedCheckpoints:
    """What a :class:`~.engine.DeepSpeedEngine` reads and writes."""

    engine: Engine
    lr_scheduler: Any

    def save_checkpoint(
        self,
        save_dir: str | os.PathLike[str],
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Writes ``save_dir/tag``; on all ranks. ``tag``: ``global_stepN`` unless given."""
        own, folder = self.engine, Path(save_dir)
        if exclude_frozen_parameters:
            raise ConfigError("save_checkpoint(exclude_frozen_parameters=True): a checkpoint holds all parameters")
        name = _agreed(own.mesh.world, f"global_step{own.steps}" if tag is None else str(tag))
        state = {"client": dict(client_state or {}), **_for_zero_to_fp32(own)}
        own.save_checkpoint(folder / name, state, keep_last=1)
        with together(own.mesh.world):
            if save_latest and own.mesh.rank == 0:
                with replacing(folder / _LATEST) as temporary:
                    write_text_durably(temporary, name)
                sync_directory(folder)
        return True

    def load_checkpoint(
        self,
        load_dir: str | os.PathLike[str],
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Any = None,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Path and client state of the checkpoint that was loaded; two None where no tag is given and none saved."""
        if custom_load_fn is not None:
            raise ConfigError("load_checkpoint(custom_load_fn=) is not supported; use load_module_state_dict()")
        own, folder = self.engine, Path(load_dir)
        if tag is None:
            newest = ""
            with together(own.mesh.world):
                if own.mesh.rank == 0:
                    newest = _newest(folder)
            tag = exchange(own.mesh.world, newest)[0]
            if not tag:
                return None, None
        path = folder / str(tag)
        optimizer = load_optimizer_states and not load_module_only
        scheduler = load_lr_scheduler_states and not load_module_only
        if own.lr_scheduler is None and self.lr_scheduler is not None and optimizer != scheduler:
            raise ConfigError(
                f"load_optimizer_states={optimizer} with load_lr_scheduler_states={scheduler}: the configuration's "
                "schedule goes by the optimizer's updates; load both, or neither"
            )
        kept = own.lr_scheduler.state_dict() if hasattr(own.lr_scheduler, "state_dict") else None
        own.require_between_steps("load_checkpoint()")
        try:
            state = own.load_checkpoint(path, weights_only=not optimizer, strict=load_module_strict or optimizer)
        except CheckpointError as error:
            raise CheckpointError(_in_words_of_deepspeed(str(error))) from None
        meta = checkpoint.read_meta(path)
        if kept is not None and optimizer and not scheduler:
            own.lr_scheduler.load_state_dict(kept)
        if kept is not None and scheduler and not optimizer and "lr_scheduler" in meta:
            own.lr_scheduler.load_state_dict(meta["lr_scheduler"])
        if not load_module_only:
            own.steps, own.skipped = int(meta["step"]), int(meta.get("skipped_steps", 0))
        return str(path), dict(state.get("client", {}))

    def save_16bit_model(
        self,
        save_dir: str | os.PathLike[str],
        save_filename: str = "pytorch_model.bin",
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Writes the model's weights, whole and in their dtype, as safetensors; ``.bin`` in the name becomes that."""
        own, folder = self.engine, Path(save_dir)
        path = folder / save_filename
        if path.suffix != ".safetensors":
            path = path.with_name("model.safetensors" if path.stem == "pytorch_model" else f"{path.stem}.safetensors")
        frozen = {n for n, p in own.module.named_parameters() if not p.requires_grad}
        whole: dict[str, torch.Tensor] = {}
        for key, value in own.tensors().stream():
            if own.mesh.rank == 0 and not (exclude_frozen_parameters and key in frozen):
                whole[plain_name(key)] = value.detach().contiguous().clone()
        with together(own.mesh.world):
            if own.mesh.rank == 0:
                folder.mkdir(parents=True, exist_ok=True)
                with replacing(path) as temporary:
                    safetensors.torch.save_file(whole, temporary, metadata={"format": "pt"})
                sync_directory(folder)
                if path.name != save_filename:
                    asked = folder / save_filename
                    print_line(f"megatron_ds: {asked} was asked for and would be a pickle: wrote {path}")
        return True

    save_fp16_model = save_16bit_model


def _for_zero_to_fp32(engine: Engine) -> dict[str, Any]:
    """What ``zero_to_fp32`` needs to know of the model: its frozen parameters, and other names of shared ones."""
    frozen = [spec_of(p).name for p in engine.module.parameters() if not p.requires_grad]
    named = engine.module.named_parameters(remove_duplicate=False)
    names = [(plain_name(name), spec_of(parameter).name) for name, parameter in named]
    own = {"frozen": frozen, "aliases": {alias: name for alias, name in names if alias != name}}
    stages = [json.loads(text) for text in exchange(engine.mesh.pp, json.dumps(own))]
    return {
        "frozen": [name for stage in stages for name in stage["frozen"]],
        "aliases": {alias: name for stage in stages for alias, name in stage["aliases"].items()},
    }


def _in_words_of_deepspeed(advice: str) -> str:
    theirs = advice.replace("weights_only=True", "load_module_only=True")
    return theirs.replace(" strict=False", " load_module_strict=False")


def _agreed(world: Axis, tag: str) -> str:
    tags = exchange(world, json.dumps(tag))
    if len(set(tags)) > 1:
        raise CheckpointError(f"the ranks save different tags, {', '.join(dict.fromkeys(tags))}; give all the same")
    if not tag or tag in (".", "..", _LATEST) or os.sep in tag:
        raise ConfigError(f"tag={tag!r} is no name for a folder in the checkpoint's directory")
    return tag


def _newest(folder: Path) -> str:
    path = folder / _LATEST
    with RaisedAs(CheckpointError, f"{path}, which names the newest tag, is damaged; give tag=", OSError, ValueError):
        return read_bytes(path, _LONGEST_TAG).decode().strip() if path.is_file() else ""
