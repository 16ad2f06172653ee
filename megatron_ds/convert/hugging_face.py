"""Language models to and from folders of ``transformers``, driven by :mod:`megatron_ds.convert.tables`.

What an architecture calls things, and how its layouts differ from ours, is an :class:`Architecture`. Here is what all
of them need: choosing one, and the files that ``transformers`` expects beside the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pydantic
import torch

from megatron_ds.checkpoint.manifest import step_name
from megatron_ds.checkpoint.meta import model_config
from megatron_ds.checkpoint.reader import Checkpoint
from megatron_ds.checkpoint.stream import FILE_BYTES, Plan
from megatron_ds.config import ModelConfig
from megatron_ds.config.transformer import rotary_faults
from megatron_ds.convert import carried_files
from megatron_ds.convert.architecture import Architecture, architecture_of, choose
from megatron_ds.convert.conversion import (
    exported_folder,
    imported_checkpoint,
    plan_export,
    require_no_checkpoint,
    write_converted,
)
from megatron_ds.convert.folder import TRANSFORMERS, HFFolder
from megatron_ds.convert.match import Match
from megatron_ds.convert.settings import KEPT, TOKEN_IDS, Settings
from megatron_ds.convert.tables import ARCHITECTURES
from megatron_ds.data.tokenizer_base import Tokenizer
from megatron_ds.data.tokenizers import load_tokenizer
from megatron_ds.errors import ConfigError, RaisedAs
from megatron_ds.files import write_json
from megatron_ds.models.families import global_shapes

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def export_hf(
    checkpoint: str | Path,
    out_dir: str | Path,
    dtype: torch.dtype | None = None,
    tokenizer: Tokenizer | None = None,
    progress: bool = False,
    warn: Callable[[str], None] | None = None,
    average: bool | None = None,
    file_bytes: int = FILE_BYTES,
) -> Path:
    """Write a checkpoint's model as a folder that ``transformers``' ``from_pretrained`` loads.

    Args:
        checkpoint: a run's checkpoint directory or one step's. Its meta must hold ``config.model``.
        out_dir: made here; must not exist or be empty. It appears only when it is complete.
        dtype: of the exported tensors; None keeps the checkpoint's.
        tokenizer: saved beside the model; its end-of-document token becomes the model's EOS. None: the one that came
            with the model or that the run was told of, if there is one.
        progress: show a progress bar.
        warn: told what a user should know of the result.
        average: the moving average of the weights, or the weights. None: the average where there is one.
        file_bytes: the size of one file at most, unless a single tensor is larger.

    Raises:
        CheckpointError: of the checkpoint; or its tensors are not those of its configuration.
        ConfigError: no architecture can express the model (the field is named), or ``out_dir`` holds something.
    """
    out_dir = Path(out_dir)
    with Checkpoint(checkpoint) as source:
        config = model_config(ModelConfig, source.meta, source.directory)
        original = carried_files.settings(source.directory.parent, carried_files.CONFIG)
        config = _for_its_sequences(config, source.meta, imported=bool(original))
        # A model that came as one class goes out as that class, where another could express it too.
        architecture = choose(
            config, sorted(ARCHITECTURES, key=lambda a: a.name not in (original.get("architectures") or ()))
        )
        rules, shapes = architecture.expanded(config), global_shapes(config)
        plan, make = plan_export(source, source.weights_kind(average), config, rules, shapes, dtype)
        with exported_folder(out_dir, plan, TRANSFORMERS, file_bytes) as (partial, files):
            write_converted(files, plan, make, f"{architecture.name} to {out_dir.name}", progress)
            _write_rest(partial, architecture, config, plan, source.directory.parent, tokenizer, warn)
    return out_dir


def _for_its_sequences(config: ModelConfig, meta: Mapping[str, Any], imported: bool) -> ModelConfig:
    """With ``max_positions`` as an export says it, where positions are no table: the longest sequence trained on.

    Such a model does not read the setting in training, so that one trained from scratch has its default. Rotary scaling
    states the lengths that it is made for, and may be computed from this one.
    """
    length = meta.get("config", {}).get("train", {}).get("sequence_length")
    if config.position == "learned" or config.rope_scaling or not isinstance(length, int):
        return config
    unset = not imported and config.max_positions == ModelConfig.model_fields["max_positions"].default
    return config.model_copy(update={"max_positions": length if unset else max(length, config.max_positions)})


def import_hf(
    hf_dir: str | Path,
    out_dir: str | Path,
    dtype: torch.dtype | None = None,
    vocab_multiple: int | None = None,
    progress: bool = False,
    warn: Callable[[str], None] | None = None,
    file_bytes: int = FILE_BYTES,
) -> Path:
    """Write a folder of ``transformers`` as checkpoint ``step-00000000`` under ``out_dir``.

    Args:
        hf_dir: has config.json and weights; see :mod:`megatron_ds.convert.folder` for which are read.
        out_dir: a checkpoint directory; tokenizer files are copied to ``tokenizer/`` in it and the other files that
            go with the model to ``hf/``, and ``model.toml`` holds the model's settings, as a file for ``--config``.
        dtype: of the checkpoint's tensors; None keeps theirs.
        vocab_multiple: the vocabulary's rows are padded with zeros to a multiple of this; None: the default of
            :class:`ModelConfig`.
        progress, warn, file_bytes: as for :func:`export_hf`.

    Raises:
        ConfigError: the model's architecture or a feature of it is not supported (named).
        CheckpointError: files are missing or damaged, or the tensors are not those of the configuration.
    """
    out_dir = Path(out_dir)
    require_no_checkpoint(out_dir)
    source = HFFolder(Path(hf_dir))
    architecture, config = described(source, vocab_multiple)
    match = Match(source, architecture, config)
    for note in (*source.notes, *match.notes):
        if warn is not None:
            warn(f"{source.path}: {note}")
    title = f"{architecture.name} from {source.path.name}"
    with imported_checkpoint(out_dir, match.config, match, title, dtype, progress, file_bytes):
        stays = carried_files.keep(source, out_dir)
        if stays and warn is not None:
            warn(f"{source.path}: not taken along: {', '.join(stays[:8])}{', ...' * (len(stays) > 8)}")
    return out_dir / step_name(0)


def described(source: HFFolder, vocab_multiple: int | None = None) -> tuple[Architecture, ModelConfig]:
    """What a folder's config.json describes, every setting of it read or known to be harmless."""
    settings = Settings(source.config)
    architecture = architecture_of(settings, ARCHITECTURES)
    fields = architecture.from_config(settings)
    settings.check_all_read(architecture.harmless)
    if vocab_multiple is not None:
        fields["vocab_multiple"] = vocab_multiple
    where = source.path / "config.json"
    with RaisedAs(ConfigError, f"{where} describes a model that is not supported", pydantic.ValidationError):
        config = ModelConfig(**fields)
    if faults := list(rotary_faults(config)):
        raise ConfigError(f"{where} describes what cannot be computed: {'; '.join(faults)}")
    # Written out, so that what was left to a default reads the same as what was given.
    sizes = {"kv_heads": config.num_kv_heads, "head_dim": config.head_size, "ffn_hidden_size": config.ffn_size}
    return architecture, config.model_copy(update=sizes)


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
    if tokenizer is None and not original and (checkpoints / carried_files.TOKENIZER).is_dir():
        tokenizer = load_tokenizer(checkpoints / carried_files.TOKENIZER, fast=False)
    same = tokenizer is not None and carried_files.has_tokenizer(checkpoints, tokenizer.fingerprint)
    carried_files.copy_out(checkpoints, folder, carried_files.REST)
    if tokenizer is not None and not same:
        tokenizer.save_hf(folder)
    elif same or original.get("vocab_size") == config.vocab_size:
        carried_files.copy_out(checkpoints, folder, carried_files.TOKENIZER)
    elif warn is not None:
        sizes = (config.vocab_size, original.get("vocab_size"))
        why = "the vocabulary has {} tokens where the original's has {}: ".format(*sizes) if original else ""
        warn(f"{why}no tokenizer goes with the model; name the one it was trained with (--tokenizer)")
    _write_configs(folder, architecture, config, plan, checkpoints, None if same and original else tokenizer)


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
    same_class = architecture.name in (original.get("architectures") or ())
    travels = KEPT | set(architecture.harmless if same_class else ())
    kept = {key: value for key, value in original.items() if key in travels}
    special: dict[str, Any] = {}
    if tokenizer is not None:
        kept, generation = ({k: v for k, v in old.items() if k not in TOKEN_IDS} for old in (kept, generation))
        special = carried_files.special_tokens(tokenizer)
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
    write_json(folder / carried_files.CONFIG, value)
    if special or not generation:
        known = {**generation, **{name: value.get(name) for name in SPECIAL_TOKENS}}
        known = {name: token for name, token in known.items() if token is not None}
        write_json(folder / carried_files.GENERATION, known)
