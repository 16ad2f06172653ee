"""DiT: a transformer of image patches with adaLN-Zero (Peebles and Xie 2023), whole or one pipeline stage of it.

Shapes: ``s`` patches, ``b`` batch, ``h`` hidden, ``c`` channels, ``p`` patch size. Between stages flows
``[s + 1, b, h]``, or ``[s / tp + 1, b, h]`` under sequence parallelism: the last row is the condition, time plus class.
It travels because that is ``1 / s`` of what flows anyway. To compute it again on each stage, every stage would hold the
embeddings (44 MB with their optimizer state in DiT-XL/2) and all stages sum their gradients in each step.

Every tensor-parallel rank holds the whole condition. Its gradient is a rank's share alone, since adaLN's weights are
split, and adds up over stages on its way back; the embeddings' gradients are summed over tp.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_ds import comm
from megatron_ds.config.diffusion import DiTConfig, ObjectiveConfig
from megatron_ds.layers.attention import AttentionConfig, AttentionInputs, SelfAttention
from megatron_ds.layers.attention_cores import AttentionRules, make_core
from megatron_ds.layers.linear import lookup, replicated_parameter
from megatron_ds.layers.mlp import MLP
from megatron_ds.layers.modulation import Modulation, modulated_norm
from megatron_ds.models import objectives
from megatron_ds.models.patches import Grid, from_patches, grid_of, sine_positions, to_patches
from megatron_ds.models.transformer import StageSettings, Table
from megatron_ds.pipeline.stage import StageSpan
from megatron_ds.rng import initialize_parameters

MicroBatch = Mapping[str, Tensor]
TIME_CHANNELS = 256
NORM_EPS = 1e-6


class Affine(nn.Module):
    """A linear layer that every tensor-parallel rank holds whole.

    Args:
        partial: each rank's gradient is a share that is summed over tp.
        std: of initial weights; 0 starts them at zero.
    """

    def __init__(self, name: str, inputs: int, outputs: int, std: float, *, partial: bool, **where: Any):
        super().__init__()
        tp = where.pop("tp")
        shape, init = (outputs, inputs), "normal" if std else "zeros"
        self.weight = replicated_parameter(
            f"{name}.weight", shape, init, tp, partial, weight_decay=True, std=std, **where
        )
        self.bias = replicated_parameter(f"{name}.bias", (outputs,), "zeros", tp, partial, **where)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Condition(nn.Module):
    """Time and class to ``[b, h]``: two layers over sines of the time, plus a row of the class's table."""

    def __init__(self, c: DiTConfig, s: StageSettings):
        super().__init__()
        h, partial = c.hidden_size, s.mesh.tp.size > 1
        self.time_in = Affine("condition.time_in", TIME_CHANNELS, h, 0.02, partial=partial, **s.where)
        self.time_out = Affine("condition.time_out", h, h, 0.02, partial=partial, **s.where)
        table = replicated_parameter(
            "condition.classes.weight", (c.num_classes + 1, h), "normal", partial=partial, **s.where
        )
        self.classes = Table(table)

    def forward(self, time: Tensor, labels: Tensor) -> Tensor:
        sines = time_sines(time).to(self.time_in.weight.dtype)
        return self.time_out(F.silu(self.time_in(sines))) + lookup(labels, self.classes.weight)


class Block(nn.Module):
    """``x + gate attention(adaLN(x))``, then ``x + gate mlp(adaLN(x))``; the gates start at zero."""

    def __init__(self, c: DiTConfig, index: int, s: StageSettings):
        super().__init__()
        name, h = f"layers.{index}", c.hidden_size
        self.mlp_norm_eps = c.norm_eps
        self.modulation = Modulation(f"{name}.modulation", h, 6, partial=s.partial, std=c.zero_init_std, **s.where)
        self.attention = SelfAttention(
            f"{name}.attention",
            AttentionConfig(h, c.num_heads, 1, c.head_size, True, True, None, c.norm_eps, c.std, c.std),
            site=0,
            recompute_core=s.recompute.mode == "selective",
            sequence_parallel=s.sequence_parallel,
            **s.where,
        )
        self.mlp = MLP(
            f"{name}.mlp",
            h,
            c.ffn_size,
            "gelu_tanh",
            bias=True,
            sequence_parallel=s.sequence_parallel,
            stds=(c.std, c.std),
            **s.where,
        )

    def forward(self, x: Tensor, condition: Tensor, inputs: AttentionInputs) -> Tensor:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulation(condition)
        x = torch.addcmul(x, gate, self.attention(modulated_norm(x, shift, scale, NORM_EPS), inputs))
        return torch.addcmul(x, mlp_gate, self.mlp(modulated_norm(x, mlp_shift, mlp_scale, self.mlp_norm_eps)))


class DiT(nn.Module):
    """The model, or one pipeline stage of it."""

    def __init__(self, config: DiTConfig, objective: ObjectiveConfig, settings: StageSettings | None = None):
        super().__init__()
        c, s = config, settings or StageSettings()
        span = s.span or StageSpan(0, c.num_layers)
        self.config, self.objective, self.span, self.tp, self.partial = c, objective, span, s.mesh.tp, s.partial
        self.positions: dict[Grid, Tensor] = {}
        if span.embedding:
            std = (2 / (c.patch_elements + c.hidden_size)) ** 0.5
            self.patches = Affine("patches", c.patch_elements, c.hidden_size, std, partial=s.partial, **s.where)
            self.condition = Condition(c, s)
        self.layers = nn.ModuleDict({str(i): Block(c, i, s) for i in range(span.first, span.last)})
        every = {"full": 1, "every_n": s.recompute.every}.get(s.recompute.mode)
        self.recomputed = {str(i) for i in range(span.first, span.last) if every and i % every == 0}
        if span.head:
            std = c.zero_init_std
            self.final_modulation = Modulation(
                "final_modulation", c.hidden_size, 2, partial=s.partial, std=std, **s.where
            )
            self.final = Affine("final", c.hidden_size, c.patch_elements, std, partial=s.partial, **s.where)

    def initialize(self, seed: int) -> None:
        """Set every weight from (seed, its global name)."""
        initialize_parameters(self.parameters(), seed)

    def forward(self, micro_batch: MicroBatch, hidden: Tensor | None = None) -> Tensor:
        """Run this stage on one micro-batch of :class:`~megatron_ds.data.image_samples.DiffusionSamples`.

        Returns:
            On the last stage the *sum* of the squared errors of the samples that count (a scalar, fp32 or fp64); on
            the others the activation for the next stage.
        """
        c = self.config
        dtype = torch.promote_types(next(self.parameters()).dtype, torch.float32)
        image, noise = micro_batch["images"].to(dtype), micro_batch["noise"].to(dtype)
        levels = objectives.noise_levels(self.objective, micro_batch["time"], math.prod(grid_of(image, c.patch_size)))
        seen = {**micro_batch, "images": objectives.noisy(levels, image, noise), "time": levels.time}
        x, condition = self._blocks(seen, hidden)
        if not self.span.head:
            return torch.cat([x, condition.unsqueeze(0)])
        wanted = objectives.target(self.objective, levels, image, noise)
        error = self._predict(x, condition).to(dtype) - self._own(to_patches(wanted, c.patch_size, last=True))
        weight = objectives.weight(self.objective, levels).to(dtype) * micro_batch["counts"]
        loss = (error.square().sum((0, 2)) * weight).sum()
        return comm.reduce_from_region(loss, self.tp) if self.partial else loss

    def predict(self, micro_batch: MicroBatch, hidden: Tensor | None = None) -> Tensor:
        """What the model predicts of noisy ``images`` ``[b, c, H, W]`` at ``time`` ``[b]`` (a step of the schedule)
        with ``labels`` ``[b]``, in their shape and dtype; on a stage without the head, the activation for the next."""
        x, condition = self._blocks(micro_batch, hidden)
        if not self.span.head:
            return torch.cat([x, condition.unsqueeze(0)])
        found, image = self._predict(x, condition), micro_batch["images"]
        if self.partial:
            found = comm.gather_dim0(found, self.tp).wait()
        return from_patches(found, self.config.patch_size, grid_of(image, self.config.patch_size)).to(image.dtype)

    def _blocks(self, seen: MicroBatch, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        """The output of this stage's blocks ``[s(/tp), b, h]``, and the condition ``[b, h]``; ``seen`` has what the
        model sees, noisy images and the step of the schedule."""
        grid = grid_of(seen["images"], self.config.patch_size)
        if self.span.embedding:
            x = self._embed(seen["images"], grid)
            condition = self.condition(seen["time"], seen["labels"])
        else:
            assert hidden is not None, "a stage without the embedding needs the previous stage's output"
            x, row = hidden.split([hidden.shape[0] - 1, 1])
            condition = row.squeeze(0)
        inputs, active = self._inputs(grid, x.dtype, x.device), F.silu(condition)
        for name, block in self.layers.items():
            if name in self.recomputed and torch.is_grad_enabled():
                x = checkpoint(block, x, active, inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, active, inputs)
        return x, condition

    def _embed(self, image: Tensor, grid: Grid) -> Tensor:
        c, weight = self.config, self.patches.weight
        if grid not in self.positions:
            self.positions[grid] = sine_positions(c.hidden_size, grid, c.grid, c.position_grid).to(weight)
        patches = to_patches(image, c.patch_size).to(weight.dtype)
        return self.patches(self._own(patches)) + self._own(self.positions[grid]).unsqueeze(1)

    def _inputs(self, grid: Grid, dtype: torch.dtype, device: torch.device) -> AttentionInputs:
        length = math.prod(grid)
        core = make_core(AttentionRules(causal=False), length, self.config.head_size, device, dtype)
        return AttentionInputs(torch.arange(length, device=device).unsqueeze(1), core)

    def _predict(self, x: Tensor, condition: Tensor) -> Tensor:
        """``[s(/tp), b, p * p * c]``."""
        shift, scale = self.final_modulation(F.silu(condition))
        return self.final(modulated_norm(x, shift, scale, NORM_EPS))

    def _own(self, of_sequence: Tensor) -> Tensor:
        """This rank's part of dim 0."""
        return comm.slice_dim0(of_sequence, self.tp) if self.partial else of_sequence

    def compile_blocks(self) -> None:
        """``torch.compile`` whole blocks on a GPU, only the activations on a CPU, as of a text's transformer."""
        for block in cast(Iterable[Block], self.layers.values()):
            if next(self.parameters()).device.type == "cpu":
                block.mlp.compile_activation()
            else:
                block.compile()


def activation_shape(c: DiTConfig, parts: int, micro_batch: MicroBatch) -> tuple[int, ...]:
    """Of what flows between stages, with the sequence cut into ``parts``: the patches, and the condition."""
    image = micro_batch["images"]
    return math.prod(grid_of(image, c.patch_size)) // parts + 1, len(image), c.hidden_size


def time_sines(time: Tensor) -> Tensor:
    """``[b] -> [b, 256]`` fp32, cosines first. In half precision times above 256 would be the same."""
    half = TIME_CHANNELS // 2
    exponents = -math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=time.device) / (half - 1)
    angles = time.float().unsqueeze(1) * exponents.exp()
    return torch.cat([angles.cos(), angles.sin()], dim=1)
