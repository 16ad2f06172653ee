"""Matrix products of a linear layer, by the fastest route the device has. Not differentiable."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ds.kernels.cpu import onednn


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``: ``[..., in]``, ``[out, in]``, ``[out]`` -> ``[..., out]``."""
    if onednn.is_faster(x):
        return onednn.product(x, weight, bias)
    if bias is None or x.dim() == 2:
        return F.linear(x, weight, bias)
    # torch flattens it as well, but by sizes that a recorded graph then has for good.
    return F.linear(x.flatten(0, -2), weight, bias).view(*x.shape[:-1], weight.shape[0])


def linear_of_vocabulary(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Logits: :func:`linear` with a large weight, which oneDNN packs anew each time, at the cost of what it gains."""
    return linear(x, weight, bias) if onednn.beats_slow_blas(x) else F.linear(x, weight, bias)


def linear_input_gradient(grad: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """``grad @ weight``: ``[..., out]``, ``[out, in]`` -> ``[..., in]``."""
    one_row = grad.numel() == weight.shape[0]  # of which oneDNN puts the weight into its order first all the same
    if one_row or not onednn.beats_slow_blas(grad):
        return torch.matmul(grad, weight, out=out)
    found = onednn.product(grad, weight.t(), None)
    return found if out is None else out.copy_(found)
