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
micro-batches is no matter; where tensor parallelism cuts what shares a scale, its amax is reduced over tp; and blocks
of features are not cut (:func:`fault`). The layer gathers sequence-parallel activations before it asks the recipe.

A weight is quantised once a step: inside :func:`weights_kept`, which the step holds around its micro-batches, when no
weight changes. Outside of it nothing is kept, so that updates, loaded checkpoints and writes need not be noticed.

With ``fp8_from_masters`` a layer in FP8 has an fp32 weight, its own master. Where ZeRO shards or offloads those, the
owner of a part quantises it and ranks gather it in FP8 alone (:mod:`megatron_ds.kernels.float8_weight`); else the layer
quantises what it has. Without it a run in bf16 or fp16 quantises what ZeRO gathers: a weight is rounded twice.
"""

from __future__ import annotations

import math
import re
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_ds import comm
from megatron_ds.errors import listed
from megatron_ds.kernels.float8 import (
    CUDA_BLOCK,
    CUDA_MULTIPLE,
    E4M3,
    E5M2,
    FIRST_CAPABILITY,
    Block,
    Float8,
    block_amax,
    block_amax_both,
    capability,
    has_tensor_cores,
    quantize,
    quantize_both,
)
from megatron_ds.kernels.float8_product import product, sum_of_products
from megatron_ds.kernels.float8_weight import Float8Format, Float8Weight, matrix_shape
from megatron_ds.layers.linear import ColumnParallelLinear, RowParallelLinear
from megatron_ds.layers.recipe import OwnPrecision, Recipe
from megatron_ds.mesh import Axis
from megatron_ds.shard import ShardSpec, spec_of

Linear = ColumnParallelLinear | RowParallelLinear


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
        cut: which dim of the weight tp cuts, ``"out"`` or ``"in"``.
    """

    def __init__(self, settings: Float8Settings, tp: Axis, cut: str):
        super().__init__()
        self.settings, self.tp, self.cut = settings, tp, cut
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
        right, cut = self._weight(weight, "in"), self.cut == "in"
        if self.block.rows is None:  # a scale a sequence
            return self._by_sequence(self._quantize(_sequences(x), self.block, E4M3, k_cut=cut), right, x)
        rows = x.reshape(-1, x.shape[-1])
        return product(self._quantize(rows, self.block, E4M3, k_cut=cut), right, x.dtype).view(*x.shape[:-1], -1)

    def input_gradient(self, grad: Tensor, weight: Tensor) -> Tensor:
        right, cut, rows = self._weight(weight, "out"), self.cut == "out", _sequences(grad)
        if not self.settings.fp8_weight_gradient or torch.compiler.is_compiling():
            left = self._quantize(rows, self.block, self.gradient_format, k_cut=cut)
        else:
            left, transposed = self._quantize_both(rows, self.block, self.gradient_format, k_cut=cut)
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
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        ahead, self._ahead = (None, None) if torch.compiler.is_compiling() else (self._ahead, None)
        if ahead is not None and ahead[0]() is grad:
            left = ahead[1]
        else:
            left = self._features(grad, self.gradient_format, "out")
        right = self._features(x, E4M3, "in")
        return sum_of_products(left, right, wide)

    def _features(self, x: Tensor, dtype: torch.dtype, dim: str) -> Float8:
        """``[s, b, features]`` quantised as ``[b, features, s]``."""
        return self._quantize(_sequences(x).transpose(1, 2), self.block, dtype, rows_cut=self.cut == dim)

    def _weight(self, weight: Tensor, over: str) -> Float8:
        """``[out, in]`` quantised for a product that sums over that dim of it, as ``[n, k]``."""
        if self.gathered is not None and self.gathered.is_given:
            return self.gathered.of(transposed=over == "out")
        block, kept = self.weight_block, None if torch.compiler.is_compiling() else self._kept
        rows_cut, k_cut = self.cut == "out", self.cut == "in"
        if kept is not None and kept.version != weight._version:
            kept = self._kept = KeptWeight(kept.whole, weight._version)
        if kept is not None and kept.whole:
            if kept.both is None:
                kept.both = self._quantize_both(weight, block, E4M3, rows_cut, k_cut)
            return kept.both[over == "out"]
        x = weight if over == "in" else weight.t()
        if kept is None or block.k is not None:
            return self._quantize(x, block, E4M3, rows_cut=self.cut != over, k_cut=self.cut == over)
        if kept.amax is None:
            kept.amax = self._amax_both(weight, block, rows_cut, k_cut)
        return quantize(x, kept.amax[over == "out"], block, E4M3, self.settings.fp8_power_of_two)

    def _quantize(
        self, x: Tensor, block: Block, dtype: torch.dtype, rows_cut: bool = False, k_cut: bool = False
    ) -> Float8:
        """``rows_cut``, ``k_cut``: tp cuts that dim of ``x [..., rows, k]``."""
        amax = None
        if block.k is None:  # else no scale is cut
            amax = self._reduced(block_amax(x, block), k_cut or (rows_cut and block.rows is None))
        return quantize(x, amax, block, dtype, self.settings.fp8_power_of_two)

    def _quantize_both(
        self, x: Tensor, block: Block, dtype: torch.dtype, rows_cut: bool = False, k_cut: bool = False
    ) -> tuple[Float8, Float8]:
        """``x [..., rows, k]`` and its transpose."""
        amax = self._amax_both(x, block, rows_cut, k_cut)
        return quantize_both(x, amax, block, dtype, self.settings.fp8_power_of_two)

    def _amax_both(self, x: Tensor, block: Block, rows_cut: bool, k_cut: bool) -> tuple[Tensor | None, Tensor | None]:
        if block.k is not None:
            return None, None
        first, second = block_amax_both(x, block)
        if block.is_square:
            whole = self._reduced(first, rows_cut or k_cut)
            return whole, whole.mT
        return self._reduced(first, k_cut), self._reduced(second, rows_cut)

    def _reduced(self, amax: Tensor, cut: bool) -> Tensor:
        return comm.all_reduce(amax, self.tp, dist.ReduceOp.MAX) if cut and self.tp.size > 1 else amax


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


def linear_layers(model: nn.Module) -> Iterator[tuple[str, Linear]]:
    """The layers that have a recipe, by global name (``layers.3.mlp.up``)."""
    for module in model.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear):
            yield spec_of(module.weight).name.removesuffix(".weight"), module


def why_not(spec: ShardSpec, settings: Float8Settings) -> str | None:
    """Why the layer of a weight stays in ``precision.dtype``, or None. The same on every mesh: by the global shape."""
    for pattern in settings.fp8_exclude:
        if fnmatchcase(spec.name.removesuffix(".weight"), pattern):
            return f"excluded by {pattern!r}"
    if min(matrix_shape(spec.global_shape)) < settings.fp8_min_features:
        return f"fewer than precision.fp8_min_features={settings.fp8_min_features} features in or out"
    return None


def kept_bytes(specs: Iterable[tuple[ShardSpec, int]], settings: Float8Settings) -> int:
    """What :func:`weights_kept` keeps of the weights among a rank's parameters, with fp32 scales.

    ``specs``: each with its copies in FP8 that are kept: 2, the weight and its transpose; 1, the transpose of what is
    gathered in FP8; 0, both are gathered so that they can be used.
    """
    total, block = 0, weight_block(settings)
    for spec, copies in specs if settings.fp8 != "none" else ():
        if spec.matrices is not None and why_not(spec, settings) is None:
            out, features = matrix_shape(spec.local_shape)
            scales = [math.prod(block.grid(*shape)[:2]) for shape in ((out, features), (features, out))]
            own = scales[:copies] if block.is_square or copies == 2 else []
            total += copies * out * features + sum(own) * torch.float32.itemsize
    return total


def weight_block(settings: Float8Settings) -> Block:
    whole = {"tensorwise": Block(None, None), "rowwise": Block(1, None)}
    return whole.get(settings.fp8, Block(settings.fp8_block, settings.fp8_block))


def use_float8(model: nn.Module, settings: Float8Settings) -> None:
    """Give the chosen layers of a stage their recipe, and ``fp8_from_masters`` weights that are their own masters.

    Where those are sharded or offloaded, they are gathered in FP8 alone (``parameter.float8``).
    """
    form = Float8Format(weight_block(settings), settings.fp8_power_of_two)
    for _, layer in linear_layers(model):
        if why_not(spec_of(layer.weight), settings) is None:
            if settings.fp8_from_masters:
                layer.weight.data = layer.weight.data.to(torch.promote_types(layer.weight.dtype, torch.float32))
            cut = "in" if isinstance(layer, RowParallelLinear) else "out"
            layer.recipe = recipe = Float8Recipe(settings, layer.tp, cut)
            if layer.weight.dtype in (torch.float32, torch.float64):
                layer.weight.float8 = recipe.gathered = Float8Weight(form)  # type: ignore[attr-defined]


def describe(model: nn.Module, settings: Float8Settings) -> tuple[str, list[str]]:
    """For the whole model: what to tell of the choice, and what is wrong with it."""
    layers = list(linear_layers(model))
    known = listed((name for name, _ in layers), 3)
    faults = [
        f"precision.fp8_exclude has {pattern!r}, which names no linear layer; they are {known}"
        for pattern in settings.fp8_exclude
        if not any(fnmatchcase(name, pattern) for name, _ in layers)
    ]
    reasons: dict[str, list[str]] = {}
    refused: dict[str, list[str]] = {}
    chosen = []
    for name, layer in layers:
        reason = why_not(spec_of(layer.weight), settings)
        if reason is not None:
            reasons.setdefault(reason, []).append(name)
            continue
        chosen.append(name)
        if what := fault(layer, settings):
            refused.setdefault(what, []).append(name)
    for what, names in refused.items():
        patterns = sorted({re.sub(r"\b\d+\b", "*", name) for name in names})
        faults.append(f"{listed(names, 3)}: {what}, or leave out: precision.fp8_exclude={patterns}")
    if not chosen:
        left = "; ".join(f"{reason}: {listed(names, 3)}" for reason, names in reasons.items())
        faults.append(
            f"precision.fp8={settings.fp8!r} finds no layer to compute in FP8 ({left or 'the model has none'})"
        )
    text = f"FP8 ({settings.fp8}): {len(chosen)} of {len(layers)} linear layers"
    notes = [
        f"{len(names)} stay in {settings.dtype}, {reason}: {listed(names, 3)}" for reason, names in reasons.items()
    ]
    return "; ".join([text, *notes]), faults


def fault(layer: Linear, settings: Float8Settings) -> str | None:
    """What FP8 products cannot do with this rank's shape: checked on every device, though a CPU would take it."""
    out, features = matrix_shape(layer.weight.shape)
    multiple = min(CUDA_MULTIPLE, settings.fp8_block)
    if out % multiple or features % multiple:
        return (
            f"{out} x {features} on a tensor-parallel rank, and FP8 takes multiples of {multiple}; change the model's "
            f"size or mesh.tp={layer.tp.size}"
        )
    if settings.fp8 != "blockwise" or layer.tp.size == 1:
        return None
    dim = spec_of(layer.weight).placements[0].dim
    uncut = features if dim == layer.weight.dim() - 1 else math.prod(layer.weight.shape[dim:-1])
    if uncut % settings.fp8_block:
        return (
            f"{uncut} consecutive features on a tensor-parallel rank, which cuts a block of "
            f"precision.fp8_block={settings.fp8_block}; use another mesh.tp or precision.fp8='rowwise'"
        )
    return None


def device_fault(device: torch.device, settings: Float8Settings) -> str | None:
    """Why the device cannot compute in FP8."""
    if settings.fp8_emulate:
        return None
    if device.type != "cuda":
        return f"precision.fp8={settings.fp8!r}: {device.type} has no FP8; emulate it with precision.fp8_emulate=true"
    if not has_tensor_cores(device):
        have, first = (".".join(map(str, c)) for c in (capability(device), FIRST_CAPABILITY))
        name = torch.cuda.get_device_properties(device).name
        return (
            f"precision.fp8={settings.fp8!r}: {name} has compute capability {have} and "
            f"FP8 begins with {first}; emulate it with precision.fp8_emulate=true"
        )
    if settings.fp8 == "blockwise" and settings.fp8_block != CUDA_BLOCK:
        return f"precision.fp8_block={settings.fp8_block}: CUDA has blocks of {CUDA_BLOCK}; leave it out"
    return None
