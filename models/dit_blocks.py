"""Blocks of a diffusion transformer: adaLN-Zero (Peebles and Xie 2023), and the joint one of text and image.

Shapes: ``s`` patches, ``t`` text tokens, ``b`` batch, ``h`` hidden. A block maps its streams, ``([s(/tp), b, h],)`` or
``([s(/tp), b, h], [t(/tp), b, h])``, to the same; ``condition [b, h]`` has gone through SiLU already.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from megatron_ds.config.diffusion import DiTConfig
from megatron_ds.kernels.rotary import rotary
from megatron_ds.layers.attention import AttentionConfig, AttentionInputs, HeadProjection, SelfAttention
from megatron_ds.layers.mlp import MLP
from megatron_ds.layers.modulation import Modulation
from megatron_ds.models.transformer import StageSettings

NORM_EPS = 1e-6
Streams = tuple[Tensor, ...]


class Block(nn.Module):
    """``x + gate attention(adaLN(x))``, then ``x + gate mlp(adaLN(x))``; the gates start at zero."""

    def __init__(self, name: str, c: DiTConfig, s: StageSettings):
        super().__init__()
        h, self.mlp_norm_eps = c.hidden_size, c.norm_eps
        self.modulation = Modulation(f"{name}.modulation", h, 6, partial=s.partial, std=c.zero_init_std, **s.where)
        self.attention = SelfAttention(
            f"{name}.attention",
            attention_config(c),
            site=0,
            recompute_core=s.recompute.mode == "selective",
            sequence_parallel=s.sequence_parallel,
            **s.where,
        )
        self.mlp = MLP(
            f"{name}.mlp",
            h,
            c.ffn_size,
            c.activation,
            bias=True,
            sequence_parallel=s.sequence_parallel,
            stds=(c.std, c.std),
            **s.where,
        )

    def forward(self, condition: Tensor, inputs: AttentionInputs, x: Tensor) -> Streams:
        shift, scale, *rest = self.modulation(condition)
        normed, x = self.modulation.norm(x, shift, scale, NORM_EPS)
        return (self.add(x, self.attention(normed, inputs), *rest),)

    def add(
        self, x: Tensor, attended: Tensor, gate: Tensor, mlp_shift: Tensor, mlp_scale: Tensor, mlp_gate: Tensor
    ) -> Tensor:
        """What the attention found and what the MLP makes of it, added to the stream."""
        normed, x = self.modulation.norm(x, mlp_shift, mlp_scale, self.mlp_norm_eps, attended, gate)
        return self.modulation.add(x, self.mlp(normed), mlp_gate)


class LastText(nn.Module):
    """What the text has in the last block, behind which nobody reads it: it is attended to, and stays what it was."""

    def __init__(self, name: str, c: DiTConfig, s: StageSettings):
        super().__init__()
        make: dict[str, Any] = {"partial": s.partial, "std": c.zero_init_std, **s.where}
        self.modulation = Modulation(f"{name}.modulation", c.hidden_size, 2, **make)
        self.attention = HeadProjection(
            f"{name}.attention", attention_config(c), sequence_parallel=s.sequence_parallel, **s.where
        )


class JointBlock(nn.Module):
    """Image and text with weights of their own and one attention over both (MMDiT, Esser et al. 2024, figure 2b)."""

    def __init__(self, name: str, c: DiTConfig, s: StageSettings, last: bool):
        super().__init__()
        self.image = Block(f"{name}.image", c, s)
        self.text = LastText(f"{name}.text", c, s) if last else Block(f"{name}.text", c, s)

    def forward(self, condition: Tensor, inputs: AttentionInputs, image: Tensor, text: Tensor) -> Streams:
        shift, scale, *rest = self.image.modulation(condition)
        text_shift, text_scale, *text_rest = self.text.modulation(condition)
        normed, image = self.image.modulation.norm(image, shift, scale, NORM_EPS)
        text_normed, text = self.text.modulation.norm(text, text_shift, text_scale, NORM_EPS)
        heads, text_heads = self.image.attention.heads(normed), self.text.attention.heads(text_normed)
        q, k, v = (torch.cat(pair) for pair in zip(heads, text_heads))
        if inputs.rotary is not None:
            q, k = rotary(q, k, *inputs.rotary)
        attended = self.image.attention.attend(q, k, v, inputs)
        of_image, of_text = attended.split([len(heads[0]), len(text_heads[0])])
        image = self.image.add(image, self.image.attention.out(of_image), *rest)
        if isinstance(self.text, Block):
            text = self.text.add(text, self.text.attention.out(of_text), *text_rest)
        return image, text


def make_block(index: int, c: DiTConfig, s: StageSettings) -> Block | JointBlock:
    name = f"layers.{index}"
    return JointBlock(name, c, s, last=index == c.num_layers - 1) if c.has_text else Block(name, c, s)


def attention_config(c: DiTConfig) -> AttentionConfig:
    qk_norm: Literal["head"] | None = "head" if c.qk_norm else None
    return AttentionConfig(c.hidden_size, c.num_heads, 1, c.head_size, True, True, qk_norm, c.norm_eps, c.std, c.std)
