"""oneDNN's matrix products on a CPU: in fp32, with weights in its own order, and of int8.

That in fp32 is as exact as the BLAS call behind ``torch.nn.functional.linear``, and faster for ``y = x w^T + b`` of
most sizes. For ``dx = dy w`` it is slower on Intel's CPUs, most of all for small ones, as it first puts the weight into
its order; for ``dw = dy^T x`` BLAS is as good there, and accumulates in place. On AMD's, for which MKL has no AVX-512
kernels, oneDNN is about twice as fast for all three. Half precision takes oneDNN's route in torch already.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ds.kernels.cpu.allocator import use_huge_pages


def _vendor() -> str:
    """Of the CPU, as Linux says it: ``GenuineIntel``, ``AuthenticAMD``; "" where it does not."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "")
    except OSError:
        return ""


BLAS_IS_SLOW = torch.backends.mkl.is_available() and _vendor() == "AuthenticAMD"
"""By the vendor and not by a trial, so that every rank and every run takes the same route."""
_WHOLE_ELEMENTS = 1 << 19
"""Of a weight gradient that is made by one product: beside its sum it is in memory as a whole."""
_BLOCK_COLUMNS = 192
"""Of a larger one, by each product. A power of two takes up to a fifth longer, as its rows fall on the same places of
the cache."""


def is_faster(x: Tensor) -> bool:
    """The private operator exists in the torch versions this project runs on where oneDNN was built in.

    It refuses sums over nothing, as of a weight's gradient without tokens.
    """
    return bool(
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and not torch.compiler.is_compiling()
        and x.shape[-1] > 0
    )


def beats_slow_blas(x: Tensor) -> bool:
    """Whether oneDNN is faster than BLAS for every fp32 product: forward, input gradient and weight gradient."""
    return BLAS_IS_SLOW and is_faster(x)


def add_product(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """``total += left @ right`` (``[rows, k] @ [k, columns]``) in fp32; ``first``: ``=`` and not ``+=``.

    A product's first operand is copied to have its rows side by side, which of a weight gradient's neither has. So the
    narrower one is the first, and ``right^T left^T`` has the same bits. The second operand is put into oneDNN's order,
    a copy that no profiler of tensors sees, by every product anew: so each takes some columns of it, for all rows. They
    must be dense: for a part of a transposed one oneDNN takes its reference loop, a thousand times slower.
    """
    if left.shape[0] > right.shape[1]:
        total, left, right = total.t(), right.t(), left.t()
    left = left.contiguous()
    columns = max(1, right.shape[1]) if total.numel() <= _WHOLE_ELEMENTS else _BLOCK_COLUMNS
    for of_total, of_right in zip(total.split(columns, dim=1), right.split(columns, dim=1)):
        found = product(left, of_right.contiguous().t(), None)
        of_total.copy_(found) if first else of_total.add_(found)
        del found  # before the next


def can_pack(weight: Tensor) -> bool:
    """Whether this machine multiplies by :func:`packed` weights of the dtype."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if weight.dtype is torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return weight.dtype is torch.float32


def packed(weight: Tensor) -> Tensor:
    """A copy of ``weight [out, in]`` in the order in which oneDNN's kernels read it, for :func:`product` alone.

    Otherwise every product of half precision puts the weight into that order anew: one row takes twice as long.
    """
    return _on_huge_pages(torch.ops.mkldnn._reorder_linear_weight(weight, None))


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias``: ``[..., in]``, ``[out, in]``, ``[out]`` -> ``[..., out]``. Not differentiable."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


MOST_INT8_PRODUCTS = (2**31 - 1) // 127**2
"""Length of the longest dot product of int8 values, up to 127 in magnitude, that cannot overflow int32."""


def can_multiply_int8(weight: Tensor) -> bool:
    """Whether this machine multiplies by :func:`packed_int8` weights: without VNNI sums may overflow."""
    there = weight.device.type == "cpu" and weight.dtype is torch.int8 and torch.backends.mkldnn.is_available()
    return there and weight.shape[1] <= MOST_INT8_PRODUCTS and torch.cpu._is_vnni_supported()


def packed_int8(weight: Tensor) -> Tensor:
    """A copy of ``weight [out, in]`` int8 for :func:`int8_product`."""
    return _on_huge_pages(torch.ops.onednn.qlinear_prepack(weight, None))


def _on_huge_pages(weight: Tensor) -> Tensor:
    use_huge_pages(torch.ops.mkldnn.data_ptr(weight), torch.ops.mkldnn._nbytes(weight))
    return weight


INT8_ZERO = 128
"""Zero point of the unsigned inputs of :func:`int8_product`. For signed inputs oneDNN has kernels on CPUs with AMX
alone; elsewhere they go through its reference loop."""


def int8_product(x: Tensor, weight: Tensor, scale: Tensor, zeros: Tensor) -> Tensor:
    """``(x - 128) @ weight.T * scale``: ``[t, in]`` uint8, packed ``[out, in]``, ``[out]`` fp32 -> ``[t, out]`` fp32.

    ``zeros``: ``[out]`` int32, the zero points of the weight.
    """
    return torch.ops.onednn.qlinear_pointwise(
        x, 1.0, INT8_ZERO, weight, scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
