"""From the settings of block-sparse attention to its layout, and what does not go together with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_ds.errors import ConfigError, multiples_around
from megatron_ds.kernels.block_layout import BlockLayout
from megatron_ds.kernels.block_patterns import PATTERNS, parameters_of

if TYPE_CHECKING:
    from megatron_ds.config.text import RunConfig, SparseAttentionConfig

_SECTION = "model.attention.sparse"


def sparse_layout(sparse: SparseAttentionConfig, length: int, heads: int, *, causal: bool = True) -> BlockLayout:
    """The layout of all heads of the model for sequences of ``length`` tokens, on the CPU."""
    own = parameters_of(sparse.mode)
    settings = {name: value for name, value in sparse if name in own and value is not None}
    return PATTERNS[sparse.mode](length, sparse.block, heads, causal=causal, **settings)


def sparse_faults(config: RunConfig) -> Iterator[str]:
    """Why a model cannot be trained with these settings, if it cannot."""
    m, sparse, length = config.model, config.model.attention.sparse, config.train.sequence_length
    own = set() if sparse.mode == "none" else parameters_of(sparse.mode) | {"block"}
    default = type(sparse)()
    for name, value in sparse:
        if name not in (own | {"mode"}) and value != getattr(default, name):
            takes = f"takes {', '.join(sorted(own))}" if own else "takes no settings; choose another mode"
            yield f"{_SECTION}.{name}={value} does nothing: mode={sparse.mode!r} {takes}"
    if sparse.mode == "none":
        return
    which = f"with {_SECTION}.mode={sparse.mode!r}"
    if m.attention_dropout:
        yield (
            f"model.attention_dropout={m.attention_dropout} {which}: sparse attention drops no probabilities; use "
            "model.attention_dropout=0 (model.hidden_dropout works)"
        )
    if m.position == "alibi":
        yield f"model.position='alibi' {which}: sparse attention has no biases; use 'rope', 'learned' or 'none'"
    for name in ("window", "attention_softcap"):
        if getattr(m, name) is not None:
            yield (
                f"model.{name}={getattr(m, name)} {which}: a layout stands in for all rules of dense attention; leave "
                f"it out, or use {_SECTION}.mode='none' (mode='sliding_window' is a window of blocks)"
            )
    for name in ("document_masking", "conversations"):
        if getattr(config.data, name):
            yield (
                f"data.{name} {which}: a layout is the same for all samples, documents are not; use "
                f"--data.no-{name.replace('_', '-')}, or {_SECTION}.mode='none'"
            )
    blocks = -(-length // sparse.block)
    for name, most in (("global_block_indices", blocks - 1), ("global_block_end_indices", blocks)):
        outside = [index for index in getattr(sparse, name) if name in own and not 0 <= index <= most]
        if outside:
            yield (
                f"{_SECTION}.{name}: {outside[0]} is outside the {blocks} blocks of train.sequence_length={length}; "
                f"use 0 to {most}"
            )
    if length % sparse.block:
        yield (
            f"train.sequence_length={length} is not a multiple of {_SECTION}.block={sparse.block}; use "
            f"{multiples_around(length, sparse.block)}, or another block"
        )
    try:
        sparse_layout(sparse, length, m.num_heads, causal=m.causal)
    except ConfigError as error:
        yield f"{_SECTION}: {error}"
