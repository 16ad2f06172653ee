"""Images drawn by a trained diffusion transformer on any mesh, by the schedulers of `diffusers`, with guidance.

What an image becomes follows from (seed, its number) alone: its first noise, and what a scheduler adds on the way, come
from a generator of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from megatron_ds import comm
from megatron_ds.checkpoint.load import load
from megatron_ds.config.diffusion import DiffusionRun, DiTConfig, ObjectiveConfig, image_faults
from megatron_ds.config.read import from_dict
from megatron_ds.errors import ConfigError
from megatron_ds.files import replacing
from megatron_ds.mesh import Mesh, MeshShape
from megatron_ds.models import objectives
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
Told = Mapping[str, Tensor]
"""What a model is told of each image: ``labels``, or ``text`` and ``pooled``; a first dim of images."""
BETAS = MappingProxyType({"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"})
PREDICTIONS = MappingProxyType({"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"})


def make_scheduler(c: ObjectiveConfig, name: str, shift: float = 1.0, learned_variance: bool = False) -> Any:
    """The scheduler of `diffusers` that goes with what the model was trained for.

    Args:
        shift: of rectified flow's times.
        learned_variance: of each step, which ``"ddpm"`` alone uses.

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
            "beta_schedule": BETAS[c.schedule],
            "beta_start": c.beta_start,
            "beta_end": c.beta_end,
            "prediction_type": PREDICTIONS[c.prediction],
            "rescale_betas_zero_snr": c.zero_terminal_snr,
            "timestep_spacing": "trailing",
        }
        if name in ("ddpm", "ddim"):
            settings["clip_sample"] = False
        if name == "ddpm" and learned_variance:
            settings["variance_type"] = "learned_range"
    return make(**settings)


def check_steps(c: ObjectiveConfig, steps: int) -> None:
    """Raise ConfigError for so many evaluations of the model as its noise schedule does not have."""
    most = steps if c.is_flow else c.num_timesteps
    if not 1 <= steps <= most:
        limit = "1 or more" if c.is_flow else f"1 to objective.num_timesteps={c.num_timesteps}"
        raise ConfigError(f"{steps} steps to draw an image: use {limit}")


def run_of_checkpoint(meta: Mapping[str, Any], source: str, tp: int, pp: int, world_size: int) -> DiffusionRun:
    """The configuration that a checkpoint's model was trained with, on another mesh.

    Without sequence parallelism: images and texts of any length are drawn by any number of ranks.

    Raises:
        ConfigError: it is of another family, or cannot be split like this.
    """
    values = meta.get("config", {})
    if values.get("model", {}).get("family") != "dit":
        raise ConfigError(f"{source} does not hold a diffusion transformer")
    kept = {name: values[name] for name in ("model", "objective") if name in values}
    run = from_dict(DiffusionRun, {**kept, "mesh": {"tp": tp, "pp": pp, "sequence_parallel": False}}, source)
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


@dataclass(frozen=True)
class _Drawing:
    """How images are drawn, besides what is in them. ``shape``: channels, height, width."""

    shape: tuple[int, int, int]
    scheduler: str
    steps: int
    guidance: float
    seed: int


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
        settings = StageSettings(mesh, span, device=mesh.device, dtype=torch.float32)
        stage = DiT(run.model, run.objective, settings).eval()
        shards = [FlatShard.of(spec_of(p), kind, p.data) for p in stage.parameters()]
        load(checkpoint, shards, mesh.world)
        self._stage = _Predictor(stage)
        self._executor = Executor(
            build_schedule("gpipe", mesh.pp.size, 1),
            {mesh.pp.rank: self._stage},
            pp=mesh.pp,
            pp_back=mesh.pp_back,
            activation_shape=partial(activation_shape, run.model, 1),
            dtype=torch.float32,
            device=mesh.device,
        )

    @torch.no_grad()
    def predict(self, images: Tensor, time: Tensor, told: Told) -> Tensor:
        """The model's prediction, on every rank of tp and pp. All of ``images`` are this replica's."""
        parts = self.mesh.pp.size if len(images) % self.mesh.pp.size == 0 else 1
        seen = {"images": images, "time": time, **told}
        cut = {name: tensor.chunk(parts) for name, tensor in seen.items()}
        self._stage.found.clear()
        self._executor.run_forward([{name: of[i] for name, of in cut.items()} for i in range(parts)])
        nothing = images.new_zeros(len(images), self.run.model.out_channels, *images.shape[2:])
        found = torch.cat(self._stage.found) if self._stage.found else nothing
        return comm.all_reduce(found, self.mesh.pp)  # zeros but from the last stage

    def sample(
        self,
        wanted: Sequence[int] | Told,
        scheduler: str,
        steps: int,
        guidance: float = 1.0,
        seed: int = 0,
        batch: int = 64,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Images of these classes or texts, fp32 ``[n, channels, height, width]`` on every rank.

        Args:
            wanted: labels; or ``text`` ``[n, t, text_size]`` and ``pooled`` ``[n, pooled_size]``, and, where samples
                without a text were trained with other embeddings than zeros, those as ``empty.text`` and
                ``empty.pooled``, with a first dim 1.
            guidance: 1 follows what is wanted as trained; above 1 further away from 'no class' or that text (Ho and
                Salimans 2022).
            batch: images that a replica draws at once.
            size: height and width of the images, or of their latents. Default: ``model.image_size``.

        Raises:
            ConfigError: a class, a text, a size, a scheduler or a number of steps that the model does not have.
        """
        check_steps(self.run.objective, steps)
        c, dp, device = self.run.model, self.mesh.dp, self.mesh.device
        height, width = size or (c.image_size, c.image_size)
        if faults := [*image_faults(self.run, height, width, tp=1), *told_faults(c, wanted)]:
            raise ConfigError("; ".join(faults))
        told, without = told_and_not(c, wanted)
        told, without = ({name: t.to(device) for name, t in of.items()} for of in (told, without))
        total = len(next(iter(told.values())))
        draw = _Drawing((c.channels, height, width), scheduler, steps, guidance, seed)
        drawn = []
        for first in range(0, total, batch * dp.size):
            size_here = min(batch, -(-(total - first) // dp.size))
            numbers = [min(first + dp.rank * size_here + i, total - 1) for i in range(size_here)]
            own = self._draw(numbers, {name: tensor[numbers] for name, tensor in told.items()}, without, draw)
            drawn.append(comm.gather_dim0(own, dp).wait()[: total - first])
        return torch.cat(drawn)

    def _draw(self, numbers: Sequence[int], told: Told, without: Told, how: _Drawing) -> Tensor:
        m, device, objective = self.run.model, self.mesh.device, self.run.objective
        shift = objectives.shift_of(objective, math.prod(how.shape[1:]) // m.patch_size**2)
        scheduler = make_scheduler(objective, how.scheduler, shift, m.learned_variance)
        scheduler.set_timesteps(how.steps, device=device)
        generators = [torch.Generator().manual_seed(derive_seed(how.seed, "image", number)) for number in numbers]
        images = torch.stack([torch.randn(how.shape, generator=g) for g in generators]).to(device)
        images = images * getattr(scheduler, "init_noise_sigma", 1.0)
        guided = how.guidance != 1.0
        if guided:
            told = {name: torch.cat([t, without[name].expand_as(t)]) for name, t in told.items()}
        times = scheduler.timesteps
        for time, following in zip(times, [*times[1:], times.new_tensor(-1)]):
            seen = scheduler.scale_model_input(images, time) if hasattr(scheduler, "scale_model_input") else images
            seen = torch.cat([seen, seen]) if guided else seen
            found = self.predict(seen, time.expand(len(seen)), told)
            found, variance = found.split([m.channels, m.out_channels - m.channels], dim=1)
            if guided:
                wanted, other = found.chunk(2)
                found, variance = other + how.guidance * (wanted - other), variance.chunk(2)[0]
            if how.scheduler == "ddpm":
                found = torch.cat([found, variance], dim=1)
            if how.scheduler == "ddim":
                # Its step goes back by num_train_timesteps // num_inference_steps, which is another way than to the
                # next time where the number of steps does not divide that of times: the images stay noisy.
                scheduler.num_inference_steps = Fraction(objective.num_timesteps, int(time - following))
            images = scheduler.step(found, time, images, **_generator(scheduler, generators)).prev_sample
        return images


def told_faults(c: DiTConfig, wanted: Sequence[int] | Told) -> Iterator[str]:
    """Why the model cannot be told that, if it cannot."""
    if not isinstance(wanted, Mapping):
        if c.has_text:
            yield "the model is told texts and no classes; give them with --text, or their embeddings with --embeddings"
        elif wrong := [label for label in wanted if not 0 <= label <= c.num_classes]:
            yield (f"class {wrong[0]} is none of the model's, 0 to {c.num_classes - 1}, or {c.num_classes} for none")
        return
    if not c.has_text:
        yield "the model is told classes and no texts; use --classes"
        return
    names = ("text", "pooled")
    if missing := [name for name in names if name not in wanted]:
        yield f"there is no {missing[0]!r} among the embeddings: {', '.join(map(repr, wanted))}"
        return
    n, tokens = wanted["text"].shape[:2]
    shapes = {"text": (n, tokens, c.text_size), "pooled": (n, c.pooled_size)}
    shapes |= {f"empty.{name}": (1, *shapes[name][1:]) for name in names}
    for name, shape in shapes.items():
        if name in wanted and wanted[name].shape != shape:
            yield f"{name!r} has the shape {list(wanted[name].shape)}, and the model takes {list(shape)}"


def told_and_not(c: DiTConfig, wanted: Sequence[int] | Told) -> tuple[Told, Told]:
    """What the model is told of each image, and for guidance, with a first dim 1, what of none."""
    if not isinstance(wanted, Mapping):
        return {"labels": torch.tensor(wanted)}, {"labels": torch.tensor([c.num_classes])}
    told = {name: wanted[name] for name in ("text", "pooled")}
    return told, {name: wanted.get(f"empty.{name}", torch.zeros_like(t[:1])) for name, t in told.items()}


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
