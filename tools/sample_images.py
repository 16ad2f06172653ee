"""Draw images with a trained diffusion transformer, as one PNG with a row of images for each class.

python tools/sample_images.py runs/digits/checkpoints --output digits.png --classes 0 1 2 3 --guidance 2
torchrun --nproc-per-node 4 tools/sample_images.py runs/digits/checkpoints --tp 2 --pp 2
python tools/sample_images.py runs/text/checkpoints --text prompts.safetensors --guidance 5 --size 96 160
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from megatron_ds.checkpoint import Checkpoint
from megatron_ds.convert.dit_folder import kind_of
from megatron_ds.data.latent_decoder import LatentDecoder, check_decoder
from megatron_ds.errors import ConfigError
from megatron_ds.mesh import Mesh, MeshShape
from megatron_ds.models.samplers import Sampler, make_scheduler, run_of_checkpoint, save_grid
from megatron_ds.train.launch import RankInfo, job, run_main, set_threads


@dataclass(frozen=True)
class Options:
    """What to draw, and by which ranks. An image is the same on every mesh."""

    checkpoint: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="CHECKPOINT")]]
    """A run's checkpoint directory (its latest is meant) or one step's directory."""
    output: Path = Path("samples.png")
    """The PNG file."""
    classes: tuple[int, ...] | None = None
    """A row for each. Default: 0 to 9."""
    text: Path | None = None
    """A row for each text, for a model that is told texts: a safetensors file with their embeddings, 'text' [n,
    tokens, width] and 'pooled' [n, width]. Where samples without a text were trained with other embeddings than zeros,
    it has those too, as 'empty.text' and 'empty.pooled' [1, ...]."""
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


def wanted_of(options: Options) -> list[int] | dict[str, Tensor]:
    """What each image is told, row by row of the grid."""
    if options.text is None:
        classes = range(10) if options.classes is None else options.classes
        return [label for label in classes for _ in range(options.columns)]
    if options.classes is not None:
        raise ConfigError("--classes and --text: an image is of a class or of a text; give one of them")
    try:
        found = load_file(options.text)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"--text {options.text} cannot be read: {error}") from error
    every = {name: t.float() for name, t in found.items()}
    return {
        name: t if name.startswith("empty.") else t.repeat_interleave(options.columns, 0) for name, t in every.items()
    }


def main(place: RankInfo) -> int:
    options = tyro.cli(Options, description=__doc__)
    with job(place, 600.0) as ranks:
        with ranks.checking(hashlib.sha256(repr(options).encode()).hexdigest()):
            device = place.device(options.device)
            with Checkpoint(options.checkpoint) as source:
                kind = kind_of(source, None if options.weights is None else options.weights == "average")
                where, meta = str(source.directory), source.meta
                check_decoder(meta, options.vae, where)
                run = run_of_checkpoint(source.meta, where, options.tp, options.pp, place.world_size)
            scheduler = options.scheduler or ("flow" if run.objective.is_flow else "ddim")
            make_scheduler(run.objective, scheduler)
            wanted = wanted_of(options)
        set_threads(place, None)
        ranks.start(device)
        shape = MeshShape.for_world(place.world_size, pp=options.pp, tp=options.tp)
        mesh = Mesh.create(shape, device, ranks.group_timeout(device))
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
