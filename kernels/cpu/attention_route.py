"""Which attention is the faster one on a CPU: torch's fused kernel, or blocks of queries."""

from __future__ import annotations

QUERIES = 64
"""Queries a block: smaller ones skip more of what lies above the diagonal, larger ones multiply at a better rate."""


def prefers_blocks(half: bool, keeps_probabilities: bool, causal: bool, other_rules: bool) -> bool:
    """Whether blocks of queries are faster: but in fp32 for whole rows, and for long ones under causality alone.

    torch's kernel computes its tiles at a fraction of the matmul rate, in bf16 more slowly than in fp32 (its backward
    pass over rows of 16 takes ten times as long), and other rules reach it as a matrix of ``[s, s]``.

    Args:
        half: inputs are of half precision.
        keeps_probabilities: rows are short, see :func:`megatron_ds.kernels.block_attention.keeps_probabilities`.
        other_rules: documents, ALiBi or dropout.
    """
    return half or other_rules or (causal and keeps_probabilities)
