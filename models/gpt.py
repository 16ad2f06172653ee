"""GPT: one decoder that is GPT-2, Llama, BLOOM, Gemma, Falcon and more by configuration, whole or one pipeline stage.

Shapes: ``s`` sequence, ``b`` batch, ``h`` hidden. What it shares with other models is in :mod:`.transformer`.
"""

from __future__ import annotations

from megatron_ds.models.activations import gpt_activations
from megatron_ds.models.text_task import TextTask
from megatron_ds.models.transformer import Transformer
from megatron_ds.pipeline.stage import Activations, StageSpan


class GPT(Transformer):
    """The decoder, or one pipeline stage of it."""


class GPTTask(TextTask):
    """A GPT to the trainer."""

    stage = GPT

    def activations(self, span: StageSpan, tp: int, device: str) -> Activations | None:
        return gpt_activations(self.config, span, tp, device)
