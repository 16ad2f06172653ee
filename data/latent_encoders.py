"""Frozen encoders from local folders: a VAE of `diffusers`, text encoders of `transformers`; and what identifies them.

Weights are read from safetensors files alone, and no code from a model's folder is run. A model trained on their
results needs the same ones when it draws: latents go back to pixels with the scale and shift of the training, and
prompts become embeddings as its texts did.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_ds.data.samples import LATENTS
from megatron_ds.errors import DataError, RaisedAs
from megatron_ds.files import check_regular, read_bytes, read_object

_WEIGHTS = re.compile(r"(diffusion_pytorch_model|model)(-\d+-of-\d+)?\.safetensors")
_TEXT_CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel", "UMT5EncoderModel")
_SCALING_FACTOR = 0.18215  # of AutoencoderKL where its configuration does not say it
_T5_TOKENS = 256  # of a text, as pipelines of Stable Diffusion 3 take; T5's tokenizers know no limit that models share
TextStates = Literal["penultimate", "last"]


def model_identity(folder: Path) -> dict[str, str]:
    """A model's class, and checksums of its configuration and of its weights: of their values, not of their files.

    Raises:
        DataError: the folder lacks ``config.json`` or safetensors files, or they cannot be read.
    """
    config = _config(folder)
    kept = {name: value for name, value in config.items() if not name.startswith("_") and "version" not in name}
    kept.pop("torch_dtype", kept.pop("dtype", None))  # how they were saved; the weights say it themselves
    digest = xxhash.xxh3_128()
    for name, path in sorted(_tensors(folder)):
        with safe_open(path, "pt") as file:
            value = file.get_tensor(name)
        digest.update(f"{name}\0{value.dtype}\0{list(value.shape)}\0".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data if value.numel() else b"")
    settings = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:32]
    return {"class": _class(config), "config": settings, "weights": digest.hexdigest()}


def _config(folder: Path) -> dict[str, Any]:
    way_out = "; give the folder of one model, as save_pretrained writes it"
    return read_object(folder / "config.json", DataError, way_out)


def _class(config: Mapping[str, Any]) -> str:
    return str(config.get("_class_name") or (config.get("architectures") or [""])[0])


def _tensors(folder: Path) -> Iterator[tuple[str, Path]]:
    """Name and file of each tensor."""
    paths = sorted(path for path in folder.glob("*.safetensors") if _WEIGHTS.fullmatch(path.name))
    if not paths:
        raise DataError(
            f"{folder} holds no weights in model.safetensors or diffusion_pytorch_model.safetensors; other formats can "
            "hold code and are not read: save the model with save_pretrained"
        )
    for path in paths:
        with RaisedAs(DataError, f"{path} cannot be read", OSError, SafetensorError):
            check_regular(path)
            with safe_open(path, "pt") as file:
                yield from ((name, path) for name in file.keys())  # noqa: SIM118


@dataclass(frozen=True)
class VaeConfig:
    """What a model is trained on is ``(latent - shift) * scale``; a latent has one place for ``factor`` pixels."""

    scale: float
    shift: float
    factor: int

    @staticmethod
    def read(folder: Path) -> VaeConfig:
        """Of a folder's VAE.

        Raises:
            DataError: it is no ``AutoencoderKL``, or normalises each channel by itself.
        """
        config = _config(folder)
        if (found := _class(config)) != "AutoencoderKL":
            raise DataError(f"{folder} holds {found or 'a model of no known class'}, not AutoencoderKL of diffusers")
        if config.get("latents_mean") is not None or config.get("latents_std") is not None:
            raise DataError(f"{folder}: a VAE with latents_mean and latents_std for each channel is not built here")
        factor = 2 ** (len(config.get("block_out_channels", (64,))) - 1)
        # Files older than the setting, Stable Diffusion 1's among them, mean the class's default.
        scale = config.get("scaling_factor", _SCALING_FACTOR)
        if not isinstance(scale, int | float) or scale <= 0:
            raise DataError(f"{folder}: scaling_factor={scale!r} of config.json is no number above 0")
        return VaeConfig(float(scale), float(config.get("shift_factor") or 0.0), factor)


@dataclass(frozen=True)
class EncoderFolders:
    """What encodes images and their texts: ``text`` and ``tokenizers`` are none, one or more, in pairs and in order."""

    vae: Path | None = None
    text: Sequence[Path] = ()
    tokenizers: Sequence[Path] = ()


def text_identities(encoders: EncoderFolders) -> list[dict[str, str]]:
    """Of text encoders with their tokenizers.

    Raises:
        DataError: they are no pairs, or one cannot be read.
    """
    if (count := len(encoders.text)) != len(encoders.tokenizers):
        raise DataError(f"{count} text encoders with {len(encoders.tokenizers)} tokenizers; give each its own")
    for folder in encoders.text:
        text_class(folder)
    pairs = zip(encoders.text, encoders.tokenizers)
    return [{**model_identity(folder), "tokenizer": tokenizer_identity(words)} for folder, words in pairs]


def text_class(folder: Path) -> str:
    """Of a folder's text encoder; a ``DataError`` for one that is not known."""
    if (name := _class(_config(folder))) not in _TEXT_CLASSES:
        raise DataError(f"{folder} holds {name or 'a model of no known class'}; use {' or '.join(_TEXT_CLASSES)}")
    return name


def is_t5(folder: Path) -> bool:
    """Whether a text encoder sees texts of any length, by relative positions."""
    return "T5" in text_class(folder)


class ImageEncoder:
    """A VAE's encoder: pixels to the mean and the standard deviation of their latent."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype):
        from diffusers import AutoencoderKL

        vae = AutoencoderKL.from_pretrained(folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True)
        self._vae = vae.to(device).eval().requires_grad_(False)
        self._device, self._dtype = device, dtype

    @torch.no_grad()
    def encode(self, pixels: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Mean and standard deviation, both float32 ``[b, c, h / factor, w / factor]``."""
        images = torch.from_numpy(pixels).to(self._device, self._dtype)
        found = self._vae.encode(images).latent_dist
        return _array(found.mean), _array(found.std)


class TextEncoder:
    """One or more text encoders side by side, as pipelines of Stable Diffusion join them.

    Hidden states of CLIP encoders are joined along their channels, and a T5 encoder's behind them along the tokens,
    where the narrower ones end in zeros. Pooled states are those of all CLIP encoders with a projection, or of the last
    one without.

    Args:
        states: of CLIP encoders, ``"penultimate"`` takes the hidden states before the last layer, as SDXL and Stable
            Diffusion 3 do, and ``"last"`` those after it. T5's are always the last.
        tokens: of a text that T5 sees. Default: 256, or fewer where its tokenizer says so.
    """

    def __init__(
        self,
        encoders: EncoderFolders,
        states: TextStates,
        tokens: int | None,
        device: torch.device,
        dtype: torch.dtype,
    ):
        import transformers

        self._states, self._device = states, device
        self._parts: list[tuple[Any, Any, int, bool]] = []
        """Model, tokenizer, tokens of a text, and whether it is a T5."""
        for folder, words in zip(encoders.text, encoders.tokenizers, strict=True):
            long = is_t5(folder)
            model = getattr(transformers, text_class(folder)).from_pretrained(
                folder, dtype=dtype, use_safetensors=True, local_files_only=True
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(words, local_files_only=True)
            most = _T5_TOKENS if long else model.config.max_position_embeddings
            own = min(tokenizer.model_max_length, most)  # which is 10^30 where a tokenizer has no limit
            length = tokens or own if long else own
            self._parts.append((model.to(device).eval().requires_grad_(False), tokenizer, length, long))
        of_clip = [length for _, _, length, long in self._parts if not long]
        if len(set(of_clip)) > 1:
            raise DataError(f"CLIP encoders of {of_clip} tokens cannot be joined along their channels; use others")

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> dict[str, npt.NDArray[np.float32]]:
        """``text`` float32 ``[b, tokens, channels]``; ``pooled`` ``[b, channels]`` where an encoder has one."""
        of_clip: list[Tensor] = []
        of_t5: list[Tensor] = []
        projected: list[Tensor] = []
        pooled: list[Tensor] = []
        for encoder, tokenizer, length, long in self._parts:
            ids = tokenizer(
                list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            ).input_ids
            out = encoder(ids.to(self._device), output_hidden_states=True)
            if long:
                of_t5.append(out.last_hidden_state)
                continue
            of_clip.append(out.hidden_states[-2] if self._states == "penultimate" else out.last_hidden_state)
            if "text_embeds" in out:
                projected.append(out.text_embeds)
            else:
                pooled = [out.pooler_output]
        states = [torch.cat(of_clip, dim=-1), *of_t5] if of_clip else of_t5
        width = max(part.shape[-1] for part in states)
        text = torch.cat([F.pad(part, (0, width - part.shape[-1])) for part in states], dim=1)
        found = {"text": _array(text)}
        return {**found, "pooled": _array(torch.cat(projected or pooled, dim=-1))} if of_clip else found


def tokenizer_identity(folder: Path) -> str:
    """A checksum of the small files of a tokenizer's folder."""
    digest = xxhash.xxh3_128()
    names = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "spiece.model")
    there = [name for name in names if (folder / name).is_file()]
    if not there:
        raise DataError(f"{folder} holds no tokenizer ({', '.join(names)})")
    for name in there:
        digest.update(name.encode() + b"\0" + read_bytes(folder / name))
    return digest.hexdigest()


def _array(values: Tensor) -> npt.NDArray[np.float32]:
    found: npt.NDArray[np.float32] = values.float().cpu().numpy()
    return found


# --- those of a checkpoint ---------------------------------------------------------------------------------------


def latents_of(meta: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a checkpoint says of the latents that its model was trained on; None for pixels."""
    found: dict[str, Any] | None = (meta.get("data") or {}).get(LATENTS)
    return found


def check_decoder(meta: Mapping[str, Any], vae: Path | None, where: object) -> None:
    """Require the VAE of the latents that a checkpoint's model was trained on, and none if it was trained on pixels.

    Raises:
        DataError: it is another, is missing, or the model was trained on pixels.
    """
    trained = latents_of(meta)
    if trained is None:
        if vae is not None and "data" in meta and meta["data"] is not None:
            raise DataError(f"{where} was trained on pixels, which --vae {vae} cannot decode; leave it out")
        return
    if vae is None:
        raise DataError(f"{where} was trained on latents of an {trained['vae']['class']}; give its folder with --vae")
    if (found := model_identity(vae)) != trained["vae"]:
        what = "weights" if found["weights"] != trained["vae"]["weights"] else "configuration (its scaling_factor?)"
        raise DataError(
            f"{vae} is not the VAE on whose latents {where} was trained: its {what} differ; give the folder that "
            "tools/cache_latents.py was given"
        )


class LatentDecoder:
    """A VAE's decoder. ``meta``: of a checkpoint; where it does not say so, scale and shift are the VAE's own."""

    def __init__(self, folder: Path, meta: Mapping[str, Any], device: torch.device):
        from diffusers import AutoencoderKL

        own = VaeConfig.read(folder)
        trained = latents_of(meta) or {"scale": own.scale, "shift": own.shift}
        self._scale, self._shift = float(trained["scale"]), float(trained["shift"])
        self._vae = AutoencoderKL.from_pretrained(folder, use_safetensors=True, local_files_only=True).to(device).eval()

    @torch.no_grad()
    def decode(self, latents: Tensor, batch: int = 8) -> Tensor:
        """``[n, c, h, w]`` as a model draws them, to pixels of -1 to 1, fp32."""
        raw = latents.float() / self._scale + self._shift
        return torch.cat([self._vae.decode(part).sample.float() for part in raw.split(batch)])


def check_text_encoders(meta: Mapping[str, Any], encoders: EncoderFolders, where: object) -> dict[str, Any]:
    """How the texts were encoded that a checkpoint's model was trained on, by these encoders.

    Raises:
        DataError: the checkpoint does not say it, or they are others.
    """
    texts: dict[str, Any] | None = (latents_of(meta) or {}).get("texts")
    if texts is None:
        raise DataError(f"{where} was not trained on texts of tools/cache_latents.py; what encodes prompts is unknown")
    wanted, given = texts["encoders"], text_identities(encoders)
    classes = ", ".join(encoder["class"] for encoder in wanted)
    if len(given) != len(wanted):
        raise DataError(
            f"{where} was trained on texts of {len(wanted)} encoders ({classes}), and not of {len(given)}; give each "
            "with --text-encoder, and its tokenizer with --tokenizer, in this order"
        )
    for folder, words, mine, theirs in zip(encoders.text, encoders.tokenizers, given, wanted):
        if differing := [name for name in theirs if mine[name] != theirs[name]]:
            raise DataError(
                f"{words if differing == ['tokenizer'] else folder} is not what {where} was trained on: its "
                f"{' and '.join(differing)} differ; give the folders that tools/cache_latents.py was given, in its "
                f"order ({classes})"
            )
    return texts


def encode_prompts(
    texts: Mapping[str, Any], encoders: EncoderFolders, prompts: Sequence[str], device: torch.device
) -> dict[str, Tensor]:
    """``text`` fp32 ``[n, tokens, width]`` and ``pooled`` ``[n, width]`` of each prompt, and of none, for guidance,
    ``empty.text`` and ``empty.pooled`` with a first dim 1; on the CPU. ``texts``: of :func:`check_text_encoders`."""
    encoder = TextEncoder(encoders, texts["states"], texts["tokens"], device, torch.float32)
    found: dict[str, Tensor] = {}
    for start, wanted in (("", prompts), ("empty.", [""])):
        parts = [encoder.encode([prompt]) for prompt in wanted]
        found |= {start + name: torch.cat([torch.from_numpy(part[name]) for part in parts]) for name in parts[0]}
    return found
