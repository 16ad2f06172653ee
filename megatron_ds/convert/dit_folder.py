"""A diffusion transformer to and from folders of `diffusers`.

One tensor at a time, by the exact pairs of transforms of :mod:`.dit_tables`: what is imported and exported again has
the same bits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_ds.checkpoint.load import compare
from megatron_ds.checkpoint.manifest import step_name
from megatron_ds.checkpoint.meta import model_config
from megatron_ds.checkpoint.reader import Checkpoint
from megatron_ds.checkpoint.safetensors_header import DTYPES
from megatron_ds.checkpoint.stream import FILE_BYTES, StreamWriter
from megatron_ds.config.diffusion import DiTConfig, ObjectiveConfig
from megatron_ds.config.read import values_to_toml
from megatron_ds.convert.dit_tables import Table, table_named, table_of
from megatron_ds.convert.folder import Safetensors
from megatron_ds.convert.hugging_face import MODEL_TOML, exported_folder
from megatron_ds.convert.settings import Settings
from megatron_ds.errors import CheckpointError
from megatron_ds.files import read_object, write_text_durably
from megatron_ds.models.dit import DiT
from megatron_ds.models.transformer import StageSettings
from megatron_ds.shard import spec_of
from megatron_ds.shard.flat_shards import FlatShard

STEM = "diffusion_pytorch_model"


def global_shapes(c: DiTConfig) -> dict[str, tuple[int, ...]]:
    """Name to global shape of every tensor of the model."""
    specs = [spec_of(p) for p in DiT(c, ObjectiveConfig(), StageSettings(device="meta")).parameters()]
    return {spec.name: spec.global_shape for spec in specs}


def export_transformer(
    checkpoint: str | Path, folder: str | Path, average: bool | None = None, file_bytes: int = FILE_BYTES
) -> Path:
    """Write a checkpoint's model as a folder that ``from_pretrained`` of its class of `diffusers` loads.

    Args:
        average: the moving average of the weights, or the weights. Default: the average where there is one.
    """
    folder = Path(folder)
    with Checkpoint(checkpoint) as source:
        config = model_config(DiTConfig, source.meta, source.directory)
        kind = source.weights_kind(average)
        table = table_of(config)
        described, shapes = table.to_config(config), global_shapes(config)
        whole = [FlatShard.whole(name, kind, torch.empty(shape, device="meta")) for name, shape in shapes.items()]
        compare(source.manifest, source.directory, whole)
        made_by = {name: rule for rule in table.rules(config) for name in rule.theirs}
        constants = dict(table.constants(config))
        dtype = DTYPES[source.record("patches.weight", kind).dtype]
        plan = {name: (tuple(tensor.shape), dtype) for name, tensor in constants.items()}
        for name, rule in made_by.items():
            part = rule.split(torch.empty(shapes[rule.ours], device="meta"))[rule.theirs.index(name)]
            plan[name] = tuple(part.shape), DTYPES[source.record(rule.ours, kind).dtype]
        with exported_folder(folder, plan, STEM, file_bytes) as (unfinished, files):
            for name in files.order:
                if name in constants:
                    files.write(name, constants[name].to(dtype))
                    continue
                rule = made_by[name]
                files.write(name, rule.split(source.read(rule.ours, kind))[rule.theirs.index(name)].contiguous())
            write_text_durably(unfinished / "config.json", json.dumps(described, indent=2) + "\n")
    return folder


def import_transformer(folder: str | Path, out_dir: str | Path) -> Path:
    """Write a model's folder of `diffusers` as checkpoint ``step-00000000`` under ``out_dir``."""
    folder, out_dir = Path(folder), Path(out_dir)
    if (out_dir / step_name(0)).exists():
        raise CheckpointError(f"{out_dir / step_name(0)} exists already; import into another folder, or remove it")
    where = folder / "config.json"
    values = read_object(where, CheckpointError)
    table = table_named(str(values.get("_class_name")), str(where))
    config = table.from_config(Settings(values, str(where)))
    weights = _Weights(folder)
    rules, shapes = table.rules(config), global_shapes(config)
    _require_tensors(weights, table, config, shapes, folder)
    plan = {rule.ours: (shapes[rule.ours], weights.found[rule.theirs[0]][1]) for rule in rules}
    by_name = {rule.ours: rule for rule in rules}
    meta = {"config": {"model": config.model_dump(mode="json")}}
    with StreamWriter(out_dir, 0, meta, plan) as writer:
        for name in writer.order:
            rule = by_name[name]
            parts = [weights.read(theirs) for theirs in rule.theirs]
            if rule.copies and not all(torch.equal(parts[0], part) for part in parts):
                raise CheckpointError(
                    f"{folder}: {rule.theirs[0]} and its like in other blocks differ. Here all blocks share one "
                    "embedding of time and class, as in published models; this one cannot be imported"
                )
            writer.write(name, rule.join(parts).contiguous())
        write_text_durably(out_dir / MODEL_TOML, values_to_toml(meta["config"]))
    return out_dir / step_name(0)


def _require_tensors(
    weights: _Weights, table: Table, config: DiTConfig, shapes: Mapping[str, tuple[int, ...]], folder: Path
) -> None:
    """A :class:`CheckpointError` that names what is missing, unknown, of another shape or not what it has to be."""
    problems: list[str] = []
    known: set[str] = set()
    for name, wanted in table.constants(config).items():
        known.add(name)
        if name not in weights.found:
            continue  # it follows from the configuration
        there, dtype = weights.read(name), weights.found[name][1]
        # A published table was computed elsewhere and rounded: to bf16, by at most 2^-8.
        close = 1e-5 if dtype in (torch.float32, torch.float64) else 2**-8
        if there.shape != wanted.shape or not torch.allclose(there.float(), wanted, rtol=0, atol=close):
            problems.append(f"{name} is not the table of sines that the configuration describes")
    for rule in table.rules(config):
        for name, part in zip(rule.theirs, rule.split(torch.empty(shapes[rule.ours], device="meta"))):
            known.add(name)
            if name not in weights.found:
                problems.append(f"{name} is missing")
            elif weights.found[name][0] != tuple(part.shape):
                problems.append(f"{name} is {list(weights.found[name][0])} instead of {list(part.shape)}")
    problems += [f"{name} is unknown" for name in sorted(weights.found.keys() - known)]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(f"{folder} does not hold the {table.name} it describes: {'; '.join(problems[:5])}{more}")


class _Weights:
    """The safetensors files of a folder. ``found``: name to shape and dtype."""

    def __init__(self, folder: Path):
        pattern = re.compile(rf"{STEM}(-\d+-of-\d+)?\.safetensors")
        self._files: dict[str, Safetensors] = {}
        self.found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        paths = sorted(path for path in folder.glob("*.safetensors") if pattern.fullmatch(path.name))
        if not paths:
            raise CheckpointError(f"{folder} has no {STEM}.safetensors; save the model with save_pretrained")
        for file in map(Safetensors, paths):
            self.found |= file.found
            self._files |= dict.fromkeys(file.found, file)

    def read(self, name: str) -> Tensor:
        return self._files[name].read(name)
