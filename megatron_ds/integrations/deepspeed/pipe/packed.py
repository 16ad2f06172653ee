"""A stage's output, a tensor or a tuple of tensors, as the one flat tensor that goes to the next stage, and back.

The flat tensor has a floating-point dtype, so that autograd goes through it: the widest of the tensors that require a
gradient. In front stands what it holds, and then the tensors without a gradient (masks, positions); both are raw bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_ds.errors import EngineError
from megatron_ds.shard.flat_shards import as_bytes

_DTYPES = (
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.complex128,
)  # fmt: skip
_WORD = 8  # bytes: what raw bytes are filled up to


def pack(output: Tensor | Sequence[Tensor], hidden: Tensor | None) -> Tensor:
    """``hidden``: the flat tensor that the stage itself got; its gradient is zero where the output does not use it.

    Raises:
        EngineError: the output is something else.
    """
    parts = [output] if isinstance(output, Tensor) else output
    if not isinstance(parts, list | tuple) or not all(isinstance(part, Tensor) for part in parts):
        raise EngineError(
            f"the last layer of a pipeline stage returned {type(output).__name__}; between two stages go a tensor, or "
            "a tuple of tensors"
        )
    for part in parts:
        if part.dtype not in _DTYPES or (part.requires_grad and part.is_complex()):
            raise EngineError(
                f"the last layer of a pipeline stage returned a tensor of {part.dtype}, which does not go to another "
                "stage; cast it, or as complex to torch.view_as_real(), or move the border with partition_method"
            )
    differentiable = [part for part in parts if part.requires_grad]
    dtypes = [part.dtype for part in differentiable] or [torch.float32]
    dtype = functools.reduce(torch.promote_types, dtypes)
    words = [0, int(isinstance(output, Tensor)), len(parts)]
    for part in parts:
        words += [_DTYPES.index(part.dtype), int(part.requires_grad), part.dim(), *part.shape]
    words[0] = len(words)
    header = torch.tensor(words, dtype=torch.int64, device=parts[0].device if parts else None)
    raw = [_raw(part).view(dtype) for part in (header, *(part for part in parts if not part.requires_grad))]
    linked = [] if hidden is None else [hidden[:0].to(dtype)]
    flat = torch.cat([*raw, *linked, *(part.reshape(-1).to(dtype) for part in differentiable)])
    return flat.requires_grad_() if torch.is_grad_enabled() and not flat.requires_grad else flat


def unpack(flat: Tensor) -> Tensor | tuple[Tensor, ...]:
    """What :func:`pack` was given."""
    each = _WORD // flat.element_size()
    plain = flat.detach()
    (size,) = plain[:each].view(torch.int64).tolist()
    _, single, count, *rest = plain[: size * each].view(torch.int64).tolist()
    layouts = []
    for _ in range(count):
        dtype, differentiable, dims = rest[:3]
        layouts.append((_DTYPES[dtype], bool(differentiable), torch.Size(rest[3 : 3 + dims])))
        rest = rest[3 + dims :]
    at = size * each
    found: list[Tensor | None] = []
    for dtype, differentiable, shape in layouts:
        if differentiable:
            found.append(None)
            continue
        nbytes = shape.numel() * dtype.itemsize
        length = -(-nbytes // _WORD) * each
        found.append(plain[at : at + length].clone().view(torch.uint8)[:nbytes].clone().view(dtype).view(shape))
        at += length
    for place, (dtype, differentiable, shape) in enumerate(layouts):
        if differentiable:
            found[place] = flat[at : at + shape.numel()].view(shape).to(dtype)
            at += shape.numel()
    parts = tuple(part for part in found if part is not None)
    return parts[0] if single else parts


def _raw(tensor: Tensor) -> Tensor:
    """The bytes, filled up to a whole number of words."""
    given = as_bytes(tensor)
    return torch.nn.functional.pad(given, (0, -given.numel() % _WORD))
