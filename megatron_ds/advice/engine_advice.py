"""Advice on a user's model and settings, with numbers that its first steps give: how long they compute, what they keep.

The rules are :mod:`megatron_ds.advice.rules`; each is said once, on rank 0.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from megatron_ds import comm
from megatron_ds.advice import rules
from megatron_ds.advice.activation_meter import ActivationMeter, recomputes
from megatron_ds.advice.first_inputs import FirstInputs
from megatron_ds.advice.rules import Advice
from megatron_ds.advice.run_advice import SETTLED, RunAdvice, recomputation, transfers
from megatron_ds.mesh import Mesh
from megatron_ds.optim.loss_scaler import LossScaler
from megatron_ds.zero.main_grad import MainGradient, is_trained
from megatron_ds.zero.optimizer import ZeroOptimizer


class EngineAdvice(RunAdvice):
    """Looks at an engine after every step.

    Args:
        ranks_sharing: ranks of this node, which share its disk.

    Attributes:
        times_steps: whether :meth:`after` wants to know how long a step computes.
        scheduled_twice: whether the loop steps the engine's scheduler too.
    """

    def __init__(
        self,
        zero: ZeroOptimizer,
        scaler: LossScaler,
        mesh: Mesh,
        micro_batches: int,
        warn: Callable[[str], object],
        module: nn.Module,
        ranks_sharing: int,
    ):
        super().__init__(zero, scaler, mesh, micro_batches, warn)
        self.module, self.ranks_sharing = module, ranks_sharing
        first = mesh.rank == 0
        self._meter = ActivationMeter(module) if first and micro_batches > 1 and recomputes(module) else None
        self._inputs = FirstInputs() if mesh.data.size > 1 else None
        self.times_steps = first and zero.config.offload_optimizer.device != "none"
        self.scheduled_twice = False
        self._seconds = math.inf
        self._number = self._after = 0

    @property
    def observer(self) -> Callable[[Any], contextlib.AbstractContextManager[None]] | None:
        """To be entered, with what the model is called with, around its forward passes. None: nothing is measured."""
        return self._observe if self._meter is not None or self._inputs is not None else None

    @contextlib.contextmanager
    def _observe(self, inputs: Any) -> Iterator[None]:
        if self._inputs is not None and self.module.training and torch.is_grad_enabled():
            self._inputs.see(inputs)
        with self._meter.forward() if self._meter is not None else contextlib.nullcontext():
            yield

    def after(self, skipped: bool, lr: float, seconds: float, strays: Mapping[str, nn.Parameter]) -> None:
        """Say what a step has shown. Collective over the data axis after the first step.

        Args:
            skipped, lr: whether the step's gradients were not finite, and the learning rate of its update.
            seconds: that the step took from its first forward pass to the end of its last backward pass.
            strays: parameters that require a gradient, but did not when the engine was made.
        """
        if self._inputs is not None:
            self.before([self._inputs.compare(self.mesh.data, self.mesh.device)])
            self._inputs = None
        self._after += 1
        if self._after == 1:
            self.before([self._unused()])
        self.after_step(skipped)
        if self.mesh.rank != 0:
            return
        if self.scheduled_twice:
            self._adviser([rules.scheduled_twice()])
        if strays:
            self._adviser([_untrained(strays, lr)])
        if self._number >= SETTLED:
            return
        self._number += 1
        self._seconds = min(self._seconds, seconds)  # the first one also sets things up
        found = [self._masters(lr)]
        if self._meter is not None:
            kept, self._meter = self._meter.result(), None
            found.append(
                recomputation(self.zero, self.micro_batches, 1, kept, "model.gradient_checkpointing_disable()")
            )
        if self._number == SETTLED and self.times_steps:
            self.times_steps = False
            found.append(transfers(self.zero, self._seconds, self.ranks_sharing))
        self._adviser(found)

    def _unused(self) -> Advice | None:
        """Of the parameters that no rank of the data axis has used. On all of them."""
        trained = [p for p in self.module.parameters() if is_trained(p) and p.requires_grad and p.numel()]
        main_grads: list[MainGradient] = [p.main_grad for p in trained]  # type: ignore[attr-defined]
        used = torch.tensor([main_grad.used for main_grad in main_grads], dtype=torch.float32, device=self.mesh.device)
        anywhere = comm.all_reduce(used, self.mesh.data).tolist()
        names = [main_grad.name for main_grad, ranks in zip(main_grads, anywhere) if not ranks]
        return rules.unused(names) if names else None

    def _masters(self, lr: float) -> Advice | None:
        """Of parameters in low precision, all of which have masters if any has."""
        low = [p for p in self.module.parameters() if p.requires_grad and _bits(p.dtype) < 24]
        masters = sum(self.zero.bytes_by_store()["master"].values()) > 0
        return rules.missing_masters(_bits(low[0].dtype), masters, lr, name=_short(low[0].dtype)) if low else None


def _untrained(strays: Mapping[str, nn.Parameter], lr: float) -> Advice | None:
    """Of parameters that the engine has no part in. Whoever trains them in low precision does so without masters."""
    advice = rules.untrained(list(strays))
    low = [p.dtype for p in strays.values() if _bits(p.dtype) < 24]
    return rules.missing_masters(_bits(low[0]), False, lr, name=_short(low[0]), action=str(advice)) if low else advice


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")


def _bits(dtype: torch.dtype) -> int:
    """Of the significand, the implied one included."""
    return 1 - round(math.log2(torch.finfo(dtype).eps)) if dtype.is_floating_point else 64
