"""What the twins make of strides, dtypes and sizes that models seldom have, under Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from interpreted_inputs import keys, normal
from interpreter_worker import close, compare
from torch import Tensor

from megatron_ds.kernels import block_patterns, registry
from megatron_ds.kernels.activation import bias_gelu, gated
from megatron_ds.kernels.dropout import dropout_add
from megatron_ds.kernels.norm import add_norm, layer_norm, rms_norm
from megatron_ds.kernels.softmax import scaled_masked_softmax
from megatron_ds.kernels.sparse_attention import _flat

UNUSUAL: dict[str, Callable[[], None]] = {}

# Every second value of a longer parameter, and one value for all columns.
PARAMETERS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "strided": (lambda w: w[::2], 74),
    "expanded": (lambda w: w.expand(37), 1),
}
for name, (view, size) in PARAMETERS.items():
    p = partial(normal, size)

    def case(function: Callable[..., Any], *inputs: Callable[[], Tensor], **options: Any) -> Callable[[], None]:
        return lambda: compare(function, [make() for make in inputs], **options)

    UNUSUAL |= {
        f"rms_norm {name} weight": case(lambda x, w, v=view: rms_norm(x, v(w), 1e-5), lambda: normal(3, 37), p),
        f"layer_norm {name} weight and bias": case(
            lambda x, w, b, v=view: layer_norm(x, v(w), v(b), 1e-5), lambda: normal(3, 37), p, p
        ),
        f"bias_gelu {name} bias": case(lambda x, b, v=view: bias_gelu(x, v(b)), lambda: normal(3, 37), p),
        f"softmax {name} slopes": case(
            lambda x, s, v=view: scaled_masked_softmax(x, slopes=v(s)), lambda: normal(1, 37, 2, 5), p, no_gradient=[1]
        ),
    }


def a_residual_of_another_dtype() -> None:
    """Results have the dtype that torch promotes both to, and gradients those of their inputs, as the reference's."""
    for types in ((torch.float16, torch.float32), (torch.float32, torch.float16), (torch.bfloat16, torch.float32)):
        x, r = (normal(3, 37, dtype=dtype).requires_grad_() for dtype in types)
        w, row_keys = normal(37), keys(3)
        for function in (
            partial(dropout_add, p=0.3, row_keys=row_keys),
            partial(add_norm, weight=w, bias=w, eps=1e-5, p=0.3, row_keys=row_keys),
            partial(add_norm, weight=w, bias=None, eps=1e-5, kind="rmsnorm"),
        ):
            results = []
            for implementation in ("triton", "reference"):
                with registry.use(implementation):
                    outputs = function(x, r)
                outputs = outputs if isinstance(outputs, tuple) else (outputs,)
                sums = sum(o.square().sum() for o in outputs)
                results.append([*outputs, *torch.autograd.grad(sums, (x, r))])
            for got, want in zip(*results):
                assert got.dtype == want.dtype, (types, got.dtype, want.dtype)
                close("result", got.detach(), want.detach().double(), 2e-2 if torch.bfloat16 in types else 4e-3)


UNUSUAL["a residual of another dtype"] = a_residual_of_another_dtype


def masks_beyond_two_billion() -> None:
    """Places in a mask that 32 bits do not hold: of the third head, and of a key. Memory is committed as it is used."""
    memory = torch.empty((1 << 32) + 64, dtype=torch.bool)
    for strides in ((0, 1 << 30, 5, 1), (0, 15, 5, 1 << 30)):
        mask = memory.as_strided((1, 3, 2, 5), strides)
        mask.copy_(torch.rand(1, 3, 2, 5) > 0.4)
        x = normal(1, 3, 2, 5)
        with registry.use("triton"):
            got = scaled_masked_softmax(x, mask=mask)
        close("softmax", got, scaled_masked_softmax(x.double(), mask=mask), 1e-6)


UNUSUAL["softmax masks beyond 2^31"] = masks_beyond_two_billion


def rows_beyond_two_billion() -> None:
    """Rows whose place 32 bits do not hold, forward and backward. Memory is committed as it is used."""
    far = torch.empty((1 << 31) + 64, dtype=torch.float16).as_strided((3, 24), (1 << 30, 1))
    far.copy_(torch.randn(3, 24))
    w = normal(24, dtype=torch.float16)
    functions: list[Callable[[Tensor], Tensor]] = [
        lambda x: rms_norm(x, w, 1e-5),
        lambda x: add_norm(x, x, w, w, 1e-5)[0],
        gated,
        lambda x: bias_gelu(x, w, added=True),
        lambda x: scaled_masked_softmax(x.view(1, 1, 3, 24), causal=True),
    ]
    for function in functions:
        results = []
        for rows in (far, far.contiguous()):
            leaf = rows.detach().requires_grad_()
            with registry.use("triton"):
                y = function(leaf)
                results.append((y, *torch.autograd.grad(y.square().sum(), leaf)))
        assert all(torch.equal(a, b) for a, b in zip(*results))


UNUSUAL["rows beyond 2^31"] = rows_beyond_two_billion


def block_masks_beyond_two_billion() -> None:
    """Mask 131,072 of blocks of 128 begins at 2^31."""
    from megatron_ds.kernels.triton import sparse_attention as twin

    block, length = 128, 160
    flat = _flat(block_patterns.dense(length, block, 1))
    number = (1 << 31) // block**2
    many = torch.empty(number + 1, block, block, dtype=torch.bool)
    many[number:] = flat[9]
    far = [torch.where(x == 0, number, x).to(torch.int32) if i in (4, 8) else x for i, x in enumerate(flat)]
    far[9] = many
    q, grad = (normal(1, 1, length, 16, dtype=torch.float16) for _ in range(2))
    results = []
    for layout in (flat, far):
        out, lse = torch.empty_like(q), torch.empty(1, 1, length)
        twin.forward(q, q, q, layout, block, False, 0.25, out, lse)
        gradients = [torch.empty_like(q) for _ in range(3)]
        twin.backward(grad, q, q, q, out, lse, layout, block, False, 0.25, *gradients)
        results.append([out, lse, *gradients])
    assert all(torch.equal(a, b) for a, b in zip(*results))


UNUSUAL["block masks beyond 2^31"] = block_masks_beyond_two_billion
