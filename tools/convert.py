"""Convert models between this library's checkpoints and folders of transformers or diffusers, one tensor at a time.

python tools/convert.py to-hf runs/first/checkpoints exported/ --tokenizer runs/tokenizer --dtype bfloat16
python tools/convert.py from-hf ~/models/Llama-3.2-1B runs/llama/checkpoints
python tools/convert.py to-diffusers runs/digits/checkpoints exported/ --pipeline
python tools/convert.py from-diffusers exported/transformer runs/dit/checkpoints
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
import tyro

from megatron_ds.convert.dit_folder import export_transformer, import_transformer
from megatron_ds.convert.dit_pipelines import export_pipeline
from megatron_ds.convert.hugging_face import export_hf, import_hf
from megatron_ds.data.cli import run
from megatron_ds.data.latent_encoders import EncoderFolders
from megatron_ds.data.tokenizers import load_tokenizer
from megatron_ds.errors import ConfigError
from megatron_ds.files import read_object

DType = Literal["float32", "bfloat16", "float16"]
Weights = Literal["average", "last"]


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
    was imported or trained with (data.tokenizer)."""
    weights: Weights | None = None
    """The moving average of the weights or those of the last step. Default: the average where there is one."""


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


@dataclass(frozen=True)
class ToDiffusers:
    """Write a checkpoint's diffusion transformer as a folder that `DiTTransformer2DModel` or `DiTPipeline` loads."""

    checkpoint: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="CHECKPOINT")]]
    """A run's checkpoint directory (its latest is meant) or one step's directory."""
    output: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="FOLDER")]]
    """The folder to make; it must not exist or be empty."""
    pipeline: bool = False
    """A whole `DiTPipeline`, or `StableDiffusion3Pipeline` of a model that is told texts: the model, its noise
    schedule, a decoder, and text encoders."""
    vae: Path | None = None
    """With --pipeline: folder of the VAE whose latents the model was trained on; default: it was trained on pixels."""
    text_encoder: tuple[Path, ...] = ()
    """With --pipeline: folders of the text encoders that tools/cache_latents.py was given, in its order."""
    tokenizer: tuple[Path, ...] = ()
    """Of each text encoder, in the same order."""
    weights: Weights | None = None
    """The moving average of the weights or those of the last step. Default: the average where there is one."""


@dataclass(frozen=True)
class FromDiffusers:
    """Write a `DiTTransformer2DModel` as checkpoint step-00000000, to train or to sample from."""

    model: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="FOLDER")]]
    """The folder with config.json and diffusion_pytorch_model.safetensors."""
    output: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="CHECKPOINTS")]]
    """The checkpoint directory; model.toml in it holds the model's settings."""


Command = (
    Annotated[ToHf, tyro.conf.subcommand("to-hf")]
    | Annotated[FromHf, tyro.conf.subcommand("from-hf")]
    | Annotated[ToDiffusers, tyro.conf.subcommand("to-diffusers")]
    | Annotated[FromDiffusers, tyro.conf.subcommand("from-diffusers")]
)


def _average(weights: Weights | None) -> bool | None:
    return None if weights is None else weights == "average"


def main(command: ToHf | FromHf | ToDiffusers | FromDiffusers) -> None:
    if isinstance(command, ToDiffusers):
        parts = {"vae": command.vae, "text-encoder": command.text_encoder, "tokenizer": command.tokenizer}
        if not command.pipeline and (given := [name for name, value in parts.items() if value]):
            raise ConfigError(f"--{given[0]} does nothing: it is no part of the transformer alone; add --pipeline")
        if command.pipeline:
            beside = EncoderFolders(command.vae, command.text_encoder, command.tokenizer)
            folder = export_pipeline(command.checkpoint, command.output, beside, _average(command.weights))
            print("\n".join([str(folder), *remarks(folder)]))
        else:
            print(export_transformer(command.checkpoint, command.output, _average(command.weights)))
        return
    if isinstance(command, FromDiffusers):
        print(import_transformer(command.model, command.output))
        return
    dtype = None if command.dtype is None else getattr(torch, command.dtype)
    if isinstance(command, ToHf):
        tokenizer = None if command.tokenizer is None else load_tokenizer(command.tokenizer)
        average = _average(command.weights)
        written = export_hf(command.checkpoint, command.output, dtype, tokenizer, True, print, average)
    else:
        written = import_hf(command.model, command.output, dtype, command.vocab_multiple, progress=True, warn=print)
    print(written)


def remarks(folder: Path) -> list[str]:
    """What a pipeline of diffusers does in another way than tools/sample_images.py."""
    scheduler = read_object(folder / "scheduler" / "scheduler_config.json", ConfigError)
    if scheduler["_class_name"] != "DDIMScheduler":
        return []
    times = scheduler["num_train_timesteps"]
    return [
        f"draw with a num_inference_steps that divides {times}: of others, a step of diffusers' DDIM goes back by "
        f"{times} // num_inference_steps, less than to the next time: noise stays. tools/sample_images.py takes any"
    ]


if __name__ == "__main__":
    run(main, cast(Any, Command), __doc__)
