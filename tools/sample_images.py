"""Draw images with a trained diffusion transformer, as one PNG with a row of images for each class.

    python tools/sample_images.py runs/digits/checkpoints --output digits.png --classes 0 1 2 3 --guidance 2
    torchrun --nproc-per-node 4 tools/sample_images.py runs/digits/checkpoints --tp 2 --pp 2
    python tools/sample_images.py runs/text/checkpoints --vae sd3/vae --text "a red square" "a blue circle" \\
        --guidance 5 --size 96 160 --text-encoder sd3/text_encoder sd3/text_encoder_2 \\
        --tokenizer sd3/tokenizer sd3/tokenizer_2
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from megatron_ds import comm
from megatron_ds.checkpoint import Checkpoint
from megatron_ds.data.latent_encoders import (
    EncoderFolders,
    LatentDecoder,
    check_decoder,
    check_text_encoders,
    encode_prompts,
)
from megatron_ds.errors import ConfigError, RaisedAs
from megatron_ds.mesh import Mesh, MeshShape
from megatron_ds.models.samplers import Sampler, check_steps, make_scheduler, run_of_checkpoint, save_grid
from megatron_ds.train.alike import facts_of
from megatron_ds.train.launch import RankInfo, job, run_main, set_threads


@dataclass(frozen=True)
class Options:
    """What to draw, and by which ranks. An image is the same on every mesh."""

    checkpoint: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="CHECKPOINT")]]
    """A run's checkpoint directory (its latest is meant) or one step's directory."""
    output: Path = Path("samples.png")
    """The PNG file."""
    classes: tuple[int, ...] | None = None
    """A row for each. Default: 0 to 9, or as many as there are."""
    text: tuple[str, ...] = ()
    """A row for each, for a model that is told texts; with the encoders of the cache that it was trained on."""
    text_encoder: tuple[Path, ...] = ()
    """Folders of these encoders, in the order in which tools/cache_latents.py was given them."""
    tokenizer: tuple[Path, ...] = ()
    """Of each text encoder, in the same order."""
    embeddings: Path | None = None
    """In place of texts: a safetensors file with their embeddings, 'text' [n, tokens, width] and 'pooled' [n, width].
    Where samples without a text were trained with other embeddings than zeros, it has those too, as 'empty.text' and
    'empty.pooled' [1, ...]."""
    size: tuple[int, int] | None = None
    """Height and width of the images, or of their latents. Default: the model's."""
    columns: int = 10
    """Images of each class or text."""
    scheduler: Literal["ddpm", "ddim", "euler", "dpm++", "flow"] | None = None
    """Default: ddim, or flow for a model of rectified flow."""
    steps: int = 50
    """Evaluations of the model for an image."""
    guidance: float = 2.0
    """1: the class or text as trained; above 1: further away from none."""
    weights: Literal["average", "last"] | None = None
    """The moving average of the weights or those of the last step. Default: the average where there is one."""
    seed: int = 0
    vae: Path | None = None
    """Folder of the VAE whose latents the model was trained on; they are decoded with the checkpoint's own scale."""
    batch: int = 64
    """Images that a replica draws at once."""
    tp: int = 1
    pp: int = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @property
    def encoders(self) -> EncoderFolders:
        return EncoderFolders(self.vae, self.text_encoder, self.tokenizer)


def check_told(options: Options, meta: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """How the texts are encoded that images are to be of; None for classes and embeddings."""
    kinds = {"--classes": options.classes, "--text": options.text or None, "--embeddings": options.embeddings}
    if len(given := [name for name, value in kinds.items() if value is not None]) > 1:
        raise ConfigError(f"{' and '.join(given)}: an image is of a class or of a text; give one of them")
    if options.text:
        return check_text_encoders(meta, options.encoders, where)
    if options.text_encoder or options.tokenizer:
        raise ConfigError("--text-encoder and --tokenizer encode what --text says; give it, or leave them out")
    return None


def wanted_of(options: Options, num_classes: int) -> list[int] | dict[str, Tensor]:
    """The class or the embeddings of each image, row by row of the grid."""
    if options.embeddings is None:
        classes = range(min(10, num_classes)) if options.classes is None else options.classes
        return [label for label in classes for _ in range(options.columns)]
    with RaisedAs(ConfigError, f"--embeddings {options.embeddings} cannot be read", OSError, SafetensorError):
        found = {name: t.float() for name, t in load_file(options.embeddings).items()}
    return each_row(found, options.columns)


def each_row(embeddings: dict[str, Tensor], columns: int) -> dict[str, Tensor]:
    """Those of each text for every image of its row."""
    return {name: t if name.startswith("empty.") else t.repeat_interleave(columns, 0) for name, t in embeddings.items()}


def encoded_texts(options: Options, texts: dict[str, Any], mesh: Mesh) -> dict[str, Tensor]:
    """Embeddings of the texts, on every rank's CPU: the first rank alone holds the encoders."""
    told: dict[str, Tensor] = {}
    if mesh.rank == 0:
        told = encode_prompts(texts, options.encoders, options.text, mesh.device)
    names = {"text": 3, "pooled": 2, "empty.text": 3, "empty.pooled": 2}
    sizes = [size for name in names if mesh.rank == 0 for size in told[name].shape] or [0] * sum(names.values())
    shapes = iter(comm.broadcast(torch.tensor(sizes, device=mesh.device), mesh.world).tolist())
    found = {}
    for name, dims in names.items():
        shape = [next(shapes) for _ in range(dims)]
        own = told[name].to(mesh.device) if mesh.rank == 0 else torch.empty(shape, device=mesh.device)
        found[name] = comm.broadcast(own, mesh.world).cpu()
    return each_row(found, options.columns)


def main(place: RankInfo) -> int:
    options = tyro.cli(Options, description=__doc__)
    with job(place, 600.0) as ranks:
        with ranks.checking(facts_of(options)):
            device = place.device(options.device)
            with Checkpoint(options.checkpoint) as source:
                kind = source.weights_kind(None if options.weights is None else options.weights == "average")
                where, meta = str(source.directory), source.meta
                check_decoder(meta, options.vae, where)
                run = run_of_checkpoint(source.meta, where, options.tp, options.pp, place.world_size)
            scheduler = options.scheduler or ("flow" if run.objective.is_flow else "ddim")
            make_scheduler(run.objective, scheduler)
            check_steps(run.objective, options.steps)
            texts = check_told(options, meta, where)
            wanted = wanted_of(options, run.model.num_classes)
        set_threads(place, None)
        ranks.start(device)
        shape = MeshShape.for_world(place.world_size, pp=options.pp, tp=options.tp)
        mesh = Mesh.create(shape, device, ranks.group_timeout(device))
        if texts is not None:
            wanted = encoded_texts(options, texts, mesh)
        sampler = Sampler(run, options.checkpoint, kind, mesh)
        images = sampler.sample(
            wanted, scheduler, options.steps, options.guidance, options.seed, options.batch, options.size
        )
        if mesh.rank == 0:
            if options.vae is not None:
                images = LatentDecoder(options.vae, meta, device).decode(images)
            save_grid(images, options.columns, options.output)
            print(options.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_main(main))
