"""The one train step: the sole owner of loss normalisation, loss scaling, clipping and the decision to skip.

The loss of a step is the sum over the unmasked target tokens of the *global* batch divided by their number. Each rank
counts its tokens before the forward pass, the counts are summed over the data axis, and the gradient that seeds every
backward pass is ``loss_scale / tokens``. Everything after that is a sum: over micro-batches, over tensor-parallel
ranks, over replicas. Nothing is ever averaged, so no mean of means can arise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ds import comm
from megatron_ds.config import OptimizerConfig
from megatron_ds.mesh import Mesh
from megatron_ds.optim.clip import clip_coefficient
from megatron_ds.optim.loss_scaler import LossScaler
from megatron_ds.optim.schedule import learning_rate
from megatron_ds.pipeline.executor import Executor
from megatron_ds.zero.optimizer import ZeroOptimizer

MicroBatch = Mapping[str, Tensor]


@dataclass(frozen=True)
class StepResult:
    """What one step did; the same on every rank.

    Attributes:
        loss: mean over the global batch's unmasked tokens.
        grad_norm: global L2 norm before clipping (NaN or Inf when the step was skipped).
        tokens: unmasked target tokens of the global batch.
        skipped: gradients were not finite, and no weight changed.
        stop: some rank asked to stop after this step.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    loss_scale: float
    skipped: bool
    stop: bool


class TrainStep:
    """Composes executor, optimizer and mesh into one optimizer step; holds no state of its own but the loss scale."""

    def __init__(
        self,
        executor: Executor,
        optimizer: ZeroOptimizer,
        mesh: Mesh,
        config: OptimizerConfig,
        scaler: LossScaler,
        total_steps: int,
    ):
        self.executor, self.optimizer, self.mesh = executor, optimizer, mesh
        self.config, self.scaler, self.total_steps = config, scaler, total_steps

    def __call__(self, micro_batches: Sequence[MicroBatch], step: int, stop: bool = False) -> StepResult:
        """Run step number ``step`` (the first is 1) on this rank's micro-batches of the global batch.

        ``stop``: this rank wants the run to end; all ranks learn of it in this step's one metrics message.
        """
        rate = learning_rate(self.config, step, self.total_steps)
        scale = self.scaler.scale
        tokens = self._count_tokens(micro_batches)
        self.optimizer.start_step()
        loss_sum = self.executor.run(micro_batches, scale / tokens.clamp(min=1))
        self.optimizer.finish_gradients()
        norm_squared, loss, stopping = self._sum_over_world(self.optimizer.norm_squared(), loss_sum, stop)
        norm_squared /= scale * scale
        skipped = not math.isfinite(norm_squared)
        norm = norm_squared if skipped else math.sqrt(norm_squared)
        self.scaler.update(found_inf=skipped)
        if skipped:
            self.optimizer.skip()
        else:
            clip = clip_coefficient(torch.tensor(norm_squared, dtype=torch.float64), self.config.clip_norm)
            self.optimizer.step(rate, clip.item() / scale)
        count = int(tokens)
        return StepResult(loss / max(count, 1), norm, rate, count, scale, skipped, stopping > 0)

    def evaluate(self, batches: Iterable[Sequence[MicroBatch]]) -> float:
        """Mean loss over the unmasked tokens of all batches, without label smoothing and dropout."""
        for stage in self.executor.stages.values():
            stage.eval()
        try:
            total = torch.zeros(2, dtype=torch.float64, device=self.mesh.device)
            for micro_batches in batches:
                total[0] += self._own_loss(self.executor.run_forward(micro_batches))
                total[1] += self._own_loss(self._local_tokens(micro_batches))
            loss, tokens = comm.all_reduce(total, self.mesh.world).tolist()
        finally:
            for stage in self.executor.stages.values():
                stage.train()
        return loss / max(tokens, 1)

    @staticmethod
    def _local_tokens(micro_batches: Sequence[MicroBatch]) -> Tensor:
        return torch.stack([batch["loss_mask"].sum() for batch in micro_batches]).sum()

    def _count_tokens(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """Unmasked tokens of the global batch, 0-d float64: exact up to 2^53."""
        return comm.all_reduce(self._local_tokens(micro_batches).double(), self.mesh.data)

    def _own_loss(self, value: Tensor) -> Tensor:
        """``value`` on the one rank that speaks for its sequences, zero elsewhere: the last stage's first tp rank."""
        speaks = self.mesh.pp.is_last and self.mesh.tp.is_first
        return value if speaks else torch.zeros_like(value)

    def _sum_over_world(self, norm_squared: Tensor, loss_sum: Tensor, stop: bool) -> tuple[float, float, float]:
        """The step's one message between all ranks, and its one host synchronisation."""
        flag = torch.tensor(float(stop), dtype=torch.float64, device=self.mesh.device)
        packed = torch.stack([norm_squared.double(), self._own_loss(loss_sum).double(), flag])
        first, second, third = comm.all_reduce(packed, self.mesh.world).tolist()
        return first, second, third
