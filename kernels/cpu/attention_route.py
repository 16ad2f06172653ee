"""Which attention is the faster one on a CPU: torch's fused kernel, or blocks of queries."""

from __future__ import annotations

QUERIES = 64
"""Queries a block: smaller ones skip more of what lies above the diagonal, larger ones multiply at a better rate."""


def prefers_blocks(half: bool, bf16: bool, keeps_probabilities: bool, causal: bool, other_rules: bool) -> bool:
    """Whether blocks of queries are faster: but in fp32 and fp16 for whole rows, and in fp32 for long causal ones.

    torch's kernel computes its tiles at a fraction of the matmul rate, in bf16 more slowly than in fp32 (its backward
    pass over rows of 16 takes ten times as long), and other rules reach it as a matrix of ``[s, s]``. In fp16 products
    are slow without AVX-512's or AMX's own, and it computes them in fp32.

    Args:
        half: inputs are of half precision. bf16: of that one.
        keeps_probabilities: rows are short, see :func:`megatron_ds.kernels.block_attention.keeps_probabilities`.
        other_rules: documents, ALiBi or dropout.
    """
    return bf16 or other_rules or (causal and (half or keeps_probabilities))
