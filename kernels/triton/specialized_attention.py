"""The forward pass of attention over a window of keys that ends at the diagonal, with specialised warps.

Four warps load keys and values through the tensor memory accelerator while two groups of four compute: what Triton
makes of a loop with ``warp_specialize`` on Hopper, from four warps alone and with descriptors alone. A causal dense
layout is a window too. What the descriptors cannot take, :func:`fits` says; the kernel of
:mod:`~megatron_ds.kernels.triton.sparse_attention` takes everything.
"""

from __future__ import annotations

import contextvars

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_ds.kernels.triton.attention_tiles import causal, place_of_program, store_tile
from megatron_ds.kernels.triton.common import on_device_of

_LOG2_E = 1.4426950408889634
LOG2_E = tl.constexpr(_LOG2_E)
QUERIES, KEYS, STAGES = 128, 64, 2


@triton.jit
def specialized_forward_kernel(
    q, k, v, out, lse, pattern, start, index, scale,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, out_batch, out_head, out_row,
    heads, group, length, side,
    TM: tl.constexpr, TN: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tile, row_of_heads = place_of_program(tl.cdiv(length, TM))
    batch = (row_of_heads // heads).to(tl.int64)
    head = row_of_heads % heads
    kv = (head // group).to(tl.int64)
    first = (tl.cdiv(length, TM) - 1 - tile) * TM  # the longest rows start first
    line = tl.load(pattern + head) * side + first // BLOCK
    begin = tl.load(index + tl.load(start + line)) * (BLOCK // TN)
    queries = q + batch * q_batch + head.to(tl.int64) * q_head
    queries = tl.make_tensor_descriptor(queries, [length, D], [q_row, 1], [TM, D])
    keys = tl.make_tensor_descriptor(k + batch * k_batch + kv * k_head, [length, D], [k_row, 1], [TN, D])
    values = tl.make_tensor_descriptor(v + batch * v_batch + kv * v_head, [length, D], [v_row, 1], [TN, D])
    q_tile = queries.load([first, 0])
    top = tl.full([TM], float("-inf"), tl.float32)
    total = tl.zeros([TM], tl.float32)
    acc = tl.zeros([TM, D], tl.float32)
    scaled = scale * LOG2_E
    for i in tl.range(begin, tl.cdiv(first + TM, TN), num_stages=STAGES, warp_specialize=True):
        scores = tl.dot(q_tile, keys.load([i * TN, 0]).T)
        scores = tl.where(causal(first, i * TN, TM, TN), scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores * scaled - (new_top * scaled)[:, None])
        shrink = tl.exp2((top - new_top) * scaled)
        total = total * shrink + tl.sum(weights, 1)
        v_tile = values.load([i * TN, 0])
        acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc * shrink[:, None])
        top = new_top
    acc = acc / total[:, None]
    store_tile(out + batch * out_batch + head.to(tl.int64) * out_head, first, out_row, length, acc, TM, D, D, True)
    row = first + tl.arange(0, TM)
    tl.store(lse + row_of_heads.to(tl.int64) * length + row, (top * scaled + tl.log2(total)) / LOG2_E)


def fits(q: Tensor, k: Tensor, v: Tensor, block: int) -> bool:
    """Whether descriptors can take ``[b, n, s, d]``: half precision, whole tiles, rows that begin at 16 bytes."""
    head_dim, length = q.shape[-1], q.shape[-2]
    return (
        q.dtype in (torch.bfloat16, torch.float16)
        and head_dim in (64, 128)
        and length % QUERIES == 0
        and block % QUERIES == 0
        and all(x.data_ptr() % 16 == 0 and not any(step % 8 for step in x.stride()[:3]) for x in (q, k, v))
    )


def forward(
    q: Tensor, k: Tensor, v: Tensor, layout: list[Tensor], block: int, scale: float, out: Tensor, lse: Tensor
) -> None:
    """Write ``out [b, n, s, d]``, its last dim contiguous, and ``lse [b, n, s]``, contiguous fp32."""
    b, n, s, d = q.shape

    def launch() -> None:
        # Where the kernel makes its descriptors. In a context of its own: this is no setting of the process.
        triton.set_allocator(lambda size, _, __: torch.empty(size, dtype=torch.int8, device=q.device))
        specialized_forward_kernel[(s // QUERIES * b * n,)](
            q, k, v, out, lse, layout[0], layout[1], layout[3], scale,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], n, n // k.shape[1], s, s // block,
            TM=QUERIES, TN=KEYS, BLOCK=block, D=d, STAGES=STAGES, num_warps=4,
        )  # fmt: skip

    with on_device_of(q):
        contextvars.copy_context().run(launch)
