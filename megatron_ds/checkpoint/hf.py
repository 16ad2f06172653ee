"""Conversion to and from Hugging Face, driven by tables: checkpoint to checkpoint, one tensor at a time.

What an architecture calls things, and how its layouts differ from ours, is an :class:`Architecture`, which the
caller passes in (``megatron_ds.models.hf_tables`` has them for the decoder). Here is what all of them need: choosing
one, planning, streaming, the files that ``transformers`` expects. A rule's two transforms are exact inverses, so
import followed by export gives back every bit.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import pydantic
import torch
from tqdm import tqdm

from megatron_ds.checkpoint.hf_architecture import Architecture, Rule, architecture_of, choose
from megatron_ds.checkpoint.hf_folder import HFFolder
from megatron_ds.checkpoint.load import compare
from megatron_ds.checkpoint.manifest import INCOMPLETE, step_name, sync_directory, write_text_durably
from megatron_ds.checkpoint.meta import model_config
from megatron_ds.checkpoint.pieces import Piece
from megatron_ds.checkpoint.reader import Checkpoint
from megatron_ds.checkpoint.save import check_space
from megatron_ds.checkpoint.stream import FILE_BYTES, Plan, StreamWriter, TensorFiles, plan_bytes
from megatron_ds.config import ModelConfig
from megatron_ds.config.read import values_to_toml
from megatron_ds.errors import CheckpointError, ConfigError

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
SHOWN = 10
MODEL_TOML = "model.toml"


class TokenizerLike(Protocol):
    """What an export needs of a tokenizer (``megatron_ds.data.tokenizers``)."""

    eod_id: int | None
    bos_id: int | None

    def save_hf(self, folder: str | Path) -> None: ...


def export_hf(
    checkpoint: str | Path,
    out_dir: str | Path,
    architectures: Sequence[Architecture],
    dtype: torch.dtype | None = None,
    tokenizer: TokenizerLike | None = None,
    progress: bool = False,
    file_bytes: int = FILE_BYTES,
) -> Path:
    """Write a checkpoint's model as a folder that ``transformers``' ``from_pretrained`` loads.

    Args:
        checkpoint: a run's checkpoint directory or one step's. Its meta must hold ``config.model``.
        out_dir: made here; must not exist or be empty. It appears only when it is complete.
        architectures: those to choose from.
        dtype: of the exported tensors; None keeps the checkpoint's.
        tokenizer: saved beside the model; its end-of-document token becomes the model's EOS.
        progress: show a progress bar.
        file_bytes: the size of one file at most, unless a single tensor is larger.

    Raises:
        CheckpointError: of the checkpoint; or its tensors are not those of its configuration.
        ConfigError: no architecture can express the model (the field is named), or ``out_dir`` holds something.
    """
    out_dir = Path(out_dir)
    with Checkpoint(checkpoint) as source:
        config = model_config(source.meta, source.directory)
        architecture = choose(config, architectures)
        shapes = architecture.shapes(config)
        whole = [Piece.whole(name, "param", torch.empty(shape, device="meta")) for name, shape in shapes.items()]
        compare(source.manifest, source.directory, whole)
        plan: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        makers: dict[str, Rule] = {}
        for rule in architecture.expanded(config):
            kept = dtype or source.dtype(rule.ours)
            parts = rule.to_hf(config, torch.empty(shapes[rule.ours], device="meta"))
            for name, part in zip(rule.theirs, parts):
                plan[name] = (tuple(part.shape), kept)
                makers[name] = rule
        partial = _new_folder(out_dir, plan_bytes(plan))

        def make(rule: Rule) -> Iterable[tuple[str, torch.Tensor]]:
            return zip(rule.theirs, rule.to_hf(config, source.read(rule.ours)))

        files = TensorFiles(partial, plan, _file_name, file_bytes=file_bytes)
        try:
            with _bar(plan, f"{architecture.name} to {out_dir.name}", progress) as bar:
                for name, tensor in _converted(files.order, makers, make, plan):
                    files.write(name, tensor)
                    bar.update(tensor.nbytes)
            files.finish()
            _write_index(partial, files, plan)
            _write_configs(partial, architecture, config, plan, source.meta.get("hf", {}), tokenizer)
            if tokenizer is not None:
                tokenizer.save_hf(partial)
            sync_directory(partial)
            if out_dir.exists():
                out_dir.rmdir()
            partial.rename(out_dir)
            sync_directory(out_dir.parent)
        except BaseException:
            files.abort()
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return out_dir


def import_hf(
    hf_dir: str | Path,
    out_dir: str | Path,
    architectures: Sequence[Architecture],
    dtype: torch.dtype | None = None,
    vocab_multiple: int | None = None,
    progress: bool = False,
    file_bytes: int = FILE_BYTES,
) -> Path:
    """Write a folder of ``transformers`` (safetensors) as checkpoint ``step-00000000`` under ``out_dir``.

    Args:
        hf_dir: has config.json and model.safetensors, or an index and its shards.
        out_dir: a checkpoint directory; tokenizer files are copied to ``tokenizer/`` in it, and ``model.toml`` in it
            holds the model's settings, as a file for ``--config``.
        architectures: those to choose from, by config.json's ``architectures`` or ``model_type``.
        dtype: of the checkpoint's tensors; None keeps theirs.
        vocab_multiple: the vocabulary's rows are padded with zeros to a multiple of this; None: the default of
            :class:`ModelConfig`.
        progress, file_bytes: as for :func:`export_hf`.

    Raises:
        ConfigError: the model's architecture or a feature of it is not supported (named).
        CheckpointError: files are missing or damaged, or the tensors are not those of the configuration.
    """
    source = HFFolder(Path(hf_dir))
    architecture = architecture_of(source.config, architectures)
    fields = architecture.from_config(source.config)
    if vocab_multiple is not None:
        fields["vocab_multiple"] = vocab_multiple
    try:
        config = ModelConfig(**fields)
    except pydantic.ValidationError as error:
        raise ConfigError(f"{source.path / 'config.json'} describes a model that is not supported: {error}") from error
    rules = architecture.expanded(config)
    names = _match_names(source, architecture, config, rules)
    shapes = architecture.shapes(config)
    plan: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for rule in rules:
        theirs = {source.dtypes[names[name]] for name in rule.theirs}
        if len(theirs) > 1 and dtype is None:
            found = ", ".join(sorted(map(str, theirs)))
            raise CheckpointError(f"{source.path}: {', '.join(rule.theirs)} have dtypes {found}; choose one with dtype")
        plan[rule.ours] = (shapes[rule.ours], dtype or theirs.pop())
    meta = {
        "config": {"model": config.model_dump(mode="json")},
        "hf": {key: source.config[key] for key in SPECIAL_TOKENS if source.config.get(key) is not None},
    }
    makers = {rule.ours: rule for rule in rules}

    def make(rule: Rule) -> Iterable[tuple[str, torch.Tensor]]:
        yield rule.ours, rule.from_hf(config, [source.read(names[name]) for name in rule.theirs])

    with StreamWriter(out_dir, 0, meta, plan, file_bytes=file_bytes) as writer:
        with _bar(plan, f"{architecture.name} from {source.path.name}", progress) as bar:
            for name, tensor in _converted(writer.order, makers, make, plan):
                writer.write(name, tensor)
                bar.update(tensor.nbytes)
        source.copy_tokenizer(Path(out_dir) / "tokenizer")
        write_text_durably(Path(out_dir) / MODEL_TOML, values_to_toml({"model": config.model_dump(mode="json")}))
    return Path(out_dir) / step_name(0)


def _match_names(
    source: HFFolder, architecture: Architecture, config: ModelConfig, rules: Sequence[Rule]
) -> dict[str, str]:
    """The rules' Hugging Face names to the names in the files, or one error that lists what differs."""
    present = set(source.shapes)
    prefix = architecture.prefix
    bare = not any(name.startswith(prefix) for name in present)
    names: dict[str, str] = {}
    shapes = architecture.shapes(config)
    wrong: list[str] = []
    for rule in rules:
        expected = rule.to_hf(config, torch.empty(shapes[rule.ours], device="meta"))
        for name, part in zip(rule.theirs, expected):
            names[name] = name.removeprefix(prefix) if bare else name
            if names[name] in present and source.shapes[names[name]] != tuple(part.shape):
                wrong.append(f"{name}: {list(source.shapes[names[name]])} instead of {list(part.shape)}")
    missing = [name for name in names.values() if name not in present]
    ignored = [*architecture.ignored, *([r"lm_head\.weight"] if config.tied_embeddings else [])]
    unexpected = [
        name
        for name in sorted(present - set(names.values()))
        if not any(re.fullmatch(f"({re.escape(prefix)})?{pattern}", name) for pattern in ignored)
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape than config.json says": wrong}
    if any(problems.values()):
        lines = [
            f"  {title}: {', '.join(found[:SHOWN])}" + (f" and {len(found) - SHOWN} more" if len(found) > SHOWN else "")
            for title, found in problems.items()
            if found
        ]
        raise CheckpointError("\n".join([f"{source.path} does not hold the {architecture.name} it describes:", *lines]))
    return names


def _converted(
    order: Sequence[str],
    makers: dict[str, Rule],
    make: Callable[[Rule], Iterable[tuple[str, torch.Tensor]]],
    plan: Plan,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in ``order``. A rule makes all its tensors at once; those wait here until their turn."""
    waiting: dict[str, torch.Tensor] = {}
    for name in order:
        if name not in waiting:
            waiting.update(make(makers[name]))
        yield name, waiting.pop(name).to(plan[name][1])


def _file_name(index: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _bar(plan: Plan, title: str, show: bool) -> tqdm:
    return tqdm(total=plan_bytes(plan), desc=title, unit="B", unit_scale=True, disable=not show)


def _new_folder(out_dir: Path, needed: int) -> Path:
    """The empty folder that becomes ``out_dir`` when it is complete."""
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ConfigError(f"{out_dir} exists and is not an empty directory; export to another, or remove it first")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    check_space(out_dir.parent, needed, "the export")
    partial = out_dir.with_name(out_dir.name + INCOMPLETE)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    return partial


def _write_index(folder: Path, files: TensorFiles, plan: Plan) -> None:
    """The index that ``transformers`` wants where there are several files."""
    if len(files.names) > 1:
        index = {
            "metadata": {"total_size": plan_bytes(plan)},
            "weight_map": {name: files.names[file] for name, (file, _) in sorted(files.place.items())},
        }
        write_text_durably(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")


def _write_configs(
    folder: Path,
    architecture: Architecture,
    config: ModelConfig,
    plan: Plan,
    imported: dict[str, Any],
    tokenizer: TokenizerLike | None,
) -> None:
    # Stated even where there is none: the classes' defaults are the ids of tokenizers that this model never saw.
    special: dict[str, Any] = {name: imported.get(name) for name in SPECIAL_TOKENS}
    if tokenizer is not None:
        special.update(bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eod_id, pad_token_id=None)
    dtypes = {dtype for _, dtype in plan.values()}
    widest = max(dtypes, key=lambda dtype: dtype.itemsize)
    value = {
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
        **architecture.to_config(config),
        **special,
        "torch_dtype": str(widest).removeprefix("torch."),
    }
    write_text_durably(folder / "config.json", json.dumps(value, indent=2) + "\n")
    known = {name: token for name, token in special.items() if token is not None}
    write_text_durably(folder / "generation_config.json", json.dumps(known, indent=2) + "\n")
