"""Encode images by a VAE, and their captions by text encoders, once: training then reads latents and embeddings.

    python tools/cache_latents.py photos --vae sd-vae --output cache --resolution 256
    torchrun --nproc-per-node 8 tools/cache_latents.py photos --vae sdxl/vae --output cache --resolution 1024 \\
        --max-ratio 2 --text-encoder sdxl/text_encoder sdxl/text_encoder_2 --tokenizer sdxl/tokenizer sdxl/tokenizer_2

As Stable Diffusion 3 has it, with its three encoders in their order: `text` is [77 + --text-tokens, 4096].

All ranks write the same files as one would. The same command again continues after a kill.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from megatron_ds.data.cache import locked
from megatron_ds.data.image_source import open_images
from megatron_ds.data.latent_cache import LatentCache
from megatron_ds.data.latent_encoders import EncoderFolders
from megatron_ds.data.latent_writer import (
    BROKEN,
    NO_IMAGES,
    CacheSettings,
    CacheWriter,
    left_out,
)
from megatron_ds.errors import DataError
from megatron_ds.train.alike import facts_of
from megatron_ds.train.launch import RankInfo, job, run_main


@dataclass(frozen=True)
class Options:
    """Which images, encoded how."""

    images: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="IMAGES")]]
    """A folder of images (a class for each subfolder, or captions in x.txt beside x.jpg or in metadata.jsonl), tar
    shards of key.jpg with key.txt or key.cls, or an image set of `datasets`."""
    vae: Path
    """Folder of an `AutoencoderKL` of diffusers."""
    output: Path
    """The folder to make, or to continue."""
    settings: tyro.conf.OmitArgPrefixes[CacheSettings]
    text_encoder: tuple[Path, ...] = ()
    """Folders of CLIP or T5 encoders of transformers. States of CLIP encoders are joined along their channels, those of
    T5 behind them along the tokens, as Stable Diffusion 3 does."""
    tokenizer: tuple[Path, ...] = ()
    """Of each text encoder, in the same order."""
    device: Literal["auto", "cpu", "cuda"] = "auto"


def main(place: RankInfo) -> int:
    options = tyro.cli(Options, description=__doc__)
    with job(place, 600.0) as ranks, contextlib.ExitStack() as stack:
        with ranks.checking(facts_of(options)):
            device = place.device(options.device)
            source = open_images(options.images)
            encoders = EncoderFolders(options.vae, options.text_encoder, options.tokenizer)
            writer = CacheWriter(source, encoders, options.settings, options.output)
            if place.rank == 0:
                writer.begin()
                stack.enter_context(_alone(options.output))
        if options.text_encoder:
            from transformers.utils import logging

            logging.disable_progress_bar()  # of a second's reading, across the bar of hours
        # What a sum rounds to depends on the threads that share it: start a rank for each core instead.
        if device.type == "cpu":
            torch.set_num_threads(1)
        print(left_out(BROKEN, writer.write(place.rank, place.world_size, device, place.rank == 0)), end="")
        if place.rank == 0:
            print(left_out(NO_IMAGES, writer.unreadable), end="")
        if place.world_size == 1:
            cache = LatentCache(options.output)
            sizes_text = ", ".join(f"{len(rows)} of {h} x {w}" for (h, w), rows in cache.buckets.items())
            print(f"{options.output}: {len(cache)} latents: {sizes_text}")
    return 0


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    try:
        with locked(folder / "lock", wait=False):
            yield
    except BlockingIOError:
        raise DataError(f"another run is writing {folder}; wait for it, or stop it") from None


if __name__ == "__main__":
    raise SystemExit(run_main(main))
