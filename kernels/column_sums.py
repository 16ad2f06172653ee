"""Fused bias gradients: column sums that the backward kernel of a neighbouring operator makes in its own pass.

The gradient of a bias, or of a norm's weight, is the column sums of a gradient. The kernel that writes that gradient
adds them up on the way, and one more launch adds them to the main gradients of all of its parameters. A linear layer
hands its bias to the operator behind it (``x_bias``) and makes no gradient for it itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_ds.kernels.accumulate import sum_rows
from megatron_ds.kernels.autograd import first_derivative_only, main_gradients


def with_bias_gradient(x: Tensor, bias: Tensor) -> Tensor:
    """``x [..., columns]``, which has ``bias [columns]`` in it already, detached: the bias gets its gradient here."""
    return _WithBiasGradient.apply(x, bias) if torch.is_grad_enabled() else x


class _WithBiasGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(bias)
        ctx.main_grads = main_gradients(bias)
        return x.view_as(x)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (bias,) = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return grads[0], None
        return grads[0], add_to_gradient(bias, sum_rows(grads[0]), *ctx.main_grads)


def add_to_gradient(bias: Tensor, total: Tensor, main_grad: Any) -> Tensor | None:
    """Add it to the bias's main gradient; where there is none, what autograd gets."""
    if main_grad is None:
        return total.view(bias.shape).to(bias.dtype)
    main_grad.add(total.view(bias.shape))
    return None


class ColumnSums:
    """The memory into which a backward kernel writes gradients that are column sums: the main gradients, if there.

    Inside this context a kernel writes ``totals``; where ``keep`` says so it adds to what is there. Afterwards
    ``gradients`` are what autograd gets, one a parameter.

    Args:
        parameters: None for one that there is not.
        needed: whether each of them wants its gradient.
        main_grads: of each of them, see :func:`megatron_ds.kernels.autograd.main_gradients`.
    """

    def __init__(self, parameters: Sequence[Tensor | None], needed: Sequence[bool], main_grads: Sequence[Any]):
        self._main = [main if need else None for main, need in zip(main_grads, needed, strict=True)]
        places = [None if main is None else main.for_kernel() for main in self._main]
        # Of one dtype, as they are written by one launch.
        dtypes = {p.dtype for p in parameters if p is not None} | {place[0].dtype for place in places if place}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        self._parameters, self._direct = parameters, [place is not None for place in places]
        self.totals, self.keep = [], []
        for parameter, place in zip(parameters, places):
            if parameter is not None:
                total, keep = place or (parameter.new_empty(parameter.shape, dtype=dtype), False)
                self.totals.append(total.view(-1))
                self.keep.append(keep)
        self.gradients: list[Tensor | None] = []

    def __enter__(self) -> ColumnSums:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        totals = iter(self.totals)
        for parameter, main, direct in zip(self._parameters, self._main, self._direct):
            total = None if parameter is None else next(totals).view(parameter.shape)
            if main is not None and error is None:
                if direct:
                    main.wrote()
                else:
                    main.add(total)
                total = None
            self.gradients.append(None if total is None or parameter is None else total.to(parameter.dtype))
