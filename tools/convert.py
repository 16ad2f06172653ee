"""Convert models between this library's checkpoints and Hugging Face folders, one tensor at a time.

python tools/convert.py to-hf runs/first/checkpoints exported/ --tokenizer runs/tokenizer --dtype bfloat16
python tools/convert.py from-hf ~/models/Llama-3.2-1B runs/llama/checkpoints
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
import tyro

from megatron_ds.convert.tables import export_hf, import_hf
from megatron_ds.data.cli import run
from megatron_ds.data.tokenizers import load_tokenizer

DType = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class ToHf:
    """Write a checkpoint's model as a folder that `transformers` loads."""

    checkpoint: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="CHECKPOINT")]]
    """A run's checkpoint directory (its latest is meant) or one step's directory."""
    output: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="FOLDER")]]
    """The folder to make; it must not exist or be empty."""
    dtype: DType | None = None
    """Of the exported weights; default: as saved."""
    tokenizer: str | None = None
    """A folder or tokenizer.json, a SentencePiece .model, or 'bytes', to go with the model; default: the one it
    was imported with."""


@dataclass(frozen=True)
class FromHf:
    """Write a Hugging Face model as checkpoint step-00000000, to train or to evaluate from."""

    model: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="FOLDER")]]
    """The folder with config.json and the weights: .safetensors files, or pytorch_model.bin."""
    output: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="CHECKPOINTS")]]
    """The checkpoint directory; tokenizer/, hf/ and model.toml hold what else belongs to the model."""
    dtype: DType | None = None
    """Of the checkpoint's weights; default: as in the model."""
    vocab_multiple: int | None = None
    """Pad the vocabulary's rows with zeros to a multiple of this; tensor parallelism must divide it. Default: 128."""


Command = Annotated[ToHf, tyro.conf.subcommand("to-hf")] | Annotated[FromHf, tyro.conf.subcommand("from-hf")]


def main(command: ToHf | FromHf) -> None:
    dtype = None if command.dtype is None else getattr(torch, command.dtype)
    if isinstance(command, ToHf):
        tokenizer = None if command.tokenizer is None else load_tokenizer(command.tokenizer)
        written = export_hf(command.checkpoint, command.output, dtype, tokenizer, progress=True, say=print)
    else:
        written = import_hf(command.model, command.output, dtype, command.vocab_multiple, progress=True, say=print)
    print(written)


if __name__ == "__main__":
    run(main, cast(Any, Command), __doc__)
