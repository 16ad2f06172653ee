"""Gradients that are sums over tokens, added up in fp32 whatever the dtype of the activations.

In half precision a sum stops growing when it is some hundred times its next term: 32,768 terms of 0.01 give 4.0 in
bf16, and 328 in fp32. torch's CPU kernels for the gradients of a LayerNorm's weights and of an embedding table do add
in half precision.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ds.kernels.cpu import blocked_sums, onednn
from megatron_ds.kernels.registry import Op, define, on_gpu

ADD_ROWS = Op("add_rows", twin="add_rows")


def add_product(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """``total += left @ right`` (``[rows, k] @ [k, columns]``), for weight gradients; ``first``: ``=`` and not ``+=``.

    So ``total`` need not be zeroed before, which would be one pass over it more. A product of its dtype is accumulated
    in place by BLAS, where that is fast, and one of half precision on a GPU always: it is rounded nowhere, and passes
    through no memory of its own. In fp16 a product comes out in fp32 on a CPU too, where no faster route is
    lost by it: what fp16 cannot hold would be infinite before it is added, whatever the loss scale. In bf16 on a CPU
    torch has no such product, and each is rounded once before it is added.
    """
    if left.dtype != total.dtype and on_gpu(total):
        if first:
            torch.mm(left, right, out_dtype=total.dtype, out=total)
        else:
            torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
        return
    if left.dtype == torch.float16:
        left, right = left.to(total.dtype), right.to(total.dtype)
    if left.dtype != total.dtype:
        blocked_sums.add_product(total, left, right, first)
    elif onednn.beats_slow_blas(left):
        onednn.add_product(total, left, right, first)
    elif first:
        torch.mm(left, right, out=total)
    else:
        total.addmm_(left, right)


def add_rows(total: Tensor, indices: Tensor, rows: Tensor) -> None:
    """``total[indices[i]] += rows[i]`` (``[n]``, ``[n, columns]``), for embedding tables; indices may repeat.

    The same bits every time; of half precision on a GPU too without a copy of all rows in the dtype of ``total``.
    """
    if total.dtype == torch.float32 and ADD_ROWS.choose(rows) == "triton":
        torch.ops.megatron_ds.add_rows_(total, rows, *indices.sort(stable=True))
    elif on_gpu(total):
        # index_add_ adds repeated rows in any order there; this sorts them.
        total.index_put_((indices,), rows.to(total.dtype), accumulate=True)
    else:
        blocked_sums.add_rows(total, indices, rows)


def sum_rows(x: Tensor) -> Tensor:
    """The sum of ``[..., columns]`` over all dims but the last, for biases.

    In fp32 where the result could overflow the dtype (fp16), or where that costs nothing (a GPU). torch adds bf16 up
    in fp32 on a CPU as well and rounds the sum once.
    """
    x = x.reshape(-1, x.shape[-1])
    if on_gpu(x) and x.dtype in (torch.float16, torch.bfloat16):
        return x.sum(0, dtype=torch.float32)
    return blocked_sums.sum_rows(x) if x.dtype == torch.float16 else x.sum(0)


define(
    "add_rows_(Tensor(a!) total, Tensor rows, Tensor places, Tensor order) -> ()",
    lambda total, *others: ADD_ROWS.load(total).add_rows_(total, *others),
    lambda total, *others: None,
)
