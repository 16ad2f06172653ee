"""Images drawn by a trained diffusion transformer on any mesh, by the schedulers of `diffusers`, with guidance.

What an image becomes follows from (seed, its number) alone: its first noise, and what a scheduler adds on the way, come
from a generator of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from megatron_ds import comm
from megatron_ds.checkpoint.load import load
from megatron_ds.config.diffusion import DiffusionRun, ObjectiveConfig
from megatron_ds.config.read import from_dict
from megatron_ds.errors import ConfigError
from megatron_ds.files import replacing
from megatron_ds.mesh import Mesh, MeshShape
from megatron_ds.models.dit import DiT, activation_shape
from megatron_ds.models.transformer import StageSettings
from megatron_ds.pipeline.executor import Executor
from megatron_ds.pipeline.layer_split import split_layers
from megatron_ds.pipeline.schedules import build_schedule
from megatron_ds.pipeline.stage import stage_spans
from megatron_ds.rng import derive_seed
from megatron_ds.shard import spec_of
from megatron_ds.shard.flat_shards import FlatShard

SCHEDULERS: Mapping[str, str] = MappingProxyType(
    {
        "ddpm": "DDPMScheduler",
        "ddim": "DDIMScheduler",
        "euler": "EulerDiscreteScheduler",
        "dpm++": "DPMSolverMultistepScheduler",
        "flow": "FlowMatchEulerDiscreteScheduler",
    }
)
_BETAS = MappingProxyType({"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"})
_PREDICTIONS = MappingProxyType({"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"})


def make_scheduler(c: ObjectiveConfig, name: str, shift: float = 1.0) -> Any:
    """The scheduler of `diffusers` that goes with what the model was trained for.

    Args:
        shift: of rectified flow's times.

    Raises:
        ConfigError: no such scheduler, or it is of another objective.
    """
    import diffusers

    if name not in SCHEDULERS or (name != "dpm++" and (name == "flow") != c.is_flow):
        fits = [known for known in SCHEDULERS if known == "dpm++" or (known == "flow") == c.is_flow]
        raise ConfigError(
            f"no scheduler {name!r} for objective.schedule={c.schedule!r}; use one of {', '.join(map(repr, fits))}"
        )
    make = getattr(diffusers, SCHEDULERS[name])
    if name == "flow":
        return make(num_train_timesteps=c.num_timesteps, shift=shift)
    settings: dict[str, Any] = {"num_train_timesteps": c.num_timesteps}
    if c.is_flow:
        settings |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift}
    else:
        settings |= {
            "beta_schedule": _BETAS[c.schedule],
            "beta_start": c.beta_start,
            "beta_end": c.beta_end,
            "prediction_type": _PREDICTIONS[c.prediction],
            "rescale_betas_zero_snr": c.zero_terminal_snr,
            "timestep_spacing": "trailing",
        }
        if name in ("ddpm", "ddim"):
            settings["clip_sample"] = False
    return make(**settings)


def run_of_checkpoint(meta: Mapping[str, Any], source: str, tp: int, pp: int, world_size: int) -> DiffusionRun:
    """The configuration that a checkpoint's model was trained with, on another mesh.

    Raises:
        ConfigError: it is of another family, or cannot be split like this.
    """
    values = meta.get("config", {})
    if values.get("model", {}).get("family") != "dit":
        raise ConfigError(f"{source} does not hold a diffusion transformer")
    kept = {name: values[name] for name in ("model", "objective") if name in values}
    run = from_dict(DiffusionRun, {**kept, "mesh": {"tp": tp, "pp": pp}}, source)
    shape = MeshShape.for_world(world_size, pp=pp, tp=tp)
    if faults := list(run.faults(shape, needs_data=False)):
        raise ConfigError("; ".join(faults))
    if pp > run.model.num_layers:
        raise ConfigError(f"pp={pp} stages for model.num_layers={run.model.num_layers}; use as many at most")
    return run


class _Predictor(nn.Module):
    """A stage that predicts instead of computing a loss; the last one keeps what it found, in order."""

    def __init__(self, stage: DiT):
        super().__init__()
        self.stage = stage
        self.found: list[Tensor] = []

    def forward(self, micro_batch: Mapping[str, Tensor], hidden: Tensor | None = None) -> Tensor:
        out = self.stage.predict(micro_batch, hidden)
        if not self.stage.span.head:
            return out
        self.found.append(out)
        return out.new_zeros(())


class Sampler:
    """A checkpoint's model on a mesh.

    Args:
        run: the configuration that it was trained with, but for the mesh.
        kind: ``"ema"`` for the moving average of the weights, ``"param"`` for the weights.

    Raises:
        CheckpointError: on every rank, as of :func:`~megatron_ds.checkpoint.load.load`.
    """

    def __init__(self, run: DiffusionRun, checkpoint: str | Path, kind: str, mesh: Mesh):
        self.run, self.mesh = run, mesh
        span = stage_spans(split_layers(run.model.num_layers, mesh.pp.size))[mesh.pp.rank]
        settings = StageSettings(
            mesh, span, sequence_parallel=run.mesh.sequence_parallel, device=mesh.device, dtype=torch.float32
        )
        stage = DiT(run.model, run.objective, settings).eval()
        shards = [FlatShard.of(spec_of(p), kind, p.data) for p in stage.parameters()]
        load(checkpoint, shards, mesh.world)
        self._stage = _Predictor(stage)
        parts = mesh.tp.size if stage.partial else 1
        self._executor = Executor(
            build_schedule("gpipe", mesh.pp.size, 1),
            {mesh.pp.rank: self._stage},
            pp=mesh.pp,
            pp_back=mesh.pp_back,
            activation_shape=partial(activation_shape, run.model, parts),
            dtype=torch.float32,
            device=mesh.device,
        )

    @torch.no_grad()
    def predict(self, images: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        """The model's prediction, on every rank of tp and pp. All of ``images`` are this replica's."""
        parts = self.mesh.pp.size if len(images) % self.mesh.pp.size == 0 else 1
        micro_batches = [
            {"images": i, "time": t, "labels": y}
            for i, t, y in zip(images.chunk(parts), time.chunk(parts), labels.chunk(parts))
        ]
        self._stage.found.clear()
        self._executor.run_forward(micro_batches)
        found = torch.cat(self._stage.found) if self._stage.found else torch.zeros_like(images)
        return comm.all_reduce(found, self.mesh.pp)  # zeros but from the last stage

    def sample(
        self, labels: Sequence[int], scheduler: str, steps: int, guidance: float = 1.0, seed: int = 0, batch: int = 64
    ) -> Tensor:
        """Images of these classes, fp32 ``[n, channels, height, width]`` on every rank.

        Args:
            guidance: 1 follows the class as trained; above 1 further away from 'no class' (Ho and Salimans 2022).
            batch: images that a replica draws at once.

        Raises:
            ConfigError: a class or a scheduler that the model does not have.
        """
        wrong = [label for label in labels if not 0 <= label <= self.run.model.num_classes]
        if wrong:
            raise ConfigError(
                f"class {wrong[0]} is none of the model's, 0 to {self.run.model.num_classes - 1}, or "
                f"{self.run.model.num_classes} for none"
            )
        dp = self.mesh.dp
        together = batch * dp.size
        drawn = []
        for first in range(0, len(labels), together):
            size = min(batch, -(-(len(labels) - first) // dp.size))
            numbers = [min(first + dp.rank * size + i, len(labels) - 1) for i in range(size)]
            own = self._draw(numbers, [labels[n] for n in numbers], scheduler, steps, guidance, seed)
            drawn.append(comm.gather_dim0(own, dp).wait()[: len(labels) - first])
        return torch.cat(drawn)

    def _draw(
        self, numbers: Sequence[int], classes: Sequence[int], name: str, steps: int, guidance: float, seed: int
    ) -> Tensor:
        m, device = self.run.model, self.mesh.device
        scheduler = make_scheduler(self.run.objective, name, self.run.objective.shift)
        scheduler.set_timesteps(steps, device=device)
        generators = [torch.Generator().manual_seed(derive_seed(seed, "image", number)) for number in numbers]
        shape = (m.channels, m.image_size, m.image_size)
        images = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)
        images = images * getattr(scheduler, "init_noise_sigma", 1.0)
        labels = torch.tensor(classes, device=device)
        guided = guidance != 1.0
        both = torch.cat([labels, torch.full_like(labels, m.num_classes)]) if guided else labels
        for time in scheduler.timesteps:
            seen = scheduler.scale_model_input(images, time) if hasattr(scheduler, "scale_model_input") else images
            seen = torch.cat([seen, seen]) if guided else seen
            found = self.predict(seen, time.expand(len(seen)), both)
            if guided:
                with_class, without = found.chunk(2)
                found = without + guidance * (with_class - without)
            images = scheduler.step(found, time, images, **_generator(scheduler, generators)).prev_sample
        return images


def save_grid(images: Tensor, columns: int, path: str | Path) -> None:
    """Write images ``[n, channels, height, width]`` of -1 to 1 as one PNG, row by row with a line between them."""
    from matplotlib import image

    n, channels, height, width = images.shape
    if channels not in (1, 3):
        raise ConfigError(f"images of {channels} channels cannot be shown: they are latents, which a VAE decodes")
    rows = -(-n // columns)
    larger = max(1, 48 // height)  # so that a person sees small ones
    grid = torch.full((rows, columns, channels, height * larger + 2, width * larger + 2), 0.5)
    shown = (images.detach().float().cpu().clamp(-1, 1) + 1) / 2
    shown = shown.repeat_interleave(larger, 2).repeat_interleave(larger, 3)
    grid.flatten(0, 1)[:n, :, 1:-1, 1:-1] = shown
    whole = grid.permute(0, 3, 1, 4, 2).reshape(rows * grid.shape[3], columns * grid.shape[4], channels)
    with replacing(Path(path)) as temporary:
        image.imsave(temporary, (whole.expand(-1, -1, 3) * 255).round().byte().numpy(), format="png")


def _generator(scheduler: Any, generators: list[torch.Generator]) -> dict[str, Any]:
    """The generators where the scheduler draws noise: one an image."""
    # Euler's step takes one generator and, without churn, draws nothing.
    return {} if "Euler" in type(scheduler).__name__ else {"generator": generators}
