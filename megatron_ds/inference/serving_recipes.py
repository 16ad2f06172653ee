"""How the linear layers of a served model multiply: by packed or quantised weights, or in tiles of rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_ds.inference.quantization import SCHEMES, QuantizedWeight, quantize
from megatron_ds.kernels.cpu import onednn
from megatron_ds.layers.linear import RepeatedKVLinear, RowParallelLinear
from megatron_ds.layers.mlp import MLP
from megatron_ds.layers.recipe import OwnPrecision, Recipe
from megatron_ds.mesh import Axis
from megatron_ds.models.transformer import Transformer

TILE = 32


class PackedWeight(Recipe):
    """The forward product of a linear layer on a CPU with a copy of its weight in oneDNN's order.

    Args:
        weight: ``[out, in]`` of this rank.
    """

    has_weight = True

    def __init__(self, weight: Tensor):
        super().__init__()
        self._packed = onednn.packed(weight)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``weight`` is not read: the recipe has a copy."""
        return onednn.product(x, self._packed, bias)


class BatchInvariant(Recipe):
    """The products of another recipe, whose rows do not depend, bit for bit, on how many others are computed with them.

    A matrix product chooses its kernel by its number of rows, and each kernel adds up in an order of its own. So the
    rows are computed in tiles of one size, for which one kernel serves; ``tests/inference/test_batch_invariance.py``
    tries that on the machine it runs on.
    """

    def __init__(self, of: Recipe):
        super().__init__()
        self.of, self.has_weight = of, of.has_weight

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out = torch.cat([self._of_tile(tile, weight, bias) for tile in rows.split(TILE)])
        return out.view(*x.shape[:-1], -1)

    def _of_tile(self, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        count = rows.shape[0]
        if count < TILE:
            rows = torch.cat((rows, rows.new_zeros(TILE - count, rows.shape[1])))
        return self.of.product(rows, weight, bias)[:count]


def use_serving_recipes(model: Transformer, scheme: str | None = None, batch_invariant: bool = False) -> Recipe:
    """Give every linear layer the recipe that it is served with: of weights in fewer bits, or packed ones where this
    machine gains by them.

    The memory of weights that a recipe has in another form is given back, but for a head's that is the embedding's too.

    Returns:
        The recipe of the vocabulary's projection, which has 8 bits under ``int4`` too.

    Raises:
        ConfigError: a layer that the scheme cannot serve.
    """
    for layer in linear_layers(model):
        weight: Tensor = layer.weight.detach()  # type: ignore[operator]
        if scheme is not None:
            use_weight(layer, quantize(rows_of(layer, weight), scheme, _split(layer)))
        elif type(layer.recipe) is OwnPrecision and onednn.can_pack(weight):
            layer.recipe = PackedWeight(rows_of(layer, weight))
            release(layer.weight)  # type: ignore[arg-type]
        if batch_invariant:
            layer.recipe = BatchInvariant(layer.recipe)  # type: ignore[arg-type]
    if batch_invariant:
        for module in model.modules():
            if isinstance(module, MLP):
                module.activate_by_rows()
    head: Recipe = OwnPrecision()
    if model.span.head:
        weight, of_head = model.output_weight.detach(), "int8" if scheme == "int4" else scheme
        if of_head is not None:
            head = SCHEMES[of_head].recipe(quantize(weight, of_head), None, weight.dtype)
        elif onednn.can_pack(weight):
            head = PackedWeight(weight)
        if head.has_weight and not model.config.tied_embeddings:
            release(model.output_weight)
    return BatchInvariant(head) if batch_invariant else head


def linear_layers(model: nn.Module) -> list[nn.Module]:
    """Those with a recipe, which a scheme replaces."""
    return [module for module in model.modules() if isinstance(getattr(module, "recipe", None), Recipe)]


def rows_of(module: nn.Module, of_weight: Tensor) -> Tensor:
    """``[out, ...]`` of what a layer computes with, of its weight's values or scales on this rank."""
    own = module.own(of_weight) if isinstance(module, RepeatedKVLinear) else of_weight
    return own.reshape(-1, own.shape[-1])


def use_weight(module: nn.Module, quantized: QuantizedWeight) -> None:
    """Let a linear layer multiply by ``quantized``; its parameter keeps its shape and the memory of one element."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    module.recipe = SCHEMES[quantized.scheme].recipe(quantized, _split(module), weight.dtype)
    release(weight)


def release(weight: Tensor) -> None:
    """Give back the memory of a weight that a recipe has in another form; it keeps its shape."""
    weight.data = weight.new_zeros(()).expand(weight.shape)


def _split(module: nn.Module) -> Axis | None:
    """The ranks among which a layer's inputs are split."""
    return module.tp if isinstance(module, RowParallelLinear) else None
