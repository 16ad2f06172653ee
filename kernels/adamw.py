"""AdamW over flat memory in one pass, which keeps half-precision weights and their fp32 master weights in step.

Per weight 32 bytes: gradient, both moments and master weight read, the last three written, and the half-precision
weight read and written. It is read because it may have been written by somebody else since the last update: where it is
not what the master weight rounds to, the master weight follows it first.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from megatron_ds.kernels.registry import Op, define

ADAMW = Op("adamw", twin="adamw")  # of master weights, which are fp32 where the weights are half precision


@dataclass(frozen=True)
class AdamWNumbers:
    """Of one update; ``step`` counts from 1 (Loshchilov & Hutter 2019, algorithm 2)."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int


def adamw_(
    master: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    low: Tensor | None,
    scale: Tensor,
    numbers: AdamWNumbers,
) -> None:
    """One update in place, with the gradient times ``scale``; none at all where that is NaN.

    Args:
        master, gradient, exp_avg, exp_avg_sq: ``[n]``.
        low: ``[n]``, the weights in half precision; None: ``master`` are the weights.
        scale: 0-d fp32, on the device.
    """
    if ADAMW.choose(master) == "triton":
        torch.ops.megatron_ds.adamw_(master, gradient, exp_avg, exp_avg_sq, low, scale, *astuple(numbers))
    else:
        adamw_reference_(master, gradient, exp_avg, exp_avg_sq, low, scale, numbers)


def adamw_reference_(
    master: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    low: Tensor | None,
    scale: Tensor,
    numbers: AdamWNumbers,
) -> None:
    n = numbers
    written = [t for t in (master, exp_avg, exp_avg_sq, low) if t is not None]
    before = [t.clone() for t in written]
    if low is not None:
        master.copy_(torch.where(master.to(low.dtype) == low, master, low.to(master.dtype)))
    g = gradient * scale
    exp_avg.lerp_(g, 1.0 - n.beta1)
    exp_avg_sq.mul_(n.beta2).addcmul_(g, g, value=1.0 - n.beta2)
    master.mul_(1.0 - n.lr * n.weight_decay)
    root = (exp_avg_sq / (1.0 - n.beta2**n.step)).sqrt_().add_(n.eps)
    master.addcdiv_(exp_avg, root, value=-n.lr / (1.0 - n.beta1**n.step))
    if low is not None:
        low.copy_(master)
    for tensor, old in zip(written, before):
        tensor.copy_(torch.where(scale.isnan(), old, tensor))


define(
    "adamw_(Tensor(a!) master, Tensor gradient, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!)? low,"
    " Tensor scale, float lr, float beta1, float beta2, float eps, float weight_decay, int step) -> ()",
    lambda master, *rest: ADAMW.load(master).adamw_(master, *rest),
    lambda master, *rest: None,
)
