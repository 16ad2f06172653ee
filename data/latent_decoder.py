"""Latents back to pixels, by the VAE that made them and with the scale and shift that the model was trained with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ds.data.latent_encoders import VaeConfig, model_identity
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
