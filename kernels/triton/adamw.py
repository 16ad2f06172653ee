"""AdamW over flat memory: each program updates a block of weights, everything it needs read and written once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from megatron_ds.kernels.triton.common import on_device_of

BLOCK = 2048


@triton.jit
def adamw_kernel(
    master, gradient, exp_avg, exp_avg_sq, low, scale, count,
    lr, decay, beta1, beta2, eps, correction1, correction2, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(scale)
    own = at < tl.where(factor == factor, count, 0)
    w = tl.load(master + at, mask=own, other=0.0)
    g = tl.load(gradient + at, mask=own, other=0.0) * factor
    m = tl.load(exp_avg + at, mask=own, other=0.0)
    v = tl.load(exp_avg_sq + at, mask=own, other=0.0)
    if low is not None:
        seen = tl.load(low + at, mask=own, other=0.0)
        w = tl.where(w.to(seen.dtype) == seen, w, seen.to(tl.float32))
    m += (1.0 - tl.cast(beta1, tl.float32)) * (g - m)
    b2 = tl.cast(beta2, tl.float32)
    v = b2 * v + (1.0 - b2) * g * g
    w -= tl.cast(decay, tl.float32) * w
    root = tl.sqrt(v / tl.cast(correction2, tl.float32)) + tl.cast(eps, tl.float32)
    w -= tl.cast(lr, tl.float32) / tl.cast(correction1, tl.float32) * m / root
    tl.store(exp_avg + at, m, mask=own)
    tl.store(exp_avg_sq + at, v, mask=own)
    tl.store(master + at, w, mask=own)
    if low is not None:
        tl.store(low + at, w.to(low.dtype.element_ty), mask=own)


def adamw_(
    master: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    low: Tensor | None,
    scale: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    if any(t is not None and not t.is_contiguous() for t in (master, gradient, exp_avg, exp_avg_sq, low)):
        raise ValueError("an update in one pass is of flat memory; use .contiguous()")
    if master.numel():
        with on_device_of(master):
            adamw_kernel[(triton.cdiv(master.numel(), BLOCK),)](
                master, gradient, exp_avg, exp_avg_sq, low, scale, master.numel(),
                lr, lr * weight_decay, beta1, beta2, eps, 1.0 - beta1**step, 1.0 - beta2**step,
                BLOCK=BLOCK, num_warps=8,
            )  # fmt: skip
