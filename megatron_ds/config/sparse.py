"""The settings of block-sparse attention, from them to its layout, and what does not go together with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from megatron_ds.config.schema import Count, Section
from megatron_ds.errors import ConfigError, multiples_around
from megatron_ds.kernels.block_layout import BlockLayout
from megatron_ds.kernels.block_patterns import PATTERNS, parameters_of

if TYPE_CHECKING:
    from megatron_ds.config.text import RunConfig

_SECTION = "model.attention.sparse"


class SparseAttentionConfig(Section):
    """Block-sparse attention: which blocks of the score matrix are computed. The same in every layer.

    The parameters, and their names, are those of DeepSpeed's sparse attention; a mode takes those that its description
    names and refuses the others. Blocks are counted in units of ``block`` tokens.
    """

    mode: Literal["none", "dense", "fixed", "variable", "bigbird", "bslongformer", "sliding_window"] = Field(
        "none", description="none: ordinary attention. dense: every block, to compare with."
    )
    block: Literal[16, 32, 64, 128] = Field(64, description="Tokens along a block's side; 64 and 128 suit Hopper.")
    different_layout_per_head: bool = Field(False, description="variable, bigbird: heads draw random blocks apart.")
    num_local_blocks: int = Field(4, gt=0, description="fixed: blocks of a local window.")
    num_global_blocks: int = Field(
        1,
        gt=0,
        description="fixed: blocks that stand for a window. bigbird: first blocks that see all and all see.",
    )
    num_different_global_patterns: int = Field(
        1, gt=0, description="fixed: heads take turns in which blocks of a window stand for it."
    )
    local_window_blocks: tuple[Count, ...] = Field((4,), description="variable: sizes of windows; the last repeats.")
    global_block_indices: tuple[int, ...] = Field((0,), description="variable, bslongformer: blocks that all see.")
    global_block_end_indices: tuple[int, ...] = Field(
        (), description="variable, bslongformer: ends of ranges that begin at global_block_indices."
    )
    num_random_blocks: int | None = Field(
        None, ge=0, description="variable, bigbird: random blocks a row of blocks. Default: 0, for bigbird 1."
    )
    num_sliding_window_blocks: int = Field(
        3,
        gt=0,
        description="sliding_window, bigbird, bslongformer: width of the band around the diagonal, odd; causal "
        "attention keeps its lower half.",
    )
    seed: int = Field(0, ge=0, description="variable, bigbird: random blocks follow from it, the head and the row.")


class AttentionConfig(Section):
    """How attention is computed."""

    sparse: SparseAttentionConfig = SparseAttentionConfig()


def sparse_layout(sparse: SparseAttentionConfig, length: int, heads: int, *, causal: bool = True) -> BlockLayout:
    """The layout of all heads of the model for sequences of ``length`` tokens, on the CPU."""
    own = parameters_of(sparse.mode)
    settings = {name: value for name, value in sparse if name in own and value is not None}
    return PATTERNS[sparse.mode](length, sparse.block, heads, causal=causal, **settings)


def layout_of_rank(
    sparse: SparseAttentionConfig, length: int, heads: int, rank: int, ranks: int, *, causal: bool
) -> BlockLayout:
    """The layout of the heads of one of ``ranks`` tensor-parallel ranks: its slice of the whole model's."""
    local = heads // ranks
    return sparse_layout(sparse, length, heads, causal=causal).of_heads(rank * local, local)


def sparse_faults(config: RunConfig) -> Iterator[str]:
    """Why a model cannot be trained with these settings, if it cannot."""
    m, sparse, length = config.model, config.model.attention.sparse, config.train.sequence_length
    yield from unused_parameters(sparse)
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
    yield from layout_faults(sparse, length, m.num_heads, m.causal, f"train.sequence_length={length}")


def unused_parameters(sparse: SparseAttentionConfig) -> Iterator[str]:
    """Parameters that the mode does not take."""
    own = set() if sparse.mode == "none" else parameters_of(sparse.mode) | {"block"}
    default = type(sparse)()
    for name, value in sparse:
        if name not in (own | {"mode"}) and value != getattr(default, name):
            takes = f"takes {', '.join(sorted(own))}" if own else "takes no settings; choose another mode"
            yield f"{_SECTION}.{name}={value} does nothing: mode={sparse.mode!r} {takes}"


def layout_faults(sparse: SparseAttentionConfig, length: int, heads: int, causal: bool, what: str) -> Iterator[str]:
    """Why there is no layout for sequences of this length, of which a message says ``what`` sets it."""
    own = parameters_of(sparse.mode)
    blocks = -(-length // sparse.block)
    for name, most in (("global_block_indices", blocks - 1), ("global_block_end_indices", blocks)):
        outside = [index for index in getattr(sparse, name) if name in own and not 0 <= index <= most]
        if outside:
            yield (f"{_SECTION}.{name}: {outside[0]} is outside the {blocks} blocks of {what}; use 0 to {most}")
    if length % sparse.block:
        yield (
            f"{what} is not a multiple of {_SECTION}.block={sparse.block}; use "
            f"{multiples_around(length, sparse.block)}, or another block"
        )
    try:
        sparse_layout(sparse, length, heads, causal=causal)
    except ConfigError as error:
        yield f"{_SECTION}: {error}"
