"""Noise schedules, times and weights against the schedulers and the training tools of `diffusers`."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_snr

from megatron_ds.config import from_dict
from megatron_ds.config.diffusion import ObjectiveConfig
from megatron_ds.errors import ConfigError
from megatron_ds.models import objectives
from megatron_ds.models.sdxl import objective_of


def objective(**values: Any) -> ObjectiveConfig:
    return from_dict(ObjectiveConfig, values, "test")


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize(
    ("schedule", "theirs", "ends"),
    [
        ("linear", "linear", (1e-4, 0.02)),
        ("scaled_linear", "scaled_linear", (0.00085, 0.012)),
        ("cosine", "squaredcos_cap_v2", (1e-4, 0.02)),
    ],
)
def test_discrete_schedules_are_those_of_diffusers(
    schedule: str, theirs: str, ends: tuple[float, float], zero_snr: bool
) -> None:
    start, end = ends
    c = objective(
        prediction="v", schedule=schedule, beta_start=start, beta_end=end, zero_terminal_snr=zero_snr, num_timesteps=100
    )
    other = DDPMScheduler(
        100, beta_schedule=theirs, beta_start=start, beta_end=end, rescale_betas_zero_snr=zero_snr
    ).alphas_cumprod
    levels = objectives.noise_levels(c, (torch.arange(100, dtype=torch.float64) + 0.5) / 100, tokens=16)
    assert torch.equal(levels.time, torch.arange(100, dtype=torch.float64))
    torch.testing.assert_close(levels.alpha**2, other.double(), rtol=0, atol=2e-6)
    torch.testing.assert_close(levels.alpha**2 + levels.sigma**2, torch.ones(100, dtype=torch.float64))
    assert (levels.alpha[-1] == 0) == zero_snr


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_the_target_and_the_noisy_image_give_the_image_back(prediction: str) -> None:
    """By the scheduler of `diffusers`, told what is predicted."""
    c = objective(prediction=prediction, schedule="cosine")
    kind = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}[prediction]
    scheduler = DDPMScheduler(
        1000, beta_schedule="squaredcos_cap_v2", prediction_type=kind, clip_sample=False, variance_type="fixed_small"
    )
    scheduler.set_timesteps(1000)
    generator = torch.Generator().manual_seed(0)
    image, noise = torch.randn(2, 2, 1, 4, 4, generator=generator, dtype=torch.float64)
    levels = objectives.noise_levels(c, torch.tensor([0.3005, 0.3005], dtype=torch.float64), tokens=4)
    noisy, target = objectives.noisy(levels, image, noise), objectives.target(c, levels, image, noise)
    torch.testing.assert_close(noisy, scheduler.add_noise(image, noise, levels.time.long()), rtol=0, atol=1e-5)
    found = scheduler.step(target, 300, noisy, generator=generator).pred_original_sample
    torch.testing.assert_close(found, image, rtol=0, atol=1e-4)


def test_flow_goes_straight_from_the_image_to_the_noise() -> None:
    c = objective(prediction="flow", schedule="flow", shift=3.0)
    u = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    levels = objectives.noise_levels(c, u, tokens=16)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=u.flip(0).tolist())
    torch.testing.assert_close(levels.sigma.flip(0).float(), scheduler.sigmas[:-1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(levels.time.flip(0).float(), scheduler.timesteps, rtol=1e-5, atol=1e-3)
    image, noise = torch.randn(2, 50, 3, 2, 2, dtype=torch.float64)
    velocity = objectives.target(c, levels, image, noise)
    at = levels.sigma.view(-1, 1, 1, 1)
    torch.testing.assert_close(objectives.noisy(levels, image, noise) - at * velocity, image)
    # Esser et al. 2024, eq. 23: with four times the tokens, twice the shift.
    far = objective(prediction="flow", schedule="flow", shift=3.0, shift_base_tokens=16)
    assert objectives.shift_of(far, 64) == 2 * objectives.shift_of(far, 16) == 6.0


def test_logit_normal_times_have_a_normal_logit() -> None:
    c = objective(prediction="flow", schedule="flow", density="logit_normal", logit_mean=0.5, logit_std=2.0)
    u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    logit = torch.logit(objectives.noise_levels(c, u, tokens=4).sigma)
    assert logit.mean().item() == pytest.approx(0.5, abs=1e-3) and logit.std().item() == pytest.approx(2.0, abs=1e-2)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_min_snr_weights_are_those_of_the_training_scripts(prediction: str) -> None:
    c = objective(prediction=prediction, schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, min_snr=5.0)
    scheduler = DDPMScheduler(1000, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    levels = objectives.noise_levels(c, (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000, tokens=4)
    snr = compute_snr(scheduler, torch.arange(1000)).double()
    want = snr.clamp(max=5.0) / (snr if prediction == "epsilon" else snr + 1)
    torch.testing.assert_close(objectives.weight(c, levels), want, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("prediction", "schedule"), [("x0", "cosine"), ("v", "cosine"), ("flow", "flow")])
def test_min_snr_is_one_weight_of_the_images_error_whatever_is_predicted(prediction: str, schedule: str) -> None:
    c = objective(prediction=prediction, schedule=schedule, min_snr=5.0)
    levels = objectives.noise_levels(c, torch.linspace(0.05, 0.95, 7, dtype=torch.float64), tokens=4)
    generator = torch.Generator().manual_seed(0)
    image, noise, wrong = torch.randn(3, 7, 1, 2, 2, dtype=torch.float64, generator=generator)
    x_t = objectives.noisy(levels, image, noise)
    alpha, sigma = levels.alpha.view(-1, 1, 1, 1), levels.sigma.view(-1, 1, 1, 1)
    predicted = {  # what says that the image is `wrong`
        "x0": wrong,
        "v": (alpha * x_t - wrong) / sigma,
        "flow": (x_t - wrong) / sigma,
    }[prediction]
    error = (predicted - objectives.target(c, levels, image, noise)).square().sum((1, 2, 3))
    want = (wrong - image).square().sum((1, 2, 3)) * (levels.alpha / levels.sigma).square().clamp(max=5.0)
    torch.testing.assert_close(objectives.weight(c, levels) * error, want)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_learned_variances_are_trained_by_the_variational_bound(prediction: str) -> None:
    """Of every step but the first the divergence of two normal distributions, of the first a share of one."""
    c = ObjectiveConfig(prediction=prediction, schedule="cosine", num_timesteps=20, vlb_weight=0.25)
    generator = torch.Generator().manual_seed(0)
    shape = (3, 20, 4, 2)
    image, noise, error, variance = torch.randn((4, *shape), generator=generator, dtype=torch.float64)
    image[0, 0, 0, 0], image[1, 0, 0, 0], image[2, 0] = -1.0, 1.0, image[2, 0].clamp(-0.9, 0.9)
    levels = objectives.noise_levels(c, (torch.arange(20, dtype=torch.float64) + 0.5) / 20, tokens=4)
    predicted = {"epsilon": noise, "x0": image}.get(prediction)
    alpha, sigma = (values.view(20, 1, 1) for values in (levels.alpha, levels.sigma))
    if predicted is None:
        predicted = alpha * noise - sigma * image
    predicted = (predicted + 0.1 * error).requires_grad_()
    variance.requires_grad_()
    got = objectives.variance_bound(c, levels, image, noise, predicted, variance)

    beta = objectives.betas(c)
    kept = (1 - beta).cumprod(0)
    seen = alpha * image + sigma * noise
    one = torch.autograd.grad(got.sum(), [predicted, variance], allow_unused=True)
    assert one[0] is None and one[1].abs().min(0).values.max() > 0  # the mean learns nothing by it
    with torch.no_grad():
        scale = {"epsilon": -sigma / alpha, "v": -sigma, "x0": torch.ones(1)}[prediction]
        found = image + scale * 0.1 * error
        for t in range(20):
            before = kept[t - 1] if t else torch.ones(())
            posterior = beta * (1 - torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])) / (1 - kept)
            low = posterior[max(t, 1)]
            std = (variance[:, t] + 1).div(2).mul(beta[t].log() - low.log()).add(low.log()).exp().sqrt()
            first, second = before.sqrt() * beta[t] / (1 - kept[t]), (1 - beta[t]).sqrt() * (1 - before) / (1 - kept[t])
            if t:
                true = torch.distributions.Normal(first * image[:, t] + second * seen[:, t], low.sqrt())
                model = torch.distributions.Normal(first * found[:, t] + second * seen[:, t], std)
                want = torch.distributions.kl_divergence(true, model)
            else:
                model, x = torch.distributions.Normal(found[:, t], std), image[:, t]
                above = torch.where(x > 0.999, 1.0, model.cdf(x + 1 / 255))
                want = -(above - torch.where(x < -0.999, 0.0, model.cdf(x - 1 / 255))).clamp(min=1e-12).log()
            torch.testing.assert_close(got[t], 0.25 * 20 * want.sum() / math.log(2), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.EDMDPMSolverMultistepScheduler(),
        diffusers.FlowMatchEulerDiscreteScheduler(),
        diffusers.EulerDiscreteScheduler(timestep_type="continuous"),
        diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_a_scheduler_of_diffusers_with_other_noise_is_refused(scheduler: Any) -> None:
    with pytest.raises(ConfigError, match="such noise is not built here; use a scheduler of linear"):
        objective_of(dict(scheduler.config), None, None, 0.0)
