"""DiT: a transformer of image patches with adaLN-Zero (Peebles and Xie 2023), told a class, or told a text by joint
blocks (MMDiT, Esser et al. 2024); whole or one pipeline stage of it.

Shapes: ``s`` patches, ``t`` text tokens, ``b`` batch, ``h`` hidden, ``c`` channels, ``p`` patch size. Between stages
flows ``[s + t + 1, b, h]`` (``t`` is 0 with a class), or ``[s / tp + t / tp + 1, b, h]`` under sequence parallelism:
the image's stream, the text's, and as the last row the condition.

The condition travels because that is ``1 / s`` of what flows anyway. To compute it again on each stage, every stage
would hold the embeddings (44 MB with their optimizer state in DiT-XL/2) and all stages sum their gradients in each
step. The text's stream has to travel: each block changes it. It is 4% of what flows at 1024 pixels (154 tokens beside
4,096 patches). Its gradients, and those of the condition, add up over stages on their way back.

Context parallelism is not built (``mesh.cp`` above 1 is refused, as for texts). It would enter where sequence
parallelism does: :meth:`DiT._own` cuts every sequence of patches, targets and text, :func:`activation_shape` and
:meth:`DiT._blocks` count the parts. Beyond that :meth:`DiT._inputs` would give a rank the rotary tables of its own
positions, ``DiTTask.count`` would count its own elements, and the attention core would see the keys of other ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_ds import comm
from megatron_ds.config.diffusion import DiTConfig, ObjectiveConfig
from megatron_ds.config.sparse import layout_of_rank
from megatron_ds.kernels.block_layout import BlockLayout
from megatron_ds.kernels.cpu.compiled_modulation import CompiledModulation
from megatron_ds.layers.affine import Affine
from megatron_ds.layers.attention import AttentionInputs
from megatron_ds.layers.attention_cores import AttentionRules, make_core
from megatron_ds.layers.mlp import MLP
from megatron_ds.layers.modulation import Modulation
from megatron_ds.models import objectives
from megatron_ds.models.conditions import ClassCondition, TextCondition
from megatron_ds.models.dit_blocks import NORM_EPS, Streams, make_block
from megatron_ds.models.patches import Grid, from_patches, grid_of, rotary_positions, sine_positions, to_patches
from megatron_ds.models.transformer import MicroBatch, StageSettings
from megatron_ds.pipeline.stage import StageSpan
from megatron_ds.rng import initialize_parameters


class DiT(nn.Module):
    """The model, or one pipeline stage of it.

    A micro-batch has ``labels`` int64 ``[b]``, or ``text`` ``[b, t, text_size]`` and ``pooled`` ``[b, pooled_size]``.
    """

    def __init__(self, config: DiTConfig, objective: ObjectiveConfig, settings: StageSettings | None = None):
        super().__init__()
        c, s = config, settings or StageSettings()
        span = s.span or StageSpan(0, c.num_layers)
        self.config, self.objective, self.span, self.tp, self.partial = c, objective, span, s.mesh.tp, s.partial
        self.layouts: dict[int, BlockLayout] = {}  # of block-sparse attention, by the length of a sequence
        self.positions: dict[tuple[Grid, int], tuple[Tensor, ...]] = {}
        if span.embedding:
            self.patches = Affine("patches", c.patch_elements, c.hidden_size, partial=s.partial, **s.where)
            self.condition = (TextCondition if c.has_text else ClassCondition)(c, s)
            if c.has_text:
                self.text = Affine("text", c.text_size, c.hidden_size, partial=s.partial, **s.where)
        self.layers = nn.ModuleDict({str(i): make_block(i, c, s) for i in range(span.first, span.last)})
        self.recomputed = {str(i) for i in range(span.first, span.last) if s.recompute.whole_block(i)}
        if span.head:
            std = c.zero_init_std
            self.final_modulation = Modulation(
                "final_modulation", c.hidden_size, 2, partial=s.partial, std=std, **s.where
            )
            features = c.patch_size**2 * c.out_channels
            self.final = Affine("final", c.hidden_size, features, std, partial=s.partial, **s.where)

    def initialize(self, seed: int) -> None:
        """Set every weight from (seed, its global name)."""
        initialize_parameters(self.parameters(), seed)

    def forward(self, micro_batch: MicroBatch, hidden: Tensor | None = None) -> Tensor:
        """Run this stage on one micro-batch of :class:`~megatron_ds.data.image_samples.DiffusionSamples`.

        Returns:
            On the last stage the *sum* of the squared errors of the samples that count, and of what learned variances
            add to them (a scalar, fp32 or fp64); on the others the activation for the next stage.
        """
        c = self.config
        dtype = torch.promote_types(next(self.parameters()).dtype, torch.float32)
        image, noise = micro_batch["images"].to(dtype), micro_batch["noise"].to(dtype)
        levels = objectives.noise_levels(self.objective, micro_batch["time"], math.prod(grid_of(image, c.patch_size)))
        seen = {**micro_batch, "images": objectives.noisy(levels, image, noise), "time": levels.time}
        streams, condition = self._blocks(seen, hidden)
        if not self.span.head:
            return torch.cat([*streams, condition.unsqueeze(0)])
        found = self._predict(streams, condition).to(dtype).unflatten(-1, (c.patch_size**2, c.out_channels))
        error = found[..., : c.channels] - self._cut(objectives.target(self.objective, levels, image, noise))
        losses = error.square().sum((0, 2, 3)) * objectives.weight(self.objective, levels).to(dtype)
        if c.learned_variance:
            known = self._cut(image), self._cut(noise)
            losses = losses + objectives.variance_bound(self.objective, levels, *known, *found.chunk(2, -1))
        loss = (losses * micro_batch["counts"]).sum()
        return comm.reduce_from_region(loss, self.tp) if self.partial else loss

    def predict(self, seen: MicroBatch, hidden: Tensor | None = None) -> Tensor:
        """What the model predicts of noisy ``images`` ``[b, c, H, W]`` at ``time`` ``[b]`` (a step of the schedule)
        with their class or text, in their shape and dtype; learned variances are as many channels behind it. On a stage
        without the head, the activation for the next. Whole on every rank: sequences are not split.
        """
        assert not self.partial, "predictions are made without sequence parallelism"
        streams, condition = self._blocks(seen, hidden)
        if not self.span.head:
            return torch.cat([*streams, condition.unsqueeze(0)])
        found, image = self._predict(streams, condition), seen["images"]
        return from_patches(found, self.config.patch_size, grid_of(image, self.config.patch_size)).to(image.dtype)

    def _blocks(self, seen: MicroBatch, hidden: Tensor | None) -> tuple[Streams, Tensor]:
        """What this stage's blocks make of the streams, and the condition ``[b, h]``; ``seen`` has what the model
        sees, noisy images and the step of the schedule."""
        if self.span.embedding:
            streams, condition = self._embed(seen), self.condition(seen)
        else:
            assert hidden is not None, "a stage without the embedding needs the previous stage's output"
            parts = self.tp.size if self.partial else 1
            *rows, row = hidden.split([*(length // parts for length in stream_lengths(self.config, seen)), 1])
            streams, condition = tuple(rows), row.squeeze(0)
        inputs, active = self._inputs(seen, streams[0].dtype), F.silu(condition)
        for name, block in self.layers.items():
            if name in self.recomputed and torch.is_grad_enabled():
                streams = checkpoint(block, active, inputs, *streams, use_reentrant=False, preserve_rng_state=False)
            else:
                streams = block(active, inputs, *streams)
        return streams, condition

    def _embed(self, seen: MicroBatch) -> Streams:
        c, like = self.config, self.patches.weight
        grid = grid_of(seen["images"], c.patch_size)
        x = self.patches(self._own(to_patches(seen["images"], c.patch_size).to(like.dtype)))
        if c.positions == "sines":
            if (grid, 0) not in self.positions:
                table = sine_positions(c.hidden_size, grid, c.grid, c.position_grid)
                self.positions[grid, 0] = (table.unsqueeze(1).to(like),)
            x = x + self._own(self.positions[grid, 0][0])
        return (x, self.text(self._own(seen["text"].transpose(0, 1).to(like.dtype)))) if c.has_text else (x,)

    def _inputs(self, seen: MicroBatch, dtype: torch.dtype) -> AttentionInputs:
        c, image = self.config, seen["images"]
        lengths, grid = stream_lengths(c, seen), grid_of(image, c.patch_size)
        rules = AttentionRules(causal=False, layout=self._layout(sum(lengths), image.device))
        core = make_core(rules, sum(lengths), c.head_size, image.device, dtype)
        rotary = None
        if c.positions == "rope":
            key = grid, sum(lengths)
            if key not in self.positions:
                tables = rotary_positions(c.head_size, grid, sum(lengths[1:]))
                self.positions[key] = tuple(table.to(image.device, dtype) for table in tables)
            rotary = cast(tuple[Tensor, Tensor], self.positions[key])
        return AttentionInputs(torch.arange(sum(lengths), device=image.device).unsqueeze(1), core, rotary)

    def _layout(self, length: int, device: torch.device) -> BlockLayout | None:
        """The blocks of attention that this rank's heads compute; None: all."""
        c = self.config
        if c.attention.sparse.mode == "none":
            return None
        if length not in self.layouts:
            layout = layout_of_rank(c.attention.sparse, length, c.num_heads, self.tp.rank, self.tp.size, causal=False)
            self.layouts[length] = layout.to(device)
        return self.layouts[length]

    def _predict(self, streams: Streams, condition: Tensor) -> Tensor:
        """``[s(/tp), b, p * p * c]``."""
        shift, scale = self.final_modulation(F.silu(condition))
        return self.final(self.final_modulation.norm(streams[0], shift, scale, NORM_EPS)[0])

    def _cut(self, image: Tensor) -> Tensor:
        """This rank's patches of an image, ``[s(/tp), b, p * p, c]``."""
        patches = self._own(to_patches(image, self.config.patch_size, last=True))
        return patches.unflatten(-1, (self.config.patch_size**2, -1))

    def _own(self, of_sequence: Tensor) -> Tensor:
        """This rank's part of dim 0."""
        return comm.slice_dim0(of_sequence, self.tp) if self.partial else of_sequence

    def compile_blocks(self) -> None:
        """``torch.compile`` whole blocks on a GPU; on a CPU what products of matrices leave: activations, adaLN."""
        if next(self.parameters()).device.type != "cpu":
            for block in cast(Iterable[nn.Module], self.layers.values()):
                block.compile()
            return
        graphs = CompiledModulation()
        for module in self.modules():
            if isinstance(module, MLP):
                module.compile_activation()
            elif isinstance(module, Modulation):
                module.compiled = graphs


def stream_lengths(c: DiTConfig, micro_batch: MicroBatch) -> tuple[int, ...]:
    """Positions of each stream: the patches and, where the model is told one, the text's tokens."""
    patches = math.prod(grid_of(micro_batch["images"], c.patch_size))
    return (patches, micro_batch["text"].shape[1]) if c.has_text else (patches,)


def activation_shape(c: DiTConfig, parts: int, micro_batch: MicroBatch) -> tuple[int, ...]:
    """Of what flows between stages, with sequences cut into ``parts``: the streams, and the condition."""
    rows = sum(length // parts for length in stream_lengths(c, micro_batch))
    return rows + 1, len(micro_batch["images"]), c.hidden_size
