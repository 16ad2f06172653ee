"""``deepspeed.utils.zero_to_fp32``: the whole fp32 weights of a checkpoint, of DeepSpeed's own or of this library's."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub
import safetensors.torch
import torch
from torch import Tensor, nn

from megatron_ds import checkpoint
from megatron_ds.errors import CheckpointError, ConfigError, RaisedAs
from megatron_ds.files import read_bytes, replacing, sync_directory, write_text_durably
from megatron_ds.integrations.deepspeed.their_checkpoint import is_theirs, read_weights

Model = TypeVar("Model", bound=nn.Module)
_WEIGHTS = re.compile(r"(pytorch_)?model(-\d+-of-\d+)?\.(bin|safetensors)(\.index\.json)?")

DTYPES: Mapping[str, torch.dtype] = {
    **dict.fromkeys(("fp32", "float32", "torch.float32"), torch.float32),
    **dict.fromkeys(("fp16", "float16", "torch.float16"), torch.float16),
    **dict.fromkeys(("bf16", "bfloat16", "torch.bfloat16"), torch.bfloat16),
}


def get_fp32_state_dict_from_zero_checkpoint(
    checkpoint_dir: str | Path,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
    lazy_mode: bool = False,
) -> dict[str, Tensor]:
    """Every parameter and persistent buffer, floating-point ones in fp32, for ``model.load_state_dict()``.

    Args:
        checkpoint_dir: the directory that ``save_checkpoint`` was given.
        tag: of the checkpoint; default: the one that the file ``latest`` names.
        lazy_mode: makes no difference: DeepSpeed's own files are mapped, not read, until they are used.

    Raises:
        CheckpointError: there is none, it is damaged or incomplete.
    """
    folder = _folder(Path(checkpoint_dir), tag)
    if is_theirs(folder):
        return read_weights(folder, exclude_frozen_parameters)
    return _ours(folder, exclude_frozen_parameters)


def _folder(directory: Path, tag: str | None) -> Path:
    if tag is None:
        path = directory / "latest"
        if not path.is_file():
            raise CheckpointError(f"{directory} has no file `latest`, which names the newest checkpoint; give its tag")
        words = read_bytes(path, 4096).decode(errors="replace").split()
        tag = words[0] if words else ""  # behind the name of one of this library's stands its checksum
    folder = directory / str(tag)
    if not tag or not folder.is_dir():
        raise CheckpointError(f"{directory} has no checkpoint {str(tag)!r}; give another tag")
    return folder


def _ours(folder: Path, exclude_frozen: bool) -> dict[str, Tensor]:
    with checkpoint.Checkpoint(folder) as source:
        own = source.meta.get("client_state", {})
        frozen = set(own.get("frozen", ())) if exclude_frozen else set()
        found = {
            name: source.read(name, kind)
            for kind in ("param", "buffer")
            for name in (source.names(kind) if kind in source.kinds() else ())
            if name not in frozen
        }
    whole = {name: value.float() if value.is_floating_point() else value for name, value in found.items()}
    aliases: Mapping[str, str] = own.get("aliases", {})
    return whole | {alias: whole[name] for alias, name in aliases.items() if name in whole}


def load_state_dict_from_zero_checkpoint(model: Model, checkpoint_dir: str | Path, tag: str | None = None) -> Model:
    """Puts the fp32 weights into ``model``, which is on the CPU afterwards; names that it has not are left out."""
    model = model.cpu()
    model.load_state_dict(get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag), strict=False)
    return model


def convert_zero_checkpoint_to_state_dict(
    checkpoint_dir: str | Path,
    output_dir: str | Path,
    dtype: torch.dtype | str = torch.float32,
    max_shard_size: int | str | None = "5GB",
    safe_serialization: bool = False,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
) -> None:
    """Writes the weights to ``output_dir``, as ``from_pretrained`` reads them.

    Args:
        dtype: of the floating-point tensors: ``fp32``, ``fp16`` or ``bf16``.
        max_shard_size: of a file; several have an index beside them. None: one file.
        safe_serialization: ``model.safetensors`` instead of ``pytorch_model.bin``.

    Raises:
        CheckpointError: there is none, it is damaged or incomplete.
        ConfigError: an argument that means nothing, or weights in ``output_dir`` that might be read instead of these.
    """
    wanted = DTYPES.get(str(dtype).lower())
    if wanted is None:
        raise ConfigError(f"dtype={dtype!r} is unknown; use fp32, fp16 or bf16")
    weights = get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag, exclude_frozen_parameters)
    weights = {name: value.to(wanted) if value.is_floating_point() else value for name, value in weights.items()}
    name = "model.safetensors" if safe_serialization else "pytorch_model.bin"
    stem, _, ending = name.rpartition(".")
    largest = max_shard_size if max_shard_size is not None else sum(value.nbytes for value in weights.values()) + 1
    with RaisedAs(ConfigError, f"max_shard_size={max_shard_size!r}", ValueError):
        split = huggingface_hub.split_torch_state_dict_into_shards(
            weights, filename_pattern=f"{stem}{{suffix}}.{ending}", max_shard_size=largest
        )
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    _require_no_others(folder, {*split.filename_to_tensors, f"{name}.index.json"})
    for file, names in split.filename_to_tensors.items():
        _write(folder / file, {name: weights[name] for name in names}, safe_serialization)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        with replacing(folder / f"{name}.index.json") as temporary:
            write_text_durably(temporary, json.dumps(index, indent=2, sort_keys=True) + "\n")
    sync_directory(folder)


def _require_no_others(folder: Path, written: Set[str]) -> None:
    there = (path.name for path in sorted(folder.iterdir()) if _WEIGHTS.fullmatch(path.name))
    if other := next((name for name in there if name not in written), None):
        raise ConfigError(
            f"{folder} holds {other}, of other weights, which from_pretrained might read instead of these: remove it, "
            "or give another folder"
        )


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: str | Path, output_dir: str | Path, *arguments: Any, **keywords: Any
) -> None:
    """:func:`convert_zero_checkpoint_to_state_dict` with ``dtype`` fp32, which is left out."""
    convert_zero_checkpoint_to_state_dict(checkpoint_dir, output_dir, torch.float32, *arguments, **keywords)


def _write(path: Path, weights: dict[str, Tensor], safe: bool) -> None:
    with replacing(path) as temporary:
        if not safe:
            torch.save({name: value.clone() for name, value in weights.items()}, temporary)
            return
        # A view of a larger tensor would be written whole, and two names of one parameter are refused.
        whole = {name: value.clone(memory_format=torch.contiguous_format) for name, value in weights.items()}
        safetensors.torch.save_file(whole, temporary, metadata={"format": "pt"})
