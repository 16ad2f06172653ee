"""BERT: an encoder that sees both ways and predicts masked tokens, whole or one pipeline stage of it.

Devlin et al. 2018: attention without a causal mask, norms behind the residual sums unless ``norm_position`` says
otherwise, and between the last block and the vocabulary one more layer. There is no next-sentence loss (Liu et al. 2019
found it to be of no use).

Shapes: ``s`` sequence, ``b`` batch, ``h`` hidden. What it shares with other models is in :mod:`.transformer`.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ds.data.gpt_sources import GPTSources
from megatron_ds.data.masked_source import mask_sources
from megatron_ds.kernels.activation import bias_gelu
from megatron_ds.layers.linear import replicated_parameter
from megatron_ds.layers.norm import Norm
from megatron_ds.models.text_task import TextTask
from megatron_ds.models.transformer import Transformer


class Dense(nn.Module):
    """A linear layer that every tensor-parallel rank holds whole."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None):
        super().__init__()
        self.weight, self.bias = weight, bias


class BERT(Transformer):
    """The encoder, or one pipeline stage of it: ``norm(gelu(W x + b))`` lies between the last block and the vocabulary.

    Samples are as a GPT's; ``loss_mask`` is True where a token was masked, ``labels`` are the tokens themselves, and
    ``document_ids`` keep padding apart too.
    """

    def build_head(self, **settings: Any) -> None:
        h = self.config.hidden_size
        place: dict[str, Any] = {"device": self.settings.device, "dtype": self.settings.dtype}
        bias = None
        if self.config.bias:
            bias = replicated_parameter("transform.bias", (h,), "zeros", self.tp, self.sequence_parallel, **place)
        self.transform = Dense(self._replicated("transform.weight", (h, h)), bias)
        self.transform_norm = Norm("transform_norm", self.config.norm, h, **settings)

    def head_input(self, x: Tensor) -> Tensor:
        # The published models have the erf form here and in the blocks alike.
        approximate = "tanh" if self.config.activation in ("gelu_tanh", "geglu_tanh") else "none"
        x = super().head_input(x)
        return self.transform_norm(bias_gelu(F.linear(x, self.transform.weight), self.transform.bias, approximate))


class BERTTask(TextTask):
    """A BERT to the trainer: the same texts, masked."""

    stage = BERT

    def open_sources(self) -> GPTSources:
        data, config = self.config.data, self.config
        return mask_sources(
            super().open_sources(),
            mask_id=data.mask_token,
            probability=data.mask_probability,
            vocab_size=config.model.vocab_size,
            seed=config.seed,
            tokenizer=data.tokenizer,
        )
