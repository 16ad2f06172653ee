"""Folders of `diffusers`: SDXL's UNet out of a pipeline's, and a pipeline or LoRA weights with what was trained."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_ds.comm.together import together
from megatron_ds.engine import Engine
from megatron_ds.errors import ConfigError, RaisedAs
from megatron_ds.files import read_json, replacing, write_json
from megatron_ds.zero.main_grad import is_trained

INDEX = "model_index.json"
LORA = "pytorch_lora_weights.safetensors"
# The projections of attention, as in the adapters that are published for SDXL.
_ADAPTED = ["to_k", "to_q", "to_v", "to_out.0"]
# Of a repository: other formats and other precisions of the same weights.
_LEFT_OUT = ("*.bin", "*.ckpt", "*.msgpack", "*.onnx*", "*.fp16.*", "*.non_ema.*")


def local_folder(name: str) -> Path:
    """A pipeline's folder; one that is not local is taken from the Hub's cache, or downloaded there.

    Raises:
        ConfigError: it holds no pipeline with SDXL's UNet.
    """
    folder = Path(name)
    if not folder.is_dir():
        from diffusers import DiffusionPipeline

        with RaisedAs(ConfigError, f"{name!r} is no folder, and cannot be downloaded", OSError, ValueError):
            folder = Path(DiffusionPipeline.download(name))
    with RaisedAs(ConfigError, f"{folder} holds no pipeline of diffusers with a UNet", OSError, ValueError):
        config = read_json(folder / "unet" / "config.json")
        read_json(folder / INDEX)
    if config.get("addition_embed_type") != "text_time":
        raise ConfigError(
            f"{folder / 'unet'} has addition_embed_type={config.get('addition_embed_type')!r}, and SDXL's UNet has "
            "'text_time': give the folder of an SDXL pipeline"
        )
    return folder


def scheduler_config(folder: Path) -> dict[str, Any]:
    """The configuration of a pipeline's noise schedule."""
    config: dict[str, Any] = read_json(folder / "scheduler" / "scheduler_config.json")
    return config


def zeros_for_empty_prompts(folder: Path) -> bool:
    """Whether the pipeline takes zeros for a missing text, and not what its encoders make of an empty one."""
    return bool(read_json(folder / INDEX).get("force_zeros_for_empty_prompt", True))


def load_unet(folder: Path, rank: int | None, checkpointing: bool) -> Any:
    """A pipeline's UNet in fp32.

    Args:
        rank: of the LoRA adapters that alone are trained; None: all of it is.
        checkpointing: compute activations again in the backward pass.
    """
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", use_safetensors=True, local_files_only=True)
    return prepare_unet(unet, rank, checkpointing)


def prepare_unet(unet: Any, rank: int | None, checkpointing: bool) -> Any:
    """The same of a UNet that is there."""
    unet.train()
    if rank is not None:
        from peft import LoraConfig

        unet.requires_grad_(False)
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=_ADAPTED))
    if checkpointing:
        unet.enable_gradient_checkpointing()
    return unet


def save_lora(engine: Engine, folder: Path, average: bool) -> None:
    """Adapters in fp32 as ``pipe.load_lora_weights(folder)`` takes them. On all ranks; rank 0 writes."""
    from diffusers import StableDiffusionXLPipeline
    from diffusers.training_utils import _collate_lora_metadata
    from peft.utils import get_peft_model_state_dict

    unet: Any = engine.module
    tensors = engine.tensors(average, masters=True)
    whole: dict[str, Tensor] = {
        name: tensors.parameter(name).cpu().clone() for name, p in unet.named_parameters() if is_trained(p)
    }
    with together(engine.mesh.world):
        if engine.mesh.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            layers = get_peft_model_state_dict(unet, state_dict=whole)
            with replacing(folder / LORA) as temporary:
                StableDiffusionXLPipeline.save_lora_weights(
                    temporary.parent,
                    unet_lora_layers=layers,
                    weight_name=temporary.name,
                    **_collate_lora_metadata({"unet": unet}),
                )


def save_pipeline(
    engine: Engine, base: Path, folder: Path, average: bool, prediction_type: str, vae: Path | None = None
) -> None:
    """The base's pipeline with the UNet that was trained, as ``from_pretrained(folder)`` takes it. On all ranks.

    The UNet is in fp32: of few updates at a small rate nothing is left in bf16.
    ``model_index.json`` is written last: a folder without it is not complete.

    Args:
        vae: the folder of the VAE whose latents were trained on. Default: the base's.
    """
    index = read_json(base / INDEX)
    with together(engine.mesh.world):
        if engine.mesh.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / INDEX).unlink(missing_ok=True)
            for name, kind in index.items():
                source = vae if name == "vae" and vae is not None else base / name
                if name != "unet" and isinstance(kind, list) and kind[0] is not None and source.is_dir():
                    _copy(source, folder / name)
            config = {**scheduler_config(base), "prediction_type": prediction_type}
            _write(folder / "scheduler" / "scheduler_config.json", config)
    engine.save_pretrained(folder / "unet", average, masters=True)
    with together(engine.mesh.world):
        if engine.mesh.rank == 0:
            _write(folder / INDEX, index)


def _copy(source: Path, target: Path) -> None:
    if target.exists() and os.path.samefile(source, target):
        return
    shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*_LEFT_OUT))


def _write(path: Path, values: Any) -> None:
    with replacing(path) as temporary:
        write_json(temporary, values)
