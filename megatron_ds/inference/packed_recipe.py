"""Products with weights in oneDNN's own order, for linear layers on a CPU that only compute forward."""

from __future__ import annotations

from torch import Tensor

from megatron_ds.inference.quantized_recipes import linear_layers, release, release_head, rows_of
from megatron_ds.kernels.cpu import onednn
from megatron_ds.layers.recipe import OwnPrecision, Recipe
from megatron_ds.models.transformer import Transformer


class PackedWeight(Recipe):
    """The forward product of a linear layer with a copy of its weight in oneDNN's order.

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


def pack_model(model: Transformer) -> Recipe | None:
    """Pack the weights of linear layers that have no other recipe, where this machine gains by it.

    The memory of the weights is given back, but for a head's that is the embedding's too.

    Returns:
        The recipe of the vocabulary's projection; None: it has none of its own.
    """
    for module in linear_layers(model):
        weight: Tensor = module.weight  # type: ignore[assignment]
        if type(module.recipe) is OwnPrecision and onednn.can_pack(weight):
            module.recipe = PackedWeight(rows_of(module, weight.detach()))
            release(weight)
    if not model.span.head or not onednn.can_pack(model.output_weight):
        return None
    recipe = PackedWeight(model.output_weight.detach())
    release_head(model)
    return recipe
