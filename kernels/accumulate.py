"""Gradients that are sums over tokens, added up in fp32 whatever the dtype of the activations.

In half precision a sum stops growing when it is some hundred times its next term: 32,768 terms of 0.01 give 4.0 in
bf16, and 328 in fp32. torch's CPU kernels for the gradients of a LayerNorm's weights and of an embedding table do add
in half precision.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK_BYTES = 1 << 20
_BLOCK_ROWS = 256  # rows converted to fp32 at a time on a CPU, so that they stay in the cache


def add_product(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """``total += left @ right`` (``[rows, k] @ [k, columns]``), for weight gradients; ``first``: ``=`` and not ``+=``.

    So ``total`` need not be zeroed before: for an 8192 x 384 table that took 4 ms on a CPU. A product of its dtype is
    accumulated in place. Products of half precision come out in fp32 on a GPU, and in fp16 on a CPU too, where no
    faster route is lost by it: what fp16 cannot hold would be infinite before it is added, whatever the loss scale.
    In bf16 on a CPU torch has no such product, and each is rounded once before it is added. It goes by blocks of rows,
    the same bits: the product as a whole, and the copy of it in the dtype of ``total`` that torch adds from, took
    18 MiB for an 8192 x 384 table.
    """
    if left.dtype != total.dtype and total.is_cuda:
        if first:
            torch.mm(left, right, out_dtype=total.dtype, out=total)
        else:
            total.add_(torch.mm(left, right, out_dtype=total.dtype))
        return
    if left.dtype == torch.float16:
        left, right = left.to(total.dtype), right.to(total.dtype)
    if left.dtype != total.dtype:
        rows = max(1, _BLOCK_BYTES // max(1, right.shape[1] * right.itemsize))
        for some, sums in zip(left.split(rows), total.split(rows)):
            product = some @ right
            sums.copy_(product) if first else sums.add_(product)
    elif first:
        torch.mm(left, right, out=total)
    else:
        total.addmm_(left, right)


def add_rows(total: Tensor, indices: Tensor, rows: Tensor) -> None:
    """``total[indices[i]] += rows[i]`` (``[n]``, ``[n, columns]``), for embedding tables; indices may repeat."""
    if total.is_cuda:
        # index_add_ adds repeated rows in any order there; this sorts them, and gives the same bits every time.
        total.index_put_((indices,), rows.to(total.dtype), accumulate=True)
        return
    for places, some in zip(indices.split(_BLOCK_ROWS), rows.split(_BLOCK_ROWS)):
        total.index_add_(0, places, some.to(total.dtype))


def sum_rows(x: Tensor) -> Tensor:
    """The sum of ``[..., columns]`` over all dims but the last, for biases.

    In fp32 where the result could overflow the dtype (fp16), or where that costs nothing (a GPU). torch adds bf16 up
    in fp32 on a CPU as well and rounds the sum once.
    """
    x = x.reshape(-1, x.shape[-1])
    if x.is_cuda and x.dtype in (torch.float16, torch.bfloat16):
        return x.sum(0, dtype=torch.float32)
    if x.dtype != torch.float16:
        return x.sum(0)
    total = x.new_zeros(x.shape[1], dtype=torch.float32)
    for some in x.split(2 * _BLOCK_ROWS):
        total += some.sum(0, dtype=torch.float32)
    return total


def layer_norm_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of ``x [..., h]``, ``weight`` and ``bias`` (``[h]``, fp32) of a LayerNorm in half precision on a CPU.

    torch's kernel on blocks of rows in fp32. ``mean`` and ``rstd`` ``[..., 1]`` are the forward pass's, in fp32.
    """
    columns = x.shape[-1]
    grads, rows = grad.reshape(-1, columns), x.reshape(-1, columns)
    out = torch.empty_like(rows)
    d_weight = weight.new_zeros(columns, dtype=torch.float32)
    d_bias = None if bias is None else torch.zeros_like(d_weight)
    wide, wide_bias = weight.float(), None if bias is None else bias.float()
    block = max(1, _BLOCK_ROWS * 384 // max(1, columns))
    for g, v, result, mu, r in zip(
        *(t.split(block) for t in (grads, rows, out, mean.reshape(-1, 1), rstd.reshape(-1, 1)))
    ):
        d, w, b = torch.ops.aten.native_layer_norm_backward(
            g.float(), v.float(), [columns], mu, r, wide, wide_bias, [True, True, bias is not None]
        )
        result.copy_(d)
        d_weight += w
        if d_bias is not None:
            d_bias += b
    return out.view(x.shape), d_weight, d_bias
