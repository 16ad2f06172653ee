"""A folder for ``from_pretrained``: the model's configuration and safetensors files, written one tensor at a time."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_ds.checkpoint.manifest import INCOMPLETE
from megatron_ds.checkpoint.save import check_space
from megatron_ds.checkpoint.stream import Plan, TensorFiles, plan_bytes
from megatron_ds.comm.together import exchange, together
from megatron_ds.convert.folder import file_name, write_index
from megatron_ds.engine.tensors import WholeTensors
from megatron_ds.engine.wrapped import plain_name
from megatron_ds.errors import ConfigError
from megatron_ds.files import sync_directory
from megatron_ds.mesh import Mesh
from megatron_ds.shard import spec_of
from megatron_ds.zero.units import unique

_WEIGHTS = "model", "diffusion_pytorch_model"  # what transformers and what diffusers calls its files


def saves(module: nn.Module) -> bool:
    """Whether :func:`save` has a folder for it: a model of transformers or diffusers, or one that PEFT has wrapped."""
    adapted = hasattr(module, "peft_config") and hasattr(module, "save_pretrained")
    # Models that hold one of transformers, as SentenceTransformer, may show its configuration as theirs.
    transformer = hasattr(getattr(module, "config", None), "save_pretrained") and hasattr(module, "can_generate")
    return adapted or hasattr(module, "save_config") or transformer


def save(module: nn.Module, tensors: WholeTensors, mesh: Mesh, folder: Path) -> None:
    """On all ranks; rank 0 writes. See :meth:`Engine.save_pretrained`."""
    if not saves(module):
        raise ConfigError(
            f"{type(module).__name__} is no model of transformers or diffusers with a configuration to save; use "
            "engine.state_dict() or engine.save_checkpoint()"
        )
    diffusers = hasattr(module, "save_config")
    # One of diffusers writes all of its own state, adapters and what they adapt, whatever it is given.
    if hasattr(module, "peft_config") and hasattr(module, "save_pretrained") and not diffusers:
        _save_by_itself(module, tensors, mesh, folder)
        return
    if _is_converted(module):
        _save_by_itself(module, tensors, mesh, folder)
        return
    stem = _WEIGHTS[diffusers]
    sources = _sources(module, tensors) | _added(tensors, mesh)
    plan: Plan = {name: (tuple(value.shape), _dtype(value, tensors)) for name, value in sources.items()}
    writes = mesh.rank == 0
    partial = folder / INCOMPLETE
    with together(mesh.world):
        if writes:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            check_space(folder, plan_bytes(plan), "the model")
    files = TensorFiles(partial, plan, functools.partial(file_name, stem))
    failure: Exception | None = None
    for name in files.order:
        value = sources[name]
        whole = tensors.parameter(spec_of(value).name) if isinstance(value, nn.Parameter) else value
        if writes and failure is None:
            try:
                files.write(name, whole.cpu().clone())
            except Exception as error:  # the other ranks gather on, and hear of it at the end
                failure = error
    with together(mesh.world):
        try:
            if failure is not None:
                files.abort()
                raise failure
            if writes:
                files.finish()
                write_index(partial, stem, files, plan)
                _write_configuration(module, tensors, partial, diffusers)
                _publish(partial, folder, stem)
        finally:
            if writes:
                shutil.rmtree(partial, ignore_errors=True)


def _is_converted(module: nn.Module) -> bool:
    """Whether the library's files hold other tensors than the module: experts one by one, names of earlier times."""
    done = getattr(module, "_weight_conversions", None)  # by from_pretrained
    if done is None and hasattr(module, "all_tied_weights_keys"):
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
        except ImportError:  # a version whose files hold a new model's tensors as they are
            return False
        done = get_model_conversion_mapping(module, add_legacy=False)
    return bool(done)


def _publish(partial: Path, folder: Path, stem: str) -> None:
    """Move what is complete to its place; weights of an earlier model there go."""
    new = {path.name for path in partial.iterdir()}
    for old in folder.glob(f"{stem}*.safetensors*"):
        if old.name not in new:
            old.unlink()
    for path in sorted(partial.iterdir()):
        os.replace(path, folder / path.name)
    sync_directory(folder)


def _sources(module: nn.Module, tensors: WholeTensors) -> dict[str, Tensor]:
    """What is written, by name: of a parameter with several names the one that the others are tied to."""
    tied = getattr(module, "all_tied_weights_keys", None) or {}
    dropped = set(tied) if isinstance(tied, dict) else set()
    ignored = set(getattr(module, "_keys_to_ignore_on_save", None) or ())
    named = dict(module.named_parameters(remove_duplicate=False))
    chosen: dict[int, str] = {}
    for name, parameter in named.items():
        if id(parameter) not in chosen or plain_name(chosen[id(parameter)]) in dropped:
            chosen[id(parameter)] = name
    found: dict[str, Tensor] = {}
    for name in tensors.names():
        if plain_name(name) in ignored:
            continue
        if name not in named:
            found[plain_name(name)] = tensors.buffer(name)
        elif chosen[id(named[name])] == name:
            found[plain_name(name)] = named[name]
    return found


def _added(tensors: WholeTensors, mesh: Mesh) -> dict[str, Tensor]:
    """Tensors that hooks and modules of their own kind (metrics) add to the state: rank 0's, elsewhere their shapes.

    With those all ranks gather in one order.
    """
    own = {plain_name(name): value for name, value in tensors.others().items() if isinstance(value, Tensor)}
    kinds = [[name, list(value.shape), str(value.dtype).removeprefix("torch.")] for name, value in own.items()]
    described = json.loads(exchange(mesh.world, json.dumps(kinds))[0])
    if mesh.rank == 0:
        return own
    return {name: torch.empty(shape, dtype=getattr(torch, dtype), device="meta") for name, shape, dtype in described}


def _dtype(value: Tensor, tensors: WholeTensors) -> torch.dtype:
    return tensors.dtype(spec_of(value).name) if isinstance(value, nn.Parameter) else value.dtype


def _write_configuration(module: Any, tensors: WholeTensors, folder: Path, diffusers: bool) -> None:
    if diffusers:
        module.save_config(folder)
        return
    config = copy.deepcopy(module.config)
    config.architectures = [type(module).__name__]
    dtypes = [_dtype(p, tensors) for p in module.parameters() if p.is_floating_point()]
    config.dtype = str(dtypes[0] if dtypes else torch.float32).removeprefix("torch.")
    config.save_pretrained(folder)
    if module.can_generate() and module.generation_config is not None:
        module.generation_config.save_pretrained(folder)


def _save_by_itself(module: Any, tensors: WholeTensors, mesh: Mesh, folder: Path) -> None:
    """A model whose files hold other tensors than the module (fused experts), or some of them (PEFT's adapters).

    Its own code writes them, out of rank 0's memory.
    """
    state = {plain_name(name): value if mesh.rank == 0 else None for name, value in tensors.stream()}
    if not hasattr(module, "peft_config"):
        state |= _added(tensors, mesh)
    with tensors.gathered(_looked_at(module), write=False), together(mesh.world):
        if mesh.rank == 0:
            with _prompts_as_in(module, state):
                module.save_pretrained(folder, state_dict=state)
            if not hasattr(module, "peft_config"):
                _write_configuration(module, tensors, folder, False)  # with the dtype that is in the files


def _looked_at(module: Any) -> list[nn.Parameter]:
    """What PEFT reads of the module itself, beside its state: what is trained, and the prompts of all adapters."""
    if not hasattr(module, "peft_config"):
        return []
    prompts = getattr(module, "prompt_encoder", None) or nn.Module()
    return unique([*(p for p in module.parameters() if p.requires_grad), *prompts.parameters()])


@contextlib.contextmanager
def _prompts_as_in(module: Any, state: dict[str, Any]) -> Iterator[None]:
    """Inside, PEFT's prompts are those of the state, such as the average: it has them of their encoder, not of it."""
    encoder = getattr(module, "prompt_encoder", None) if hasattr(module, "peft_config") else None
    if not encoder:
        yield
        return
    module.prompt_encoder = copy.deepcopy(encoder)
    try:
        for name, parameter in module.prompt_encoder.named_parameters():
            parameter.data = state[f"prompt_encoder.{name}"]
        yield
    finally:
        module.prompt_encoder = encoder
