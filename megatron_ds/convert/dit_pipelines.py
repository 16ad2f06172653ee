"""Folders from which pipelines of `diffusers` sample: a model, its noise schedule, and the encoders of its latents.

``DiTPipeline`` is told classes, ``StableDiffusion3Pipeline`` texts. What a pipeline would compute in another way than
the model was trained for is refused.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_ds.checkpoint.meta import model_config
from megatron_ds.checkpoint.reader import Checkpoint
from megatron_ds.config.diffusion import DiTConfig, ObjectiveConfig
from megatron_ds.config.read import from_dict
from megatron_ds.convert.conversion import new_folder
from megatron_ds.convert.dit_folder import export_transformer
from megatron_ds.convert.dit_tables import table_of
from megatron_ds.data.latent_encoders import EncoderFolders, VaeConfig, check_decoder, check_text_encoders, latents_of
from megatron_ds.errors import ConfigError
from megatron_ds.files import read_object, write_json
from megatron_ds.models.objectives import shift_of
from megatron_ds.models.samplers import make_scheduler

NO_CLASS = 1000  # the label that DiTPipeline takes for guidance, whatever the model
SD3_ENCODERS = ("CLIPTextModelWithProjection", "CLIPTextModelWithProjection", "T5EncoderModel")
_OTHER_FORMATS = shutil.ignore_patterns("*.bin", "*.ckpt", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx", "*.py")


def export_pipeline(
    checkpoint: str | Path, folder: str | Path, parts: EncoderFolders | None = None, average: bool | None = None
) -> Path:
    """Write a checkpoint's model and what goes with it as a folder that a pipeline of `diffusers` samples from.

    Args:
        parts: what the model was trained beside, as the latent cache was made with it; no VAE: it was on pixels.

    Raises:
        ConfigError: the pipeline would compute something else than the model was trained for.
        DataError: the parts are not those that the model was trained with.
    """
    folder, parts = Path(folder), parts or EncoderFolders()
    with Checkpoint(checkpoint) as source:
        config = model_config(DiTConfig, source.meta, source.directory)
        objective = from_dict(ObjectiveConfig, source.meta["config"].get("objective", {}), str(source.directory))
        check_decoder(source.meta, parts.vae, source.directory)
        _check_pipeline(config, objective, source, parts)
    with new_folder(folder, 0) as unfinished:
        export_transformer(checkpoint, unfinished / "transformer", average)
        name, shift = ("flow", shift_of(objective, config.patches)) if objective.is_flow else ("ddim", 1.0)
        make_scheduler(objective, name, shift).save_pretrained(unfinished / "scheduler")
        entries = {"transformer": ["diffusers", table_of(config).name], **_write_vae(unfinished, config, parts.vae)}
        if config.has_text:
            entries |= _write_text_encoders(unfinished, parts)
        _write_index(unfinished, config.has_text, entries)
    return folder


def _check_pipeline(config: DiTConfig, objective: ObjectiveConfig, source: Checkpoint, parts: EncoderFolders) -> None:
    where = source.directory
    if config.has_text != objective.is_flow:
        told, name = ("texts", "StableDiffusion3Pipeline") if config.has_text else ("classes", "DiTPipeline")
        raise ConfigError(
            f"{where} is told {told}, and {name} knows {'no' if objective.is_flow else 'no other than the'} scheduler "
            "of rectified flow; export the transformer alone, or sample with tools/sample_images.py"
        )
    if config.has_text:
        _check_sd3_texts(check_text_encoders(source.meta, parts, where), where)
        return
    if parts.text or parts.tokenizers:
        raise ConfigError(f"{where} is told classes: --text-encoder and --tokenizer do nothing; leave them out")
    if config.num_classes != NO_CLASS:
        raise ConfigError(
            f"DiTPipeline takes class {NO_CLASS} for 'no class', and this model has model.num_classes="
            f"{config.num_classes}; train it with model.num_classes={NO_CLASS}, or export the transformer alone"
        )
    if (trained := latents_of(source.meta)) is not None and trained["shift"]:
        raise ConfigError(
            f"{where}: latents are shifted by {trained['shift']}, which DiTPipeline does not undo; export the "
            "transformer alone, or sample with tools/sample_images.py"
        )


def _check_sd3_texts(texts: Mapping[str, Any], where: Path) -> None:
    classes = tuple(encoder["class"] for encoder in texts["encoders"])
    if classes != SD3_ENCODERS or texts["states"] != "penultimate":
        raise ConfigError(
            f"{where} was trained on {texts['states']} states of {', '.join(classes)}, and StableDiffusion3Pipeline "
            f"takes penultimate ones of {', '.join(SD3_ENCODERS)}; export the transformer alone, or sample with "
            "tools/sample_images.py"
        )


def _write_vae(folder: Path, config: DiTConfig, vae: Path | None) -> dict[str, list[str]]:
    if vae is None:
        decoder = identity_vae(config.channels)
        decoder.save_pretrained(folder / "vae")
        return {"vae": ["diffusers", type(decoder).__name__]}
    _copy(vae, folder / "vae")
    where = folder / "vae" / "config.json"
    # StableDiffusion3Pipeline adds the shift, which in the configuration of many a VAE is None.
    values = {**read_object(where, ConfigError), "shift_factor": VaeConfig.read(vae).shift}
    write_json(where, values)
    return {"vae": ["diffusers", str(values["_class_name"])]}


def _write_text_encoders(folder: Path, parts: EncoderFolders) -> dict[str, list[str]]:
    entries = {}
    for number, (encoder, words, name) in enumerate(zip(parts.text, parts.tokenizers, SD3_ENCODERS), 1):
        suffix = "" if number == 1 else f"_{number}"
        _copy(encoder, folder / f"text_encoder{suffix}")
        _copy(words, folder / f"tokenizer{suffix}")
        kind = str(read_object(words / "tokenizer_config.json", ConfigError)["tokenizer_class"])
        entries[f"text_encoder{suffix}"] = ["transformers", name]
        entries[f"tokenizer{suffix}"] = ["transformers", kind]
    return entries


def _copy(folder: Path, to: Path) -> None:
    """A model's folder without weights in formats that can hold code."""
    shutil.copytree(folder, to, ignore=_OTHER_FORMATS)


def _write_index(folder: Path, has_text: bool, entries: Mapping[str, list[str]]) -> None:
    import diffusers

    index = {
        "_class_name": "StableDiffusion3Pipeline" if has_text else "DiTPipeline",
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler" if has_text else "DDIMScheduler"],
        **entries,
    }
    write_json(folder / "model_index.json", index)


def identity_vae(channels: int) -> Any:
    """A VAE of `diffusers` whose latents are the pixels: an ``AutoencoderTiny`` without blocks.

    Its decoder bends latents by ``3 tanh(z / 3)``. Latents are therefore pixels / 100, where that is straight to 4e-6;
    the ReLU between its two convolutions gets them once with each sign.
    """
    from diffusers import AutoencoderTiny

    scale, width = 100.0, 2 * channels
    vae = AutoencoderTiny(
        in_channels=channels,
        out_channels=channels,
        encoder_block_out_channels=(width,),
        decoder_block_out_channels=(width,),
        latent_channels=channels,
        num_encoder_blocks=(0,),
        num_decoder_blocks=(0,),
        scaling_factor=scale,
    )
    both = torch.cat([torch.eye(channels), -torch.eye(channels)])
    first = torch.cat([torch.eye(channels), torch.zeros(channels, channels)])
    # The encoder sees (x + 1) / 2, and the decoder's result is doubled and lowered by 1.
    for layer, weight, bias in (
        (vae.encoder.layers[0], first, 0.0),
        (vae.encoder.layers[-1], first.t() * 2 / scale, -1 / scale),
        (vae.decoder.layers[0], both, 0.0),
        (vae.decoder.layers[-1], both.t() * scale / 2, 0.5),
    ):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.constant_(layer.bias, bias)
        layer.weight.data[:, :, 1, 1] = weight
    return vae
