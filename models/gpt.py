"""GPT: one decoder that is GPT-2, GPT-3, Llama 2/3 or BLOOM by configuration, whole or one pipeline stage of it.

Shapes: ``s`` sequence, ``b`` batch, ``h`` hidden. What it shares with other models is in :mod:`.transformer`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megatron_ds.layers.attention import AttentionInputs
from megatron_ds.layers.norm import Norm
from megatron_ds.models.activations import gpt_activations
from megatron_ds.models.text_task import TextTask
from megatron_ds.models.transformer import BlockParts, Transformer
from megatron_ds.pipeline.stage import Activations, StageSpan
from megatron_ds.rng import add_dropout, keys_of_rows


class Block(BlockParts):
    """Pre-norm transformer block: ``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    def forward(self, x: Tensor, inputs: AttentionInputs) -> Tensor:
        attended = self.attention(self.attention_norm(x), inputs)
        keys = keys_of_rows(attended, self.hidden_dropout, inputs.keys, self.site)
        normed, x = self.mlp_norm(attended, residual=x, p=self.hidden_dropout, row_keys=keys)
        return add_dropout(self.mlp(normed), x, self.hidden_dropout, inputs.keys, self.site + 1)


class GPT(Transformer):
    """The decoder, or one pipeline stage of it: a norm lies between the last block and the vocabulary."""

    block = Block

    def build_head(self, **settings: Any) -> None:
        self.final_norm = Norm("final_norm", self.config.norm, self.config.hidden_size, **settings)

    def head_input(self, x: Tensor) -> Tensor:
        return self.final_norm(x)


class GPTTask(TextTask):
    """A GPT to the trainer."""

    stage = GPT

    def activations(self, span: StageSpan, tp: int, device: str) -> Activations | None:
        return gpt_activations(self.config, span, tp, device)
