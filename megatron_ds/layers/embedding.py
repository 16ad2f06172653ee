"""Vocabulary-parallel token embedding, and the lookup of rows in any table.

Shapes: ``s`` sequence, ``b`` batch, ``h`` hidden, ``v`` vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ds import comm
from megatron_ds.kernels.accumulate import add_rows
from megatron_ds.kernels.autograd import first_derivative_only, main_gradients
from megatron_ds.mesh import Axis
from megatron_ds.shard import ShardedDim, ShardSpec, empty_parameter


class _Lookup(torch.autograd.Function):
    """Embedding lookup. Its gradient is added straight to the main gradient where an optimizer gave the table one."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(tokens, table)
        (ctx.main_grad,) = main_gradients(table)
        return F.embedding(tokens, table)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor | None]:
        tokens, table = ctx.saved_tensors
        (grad,) = grads
        if not ctx.needs_input_grad[1]:
            return None, None
        if ctx.main_grad is not None:
            ctx.main_grad.add_rows(tokens.reshape(-1), grad.reshape(-1, grad.shape[-1]))
            return None, None
        if table.dtype not in (torch.float16, torch.bfloat16):
            return None, torch.ops.aten.embedding_dense_backward(grad, tokens, table.shape[0], -1, False)
        total = torch.zeros_like(table, dtype=torch.float32)
        add_rows(total, tokens.reshape(-1), grad.reshape(-1, grad.shape[-1]))
        return None, total.to(table.dtype)


def lookup(indices: Tensor, table: Tensor) -> Tensor:
    """``table[indices]``: ``[...]`` int64, ``[rows, h]`` -> ``[..., h]``; the table's gradient is summed in fp32."""
    return _Lookup.apply(indices, table) if torch.is_grad_enabled() else F.embedding(indices, table)


class VocabParallelEmbedding(nn.Module):
    """Token ids ``[s, b] -> [s(/tp), b, h]``; each rank holds ``v / tp`` consecutive rows of the padded table.

    Args:
        num_embeddings: padded rows of the global table.
        replica: this copy belongs to the last stage of a pipeline and is tied to the first stage's.
    """

    def __init__(
        self,
        name: str,
        num_embeddings: int,
        embedding_dim: int,
        *,
        tp: Axis,
        sequence_parallel: bool,
        init_std: float,
        replica: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.tp, self.sequence_parallel = tp, sequence_parallel and tp.size > 1
        spec = ShardSpec(
            f"{name}.weight",
            (num_embeddings, embedding_dim),
            (ShardedDim.over(tp, 0),),
            replica=replica,
            std=init_std,
        )
        self.weight = empty_parameter(spec, device, dtype)
        self.first_row = spec.offset[0]

    def forward(self, tokens: Tensor) -> Tensor:
        if self.tp.size == 1:
            return lookup(tokens, self.weight)
        local = tokens - self.first_row
        outside = (local < 0) | (local >= self.weight.shape[0])
        # Any row will do for a token of another rank, but not one for all: its gradient would be one long sum.
        partial = lookup(local.remainder(self.weight.shape[0]), self.weight).masked_fill(outside.unsqueeze(-1), 0.0)
        if self.sequence_parallel:
            return comm.reduce_scatter_sequence(partial, self.tp)
        return comm.reduce_from_region(partial, self.tp)
