"""The files of a ``transformers`` folder that are no weights: they go with the model, through training, back out.

Beside the checkpoints that came from a folder lie ``tokenizer/``, the files that make the tokenizer, and ``hf/``, the
rest: configuration, generation settings, licence, model card. A run that starts from such a checkpoint takes both
along, and an export writes what has not changed as it was. A run that names a tokenizer keeps that one.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_ds.convert.folder import HFFolder
from megatron_ds.convert.settings import TOKEN_IDS
from megatron_ds.data.chat import ChatTemplate, template_of_dataset
from megatron_ds.data.dataset_files import read_manifest
from megatron_ds.data.tokenizer_base import Tokenizer
from megatron_ds.data.tokenizers import load_tokenizer
from megatron_ds.errors import CheckpointError, DataError, RaisedAs
from megatron_ds.files import read_bytes, read_object, write_json

TOKENIZER, REST = "tokenizer", "hf"
CONFIG, GENERATION = "config.json", "generation_config.json"

# What belongs to a tokenizer, and the kinds of all that travels: texts, settings, pictures. Weights and code do not.
_TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.jinja",
    "chat_template.*", "*.model", "*.tiktoken", "*.spm",
)  # fmt: skip
_KINDS = (
    "", ".json", ".jsonl", ".yaml", ".yml", ".toml", ".xml", ".txt", ".md", ".rst", ".html", ".pdf", ".csv", ".tsv",
    ".bib", ".cff", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".jinja", ".model", ".tiktoken", ".spm", ".vocab",
)  # fmt: skip
_CONVERTED = (".safetensors", ".bin", ".index.json")
_TEMPLATES = "additional_chat_templates"


def keep(source: HFFolder, out_dir: Path) -> list[str]:
    """Copy what travels from a folder to beside its checkpoint.

    Returns:
        The names of what stays behind, besides the weights: code, folders, formats of others.

    Raises:
        CheckpointError: a file of it cannot be read, or is a link out of the folder.
    """
    stays = []
    for path, name in _files(source.path):
        if _travels(path):
            _copy(source.inside(name), out_dir / (TOKENIZER if _is_tokenizers(name) else REST) / name)
        elif name != _TEMPLATES and not name.endswith(_CONVERTED):
            stays.append(name + "/" * path.is_dir())
    return stays


def copy_all(source: HFFolder, out_dir: Path) -> None:
    """Copy what travels from a folder to another, but for config.json.

    Raises:
        CheckpointError: a file of it cannot be read, or is a link out of the folder.
    """
    for path, name in _files(source.path):
        if _travels(path) and name != CONFIG:
            _copy(source.inside(name), out_dir / name)


def _files(source: Path) -> Iterator[tuple[Path, str]]:
    """What lies in a folder and in the one of chat templates in it, with its name inside."""
    for folder in (source, source / _TEMPLATES):
        for path in sorted(folder.glob("[!.]*")):
            yield path, str(path.relative_to(source))


def take_along(checkpoints: Path, out_dir: Path) -> None:
    """Copy what lies beside a run's checkpoints to beside another's, which starts from them.

    Raises:
        CheckpointError: it cannot be read, or not be written.
    """
    for kept in (TOKENIZER, REST):
        if not (out_dir / kept).exists():
            copy_out(checkpoints, out_dir / kept, kept)


def keep_texts_files(
    spec: str | None, prefixes: Sequence[str], conversations: bool, checkpoints: Path, vocab_size: int
) -> None:
    """Keep the tokenizer of a run on text beside its checkpoints, and the template of its conversations.

    Args:
        spec: the tokenizer that the run names. Default: the one that came with the model, else what made the data.
        prefixes: of its datasets.
        vocab_size: of the model that is trained.

    Raises:
        CheckpointError, DataError: they cannot be read, or not be written.
    """
    tokenizer = None
    if spec is not None:
        tokenizer = load_tokenizer(spec, fast=False)
    elif prefixes and not (checkpoints / TOKENIZER).is_dir():
        spec, tokenizer = _tokenizer_of(prefixes[0])
    if spec is not None and tokenizer is not None:
        keep_tokenizer(spec, tokenizer, checkpoints, vocab_size)
    if conversations and prefixes and (checkpoints / TOKENIZER).is_dir():
        tokenizer = tokenizer or load_tokenizer(checkpoints / TOKENIZER, fast=False)
        if template := template_of_dataset(prefixes[0], tokenizer.special):
            keep_template(template, checkpoints)


def keep_tokenizer(spec: str, tokenizer: Tokenizer, checkpoints: Path, vocab_size: int) -> None:
    """Keep the tokenizer that a run is trained with beside its checkpoints, so that exports and servers find it.

    It replaces one that came with the model, also as the source of the ids that begin and end a text.

    Args:
        spec: where the tokenizer was loaded from.
        vocab_size: of the model that is trained.

    Raises:
        CheckpointError: its files cannot be read, or not be written.
    """
    target = checkpoints / TOKENIZER
    inside = Path(spec).absolute().is_relative_to(target.absolute())
    if inside or has_tokenizer(checkpoints, tokenizer.fingerprint):
        return
    with RaisedAs(CheckpointError, f"{target} cannot be written", OSError):
        shutil.rmtree(target, ignore_errors=True)
        if Path(spec).is_dir():
            for path, name in _files(Path(spec)):
                if _travels(path) and _is_tokenizers(name):
                    _copy(path, target / name)
        else:
            tokenizer.save_hf(target)
        for name in (CONFIG, GENERATION):
            if carried := settings(checkpoints, name):
                kept = {key: value for key, value in carried.items() if key not in TOKEN_IDS}
                sizes = {"vocab_size": vocab_size} if name == CONFIG else {}
                write_json(checkpoints / REST / name, {**kept, **sizes, **special_tokens(tokenizer)})


def _tokenizer_of(prefix: str) -> tuple[str, Tokenizer] | tuple[None, None]:
    """The tokenizer that made a dataset, and where it is; None where that is not known, or another one is there now."""
    if made_with := (read_manifest(prefix) or {}).get("tokenizer"):
        with contextlib.suppress(DataError):
            tokenizer = load_tokenizer(made_with["spec"], fast=False)
            if tokenizer.fingerprint == made_with["xxh3"]:
                return str(made_with["spec"]), tokenizer
    return None, None


def keep_template(template: ChatTemplate, checkpoints: Path) -> None:
    """Put the template that conversations were written by beside the tokenizer, in place of the tokenizer's own.

    Raises:
        CheckpointError: it cannot be written.
    """
    folder = checkpoints / TOKENIZER
    if folder.is_dir():
        with RaisedAs(CheckpointError, f"{folder} cannot be written", OSError):
            shutil.rmtree(folder / _TEMPLATES, ignore_errors=True)
            (folder / "chat_template.jinja").write_text(template.source, encoding="utf-8")


def special_tokens(tokenizer: Tokenizer) -> dict[str, int | None]:
    """The ids that a model's configuration has of its tokenizer."""
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eod_id, "pad_token_id": None}


def copy_out(checkpoints: Path, folder: Path, kept: str) -> None:
    """Copy one of the two into a folder. It came with a checkpoint, from wherever that came: no link is followed.

    Raises:
        CheckpointError: a file of it cannot be read, or not be written.
    """
    for path in sorted((checkpoints / kept).rglob("*")):
        if path.is_symlink():
            raise CheckpointError(f"{path} is a link, and nothing outside {checkpoints / kept} is read; remove it")
        if not path.is_dir():
            _copy(path, folder / path.relative_to(checkpoints / kept))


def _copy(path: Path, target: Path) -> None:
    """Copy a regular file of bounded size: these are texts and settings."""
    with RaisedAs(CheckpointError, f"{path} cannot be copied to {target}", OSError):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(read_bytes(path))


def settings(checkpoints: Path, name: str) -> dict[str, Any]:
    """A JSON file of the folder that the checkpoints came from; empty where there is none."""
    path = checkpoints / REST / name
    return read_object(path, CheckpointError) if path.exists() else {}


def has_tokenizer(checkpoints: Path, fingerprint: str) -> bool:
    """Whether the tokenizer beside the checkpoints, with what its settings add, is the one with this fingerprint."""
    with contextlib.suppress(DataError):
        return load_tokenizer(checkpoints / TOKENIZER, fast=False).fingerprint == fingerprint
    return False  # there is none, or none that can be read


def _travels(path: Path) -> bool:
    return path.suffix in _KINDS and not path.is_dir() and not path.name.endswith(".index.json")


def _is_tokenizers(name: str) -> bool:
    return any(Path(name).match(pattern) for pattern in _TOKENIZER_FILES)
