"""What every conversion does: folders that appear when they are complete, checkpoints of a folder, tensor by tensor.

A rule's two transforms are exact inverses, so import followed by export gives back every bit.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_ds.checkpoint.load import compare
from megatron_ds.checkpoint.manifest import INCOMPLETE, step_name
from megatron_ds.checkpoint.reader import Checkpoint
from megatron_ds.checkpoint.save import check_space
from megatron_ds.checkpoint.stream import FILE_BYTES, Plan, StreamWriter, TensorFiles, plan_bytes
from megatron_ds.config import BaseModelConfig
from megatron_ds.config.read import values_to_toml
from megatron_ds.convert.architecture import Rule
from megatron_ds.convert.folder import file_name, write_index
from megatron_ds.convert.match import Matched
from megatron_ds.errors import CheckpointError, ConfigError
from megatron_ds.files import sync_directory, write_text_durably
from megatron_ds.models.families import Shapes
from megatron_ds.shard.flat_shards import FlatShard

MODEL_TOML = "model.toml"


@contextmanager
def new_folder(out_dir: Path, needed: int) -> Iterator[Path]:
    """A folder that becomes ``out_dir`` on leaving, when it is complete; by an exception it is removed.

    Raises:
        ConfigError: ``out_dir`` holds something, or has no name.
        CheckpointError: its disk has no room for ``needed`` bytes.
    """
    if not out_dir.name:
        raise ConfigError(f"{out_dir} is a folder that is there; give the name of one that is to be made")
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ConfigError(f"{out_dir} exists and is not an empty directory; export to another, or remove it first")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    check_space(out_dir.parent, needed, "the export")
    partial = out_dir.with_name(out_dir.name + INCOMPLETE)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        sync_directory(partial)
        if out_dir.exists():
            out_dir.rmdir()
        partial.rename(out_dir)
        sync_directory(out_dir.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def exported_folder(
    out_dir: Path, plan: Plan, stem: str, file_bytes: int = FILE_BYTES
) -> Iterator[tuple[Path, TensorFiles]]:
    """A :func:`new_folder`, and the safetensors files of its weights.

    Inside, everything in ``plan`` is written in the files' order, and what else belongs to the folder.

    Args:
        stem: what the files' names begin with, see :class:`~megatron_ds.convert.folder.WeightFolder`.
    """
    with new_folder(out_dir, plan_bytes(plan)) as partial:
        files = TensorFiles(partial, plan, functools.partial(file_name, stem), file_bytes=file_bytes)
        try:
            yield partial, files
            files.finish()
            write_index(partial, stem, files, plan)
        finally:
            files.abort()


def plan_export(
    source: Checkpoint,
    kind: str,
    config: BaseModelConfig,
    rules: Sequence[Rule],
    shapes: Shapes,
    dtype: torch.dtype | None = None,
) -> tuple[dict[str, tuple[tuple[int, ...], torch.dtype]], Callable[[str], Mapping[str, Tensor]]]:
    """By exported name shape and dtype; and what makes a tensor, with all those that come of the same one of ours.

    Args:
        kind: of the checkpoint's tensors. dtype: of the exported tensors; None keeps the checkpoint's.

    Raises:
        CheckpointError: the checkpoint's tensors are not those of its configuration.
    """
    whole = [FlatShard.whole(name, kind, torch.empty(shape, device="meta")) for name, shape in shapes.items()]
    compare(source.manifest, source.directory, whole)
    plan: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    makers: dict[str, Rule] = {}
    for rule in rules:
        kept = dtype or source.dtype(rule.ours, kind)
        for name, part in zip(rule.theirs, rule.to_hf(config, torch.empty(shapes[rule.ours], device="meta"))):
            plan[name] = tuple(part.shape), kept
            makers[name] = rule

    def make(name: str) -> Mapping[str, Tensor]:
        rule = makers[name]
        return dict(zip(rule.theirs, rule.to_hf(config, source.read(rule.ours, kind))))

    return plan, make


def require_no_checkpoint(out_dir: Path) -> None:
    """A :class:`CheckpointError` where the checkpoint that an import writes is there already."""
    if (out_dir / step_name(0)).exists():
        raise CheckpointError(
            f"{out_dir / step_name(0)} exists already; import into another folder, or remove it first"
        )


@contextmanager
def imported_checkpoint(
    out_dir: Path,
    config: BaseModelConfig,
    matched: Matched,
    title: str,
    dtype: torch.dtype | None = None,
    progress: bool = False,
    file_bytes: int = FILE_BYTES,
) -> Iterator[None]:
    """Checkpoint ``step-00000000`` under ``out_dir``, of a folder's tensors; it is committed on leaving.

    ``model.toml`` beside it holds the model's settings, as a file for ``--config``. Inside, what else belongs there is
    written. ``dtype``: of its tensors; None keeps theirs.
    """
    rules = {rule.ours: rule for rule in matched.rules}
    plan = {name: (matched.shapes[name], dtype or matched.dtype_of(rule)) for name, rule in rules.items()}
    meta = {"config": {"model": config.model_dump(mode="json")}}

    def make(name: str) -> Mapping[str, Tensor]:
        return {name: rules[name].from_hf(config, matched.read(rules[name]))}

    with StreamWriter(out_dir, 0, meta, plan, file_bytes=file_bytes) as writer:
        write_converted(writer, plan, make, title, progress)
        yield
        write_text_durably(out_dir / MODEL_TOML, values_to_toml(meta["config"]))


def write_converted(
    files: TensorFiles | StreamWriter,
    plan: Plan,
    make: Callable[[str], Mapping[str, Tensor]],
    title: str,
    progress: bool = False,
) -> None:
    """Write every tensor in the order of the files. Tensors that ``make`` gives along wait here until their turn.

    Raises:
        ConfigError: a value is beyond the range of the dtype in ``plan``.
    """
    waiting: dict[str, Tensor] = {}
    with tqdm(total=plan_bytes(plan), desc=title, unit="B", unit_scale=True, disable=not progress) as bar:
        for name in files.order:
            if name not in waiting:
                waiting.update(make(name))
            wide = waiting.pop(name)
            tensor = wide.to(plan[name][1])
            if tensor.dtype is torch.float16 and not torch.equal(tensor.isfinite(), wide.isfinite()):
                raise ConfigError(
                    f"{name} has values up to {wide.abs().max():.3g}, and float16 ends at 65504; use bfloat16"
                )
            files.write(name, tensor)
            bar.update(tensor.nbytes)
