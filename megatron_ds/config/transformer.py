"""What has to fit together in the ``model`` section of a transformer, and between it and other sections."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_ds.errors import divisors, multiples_around

if TYPE_CHECKING:
    from megatron_ds.config.text import ModelConfig, RunConfig

_ROPE_SCALING = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}


def transformer_faults(config: RunConfig) -> Iterator[str]:
    """Why a GPT or a BERT cannot be built, split over tp, or fed with these samples, if it cannot."""
    yield from _attention_faults(config.model)
    yield from _split_faults(config.model, config.mesh.tp)
    yield from _position_faults(config.model, config.train.sequence_length)
    m, mesh, length = config.model, config.mesh, config.train.sequence_length
    if not m.causal and (config.data.conversations or config.data.fim.rate):
        yield "data.conversations and data.fim.rate are for model.family='gpt': a BERT predicts masked tokens of texts"
    if mesh.sequence_parallel and mesh.tp > 1 and length % mesh.tp:
        yield (
            f"train.sequence_length={length} cannot be split over mesh.tp={mesh.tp} for sequence parallelism; use "
            f"{multiples_around(length, mesh.tp)}, or --mesh.no-sequence-parallel"
        )


def _attention_faults(m: ModelConfig) -> Iterator[str]:
    if m.num_heads % m.groups:
        yield (
            f"model.num_heads={m.num_heads} is not a multiple of model.kv_heads={m.groups}; "
            f"kv_heads may be {divisors(m.num_heads)}"
        )
    if m.head_dim is None and m.hidden_size % m.num_heads:
        yield (
            f"model.hidden_size={m.hidden_size} is not a multiple of model.num_heads={m.num_heads}; "
            f"use {multiples_around(m.hidden_size, m.num_heads)}, or set model.head_dim"
        )


def _split_faults(m: ModelConfig, tp: int) -> Iterator[str]:
    if m.groups % tp:
        yield (
            f"model.{'num_heads' if m.kv_heads is None else 'kv_heads'}={m.groups} cannot be split over "
            f"mesh.tp={tp}; tp may be {divisors(m.groups)}"
        )
    if m.ffn_size % tp:
        yield (
            f"model.ffn_hidden_size={m.ffn_size} cannot be split over mesh.tp={tp}; "
            f"use {multiples_around(m.ffn_size, tp)}"
        )
    if m.padded_vocab % tp:
        yield (
            f"the vocabulary padded to {m.padded_vocab} (model.vocab_size={m.vocab_size}, "
            f"model.vocab_multiple={m.vocab_multiple}) cannot be split over mesh.tp={tp}; "
            f"use model.vocab_multiple={math.lcm(m.vocab_multiple, tp)}"
        )


def _position_faults(m: ModelConfig, length: int) -> Iterator[str]:
    if m.position == "rope" and m.head_size % 2:
        yield f"rotary positions need an even head_dim, not {m.head_size}"
    if m.position == "alibi" and not m.causal:
        yield (
            "model.position='alibi' with model.family='bert': ALiBi's bias is for tokens that look back; use "
            "'learned', 'rope' or 'none'"
        )
    if m.rope_scaling is not None and not set(m.rope_scaling) >= _ROPE_SCALING:
        yield f"model.rope_scaling={m.rope_scaling} lacks {sorted(_ROPE_SCALING - set(m.rope_scaling))}"
    if m.position == "learned" and length > m.max_positions:
        yield (
            f"train.sequence_length={length} is longer than model.max_positions={m.max_positions}; "
            "raise max_positions or shorten the sequence"
        )
