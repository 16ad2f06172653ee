"""BERT: an encoder that sees both ways and predicts masked tokens, whole or one pipeline stage of it.

Devlin et al. 2018: attention without a causal mask, norms behind the residual sums unless ``norm_position`` says
otherwise, and between the last block and the vocabulary one more layer. There is no next-sentence loss (Liu et al. 2019
found it to be of no use): a next-sentence head (``sentence_head``) is kept frozen, and can be evaluated.

Shapes: ``s`` sequence, ``b`` batch, ``h`` hidden. What it shares with other models is in :mod:`.transformer`.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ds import comm
from megatron_ds.data.gpt_sources import GPTSources
from megatron_ds.data.masked_source import mask_sources
from megatron_ds.kernels.activation import bias_gelu
from megatron_ds.layers.linear import replicated_parameter
from megatron_ds.layers.norms import Norm
from megatron_ds.models.text_task import TextTask
from megatron_ds.models.transformer import MicroBatch, Transformer


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
        self.transform = self._dense("transform", h, bias=self.config.bias)
        self.transform_norm = Norm("transform_norm", self.config.norm, h, **settings)
        if self.config.sentence_head:
            # Without a loss there is no gradient, and an optimizer's weight decay would still shrink them.
            self.pooler = self._dense("pooler", h).requires_grad_(False)
            self.sentence = self._dense("sentence", 2).requires_grad_(False)

    def _dense(self, name: str, width: int, bias: bool = True) -> Dense:
        weight = self._replicated(f"{name}.weight", (width, self.config.hidden_size))
        if not bias:
            return Dense(weight, None)
        place: dict[str, Any] = {"device": self.settings.device, "dtype": self.settings.dtype}
        own = replicated_parameter(f"{name}.bias", (width,), "zeros", self.tp, self.sequence_parallel, **place)
        return Dense(weight, own)

    def head_input(self, x: Tensor) -> Tensor:
        # The published models have the erf form here and in the blocks alike.
        approximate = "tanh" if self.config.activation in ("gelu_tanh", "geglu_tanh") else "none"
        x = super().head_input(x)
        return self.transform_norm(bias_gelu(F.linear(x, self.transform.weight), self.transform.bias, approximate))

    def sentence_logits(self, micro_batch: MicroBatch, hidden: Tensor | None = None) -> Tensor:
        """``[b, 2]``: that the second sentence follows the first, and that it is a random one; for evaluation."""
        x = super().head_input(self.hidden_states(micro_batch, hidden))
        if self.sequence_parallel:
            x = comm.gather_dim0(x, self.tp).wait()
        pooled = F.linear(x[0], self.pooler.weight, self.pooler.bias).tanh()
        return F.linear(pooled, self.sentence.weight, self.sentence.bias)


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
