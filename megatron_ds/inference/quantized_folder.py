"""Folders of quantised weights as compressed-tensors keeps them, which transformers reads as well.

=========  ====================================================  =======================  =========================
scheme     tensors of a linear layer                             format in config.json    shared scale
=========  ====================================================  =======================  =========================
``int8``   ``weight_packed``, ``weight_scale``, ``weight_shape``  ``pack-quantized``       an output's
``w8a8``   ``weight`` int8, ``weight_scale``                     ``int-quantized``        an output's; a token's
``fp8``    ``weight`` e4m3, ``weight_scale``                     ``float-quantized``      an output's; a token's
``int4``   ``weight_packed``, ``weight_scale``, ``weight_shape``  ``pack-quantized``       some of an output's inputs
=========  ====================================================  =======================  =========================

A packed row is whole numbers without a sign (the value plus 128, or plus 8), the first in the lowest bits of an int32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from megatron_ds.config import ModelConfig
from megatron_ds.convert.architecture import Rule
from megatron_ds.convert.folder import HFFolder
from megatron_ds.errors import CheckpointError, ConfigError
from megatron_ds.inference.quantized_recipes import rows_of
from megatron_ds.inference.quantized_weights import GROUP, QuantizedWeight
from megatron_ds.kernels.float8 import E4M3
from megatron_ds.shard import spec_of

METHOD = "compressed-tensors"
_PACKED = {"int8": 8, "int4": 4}
_VALUES: Mapping[str, torch.dtype] = MappingProxyType({"w8a8": torch.int8, "fp8": E4M3})
_SUFFIXES = ".weight_packed", ".weight_shape", ".weight_zero_point", ".weight_g_idx", ".input_scale"


def _numbers(bits: int, kind: str, group: int | None = None, dynamic: bool = False) -> dict[str, Any]:
    """How compressed-tensors describes numbers and who shares a scale."""
    strategy = "token" if dynamic else "group" if group else "channel"
    return {"num_bits": bits, "type": kind, "symmetric": True, "strategy": strategy, "group_size": group,
            "dynamic": dynamic}  # fmt: skip


def quantization_config(scheme: str, ignored: list[str]) -> dict[str, Any]:
    """What config.json says of a folder's weights. ``ignored``: linear layers outside of the blocks."""
    inputs = _numbers(8, "float" if scheme == "fp8" else "int", dynamic=True) if scheme in _VALUES else None
    weights = _numbers(4 if scheme == "int4" else 8, "float" if scheme == "fp8" else "int",
                       GROUP if scheme == "int4" else None)  # fmt: skip
    form = {"w8a8": "int-quantized", "fp8": "float-quantized"}.get(scheme, "pack-quantized")
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None,
             "format": form}  # fmt: skip
    return {
        "quant_method": METHOD,
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignored,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def scheme_of(said: Any, where: str) -> tuple[str, int | None]:
    """The scheme that a ``quantization_config`` describes, and how many inputs share a scale; None: all.

    Raises:
        CheckpointError: it describes another one; what it says that differs is named.
    """
    if not isinstance(said, dict) or said.get("quant_method") != METHOD:
        method = said.get("quant_method") if isinstance(said, dict) else said
        raise CheckpointError(f"{where} is quantised by {method!r}; {_WAYS_OUT}")
    groups = said.get("config_groups")
    group = next(iter(groups.values())) if isinstance(groups, dict) and len(groups) == 1 else None
    if not isinstance(group, dict) or group.get("output_activations") or said.get("kv_cache_scheme"):
        raise CheckpointError(
            f"{where} is quantised in several ways, or outputs or the key/value cache are quantised too; {_WAYS_OUT}"
        )
    besides = [name for name in ("sparsity_config", "transform_config") if said.get(name)]
    if said.get("quantization_status", "compressed") != "compressed" or besides:
        raise CheckpointError(
            f"{where} is not compressed, or there is a {' and a '.join(besides)} besides; {_WAYS_OUT}"
        )
    form = group.get("format") or said.get("format")
    for scheme in ("int8", "w8a8", "fp8", "int4"):
        wanted = quantization_config(scheme, [])["config_groups"]["group_0"]
        if wanted["format"] == form and all(_agree(group.get(k), wanted[k]) for k in ("weights", "input_activations")):
            return scheme, group["weights"].get("group_size") if scheme == "int4" else None
    raise CheckpointError(
        f"{where} is quantised with weights {group.get('weights')}, inputs {group.get('input_activations')} in the "
        f"format {form!r}, which is none of int8, w8a8, fp8 and int4 here; {_WAYS_OUT}"
    )


_WAYS_OUT = "serve the unquantised model with quantization=..., or quantise that with tools/quantize.py"


def _agree(found: Any, wanted: dict[str, Any] | None) -> bool:
    """Any size of a group will do; a file without a setting means compressed-tensors' default."""
    if wanted is None or found is None:
        return wanted is found
    default = {"symmetric": True, "dynamic": False, "group_size": None}
    names = [name for name in wanted if not (name == "group_size" and wanted[name])]
    ordered = found.get("actorder") in (None, "weight", "static")
    return ordered and all(found.get(name, default.get(name)) == wanted[name] for name in names)


class QuantizedFolder(HFFolder):
    """A folder whose linear layers are quantised; to a reader of names and shapes it is like any other.

    Attributes:
        scheme: see :mod:`megatron_ds.inference.quantized_recipes`. group: inputs that share a scale, None: all.
        quantized: names of the weights in fewer bits.

    Raises:
        CheckpointError: another scheme, or a quantised tensor without its scale.
    """

    def __init__(self, path: Path):
        super().__init__(path)
        self.scheme, self.group = scheme_of(self.config.pop("quantization_config"), str(path))
        scales = [name.removesuffix("_scale") for name in self.shapes if name.endswith(".weight_scale")]
        self.quantized = frozenset(scales)
        kept = {name: self._take(name) for name in scales}
        for name in self.shapes:
            if name.endswith(_SUFFIXES):
                raise CheckpointError(f"{path}: {name} is part of a quantised tensor without its scale")
        for name, (shape, dtype) in kept.items():
            self.shapes[name], self.dtypes[name] = shape, dtype

    def require_plain(self) -> None:
        """Quantised is what it is."""

    def check_dtype(self, name: str) -> None:
        if name not in self.quantized and self.dtypes[name] in (torch.int8, E4M3):
            raise CheckpointError(f"{self.path}: {name} is {self.dtypes[name]} and has no {name}_scale")
        super().check_dtype(name)

    def read(self, name: str) -> Tensor:
        return (
            self.read_quantized(name).dequantized(self.dtypes[name]) if name in self.quantized else super().read(name)
        )

    def read_quantized(self, name: str) -> QuantizedWeight:
        """The weight ``name``."""
        scale = super().read(f"{name}_scale")
        values = super().read(f"{name}_packed" if self.scheme in _PACKED else name)
        if self.scheme in _PACKED:
            values = unpacked(values, _PACKED[self.scheme])[:, : self.shapes[name][1]]
        return QuantizedWeight(self.scheme, values, scale.view(len(values), -1))

    def _take(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Let a weight's scale and shape be no tensors of their own; returns the shape and dtype it stands for."""
        scale, dtype = self.shapes.pop(f"{name}_scale"), self.dtypes[f"{name}_scale"]
        if self.scheme not in _PACKED:
            if self.dtypes.get(name) != _VALUES[self.scheme]:
                raise CheckpointError(
                    f"{self.path}: {name} has a scale and is {self.dtypes.get(name, 'not there')}, where the scheme "
                    f"{self.scheme!r} has {_VALUES[self.scheme]}"
                )
            shape = self.shapes[name]
        else:
            packed = self.shapes.pop(f"{name}_packed", None)
            if packed is None or self.shapes.pop(f"{name}_shape", None) != (2,):
                raise CheckpointError(f"{self.path}: {name}_scale has no {name}_packed and {name}_shape beside it")
            shape = tuple(int(size) for size in super().read(f"{name}_shape"))
            width = -(-shape[1] * _PACKED[self.scheme] // 32)
            if packed != (shape[0], width):
                raise CheckpointError(f"{self.path}: {name}_packed is {list(packed)}, not {[shape[0], width]}")
        groups = scale[1] if len(scale) == 2 else 1
        if scale[:1] != shape[:1] or groups * (self.group or shape[1]) != shape[1]:  # the last may not be a smaller one
            of = f" in groups of {self.group}" if self.group else ""
            raise CheckpointError(
                f"{self.path}: {name}_scale is {list(scale)}, which no weight of {list(shape)}{of} has"
            )
        if not dtype.is_floating_point:
            raise CheckpointError(f"{self.path}: {name}_scale is {dtype}, no number with a fraction")
        return shape, dtype


def tensors_of(name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """What a folder holds of the weight ``name``."""
    if weight.scheme in _VALUES:
        return {name: weight.values, f"{name}_scale": weight.scale}
    return {
        f"{name}_packed": packed(weight.values, _PACKED[weight.scheme]),
        f"{name}_scale": weight.scale,
        f"{name}_shape": torch.tensor(weight.values.shape),
    }


def packed(values: Tensor, bits: int) -> Tensor:
    """int8 ``[out, in]`` of 4 or 8 bits in int32 ``[out, in * bits / 32]``, rounded up."""
    unsigned = (values.to(torch.int16) + (1 << bits - 1)).to(torch.uint8)
    unsigned = nn.functional.pad(unsigned, (0, -values.shape[1] % (32 // bits)))
    if bits == 4:
        low, high = unsigned.view(len(values), -1, 2).unbind(2)
        unsigned = low | high << 4
    return unsigned.contiguous().view(torch.int32)


def unpacked(words: Tensor, bits: int) -> Tensor:
    """The inverse of :func:`packed`."""
    unsigned = words.contiguous().view(torch.uint8)
    if bits == 4:
        unsigned = torch.stack((unsigned & 15, unsigned >> 4), dim=2).flatten(1)
    return (unsigned.to(torch.int16) - (1 << bits - 1)).to(torch.int8)


def weight_of(layer: nn.Module, rule: Rule, config: ModelConfig, parts: list[QuantizedWeight]) -> QuantizedWeight:
    """What a linear layer on this rank multiplies by, of a folder's tensors.

    Raises:
        ConfigError: the ranks would have to share a scale's inputs.
    """
    spec = spec_of(layer.weight)  # type: ignore[arg-type]
    # Views, concatenations and slices of bytes: not every operation on FP8 is there on every device.
    values = rule.from_hf(config, [part.values.view(torch.int8) for part in parts]).view(parts[0].values.dtype)
    scale = rule.from_hf(config, [part.scale for part in parts])
    last = scale.dim() - 1
    cut = [place for place in spec.placements if scale.shape[-1] > 1 or place.dim != last]
    for place in cut:
        if place.dim == last and scale.shape[-1] % place.count:
            raise ConfigError(
                f"{spec.name} has {scale.shape[-1]} groups of inputs that share a scale, which cannot be split over "
                f"tensor_parallel_size={place.count}"
            )
    scale = replace(spec, placements=tuple(cut)).slice_of(scale)
    return QuantizedWeight(parts[0].scheme, rows_of(layer, spec.slice_of(values)), rows_of(layer, scale))
