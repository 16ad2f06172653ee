"""The VAE and the text encoders that a checkpoint's model was trained with: required to be the same, and used.

Latents go back to pixels with the scale and shift of the training, and prompts become embeddings as its texts did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ds.data.latent_encoders import TextEncoder, VaeConfig, model_identity, text_identities
from megatron_ds.data.samples import LATENTS
from megatron_ds.errors import DataError


def latents_of(meta: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a checkpoint says of the latents that its model was trained on; None for pixels."""
    found: dict[str, Any] | None = (meta.get("data") or {}).get(LATENTS)
    return found


def check_decoder(meta: Mapping[str, Any], vae: Path | None, where: object) -> None:
    """Require the VAE of the latents that a checkpoint's model was trained on.

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


def check_text_encoders(
    meta: Mapping[str, Any], folders: Sequence[Path], tokenizers: Sequence[Path], where: object
) -> dict[str, Any]:
    """How the texts were encoded that a checkpoint's model was trained on, by these encoders.

    Raises:
        DataError: the checkpoint does not say it, or they are others.
    """
    texts: dict[str, Any] | None = (latents_of(meta) or {}).get("texts")
    if texts is None:
        raise DataError(f"{where} was not trained on texts of tools/cache_latents.py; what encodes prompts is unknown")
    wanted, given = texts["encoders"], text_identities(folders, tokenizers)
    classes = ", ".join(encoder["class"] for encoder in wanted)
    if len(given) != len(wanted):
        raise DataError(
            f"{where} was trained on texts of {len(wanted)} encoders ({classes}), and not of {len(given)}; give each "
            "with --text-encoder, and its tokenizer with --tokenizer, in this order"
        )
    for folder, words, mine, theirs in zip(folders, tokenizers, given, wanted):
        if differing := [name for name in theirs if mine[name] != theirs[name]]:
            raise DataError(
                f"{words if differing == ['tokenizer'] else folder} is not what {where} was trained on: its "
                f"{' and '.join(differing)} differ; give the folders that tools/cache_latents.py was given, in its "
                f"order ({classes})"
            )
    return texts


def encode_prompts(
    texts: Mapping[str, Any],
    folders: Sequence[Path],
    tokenizers: Sequence[Path],
    prompts: Sequence[str],
    device: torch.device,
) -> dict[str, Tensor]:
    """``text`` fp32 ``[n, tokens, width]`` and ``pooled`` ``[n, width]`` of each prompt, and of none, for guidance,
    ``empty.text`` and ``empty.pooled`` with a first dim 1; on the CPU.

    Args:
        texts: from :func:`check_text_encoders`.
    """
    encoder = TextEncoder(folders, tokenizers, texts["states"], texts["tokens"], device, torch.float32)
    found: dict[str, Tensor] = {}
    for start, wanted in (("", prompts), ("empty.", [""])):
        parts = [encoder.encode([prompt]) for prompt in wanted]
        found |= {start + name: torch.cat([torch.from_numpy(part[name]) for part in parts]) for name in parts[0]}
    return found
