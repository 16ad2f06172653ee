"""Gradient clipping by the global norm: the coefficient that follows from it."""

from __future__ import annotations

import torch


def clip_coefficient(norm_squared: torch.Tensor, clip_norm: float) -> torch.Tensor:
    """The factor that brings a gradient to a norm of ``clip_norm`` at most: ``min(1, clip / (norm + 1e-6))``.

    That of ``torch.nn.utils.clip_grad_norm_``, of Megatron-LM and of DeepSpeed.

    Args:
        norm_squared: 0-d, the global squared norm. NaN and Inf pass through as NaN and 0: decide on skipping first.
        clip_norm: largest norm; 0 turns clipping off (the factor is 1).
    """
    if clip_norm < 0:
        raise ValueError(f"clip_norm={clip_norm} is negative; use 0 for no clipping")
    if clip_norm == 0:
        return torch.ones_like(norm_squared)
    return (clip_norm / (norm_squared.sqrt() + 1e-6)).clamp(max=1.0)
