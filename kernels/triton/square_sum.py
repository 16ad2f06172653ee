"""The sum of squares of a flat buffer: one launch for a partial sum a program, one for their sum."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_ds.kernels.triton.common import STAGES, on_device_of, persistent

BLOCK, WARPS, RESIDENT_WARPS = 2048, 4, 32


@triton.jit
def square_sum_kernel(flat, partial, count, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    at = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    whole = count // BLOCK
    for tile in tl.range(tl.program_id(0), whole, tl.num_programs(0), num_stages=STAGES):
        x = tl.load(flat + tl.cast(tile, tl.int64) * BLOCK + at).to(tl.float32)
        total += (x * x).to(tl.float64)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        rest = tl.cast(whole, tl.int64) * BLOCK + at
        x = tl.load(flat + rest, mask=rest < count, other=0.0).to(tl.float32)
        total += (x * x).to(tl.float64)
    tl.store(partial + tl.program_id(0), tl.sum(total, axis=0))


def square_sum(flat: Tensor) -> Tensor:
    flat = flat.contiguous()
    programs = persistent(flat, max(1, triton.cdiv(flat.numel(), BLOCK)), WARPS, RESIDENT_WARPS)
    partial = flat.new_empty(programs, dtype=torch.float64)
    with on_device_of(flat):
        square_sum_kernel[(programs,)](flat, partial, flat.numel(), BLOCK=BLOCK, STAGES=STAGES, num_warps=WARPS)
    return partial.sum()
