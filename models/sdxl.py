"""SDXL (Podell et al. 2023): how the UNet of `diffusers` is trained on latents, text and sizes.

``b`` batch, ``c`` channels of the latents, ``h`` and ``w`` their height and width, ``s`` tokens of a text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_ds.config.diffusion import ObjectiveConfig
from megatron_ds.config.read import from_dict
from megatron_ds.errors import ConfigError
from megatron_ds.models import objectives
from megatron_ds.models.samplers import BETAS, PREDICTIONS

Batch = Mapping[str, Tensor]
SIZES = ("original_size", "crop_top_left", "target_size")
"""Vertical and horizontal pixels of an image, of what was cut off at its top and left, and of what is left; in this
order the UNet takes them."""
CONDITION = ("text", "pooled", *SIZES)
"""Fields of a micro-batch: ``text`` ``[b, s, channels]``, ``pooled`` ``[b, channels]``, and sizes ``[b, 2]`` each."""


def objective_of(
    scheduler: Mapping[str, Any], prediction_type: str | None, snr_gamma: float | None, empty_prompts: float
) -> ObjectiveConfig:
    """What is trained, of the configuration of a scheduler of `diffusers`.

    Args:
        prediction_type: another than the scheduler's; None: its own.
        empty_prompts: share of samples that are trained without their text.

    Raises:
        ConfigError: a noise schedule or a prediction that there is not.
    """
    betas, name = scheduler.get("beta_schedule"), scheduler.get("_class_name", "the scheduler")
    if betas is None or scheduler.get("timestep_type") == "continuous" or scheduler.get("use_flow_sigmas"):
        raise ConfigError(
            f"{name} has no beta_schedule with its steps as times (EDM's and rectified flow's have none): such noise "
            f"is not built here; use a scheduler of {', '.join(BETAS.values())}"
        )
    wanted = prediction_type or scheduler.get("prediction_type", "epsilon")
    schedules, predictions = ({theirs: ours for ours, theirs in table.items()} for table in (BETAS, PREDICTIONS))
    for name, value, table in (("beta_schedule", betas, schedules), ("prediction_type", wanted, predictions)):
        if value not in table:
            raise ConfigError(f"{name}={value!r} of the scheduler is not built here; use {', '.join(table)}")
    if scheduler.get("trained_betas") is not None:
        raise ConfigError("trained_betas of the scheduler are not built here; use a scheduler with beta_schedule")
    values = {
        "prediction": predictions[wanted],
        "schedule": schedules[betas],
        "num_timesteps": scheduler.get("num_train_timesteps", 1000),
        "beta_start": scheduler.get("beta_start", 1e-4),
        "beta_end": scheduler.get("beta_end", 0.02),
        "zero_terminal_snr": scheduler.get("rescale_betas_zero_snr", False),
        "min_snr": snr_gamma,
        "condition_dropout": empty_prompts,
    }
    return from_dict(ObjectiveConfig, values, "the scheduler")


def denoising_loss(objective: ObjectiveConfig, dtype: torch.dtype) -> Callable[[Callable[..., Any], Batch], Tensor]:
    """The loss of a micro-batch: 0-d, the mean over its samples of each one's weighted mean squared error.

    A micro-batch is one of :class:`~megatron_ds.data.image_samples.DiffusionSamples` with :data:`CONDITION`. Sizes in
    pixels stay in fp32, and so do their sines: bf16 has no odd number above 256.

    Args:
        dtype: of the UNet's weights and of what it computes.
    """

    def loss(unet: Callable[..., Any], batch: Batch) -> Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        latents, noise = batch["images"].to(wide), batch["noise"].to(wide)
        levels = objectives.noise_levels(objective, batch["time"], latents[0, 0].numel())
        pixels = torch.cat([batch[name] for name in SIZES], dim=1).float()
        sizes = {"text_embeds": batch["pooled"].to(dtype), "time_ids": pixels}
        seen = objectives.noisy(levels, latents, noise).to(dtype)
        predicted = unet(seen, levels.time, batch["text"].to(dtype), added_cond_kwargs=sizes).sample.to(wide)
        error = (predicted - objectives.target(objective, levels, latents, noise)).square().flatten(1).mean(1)
        return (error * objectives.weight(objective, levels).to(wide)).mean()

    return loss
