"""Which part of which global tensor a rank holds: the one description that everything else reads.

Initialisation, gradient norm, checkpoint, Hugging Face conversion and memory estimates all take a parameter's
:class:`ShardSpec` and none of them derives the layout again. The invariant that makes this possible: *a shard is one
box of a global tensor whose layout does not depend on the mesh*: along each sharded dim a plain slice. Fused weights
are therefore given extra dims (`qkv` is ``[kv_heads, queries_per_kv_head + 2, head_dim, hidden]``) instead of an
interleaving that only one tensor-parallel size understands.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import nn

Init = Literal["normal", "zeros", "ones"]


class Line(Protocol):
    """A line of ranks, such as :class:`~megatron_ds.mesh.Axis`."""

    @property
    def name(self) -> str: ...

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...


@dataclass(frozen=True)
class ShardedDim:
    """Dim ``dim`` is cut into ``count`` equal slices over the mesh axis ``axis``; this is number ``index`` of them."""

    dim: int
    axis: str
    index: int
    count: int

    @staticmethod
    def over(axis: Line, dim: int) -> ShardedDim:
        """This rank's slice of a dim that is sharded over ``axis``."""
        return ShardedDim(dim, axis.name, axis.rank, axis.size)


@dataclass(frozen=True)
class Matrices:
    """What a linear layer's weight is made of: matrices ``[out, in]`` side by side along ``dim``, of ``sizes`` each.

    No sizes: the weight is one matrix. All dims but the last, and the leading ones, are output features.

    Args:
        leading: so many dims at the front number matrices of their own, as experts do.
        heads: so many dims at the front number heads, which may be taken as matrices of their own too.
    """

    dim: int = 0
    sizes: tuple[int, ...] = ()
    leading: int = 0
    heads: int = 0

    def by_head(self) -> Matrices:
        """One matrix a head, where there are heads."""
        return Matrices(leading=self.heads) if self.heads else self

    def split(self, whole: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The matrices of a whole weight, as views in its dims."""
        return whole.split(self.sizes, dim=self.dim) if self.sizes else (whole,)


WHOLE = Matrices()


@dataclass(frozen=True)
class ShardSpec:
    """What a local parameter is a part of.

    Args:
        name: global name, independent of the pipeline split (``layers.17.attention.qkv.weight``).
        global_shape: shape of the whole tensor; with a last dim of 2 if it is complex, see :func:`as_real`.
        placements: the sharded dims, each over a mesh axis of its own. Empty where every rank holds the whole tensor.
            Of two that cut the same dim the later one cuts the slices of the earlier.
        reduce_over: the mesh axes over which each rank's gradient is only its share and must be summed, besides those
            over which ZeRO reduces (``("tp",)`` for a norm weight under sequence parallelism, which sees only its
            part of the sequence).
        replica: this rank's copy is a duplicate of one that another rank owns (the TP ranks other than 0 of an
            unsharded tensor; the last stage's copy of a tied embedding). Duplicates are not counted in the gradient
            norm and not saved.
        init: how the global tensor is initialised, from (seed, name) alone; ``std`` for ``"normal"``.
        weight_decay: whether the optimizer decays it (matrices yes; biases and norms no).
        matrices: of the weight of a linear layer, for optimizers of whole matrices; None: it is no such weight.
        order: the dims of this rank's shard from the slowest to the fastest in memory, as :func:`memory_order` says;
            empty: row-major. Flat buffers hold a parameter in this order, files all of them row-major.
    """

    name: str
    global_shape: tuple[int, ...]
    placements: tuple[ShardedDim, ...] = ()
    reduce_over: tuple[str, ...] = ()
    replica: bool = False
    init: Init = "normal"
    std: float = 0.02
    weight_decay: bool = True
    matrices: Matrices | None = None
    order: tuple[int, ...] = ()

    @property
    def local_shape(self) -> tuple[int, ...]:
        return self._box()[1]

    @property
    def offset(self) -> tuple[int, ...]:
        """Where this shard's box starts in the global tensor, per dim."""
        return self._box()[0]

    def _box(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Offset and shape of the shard, per dim."""
        start, shape = [0] * len(self.global_shape), list(self.global_shape)
        for cut in self.placements:
            size, rest = divmod(shape[cut.dim], cut.count)
            if rest:
                raise ValueError(
                    f"{self.name}: dim {cut.dim} of {list(self.global_shape)} is not divisible by {cut.count} shards "
                    f"over {cut.axis}"
                )
            start[cut.dim] += cut.index * size
            shape[cut.dim] = size
        return tuple(start), tuple(shape)

    def is_sharded_over(self, axis: str) -> bool:
        """Whether ranks of the mesh axis hold different parts."""
        return any(cut.axis == axis and cut.count > 1 for cut in self.placements)

    def slice_of(self, whole: torch.Tensor) -> torch.Tensor:
        """This shard's part of the whole tensor, as a view."""
        for cut in self.placements:
            size = whole.shape[cut.dim] // cut.count
            whole = whole.narrow(cut.dim, cut.index * size, size)
        return whole


def set_matrices(weight: nn.Parameter, matrices: Matrices) -> None:
    """Set the matrices that a fused weight of a linear layer is made of."""
    weight.shard = replace(spec_of(weight), matrices=matrices)  # type: ignore[attr-defined]


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
    return in_order(flat, tuple(parameter.shape), spec_of(parameter).order)


def memory_order(tensor: torch.Tensor) -> tuple[int, ...]:
    """The dims of a dense tensor from the slowest to the fastest in memory: channels-last is ``(0, 2, 3, 1)``.

    Empty where it is row-major, or not dense.
    """
    strides, dims = tensor.stride(), range(tensor.dim())
    order = tuple(sorted(dims, key=lambda dim: -strides[dim]))
    return order if order != tuple(dims) and tensor.permute(order).is_contiguous() else ()


def in_order(flat: torch.Tensor, shape: tuple[int, ...], order: tuple[int, ...]) -> torch.Tensor:
    """A flat range as a view of that shape, whose dims lie in memory in that order (empty: row-major)."""
    if not order:
        return flat.view(shape)
    return flat.view([shape[dim] for dim in order]).permute([order.index(dim) for dim in range(len(shape))])


def spec_of(parameter: torch.Tensor) -> ShardSpec:
    """The :class:`ShardSpec` of a parameter; an error that names the mistake when it has none."""
    spec = getattr(parameter, "shard", None)
    if not isinstance(spec, ShardSpec):
        raise TypeError(f"parameter of shape {list(parameter.shape)} has no ShardSpec; set `parameter.shard`")
    return spec
