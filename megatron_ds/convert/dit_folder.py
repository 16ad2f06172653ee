"""A diffusion transformer to and from folders of `diffusers`, by the tables of :mod:`.dit_tables`."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_ds.checkpoint.manifest import step_name
from megatron_ds.checkpoint.meta import model_config
from megatron_ds.checkpoint.reader import Checkpoint
from megatron_ds.checkpoint.stream import FILE_BYTES
from megatron_ds.config.diffusion import DiTConfig, ObjectiveConfig
from megatron_ds.convert.conversion import (
    exported_folder,
    imported_checkpoint,
    plan_export,
    require_no_checkpoint,
    write_converted,
)
from megatron_ds.convert.dit_tables import Table, table_named, table_of
from megatron_ds.convert.folder import DIFFUSERS, WeightFolder
from megatron_ds.convert.match import Matched
from megatron_ds.convert.settings import Settings
from megatron_ds.errors import CheckpointError
from megatron_ds.files import read_object, write_json
from megatron_ds.models.dit import DiT
from megatron_ds.models.families import Shapes
from megatron_ds.models.transformer import StageSettings
from megatron_ds.shard import spec_of


def global_shapes(c: DiTConfig) -> Shapes:
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
        described = table.to_config(config)
        plan, make = plan_export(source, kind, config, table.rules(config), global_shapes(config))
        constants = table.constants(config)
        plan |= {name: (tuple(value.shape), source.dtype("patches.weight", kind)) for name, value in constants.items()}
        with exported_folder(folder, plan, DIFFUSERS, file_bytes) as (unfinished, files):
            write_converted(files, plan, lambda name: constants if name in constants else make(name), table.name)
            write_json(unfinished / "config.json", described)
    return folder


def import_transformer(folder: str | Path, out_dir: str | Path) -> Path:
    """Write a model's folder of `diffusers` as checkpoint ``step-00000000`` under ``out_dir``."""
    folder, out_dir = Path(folder), Path(out_dir)
    require_no_checkpoint(out_dir)
    where = folder / "config.json"
    values = read_object(where, CheckpointError)
    table = table_named(str(values.get("_class_name")), str(where))
    config = table.from_config(Settings(values, str(where)))
    source = WeightFolder(folder, DIFFUSERS)
    constants = _check_constants(source, table, config)
    names = {name: name for name in source.shapes}
    matched = Matched(source, table.name, config, table.rules(config), global_shapes(config), names, constants)
    for rule in matched.rules:
        first, *others = matched.read(rule) if rule.copies else [torch.empty(0)]
        if not all(torch.equal(first, other) for other in others):
            raise CheckpointError(
                f"{folder}: {rule.theirs[0]} and its like in other blocks differ. Here all blocks share one embedding "
                "of time and class, as in published models; this one cannot be imported"
            )
    with imported_checkpoint(out_dir, config, matched, table.name):
        pass
    return out_dir / step_name(0)


def _check_constants(source: WeightFolder, table: Table, config: DiTConfig) -> set[str]:
    """The names of tensors that follow from the configuration; a folder need not have them.

    Raises:
        CheckpointError: it has one of other values.
    """
    constants = table.constants(config)
    for name in constants.keys() & source.shapes:
        wanted, there = constants[name], source.read(name)
        # A published table was computed elsewhere and rounded: to bf16, by at most 2^-8.
        close = 1e-5 if there.dtype in (torch.float32, torch.float64) else 2**-8
        if there.shape != wanted.shape or not torch.allclose(there.float(), wanted, rtol=0, atol=close):
            raise CheckpointError(f"{source.path}: {name} is not the table of sines that the configuration describes")
    return set(constants)
