"""Which part of which global tensor a rank holds: the one description that everything else reads.

Initialisation, gradient norm, checkpoint, Hugging Face conversion and memory estimates all take a parameter's
:class:`ShardSpec` and none of them derives the layout again. The invariant that makes this possible: *a
tensor-parallel shard is one plain slice along one dim of a global tensor whose layout does not depend on the
mesh*. Fused weights are therefore given extra dims (`qkv` is ``[kv_groups, q_per_group + 2, head_dim, hidden]``)
instead of an interleaving that only one tensor-parallel size understands.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

Init = Literal["normal", "zeros", "ones"]


@dataclass(frozen=True)
class ShardSpec:
    """What a local parameter is a part of.

    Args:
        name: global name, independent of the pipeline split (``layers.17.attention.qkv.weight``).
        global_shape: shape of the whole tensor; with a last dim of 2 if it is complex, see :func:`as_real`.
        dim: the sharded dim, or None where every tensor-parallel rank holds the whole tensor.
        index, count: this shard is number ``index`` of ``count`` equal slices along ``dim``; 0 of 1 if that is None.
        partial_over_tp: the gradient each tensor-parallel rank computes is only its share and must be summed over
            the TP axis (a norm weight under sequence parallelism sees only its part of the sequence).
        replica: this rank's copy is a duplicate of one that another rank owns (the TP ranks other than 0 of an
            unsharded tensor; the last stage's copy of a tied embedding). Duplicates are not counted in the gradient
            norm and not saved.
        init: how the global tensor is initialised, from (seed, name) alone; ``std`` for ``"normal"``.
        weight_decay: whether the optimizer decays it (matrices yes; biases and norms no).
    """

    name: str
    global_shape: tuple[int, ...]
    dim: int | None = None
    index: int = 0
    count: int = 1
    partial_over_tp: bool = False
    replica: bool = False
    init: Init = "normal"
    std: float = 0.02
    weight_decay: bool = True

    @property
    def local_shape(self) -> tuple[int, ...]:
        if self.dim is None:
            return self.global_shape
        size, rest = divmod(self.global_shape[self.dim], self.count)
        if rest:
            raise ValueError(
                f"{self.name}: dim {self.dim} of {list(self.global_shape)} is not divisible by {self.count} shards"
            )
        return (*self.global_shape[: self.dim], size, *self.global_shape[self.dim + 1 :])

    @property
    def offset(self) -> tuple[int, ...]:
        """Where this shard's box starts in the global tensor, per dim."""
        start = [0] * len(self.global_shape)
        if self.dim is not None:
            start[self.dim] = self.index * self.local_shape[self.dim]
        return tuple(start)

    def slice_of(self, whole: torch.Tensor) -> torch.Tensor:
        """This shard's part of the whole tensor, as a view."""
        if self.dim is None:
            return whole
        size = self.local_shape[self.dim]
        return whole.narrow(self.dim, self.index * size, size)


def empty_parameter(
    spec: ShardSpec, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> nn.Parameter:
    """An uninitialised local parameter of ``spec.local_shape`` carrying ``spec`` as its ``.shard`` attribute."""
    parameter = nn.Parameter(torch.empty(spec.local_shape, device=device, dtype=dtype))
    parameter.shard = spec  # type: ignore[attr-defined]
    return parameter


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the real and the imaginary part of a complex number; any other dtype itself."""
    return dtype.to_real() if dtype.is_complex else dtype


def as_real(tensor: torch.Tensor) -> torch.Tensor:
    """A complex tensor as its two parts, ``[..., 2]``, as flat buffers and files hold it; any other tensor itself."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def shaped_as(flat: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A flat range of real numbers as a view that has the parameter's shape, and is complex where it is."""
    if parameter.is_complex():
        return torch.view_as_complex(flat.view(*parameter.shape, 2))
    return flat.view(parameter.shape)


def spec_of(parameter: torch.Tensor) -> ShardSpec:
    """The :class:`ShardSpec` of a parameter; an error that names the mistake when it has none."""
    spec = getattr(parameter, "shard", None)
    if not isinstance(spec, ShardSpec):
        raise TypeError(f"parameter of shape {list(parameter.shape)} has no ShardSpec; set `parameter.shard`")
    return spec
