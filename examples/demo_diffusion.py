"""A diffusion transformer learns to draw digits, on this machine: 8 ranks, samples, a pipeline for `diffusers`.

    python examples/demo_diffusion.py [--output runs/digits] [--steps N] [dotted settings of examples/pretrain_dit.py]

The images are scikit-learn's handwritten digits, which come with it. Training runs on 8 ranks (TP 2 x PP 2 x DP 2,
sequence parallel, ZeRO-1) on the CPU, or on the machine's GPUs; then once more on one process, to show that the losses
are the same. A classifier that was trained on the real digits says how many of 500 drawn ones it recognises.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from megatron_ds.checkpoint import Checkpoint
from megatron_ds.config.diffusion import DiffusionRun
from megatron_ds.convert.dit_pipelines import export_pipeline
from megatron_ds.mesh import Mesh
from megatron_ds.models.samplers import Sampler, run_of_checkpoint, save_grid
from megatron_ds.train.demonstration import run_twice

HERE = Path(__file__).parent
SCRIPT = HERE / "pretrain_dit.py"
SAMPLES, STEPS, GUIDANCE = 500, 20, 2.0


def draw(checkpoints: Path) -> tuple[torch.Tensor, list[int]]:
    """Digits by the moving average of the weights, and which ones they should be."""
    with Checkpoint(checkpoints) as saved:
        run: DiffusionRun = run_of_checkpoint(saved.meta, str(saved.directory), 1, 1, 1)
    labels = [number % 10 for number in range(SAMPLES)]
    sampler = Sampler(run, checkpoints, "ema", Mesh.single())
    return sampler.sample(labels, "ddim", STEPS, GUIDANCE, batch=250), labels


def accuracy(images: torch.Tensor, labels: list[int]) -> tuple[float, float]:
    """Share that a classifier recognises of the drawn digits, and of real ones that it has not seen."""
    from sklearn.datasets import load_digits
    from sklearn.svm import SVC

    real, digits = load_digits(return_X_y=True)
    classifier = SVC(gamma=0.001).fit(real[500:], digits[500:])
    drawn = (images.clamp(-1, 1) + 1) * 8
    return classifier.score(drawn.flatten(1).numpy(), labels), classifier.score(real[:500], digits[:500])


def draw_with_diffusers(folder: Path, path: Path) -> None:
    """Ten digits by `diffusers` alone."""
    from diffusers import DiTPipeline
    from diffusers.utils import logging

    logging.set_verbosity_error()  # it expects another class of VAE, and says so
    logging.disable_progress_bar()
    pipeline = DiTPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(
        list(range(10)),
        guidance_scale=GUIDANCE,
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    save_grid(torch.from_numpy(drawn).permute(0, 3, 1, 2) * 2 - 1, 10, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/digits"), help="directory of everything it makes")
    parser.add_argument("--steps", type=int, default=500, help="optimizer steps")
    options, overrides = parser.parse_known_args()
    start = time.perf_counter()
    root: Path = options.output
    settings = ["--config", str(HERE / "configs/diffusion/digits.toml"), "--train.steps", str(options.steps)]
    settings += overrides
    runs = run_twice(SCRIPT, settings, root, "digits: the same seed on two meshes", "squared error", start)
    checkpoints = runs.output / "checkpoints"
    images, labels = draw(checkpoints)
    save_grid(images[:100], 10, root / "samples.png")
    drawn, real = accuracy(images, labels)
    pipeline = export_pipeline(checkpoints, runs.output / "pipeline")
    draw_with_diffusers(pipeline, root / "samples-diffusers.png")
    runs.report(
        [f"of {len(labels)} drawn digits a classifier recognises {drawn:.1%}; of real ones {real:.1%}"],
        [
            ("drawn digits", root / "samples.png"),
            ("by diffusers", root / "samples-diffusers.png"),
            ("DiTPipeline", pipeline),
        ],
    )
    if drawn < 0.9:
        sys.exit(f"error: only {drawn:.1%} of the drawn digits are recognised, fewer than 90%")


if __name__ == "__main__":
    main()
