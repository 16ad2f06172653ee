"""torch's own fused optimizers over flat segments: which state they keep, and one update.

Everything is allocated by the caller and handed in, so that the state lives in flat buffers, exists before the first
step (a checkpoint at step 0 is like any other) and can be moved or saved without asking the optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_ds.config import OptimizerConfig


def state_kinds(config: OptimizerConfig) -> tuple[str, ...]:
    """Names of the state tensors the optimizer keeps for each parameter, each of the parameter's size."""
    if config.name == "adamw":
        return ("exp_avg", "exp_avg_sq")
    return ("momentum_buffer",) if config.momentum > 0 else ()


@dataclass
class OptimizerSegment:
    """One 1-D range of master weights with its gradient and its state, all views of flat buffers.

    ``state`` has one tensor for each of :func:`state_kinds`, zero at the start of a run.
    """

    master: torch.Tensor
    gradient: torch.Tensor
    state: dict[str, torch.Tensor]
    weight_decay: bool


class SegmentOptimizer:
    """A ``torch.optim`` optimizer over ``segments`` (at least one), all of one dtype and device.

    AdamW: ``m = b1 m + (1 - b1) g``, ``v = b2 v + (1 - b2) g^2``, ``w -= lr (wd w + m^ / (sqrt(v^) + eps))``
    (Loshchilov & Hutter 2019, algorithm 2). SGD: ``g += wd w``, ``m = mu m + g``, ``w -= lr m``.
    """

    def __init__(self, config: OptimizerConfig, segments: Sequence[OptimizerSegment]):
        groups = [
            {
                "params": [s.master for s in segments if s.weight_decay == decayed],
                "weight_decay": config.weight_decay if decayed else 0.0,
            }
            for decayed in (True, False)
        ]
        groups = [group for group in groups if group["params"]]
        self._optimizer: torch.optim.Optimizer
        if config.name == "adamw":
            self._optimizer = torch.optim.AdamW(
                groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
            )
        else:
            self._optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)
        device = segments[0].master.device
        # AdamW counts the updates of each of its parameters in a tensor; here they are all one number.
        self._counts = torch.zeros(len(segments), dtype=torch.float32, device=device)
        for index, segment in enumerate(segments):
            segment.master.grad = segment.gradient
            state = self._optimizer.state[segment.master]
            state.update(segment.state)
            if config.name == "adamw":
                state["step"] = self._counts[index]
        self._gradients = [segment.gradient for segment in segments]
        self._wide = segments[0].master.dtype == torch.float64

    def set_count(self, updates: int) -> None:
        """Say how many updates the state has seen (AdamW's bias correction), after loading a checkpoint."""
        self._counts.fill_(updates)

    def step(self, lr: float, scale: float | torch.Tensor = 1.0) -> None:
        """One update with gradients multiplied by ``scale``. The gradients are no longer needed and may be changed."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        scaled = isinstance(scale, torch.Tensor) or scale != 1.0
        if scaled and self._wide:
            # The kernel takes its divisor in fp32, which would cost fp64 half its digits.
            torch._foreach_mul_(self._gradients, scale)
        elif scaled:
            # torch.amp.GradScaler's own protocol: the fused kernel divides while it reads, with no pass of its own.
            inverse = 1.0 / torch.as_tensor(scale, dtype=torch.float32, device=self._gradients[0].device)
            self._optimizer.grad_scale = inverse  # type: ignore[attr-defined]
        self._optimizer.step()
        if scaled and not self._wide:
            del self._optimizer.grad_scale  # type: ignore[attr-defined]
