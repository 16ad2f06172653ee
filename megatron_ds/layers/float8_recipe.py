"""FP8 recipes of a linear layer: its three products in eight-bit floating point, the same on every mesh.

Both operands of a product are quantised from what the layer has in high precision, with scales of the moment (*dynamic
scaling*), so that there is no state. What shares a scale (see :class:`~megatron_ds.kernels.float8.Block`):

=========== ============================ ====================== =======================================
recipe      activations and gradients    weights                weight gradient, whose sum is over tokens
=========== ============================ ====================== =======================================
tensorwise  a sequence                   the whole weight       a sequence
rowwise     a token                      a row (or column)      a feature of a sequence
blockwise   128 features of a token      128 x 128              128 tokens of a feature
=========== ============================ ====================== =======================================

No scale depends on the mesh. A scale never spans two sequences, so that how samples are put on replicas and into
micro-batches is no matter; its amax is reduced over the axes that cut what shares it, features over tp and tokens over
cp; and blocks are not cut (:func:`~megatron_ds.layers.float8_layers.fault` for features, :func:`length_fault` for
tokens). The layer gathers sequence-parallel activations before it asks the recipe.

A weight is quantised once a step: inside :func:`weights_kept`, which the step holds around its micro-batches, when no
weight changes. Outside of it nothing is kept, so that updates, loaded checkpoints and writes need not be noticed.

With ``fp8_from_masters`` a layer in FP8 has an fp32 weight, its own master. Where ZeRO shards or offloads those, the
owner of a part quantises it and ranks gather it in FP8 alone (:mod:`megatron_ds.kernels.float8_weight`); else the layer
quantises what it has. Without it a run in bf16 or fp16 quantises what ZeRO gathers: a weight is rounded twice.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_ds import comm
from megatron_ds.errors import ConfigError
from megatron_ds.kernels.float8 import (
    E4M3,
    E5M2,
    Block,
    Float8,
    block_amax,
    block_amax_both,
    quantize,
    quantize_both,
)
from megatron_ds.kernels.float8_product import product, sum_of_products
from megatron_ds.kernels.float8_weight import Float8Weight
from megatron_ds.layers.linear import ColumnParallelLinear, RowParallelLinear
from megatron_ds.layers.recipe import OwnPrecision, Recipe
from megatron_ds.mesh import Axis

Linear = ColumnParallelLinear | RowParallelLinear

Axes = tuple[Axis, ...]


class Float8Settings(Protocol):
    """The part of a run's ``precision`` that is read here; its configuration says what each means."""

    @property
    def dtype(self) -> str: ...

    @property
    def fp8(self) -> str: ...

    @property
    def fp8_gradients(self) -> str | None: ...

    @property
    def fp8_weight_gradient(self) -> bool: ...

    @property
    def fp8_from_masters(self) -> bool: ...

    @property
    def fp8_power_of_two(self) -> bool: ...

    @property
    def fp8_block(self) -> int: ...

    @property
    def fp8_min_features(self) -> int: ...

    @property
    def fp8_exclude(self) -> Sequence[str]: ...

    @property
    def fp8_emulate(self) -> bool: ...


@dataclass
class KeptWeight:
    """The cache of a weight in FP8, valid while the weight has the same ``version``.

    Attributes:
        whole: its values are kept. Else the amax alone, where a scale spans whole rows: ZeRO stage 3 would hold in FP8
            what it frees in high precision.
        version: torch's counter of the weight, which a write in place raises.
        amax: of the weight ``[out, in]`` and of its transpose.
        both: those, quantised.
    """

    whole: bool
    version: int | None = None
    amax: tuple[Tensor | None, Tensor | None] | None = None
    both: tuple[Float8, Float8] | None = None


class Float8Recipe(Recipe):
    """The products of one linear layer in FP8.

    Args:
        settings: ``precision.fp8*``.
        cut: the axis that cuts features of the weight, by their dim ``"out"`` or ``"in"``, and the one that cuts
            ``"tokens"``.
    """

    def __init__(self, settings: Float8Settings, cut: Mapping[str, Axis]):
        super().__init__()
        self.settings = settings
        self.cut: dict[str, Axes] = {"out": (), "in": (), "tokens": ()}
        self.cut |= {dim: (axis,) for dim, axis in cut.items() if axis.size > 1}
        self.high = OwnPrecision()
        wanted = settings.fp8_gradients or ("e5m2" if settings.fp8 == "tensorwise" else "e4m3")
        self.gradient_format = E5M2 if wanted == "e5m2" else E4M3
        self.weight_block = weight_block(settings)
        self.block = Block(None if self.weight_block.rows is None else 1, self.weight_block.k)
        self.gathered: Float8Weight | None = None  # in place of the layer's weight, where somebody fills it
        self._kept: KeptWeight | None = None
        self._ahead: tuple[weakref.ref[Tensor], Float8] | None = None  # a gradient, and its transpose quantised

    def keep_weight(self, whole: bool) -> None:
        """The weight does not change until :meth:`forget`."""
        self._kept = KeptWeight(whole)
        if self.gathered is not None:
            self.gathered.keep_transposed(whole)

    def forget(self) -> None:
        self._kept = self._ahead = None
        if self.gathered is not None:
            self.gathered.keep_transposed(False)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = self._forward(x, weight)
        return out if bias is None else out + bias

    def _forward(self, x: Tensor, weight: Tensor) -> Tensor:
        right, over = self._weight(weight, "in"), (self.cut["tokens"], self.cut["in"])
        if self.block.rows is None:  # a scale a sequence
            return self._by_sequence(self._quantize(_sequences(x), self.block, E4M3, *over), right, x)
        rows = x.reshape(-1, x.shape[-1])
        return product(self._quantize(rows, self.block, E4M3, *over), right, x.dtype).view(*x.shape[:-1], -1)

    def input_gradient(self, grad: Tensor, weight: Tensor) -> Tensor:
        right, rows, over = self._weight(weight, "out"), _sequences(grad), (self.cut["tokens"], self.cut["out"])
        if not self.settings.fp8_weight_gradient or torch.compiler.is_compiling():
            left = self._quantize(rows, self.block, self.gradient_format, *over)
        else:
            left, transposed = self._quantize_both(rows, self.block, self.gradient_format, *over)
            self._ahead = weakref.ref(grad), transposed
        return self._by_sequence(left, right, grad)

    def weight_gradient(self, grad: Tensor, x: Tensor) -> Tensor:
        if not self.settings.fp8_weight_gradient:
            return self.high.weight_gradient(grad, x)
        return self._wide_weight_gradient(grad, x).to(x.dtype)

    def add_weight_gradient(self, total: Tensor, grad: Tensor, x: Tensor, first: bool) -> None:
        if not self.settings.fp8_weight_gradient:
            return self.high.add_weight_gradient(total, grad, x, first)
        gradient = self._wide_weight_gradient(grad, x)
        total.copy_(gradient) if first else total.add_(gradient)
        return None

    def _by_sequence(self, left: Float8, right: Float8, like: Tensor) -> Tensor:
        """``left [b, s, k]`` times ``right [n, k]``, as ``[s, (b,) n]``; ``like [s, (b,) k]``."""
        return product(left.flat(), right, like.dtype).view(*like.shape[:-1], -1)

    def _wide_weight_gradient(self, grad: Tensor, x: Tensor) -> Tensor:
        """``[out, in]`` in fp32 (fp64 for fp64): the sum over sequences of products of which each sums over one."""
        if what := length_fault(x.shape[0], self.cut["tokens"], self.block):
            raise ConfigError(what)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        left = None
        if not torch.compiler.is_compiling():  # which cannot set an attribute in a backward pass (torch 2.11)
            ahead, self._ahead = self._ahead, None
            left = ahead[1] if ahead is not None and ahead[0]() is grad else None
        if left is None:
            left = self._features(grad, self.gradient_format, "out")
        right = self._features(x, E4M3, "in")
        return sum_of_products(left, right, wide)

    def _features(self, x: Tensor, dtype: torch.dtype, dim: str) -> Float8:
        """``[s, b, features]`` quantised as ``[b, features, s]``."""
        return self._quantize(_sequences(x).transpose(1, 2), self.block, dtype, self.cut[dim], self.cut["tokens"])

    def _weight(self, weight: Tensor, over: str) -> Float8:
        """``[out, in]`` quantised for a product that sums over that dim of it, as ``[n, k]``."""
        if self.gathered is not None and self.gathered.is_given:
            return self.gathered.of(transposed=over == "out")
        block, kept = self.weight_block, None if torch.compiler.is_compiling() else self._kept
        over_both = self.cut["out"], self.cut["in"]
        if kept is not None and kept.version != weight._version:
            kept = self._kept = KeptWeight(kept.whole, weight._version)
        if kept is not None and kept.whole:
            if kept.both is None:
                kept.both = self._quantize_both(weight, block, E4M3, *over_both)
            return kept.both[over == "out"]
        x = weight if over == "in" else weight.t()
        if kept is None or block.k is not None:
            return self._quantize(x, block, E4M3, *(over_both if over == "in" else over_both[::-1]))
        if kept.amax is None:
            kept.amax = self._amax_both(weight, block, *over_both)
        return quantize(x, kept.amax[over == "out"], block, E4M3, self.settings.fp8_power_of_two)

    def _quantize(self, x: Tensor, block: Block, dtype: torch.dtype, rows: Axes, k: Axes) -> Float8:
        """``x [..., rows, k]``, of which each dim is cut by these axes."""
        amax = None
        if block.k is None:  # else no scale is cut
            amax = _reduced(block_amax(x, block), (*k, *rows) if block.rows is None else k)
        return quantize(x, amax, block, dtype, self.settings.fp8_power_of_two)

    def _quantize_both(self, x: Tensor, block: Block, dtype: torch.dtype, rows: Axes, k: Axes) -> tuple[Float8, Float8]:
        """``x [..., rows, k]`` and its transpose."""
        return quantize_both(x, self._amax_both(x, block, rows, k), block, dtype, self.settings.fp8_power_of_two)

    def _amax_both(self, x: Tensor, block: Block, rows: Axes, k: Axes) -> tuple[Tensor | None, Tensor | None]:
        if block.k is not None:
            return None, None
        first, second = block_amax_both(x, block)
        if block.is_square:
            whole = _reduced(first, (*k, *rows))
            return whole, whole.mT
        return _reduced(first, k), _reduced(second, rows)


def _reduced(amax: Tensor, over: Axes) -> Tensor:
    for axis in over:  # as integers, of which a NaN is the largest: it reaches all ranks
        comm.all_reduce(amax.view(torch.int32), axis, dist.ReduceOp.MAX)
    return amax


def length_fault(tokens: int, cut: Axes, block: Block) -> str | None:
    """Why a rank with so many tokens of a sequence lacks whole blocks of it, if it does.

    Context parallelism gives a rank two chunks of a sequence, one from either half.
    """
    if block.k is None or not cut or tokens % (2 * block.k) == 0:
        return None
    return (
        f"precision.fp8='blockwise' with {tokens} tokens of a sequence on each of mesh.cp={cut[0].size} ranks, "
        f"in two chunks: a block of precision.fp8_block={block.k} tokens, for the weight gradient, would be cut; use "
        f"a sequence length that is a multiple of {2 * cut[0].size * block.k} (2 x {cut[0].size} x {block.k}), "
        "precision.fp8='rowwise', or precision.fp8_weight_gradient=false"
    )


def recipes_of(models: Iterable[nn.Module]) -> list[Float8Recipe]:
    return [module for model in models for module in model.modules() if isinstance(module, Float8Recipe)]


@contextmanager
def weights_kept(recipes: Sequence[Float8Recipe], whole: bool) -> Iterator[None]:
    """A context in which no weight changes: each is quantised to FP8 once. ``whole``: see :class:`KeptWeight`."""
    for recipe in recipes:
        recipe.keep_weight(whole)
    try:
        yield
    finally:
        for recipe in recipes:
            recipe.forget()


def _sequences(x: Tensor) -> Tensor:
    """``[s, b, k] -> [b, s, k]``."""
    return x.reshape(x.shape[0], -1, x.shape[-1]).transpose(0, 1)


def weight_block(settings: Float8Settings) -> Block:
    whole = {"tensorwise": Block(None, None), "rowwise": Block(1, None)}
    return whole.get(settings.fp8, Block(settings.fp8_block, settings.fp8_block))
