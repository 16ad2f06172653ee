"""Which attention is the faster one on a CPU: torch's fused kernel, or blocks of queries."""

from __future__ import annotations

import torch

QUERIES = 64
"""Queries a block: smaller ones skip more of what lies above the diagonal, larger ones multiply at a better rate."""


def prefers_blocks(dtype: torch.dtype, keeps_probabilities: bool, causal: bool, other_rules: bool) -> bool:
    """Whether blocks of queries are faster: but in fp32 and fp16 for whole rows, and in fp32 for long causal ones.

    torch's kernel computes its tiles at a fraction of the matmul rate, in bf16 more slowly than in fp32 (most
    of all its backward pass over short rows), and other rules reach it as a matrix of ``[s, s]``. In fp16 products
    are slow without AVX-512's or AMX's own, and it computes them in fp32.

    Args:
        dtype: of the inputs.
        keeps_probabilities: rows are short, see :func:`megatron_ds.kernels.block_attention.keeps_probabilities`.
        other_rules: documents, ALiBi or dropout.
    """
    if dtype is torch.bfloat16 or other_rules:
        return True
    return causal and (dtype is torch.float16 or keeps_probabilities)
