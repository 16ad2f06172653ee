"""The latents and texts that SDXL is trained on: encoded once by all ranks, each its part, then read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging

from megatron_ds.comm.together import together
from megatron_ds.data.image_samples import DiffusionSamples, LatentImages
from megatron_ds.data.image_source import open_images
from megatron_ds.data.latent_cache import LatentCache
from megatron_ds.data.latent_encoders import EncoderFolders, model_identity, text_identities
from megatron_ds.data.latent_writer import (
    BROKEN,
    NO_IMAGES,
    CacheSettings,
    CacheWriter,
    left_out,
)
from megatron_ds.errors import DataError
from megatron_ds.mesh import Mesh
from megatron_ds.models.sdxl import CONDITION

_ENCODERS, _TOKENIZERS = ("text_encoder", "text_encoder_2"), ("tokenizer", "tokenizer_2")


def _folders(base: Path, vae: Path) -> EncoderFolders:
    return EncoderFolders(vae, [base / name for name in _ENCODERS], [base / name for name in _TOKENIZERS])


def write_latents(
    mesh: Mesh, images: Path, base: Path, vae: Path, settings: CacheSettings, folder: Path
) -> LatentCache:
    """Encode a folder of images with captions by a pipeline's encoders, where that has not been done yet. On all ranks.

    Raises:
        DataError: images or captions are missing, encoders overflow, or the folder holds another cache.
    """
    logging.disable_progress_bar()  # of a second's reading, across the bar of hours
    encoders = _folders(base, vae)
    with together(mesh.world):
        source = open_images(images)
        writer = CacheWriter(source, encoders, settings, folder)
        if mesh.rank == 0:
            writer.begin()
    # They meet after every shard: over all of a large set one may fall behind by more than the group waits.
    written = writer.rounds(mesh.rank, mesh.world.size, mesh.device, mesh.rank == 0)
    more = True
    while more:
        with together(mesh.world):
            more = next(written, None) is not None
    with together(mesh.world):
        cache = LatentCache(folder)
        if mesh.rank == 0:
            broken = [f"{source.name(row)}: {why}" for row, why in cache.bad]
            print(left_out(BROKEN, broken) + left_out(NO_IMAGES, writer.unreadable), end="", flush=True)
        return cache


def open_latents(folder: Path, base: Path, vae: Path, wanted: Mapping[str, Any]) -> LatentCache:
    """A cache that `tools/cache_latents.py` wrote.

    Args:
        wanted: of :class:`CacheSettings` what the user has asked for.

    Raises:
        DataError: it is not finished, damaged, of another VAE or other text encoders than those of the pipeline, or of
            other settings than the user has asked for.
    """
    cache = LatentCache(folder)
    for name, value in wanted.items():
        if (found := cache.settings[name]) != value:
            raise DataError(
                f"{folder} was encoded with {name}={found!r}, and {value!r} is asked for; leave that out, or encode "
                "the images again"
            )
    if (mine := model_identity(vae)) != cache.encoder:
        raise DataError(
            f"{folder} has latents of the VAE {cache.encoder['weights']}, and {vae} is {mine['weights']}; give the VAE "
            "they were made by with --pretrained_vae_model_name_or_path, or encode the images again"
        )
    texts = text_identities(_folders(base, vae))
    if cache.texts is None or (cache.texts["encoders"], cache.texts["states"]) != (texts, "penultimate"):
        raise DataError(
            f"{folder} does not have texts of the two text encoders of {base}, by their penultimate states; encode the "
            "images again with these"
        )
    return cache


def samples_of(
    cache: LatentCache, seed: int, empty_prompts: float, zeros: bool, noise_offset: float, block: int
) -> DiffusionSamples:
    """Samples with noise, a time and perhaps no text, all by (seed, place in the run).

    Args:
        zeros: what stands for no text is zero, and not the embedding of the empty text.
        block: samples of a micro-batch, which have one size.
    """
    images = LatentImages(cache, seed, CONDITION)
    if zeros:
        images.empty = {name: np.zeros_like(empty) for name, empty in images.empty.items()}
    return DiffusionSamples(images, seed, 0, empty_prompts, block, noise_offset)
