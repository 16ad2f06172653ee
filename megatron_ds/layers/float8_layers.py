"""Which linear layers compute in FP8, and what keeps them from it.

A layer is chosen by its name and by its global shape, so that every mesh chooses the same ones; what a rank's own shape
or device cannot do is a fault.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase

import torch
from torch import nn

from megatron_ds.errors import listed
from megatron_ds.kernels.float8 import CUDA_BLOCK, CUDA_MULTIPLE, FIRST_CAPABILITY, capability, has_tensor_cores
from megatron_ds.kernels.float8_weight import Float8Format, Float8Weight, matrix_shape
from megatron_ds.layers.float8_recipe import Float8Recipe, Float8Settings, weight_block
from megatron_ds.layers.linear import ColumnParallelLinear, RowParallelLinear
from megatron_ds.mesh import Axis
from megatron_ds.shard import ShardSpec, spec_of

Linear = ColumnParallelLinear | RowParallelLinear


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


def use_float8(model: nn.Module, settings: Float8Settings, cp: Axis) -> None:
    """Give the chosen layers of a stage their recipe, and ``fp8_from_masters`` weights that are their own masters.

    Where those are sharded or offloaded, they are gathered in FP8 alone (``parameter.float8``).

    Args:
        cp: the axis that cuts sequences.
    """
    form = Float8Format(weight_block(settings), settings.fp8_power_of_two)
    for _, layer in linear_layers(model):
        if why_not(spec_of(layer.weight), settings) is None:
            if settings.fp8_from_masters:
                layer.weight.data = layer.weight.data.to(torch.promote_types(layer.weight.dtype, torch.float32))
            cut = "in" if isinstance(layer, RowParallelLinear) else "out"
            layer.recipe = recipe = Float8Recipe(settings, {cut: layer.tp, "tokens": cp})
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
