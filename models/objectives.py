"""Diffusion objectives as small pure functions: noise schedules, training times, targets and weights.

A noisy image is ``alpha x0 + sigma noise``. On the discrete schedules ``alpha^2 = a_t`` and ``sigma^2 = 1 - a_t`` with
``a_t`` the product of ``1 - beta`` up to step t (Ho et al. 2020, eq. 4); of rectified flow ``alpha = 1 - t`` and
``sigma = t`` (Liu et al. 2023). Times and coefficients are float64, whatever the model computes in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ds.config.diffusion import ObjectiveConfig


@dataclass(frozen=True)
class NoiseLevels:
    """Of a micro-batch, ``[b]`` float64 each.

    Attributes:
        time: what the model is told: a step of the schedule, 0 to ``num_timesteps``; whole on discrete schedules.
        alpha, sigma: shares of image and noise.
    """

    time: Tensor
    alpha: Tensor
    sigma: Tensor


def betas(c: ObjectiveConfig) -> Tensor:
    """``[num_timesteps]`` float64, of a discrete schedule."""
    n = c.num_timesteps
    if c.schedule == "linear":
        found = torch.linspace(c.beta_start, c.beta_end, n, dtype=torch.float64)
    elif c.schedule == "scaled_linear":
        found = torch.linspace(c.beta_start**0.5, c.beta_end**0.5, n, dtype=torch.float64) ** 2
    else:  # Nichol and Dhariwal 2021, eq. 17
        steps = (torch.arange(n + 1, dtype=torch.float64) / n + 0.008) / 1.008
        kept = torch.cos(steps * math.pi / 2) ** 2
        found = (1 - kept[1:] / kept[:-1]).clamp(max=0.999)
    return rescaled_to_zero_snr(found) if c.zero_terminal_snr else found


def rescaled_to_zero_snr(betas: Tensor) -> Tensor:
    """The first step as it was and nothing but noise at the last (Lin et al. 2024, algorithm 1)."""
    roots = (1 - betas).cumprod(0).sqrt()
    roots = (roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))
    kept = roots**2
    return 1 - torch.cat([kept[:1], kept[1:] / kept[:-1]])


def shift_of(c: ObjectiveConfig, tokens: int) -> float:
    """How much rectified flow's times are shifted for images of so many tokens (Esser et al. 2024, eq. 23)."""
    return c.shift * (math.sqrt(tokens / c.shift_base_tokens) if c.shift_base_tokens else 1.0)


def noise_levels(c: ObjectiveConfig, uniform: Tensor, tokens: int) -> NoiseLevels:
    """From numbers uniform in (0, 1), ``[b]`` float64, which are the sample's own."""
    share = uniform
    if c.density == "logit_normal":
        share = torch.sigmoid(c.logit_mean + c.logit_std * torch.special.ndtri(uniform))
    if c.is_flow:
        shift = shift_of(c, tokens)
        share = shift * share / (1 + (shift - 1) * share)
        return NoiseLevels(share * c.num_timesteps, 1 - share, share)
    step = (share * c.num_timesteps).long().clamp(max=c.num_timesteps - 1)
    kept = (1 - betas(c)).cumprod(0).to(uniform.device)[step]
    return NoiseLevels(step.double(), kept.sqrt(), (1 - kept).clamp(min=0).sqrt())


def noisy(levels: NoiseLevels, image: Tensor, noise: Tensor) -> Tensor:
    """``alpha x0 + sigma noise``, ``[b, ...]`` in the image's dtype."""
    return _per_sample(levels.alpha, image) * image + _per_sample(levels.sigma, image) * noise


def target(c: ObjectiveConfig, levels: NoiseLevels, image: Tensor, noise: Tensor) -> Tensor:
    """What the model should predict."""
    if c.prediction == "epsilon":
        return noise
    if c.prediction == "x0":
        return image
    if c.prediction == "flow":
        return noise - image
    return _per_sample(levels.alpha, image) * noise - _per_sample(levels.sigma, image) * image


def weight(c: ObjectiveConfig, levels: NoiseLevels) -> Tensor:
    """``[b]`` float64: the weight of a sample's squared error.

    min-SNR is the weight ``min(snr, gamma)`` of the image's error, said in what is predicted (Hang et al. 2023, section
    3.4): the error of the noise is ``snr`` times that of the image, of ``v`` ``snr + 1`` times, and of rectified flow's
    velocity ``1 / sigma^2`` times.
    """
    if c.min_snr is None:
        return torch.ones_like(levels.alpha)
    snr = levels.alpha**2 / levels.sigma.clamp(min=1e-10) ** 2
    clamped = snr.clamp(max=c.min_snr)
    if c.prediction == "epsilon":
        return (c.min_snr / snr.clamp(min=1e-10)).clamp(max=1.0)
    if c.prediction == "v":
        return clamped / (snr + 1)
    return clamped if c.prediction == "x0" else clamped * levels.sigma**2


def variance_bound(
    c: ObjectiveConfig, levels: NoiseLevels, image: Tensor, noise: Tensor, predicted: Tensor, variance: Tensor
) -> Tensor:
    """``[b]``: ``vlb_weight`` times the variational bound in bits, summed over a sample's elements, of one step in
    place of all ``num_timesteps`` (Nichol and Dhariwal 2021, eq. 16).

    The mean is ``predicted`` without its gradient, so that the bound trains variances alone; they lie between the two
    bounds of eq. 15, at -1 the lower one. All of ``[s, b, p * p, c]``.
    """
    step, predicted = levels.time.long(), predicted.detach()
    beta = betas(c).to(image.device)
    kept = (1 - beta).cumprod(0)
    before = torch.cat([kept.new_ones(1), kept[:-1]])
    posterior = beta * (1 - before) / (1 - kept)
    posterior = torch.cat([posterior[1:2], posterior[1:]])[step]  # the first is 0, which has no logarithm

    def of(values: Tensor) -> Tensor:
        return values.to(image.dtype).view(-1, 1, 1)

    alpha, sigma = of(levels.alpha), of(levels.sigma)
    seen = alpha * image + sigma * noise
    if c.prediction == "epsilon":
        found = (seen - sigma * predicted) / alpha
    else:
        found = predicted if c.prediction == "x0" else alpha * seen - sigma * predicted
    share, low, high = (variance + 1) / 2, of(posterior.log()), of(beta[step].log())
    log_variance = share * high + (1 - share) * low
    distance = of((beta * before.sqrt() / (1 - kept))[step]) * (image - found)
    divergence = 0.5 * (log_variance - low - 1 + (low - log_variance).exp() + distance**2 * (-log_variance).exp())
    bound = torch.where(of(step == 0) > 0, _of_first_step(image, found, log_variance), divergence)
    return c.vlb_weight * c.num_timesteps / math.log(2) * bound.flatten(2).sum((0, 2))


def _of_first_step(image: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """``-log`` of the share of a normal distribution in the pixel's 1/255 of the way from -1 to 1 (Ho et al. 2020, eq.
    13)."""
    above, below = (torch.special.ndtr((image + edge / 255 - mean) * (-0.5 * log_variance).exp()) for edge in (1, -1))
    above, below = above.where(image <= 0.999, 1.0), below.where(image >= -0.999, 0.0)
    return -(above - below).clamp(min=1e-12).log()


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype).view(-1, *(1,) * (like.dim() - 1))
