"""Rotation of queries and keys in one launch.

A program takes one token and a few heads, of the queries or, further along the grid, of the keys, so that the angles
are loaded once for all of those heads.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from megatron_ds.kernels.triton.common import on_device_of


@triton.jit
def rotary_kernel(
    q, k, q_out, k_out, cos, sin, batch, q_heads, k_heads, dim, planes, offset,
    q_s, q_b, q_n, k_s, k_b, k_n, table_s, table_b,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, PASSES: tl.constexpr,
    HEADS: tl.constexpr, PLANES: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    s, b = tl.cast(token // batch, tl.int64), tl.cast(token % batch, tl.int64)
    blocks = tl.cdiv(q_heads, HEADS)
    block = tl.program_id(1)
    x, out, stride, heads = q + s * q_s + b * q_b, q_out + token.to(tl.int64) * q_heads * dim, q_n, q_heads
    if block >= blocks:
        x, out, stride, heads = k + s * k_s + b * k_b, k_out + token.to(tl.int64) * k_heads * dim, k_n, k_heads
        block -= blocks
    head = block * HEADS + tl.arange(0, HEADS)[:, None]
    x += head.to(tl.int64) * stride
    out += head.to(tl.int64) * dim
    plane = tl.arange(0, PLANES)[None, :]
    angle = (s + offset) * table_s + b * table_b + plane
    c = tl.load(cos + angle, mask=plane < planes, other=0.0).to(tl.float32)
    w = tl.load(sin + angle, mask=plane < planes, other=0.0).to(tl.float32)
    if INVERSE:
        w = -w
    if INTERLEAVED:
        # Neighbours are loaded together and taken apart in registers, so that the loads stay wide.
        both = tl.arange(0, 2 * PLANES)[None, :]
        inside = (head < heads) & (both < 2 * planes)
        pair = tl.load(x + both, mask=inside, other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(pair, (HEADS, PLANES, 2)))
        turned = tl.join(first * c - second * w, second * c + first * w)
        tl.store(out + both, tl.reshape(turned, (HEADS, 2 * PLANES)).to(q_out.dtype.element_ty), mask=inside)
    else:
        inside = (head < heads) & (plane < planes)
        first = tl.load(x + plane, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(x + planes + plane, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + plane, (first * c - second * w).to(q_out.dtype.element_ty), mask=inside)
        tl.store(out + planes + plane, (second * c + first * w).to(q_out.dtype.element_ty), mask=inside)
    if PASSES:
        rest = 2 * planes + tl.arange(0, REST)[None, :]
        inside = (head < heads) & (rest < dim)
        tl.store(out + rest, tl.load(x + rest, mask=inside, other=0.0), mask=inside)


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, offset: int, inverse: bool
) -> tuple[Tensor, Tensor]:
    q, k, cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, cos, sin))
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    length, batch, q_heads, dim = q.shape
    k_heads, size = k.shape[2], cos.shape[-1]
    if q.dtype != k.dtype or k.shape[:2] != q.shape[:2] or k.shape[3] != dim or size > dim or size % 2:
        raise ValueError(
            f"q {tuple(q.shape)} {q.dtype}, k {tuple(k.shape)} {k.dtype} and {size} rotated dims do not fit"
        )
    if cos.shape != sin.shape or cos.shape[0] < offset + length or cos.shape[1] not in (1, batch):
        raise ValueError(f"tables {tuple(cos.shape)} do not hold positions {offset}..{offset + length} of {batch} rows")
    heads = min(16, triton.next_power_of_2(max(q_heads, k_heads, 1)))
    grid = (length * batch, triton.cdiv(q_heads, heads) + triton.cdiv(k_heads, heads))
    if length * batch and grid[1] and dim:
        with on_device_of(q):
            rotary_kernel[grid](
                q, k, q_out, k_out, cos, sin, batch, q_heads, k_heads, dim, size // 2, offset,
                *q.stride()[:3], *k.stride()[:3], cos.stride(0), cos.stride(1) if cos.shape[1] > 1 else 0,
                INTERLEAVED=interleaved, INVERSE=inverse, PASSES=size < dim,
                HEADS=heads, PLANES=triton.next_power_of_2(max(1, size // 2)),
                REST=triton.next_power_of_2(max(1, dim - size)),
            )  # fmt: skip
    return q_out, k_out
