"""Conversion to and from Hugging Face, driven by tables: checkpoint to checkpoint, one tensor at a time.

What an architecture calls things, and how its layouts differ from ours, is an :class:`Architecture`, which the
caller passes in (``megatron_ds.convert.tables`` has them for the decoder). Here is what all of them need: choosing
one, planning, streaming, the files that ``transformers`` expects. A rule's two transforms are exact inverses, so
import followed by export gives back every bit.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pydantic
import torch
from tqdm import tqdm

from megatron_ds.checkpoint.load import compare
from megatron_ds.checkpoint.manifest import INCOMPLETE, step_name
from megatron_ds.checkpoint.meta import model_config
from megatron_ds.checkpoint.reader import Checkpoint
from megatron_ds.checkpoint.save import check_space
from megatron_ds.checkpoint.stream import FILE_BYTES, Plan, StreamWriter, TensorFiles, plan_bytes
from megatron_ds.config import ModelConfig
from megatron_ds.config.read import values_to_toml
from megatron_ds.convert import carried_files
from megatron_ds.convert.architecture import Architecture, Rule, architecture_of, choose
from megatron_ds.convert.folder import HFFolder, file_name, write_index
from megatron_ds.convert.match import Match
from megatron_ds.convert.settings import KEPT, Settings
from megatron_ds.data.tokenizer_base import Tokenizer
from megatron_ds.errors import CheckpointError, ConfigError
from megatron_ds.files import sync_directory, write_text_durably
from megatron_ds.shard.flat_shards import FlatShard

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
MODEL_TOML = "model.toml"
_STEM = "model"


def export_hf(
    checkpoint: str | Path,
    out_dir: str | Path,
    architectures: Sequence[Architecture],
    dtype: torch.dtype | None = None,
    tokenizer: Tokenizer | None = None,
    progress: bool = False,
    file_bytes: int = FILE_BYTES,
    warn: Callable[[str], None] | None = None,
    average: bool | None = None,
) -> Path:
    """Write a checkpoint's model as a folder that ``transformers``' ``from_pretrained`` loads.

    Args:
        checkpoint: a run's checkpoint directory or one step's. Its meta must hold ``config.model``.
        out_dir: made here; must not exist or be empty. It appears only when it is complete.
        architectures: those to choose from.
        dtype: of the exported tensors; None keeps the checkpoint's.
        tokenizer: saved beside the model; its end-of-document token becomes the model's EOS. None: the one that came
            with the model, if it did.
        progress: show a progress bar.
        file_bytes: the size of one file at most, unless a single tensor is larger.
        warn: told what a user should know of the result.
        average: the moving average of the weights, or the weights. None: the average where there is one.

    Raises:
        CheckpointError: of the checkpoint; or its tensors are not those of its configuration.
        ConfigError: no architecture can express the model (the field is named), or ``out_dir`` holds something.
    """
    out_dir = Path(out_dir)
    with Checkpoint(checkpoint) as source:
        config = model_config(ModelConfig, source.meta, source.directory)
        original = carried_files.settings(source.directory.parent, carried_files.CONFIG)
        # A model that came as one class goes out as that class, where another could express it too.
        architecture = choose(
            config, sorted(architectures, key=lambda a: a.name not in original.get("architectures", ()))
        )
        kind, shapes = source.weights_kind(average), architecture.shapes(config)
        whole = [FlatShard.whole(name, kind, torch.empty(shape, device="meta")) for name, shape in shapes.items()]
        compare(source.manifest, source.directory, whole)
        plan, makers = _plan_export(source, architecture, config, shapes, dtype, kind)

        def make(rule: Rule) -> Iterable[tuple[str, torch.Tensor]]:
            return zip(rule.theirs, rule.to_hf(config, source.read(rule.ours, kind)))

        with exported_folder(out_dir, plan, _STEM, file_bytes) as (partial, files):
            with _bar(plan, f"{architecture.name} to {out_dir.name}", progress) as bar:
                for name, tensor in _converted(files.order, makers, make, plan):
                    files.write(name, tensor)
                    bar.update(tensor.nbytes)
            _write_rest(partial, architecture, config, plan, source.directory.parent, tokenizer, warn)
    return out_dir


def _plan_export(
    source: Checkpoint,
    architecture: Architecture,
    config: ModelConfig,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype | None,
    kind: str,
) -> tuple[dict[str, tuple[tuple[int, ...], torch.dtype]], dict[str, Rule]]:
    """By exported name: shape and dtype, and the rule that makes the tensor."""
    plan: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    makers: dict[str, Rule] = {}
    for rule in architecture.expanded(config):
        kept = dtype or source.dtype(rule.ours, kind)
        parts = rule.to_hf(config, torch.empty(shapes[rule.ours], device="meta"))
        for name, part in zip(rule.theirs, parts):
            plan[name] = (tuple(part.shape), kept)
            makers[name] = rule
    return plan, makers


def import_hf(
    hf_dir: str | Path,
    out_dir: str | Path,
    architectures: Sequence[Architecture],
    dtype: torch.dtype | None = None,
    vocab_multiple: int | None = None,
    progress: bool = False,
    file_bytes: int = FILE_BYTES,
    warn: Callable[[str], None] | None = None,
) -> Path:
    """Write a folder of ``transformers`` as checkpoint ``step-00000000`` under ``out_dir``.

    Args:
        hf_dir: has config.json and weights; see :mod:`megatron_ds.convert.folder` for which are read.
        out_dir: a checkpoint directory; tokenizer files are copied to ``tokenizer/`` in it and the other files that
            go with the model to ``hf/``, and ``model.toml`` holds the model's settings, as a file for ``--config``.
        architectures: those to choose from, by config.json's ``architectures`` or ``model_type``.
        dtype: of the checkpoint's tensors; None keeps theirs.
        vocab_multiple: the vocabulary's rows are padded with zeros to a multiple of this; None: the default of
            :class:`ModelConfig`.
        progress, file_bytes, warn: as for :func:`export_hf`.

    Raises:
        ConfigError: the model's architecture or a feature of it is not supported (named).
        CheckpointError: files are missing or damaged, or the tensors are not those of the configuration.
    """
    out_dir = Path(out_dir)
    if (out_dir / step_name(0)).exists():
        raise CheckpointError(
            f"{out_dir / step_name(0)} exists already; import into another folder, or remove it first"
        )
    source = HFFolder(Path(hf_dir))
    architecture, config = described(source, architectures, vocab_multiple)
    match = Match(source, architecture, config)
    config, shapes = match.config, architecture.shapes(match.config)
    for note in (*source.notes, *match.notes):
        if warn is not None:
            warn(f"{source.path}: {note}")
    plan = {rule.ours: (shapes[rule.ours], dtype or _dtype_of(source, match, rule)) for rule in match.rules}
    meta = {"config": {"model": config.model_dump(mode="json")}}
    makers = {rule.ours: rule for rule in match.rules}

    def make(rule: Rule) -> Iterable[tuple[str, torch.Tensor]]:
        yield rule.ours, rule.from_hf(config, match.read(rule))

    with StreamWriter(out_dir, 0, meta, plan, file_bytes=file_bytes) as writer:
        with _bar(plan, f"{architecture.name} from {source.path.name}", progress) as bar:
            for name, tensor in _converted(writer.order, makers, make, plan):
                writer.write(name, tensor)
                bar.update(tensor.nbytes)
        stays = carried_files.keep(source, out_dir)
        if stays and warn is not None:
            warn(f"{source.path}: not taken along: {', '.join(stays[:8])}{', ...' * (len(stays) > 8)}")
        write_text_durably(out_dir / MODEL_TOML, values_to_toml(meta["config"]))
    return out_dir / step_name(0)


def _dtype_of(source: HFFolder, match: Match, rule: Rule) -> torch.dtype:
    """The one dtype of the tensors that a rule reads; a :class:`CheckpointError` where they have several."""
    dtypes = {source.dtypes[match.names[name]] for name in rule.theirs}
    if len(dtypes) > 1:
        found = ", ".join(sorted(map(str, dtypes)))
        raise CheckpointError(f"{source.path}: {', '.join(rule.theirs)} have dtypes {found}; choose one with --dtype")
    return dtypes.pop()


def described(
    source: HFFolder, architectures: Sequence[Architecture], vocab_multiple: int | None
) -> tuple[Architecture, ModelConfig]:
    """What a folder's config.json describes, every setting of it read or known to be harmless."""
    settings = Settings(source.config)
    architecture = architecture_of(settings, architectures)
    fields = architecture.from_config(settings)
    settings.check_all_read(architecture.harmless)
    if vocab_multiple is not None:
        fields["vocab_multiple"] = vocab_multiple
    try:
        config = ModelConfig(**fields)
    except pydantic.ValidationError as error:
        raise ConfigError(f"{source.path / 'config.json'} describes a model that is not supported: {error}") from error
    # Written out, so that what was left to a default reads the same as what was given.
    sizes = {"kv_heads": config.num_kv_heads, "head_dim": config.head_size, "ffn_hidden_size": config.ffn_size}
    return architecture, config.model_copy(update=sizes)


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


def _bar(plan: Plan, title: str, show: bool) -> tqdm:
    return tqdm(total=plan_bytes(plan), desc=title, unit="B", unit_scale=True, disable=not show)


@contextmanager
def exported_folder(
    out_dir: Path, plan: Plan, stem: str, file_bytes: int = FILE_BYTES
) -> Iterator[tuple[Path, TensorFiles]]:
    """The folder that becomes ``out_dir`` when it is complete, and the safetensors files of its weights.

    Inside, everything in ``plan`` is written in the files' order, and what else belongs to the folder. On leaving comes
    the index, and the folder gets its name; by an exception it is removed.

    Args:
        stem: of the files' names: ``model`` in transformers' folders.

    Raises:
        ConfigError: ``out_dir`` holds something.
    """
    partial = new_folder(out_dir, plan_bytes(plan))
    files = TensorFiles(partial, plan, functools.partial(file_name, stem), file_bytes=file_bytes)
    try:
        yield partial, files
        files.finish()
        write_index(partial, stem, files, plan)
        publish_folder(partial, out_dir)
    except BaseException:
        files.abort()
        shutil.rmtree(partial, ignore_errors=True)
        raise


def new_folder(out_dir: Path, needed: int) -> Path:
    """The empty folder that becomes ``out_dir`` when it is complete."""
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ConfigError(f"{out_dir} exists and is not an empty directory; export to another, or remove it first")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    check_space(out_dir.parent, needed, "the export")
    partial = out_dir.with_name(out_dir.name + INCOMPLETE)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    return partial


def publish_folder(partial: Path, out_dir: Path) -> None:
    """Give a complete folder its name."""
    sync_directory(partial)
    if out_dir.exists():
        out_dir.rmdir()
    partial.rename(out_dir)
    sync_directory(out_dir.parent)


def _write_rest(
    folder: Path,
    architecture: Architecture,
    config: ModelConfig,
    plan: Plan,
    checkpoints: Path,
    tokenizer: Tokenizer | None,
    warn: Callable[[str], None] | None,
) -> None:
    """Everything but the weights: what came with the model and has not changed, as it was."""
    original = carried_files.settings(checkpoints, carried_files.CONFIG)
    same = tokenizer is not None and carried_files.has_tokenizer(checkpoints, tokenizer.fingerprint)
    carried_files.copy_out(checkpoints, folder, carried_files.REST)
    if tokenizer is not None and not same:
        tokenizer.save_hf(folder)
    elif same or original.get("vocab_size") == config.vocab_size:
        carried_files.copy_out(checkpoints, folder, carried_files.TOKENIZER)
    elif original and warn is not None:
        warn(
            f"the vocabulary has {config.vocab_size} tokens where the original's has {original.get('vocab_size')}: no "
            "tokenizer goes with the model; name the one it was trained with (--tokenizer)"
        )
    _write_configs(folder, architecture, config, plan, checkpoints, None if same else tokenizer)


def _write_configs(
    folder: Path,
    architecture: Architecture,
    config: ModelConfig,
    plan: Plan,
    checkpoints: Path,
    tokenizer: Tokenizer | None,
) -> None:
    """config.json and generation_config.json: what the original said of generation, and ours of the model.

    Args:
        tokenizer: another one than the original's; its tokens end and begin a text from now on.
    """
    original = carried_files.settings(checkpoints, carried_files.CONFIG)
    generation = carried_files.settings(checkpoints, carried_files.GENERATION)
    same_class = architecture.name in original.get("architectures", ())
    travels = KEPT | set(architecture.harmless if same_class else ())
    kept = {key: value for key, value in original.items() if key in travels}
    special: dict[str, Any] = {}
    if tokenizer is not None:
        special = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eod_id, "pad_token_id": None}
    elif not original:
        # Stated: the classes' defaults are the ids of tokenizers that this model never saw.
        special = dict.fromkeys(SPECIAL_TOKENS)
    widest = max((dtype for _, dtype in plan.values()), key=lambda dtype: dtype.itemsize)
    value = {
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
        **kept,
        **special,
        **architecture.to_config(config),
        "torch_dtype": str(widest).removeprefix("torch."),
    }
    write_text_durably(folder / carried_files.CONFIG, json.dumps(value, indent=2) + "\n")
    if special or not generation:
        known = {**generation, **{name: value.get(name) for name in SPECIAL_TOKENS}}
        known = {name: token for name, token in known.items() if token is not None}
        write_text_durably(folder / carried_files.GENERATION, json.dumps(known, indent=2) + "\n")
