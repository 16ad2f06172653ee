"""The loop of fine-tuning: steps of an engine, checkpoints, and going on from one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_ds.checkpoint import read_meta
from megatron_ds.checkpoint.directory import steps_in
from megatron_ds.config.diffusion import ObjectiveConfig
from megatron_ds.data.latent_cache import LatentCache
from megatron_ds.data.loader import BatchLoader
from megatron_ds.engine import Engine
from megatron_ds.errors import CheckpointError, ConfigError, RaisedAs
from megatron_ds.models.samplers import PREDICTIONS
from megatron_ds.train.callbacks import MetricsFile
from megatron_ds.train.signals import stop_signals

CHECKPOINTS = "checkpoints"
LATEST = "latest"


def identity_of(
    objective: ObjectiveConfig, seed: int, latents: LatentCache, rank: int | None, block: int
) -> dict[str, Any]:
    """What a run that is resumed must have in common with the run before, as JSON values.

    ``block``: images of a micro-batch. Where they have several sizes the order of all depends on it.
    """
    blocks = {"train_batch_size of images of several sizes": block} if len(latents.buckets) > 1 else {}
    return {
        **blocks,
        **_objective(objective),
        "seed": seed,
        "rank of LoRA": rank,
        "scale and shift of the latents": [latents.scale, latents.shift],
        "latents": dict(latents.identity),
    }


def _objective(objective: ObjectiveConfig) -> dict[str, Any]:
    names = {"schedule", "num_timesteps", "beta_start", "beta_end", "zero_terminal_snr"}
    return {
        "prediction_type": PREDICTIONS[objective.prediction],
        "noise schedule": objective.model_dump(mode="json", include=names),
    }


def check_output(output: Path, asked: str | None, objective: ObjectiveConfig) -> None:
    """What can be seen before images are encoded.

    Raises:
        ConfigError: a new run where there are checkpoints. CheckpointError: those are of another objective.
    """
    found = steps_in(output / CHECKPOINTS)
    if asked is None and found:
        raise ConfigError(
            f"{output / CHECKPOINTS} holds checkpoints of a run; add --resume_from_checkpoint latest to go on with it, "
            "or give another --output_dir"
        )
    if path := _path_of(output, asked):
        _require_same(path, _objective(objective))


def checkpoint_to_resume(output: Path, asked: str | None, identity: Mapping[str, Any]) -> Path | None:
    """The checkpoint that a run goes on from; None: it begins.

    Args:
        asked: ``"latest"``, a checkpoint's name or its path; None: a new run is meant.

    Raises:
        CheckpointError: it is not there, or of a run of another identity.
    """
    if path := _path_of(output, asked):
        _require_same(path, identity)
    return path


def _path_of(output: Path, asked: str | None) -> Path | None:
    directory = output / CHECKPOINTS
    if asked is None or (asked == LATEST and not steps_in(directory)):
        return None
    return directory if asked == LATEST else Path(asked) if Path(asked).exists() else directory / asked


def _require_same(path: Path, identity: Mapping[str, Any]) -> None:
    before = read_meta(path).get("client_state", {}).get("identity")
    if before is None:
        raise CheckpointError(f"{path} was written by another script: it does not say what was trained")
    differs = [
        f"{name}: {before.get(name)} there, {value} here"
        for name, value in identity.items()
        if before.get(name) != value
    ]
    if differs:
        raise CheckpointError(
            f"{path} is of another run: {'; '.join(differs)}. Give what was given then, or start a new run in another "
            "--output_dir"
        )


@dataclass(frozen=True)
class Limits:
    """How long a run is, and what it keeps.

    Attributes:
        steps: updates of the whole run. save_every: steps between checkpoints. keep_last: of them; None: all.
    """

    steps: int
    save_every: int
    keep_last: int | None


def train(
    engine: Engine, loader: BatchLoader, limits: Limits, output: Path, identity: Mapping[str, Any], resume: Path | None
) -> bool:
    """Train to the end, and True; or until SIGTERM or Ctrl-C, and False: then there is a checkpoint to go on from."""
    if resume is not None:
        loader.load_state_dict({"consumed": engine.load_checkpoint(resume)["consumed"]})
    writes, asked, stopped = engine.mesh.rank == 0, threading.Event(), False
    output.mkdir(parents=True, exist_ok=True)
    metrics = MetricsFile(output / "metrics.jsonl", print)
    if writes:
        metrics.on_start(engine.steps, limits.steps, engine.skipped)
    with stop_signals(asked), loader:
        while engine.steps < limits.steps and not stopped:
            result = engine.train_batch(next(loader), asked.is_set())
            stopped = result.stop
            if writes:
                metrics.on_step(engine.steps, result, {})
            if stopped or engine.steps % limits.save_every == 0 or engine.steps == limits.steps:
                state = {**loader.state_dict(), "identity": dict(identity)}
                saved = engine.save_checkpoint(output / CHECKPOINTS, state, limits.keep_last)
                if writes:
                    print(f"saved {saved}", flush=True)
    if writes:
        metrics.on_end()
    return not stopped


def learning_rates(name: str, lr: float, warmup: int, steps: int) -> Callable[[int], float]:
    """The rate of an update, counted from 1, by a schedule of `diffusers`.

    Raises:
        ConfigError: there is no schedule of that name.
    """
    from diffusers.optimization import get_scheduler

    # Of the same rate: polynomial ends at 1e-7, whatever it begins with.
    held = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=lr)
    with RaisedAs(ConfigError, f"--lr_scheduler {name}", ValueError):
        scheduler = get_scheduler(name, held, num_warmup_steps=warmup, num_training_steps=steps)
    (factor,) = scheduler.lr_lambdas
    return lambda update: lr * float(factor(update - 1))
