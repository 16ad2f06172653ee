"""A new run that starts from the weights of a checkpoint: whose settings hold, what may differ, which rows are new.

The model's settings, and what else its weights mean (a diffusion model's objective), come from the checkpoint unless
they are given. One that is given and contradicts the checkpoint would train a model that computes something else from
the same weights, so it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_ds.checkpoint.directory import find
from megatron_ds.checkpoint.load import load
from megatron_ds.checkpoint.meta import model_config
from megatron_ds.config import BaseModelConfig, BaseRunConfig, from_dict, read_toml
from megatron_ds.data.samples import LATENTS
from megatron_ds.errors import CheckpointError, ConfigError
from megatron_ds.mesh import Mesh
from megatron_ds.train.output import Output, latents_of
from megatron_ds.zero.optimizer import ZeroOptimizer


def model_defaults(config: BaseRunConfig) -> dict[str, Any]:
    """The settings of a run that come from the checkpoint it starts from, under those that are given.

    Nothing where there is no such checkpoint, or it cannot be read: :func:`check_model` says that, on all ranks alike.
    """
    path = config.checkpoint.init_from
    if path is None:
        return {}
    output = Output(config.output)
    source = output.resume_path(config)
    if source is not None:
        path = str(source)  # what it started from may be gone by now
    try:
        model, meanings = _saved(config, path)
    except CheckpointError:
        # A run whose newest checkpoint is damaged is no other run: loading says what is wrong, or takes an older one.
        if source is None or not source.absolute().is_relative_to(output.checkpoints.absolute()):
            return {}
        try:
            saved = from_dict(type(config), read_toml(output.config), str(output.config))
        except (ConfigError, OSError, ValueError):
            return {}
        model, meanings = saved.model, _meanings(config, saved.to_dict())
    found: dict[str, Any] = {"model": model.model_dump(mode="json")}
    for key, value in meanings.items():
        section, name = key.split(".")
        found.setdefault(section, {})[name] = value
    return found


def check_model(config: BaseRunConfig) -> list[str]:
    """Compare the run's model with the one whose weights it starts from. Reads only.

    Returns:
        What differs on purpose, a line each.

    Raises:
        ConfigError: a setting contradicts the checkpoint's.
        CheckpointError: the checkpoint cannot be read, or does not say what model it holds.
    """
    path = config.checkpoint.init_from
    if path is None:
        return []
    model, meanings = _saved(config, path)
    old, new = model.resolved, config.model.resolved
    changed = {name: f"model.{name}: {old[name]!r} -> {new[name]!r}" for name in new if new[name] != old[name]}
    grown = config.model.growing
    refused, said = [], []
    for name, text in changed.items():
        if name in grown and new[name] > old[name]:
            said.append(f"{text} ({grown[name]})")
        elif name in config.model.free:
            said.append(text)
        else:
            refused.append(f"{text} (it may only grow)" if name in grown else text)
    now = config.to_dict()
    for key, value in meanings.items():
        section, name = key.split(".")
        if now[section][name] != value:
            refused.append(f"{key}: {value!r} -> {now[section][name]!r}")
    if refused:
        raise ConfigError(
            f"checkpoint.init_from={path!r} holds another model than the settings describe: "
            f"{'; '.join(refused)}. What is left out is taken from the checkpoint: remove these settings"
        )
    return said


def check_latents(config: BaseRunConfig, data: Mapping[str, Any]) -> list[str]:
    """A line where the weights are of other latents or texts than those of ``data``, which may be meant."""
    path = config.checkpoint.init_from
    before = find(path)[1].meta.get("data") if path is not None else None
    if before is None or before.get(LATENTS) == data.get(LATENTS):
        return []
    return [f"warning: they were trained on {latents_of(before)}, and the data has {latents_of(data)}"]


def load_weights(config: BaseRunConfig, tables: Mapping[str, str], optimizer: ZeroOptimizer, mesh: Mesh) -> None:
    """Fill the parameters from the checkpoint; rows that it does not have keep their initial values.

    Args:
        tables: see :class:`~megatron_ds.pipeline.stage.Model`.
    """
    path = config.checkpoint.init_from
    assert path is not None
    directory, manifest = find(path)
    saved = model_config(type(config.model), manifest.meta, directory)
    weights = []
    for flat_shard in optimizer.flat_shards(for_load=True):
        record = manifest.tensors.get(("param", flat_shard.name))
        if flat_shard.kind == "param" and flat_shard.name in tables and record is not None:
            part = flat_shard.first_rows(getattr(saved, tables[flat_shard.name]), record.shape)
            weights += [] if part is None else [part]
        elif flat_shard.kind == "param":
            weights.append(flat_shard)
    load(path, weights, mesh.world)
    optimizer.refresh_parameters()


def _saved(config: BaseRunConfig, path: str) -> tuple[BaseModelConfig, dict[str, Any]]:
    """The checkpoint's model, and its dotted settings of other sections that say what the weights mean."""
    directory, manifest = find(path)
    model = model_config(type(config.model), manifest.meta, directory)
    return model, _meanings(config, manifest.meta.get("config", {}))


def _meanings(config: BaseRunConfig, saved: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: saved[section][name]
        for key in sorted(config.fixed)
        for section, _, name in [key.partition(".")]
        if name and name in saved.get(section, {})
    }
