"""Folders of quantised weights as compressed-tensors keeps them, which transformers reads as well.

Of a weight there are the tensors of its :func:`layout`: numbers of eight bits with scales where each token's inputs
are quantised too (formats ``int-quantized`` and ``float-quantized``), else :func:`packed` ones (``pack-quantized``).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_ds.checkpoint.stream import Plan
from megatron_ds.config import ModelConfig
from megatron_ds.convert.architecture import Rule
from megatron_ds.convert.folder import HFFolder
from megatron_ds.errors import CheckpointError, ConfigError
from megatron_ds.inference.quantization import SCHEMES, QuantizedWeight, packed, unpacked
from megatron_ds.inference.serving_recipes import rows_of
from megatron_ds.kernels.float8 import E4M3
from megatron_ds.shard import spec_of

METHOD = "compressed-tensors"
_WAYS_OUT = "serve the unquantised model with quantization=..., or quantise that with tools/quantize.py"
_PARTS = ".weight_packed", ".weight_shape", ".weight_zero_point", ".weight_g_idx", ".input_scale"


def layout(name: str, shape: tuple[int, ...], scheme: str, group: int | None, scale: torch.dtype) -> Plan:
    """The tensors that a folder holds of the weight ``name``, with ``group`` inputs to a scale; None: all."""
    s, (outputs, inputs) = SCHEMES[scheme], shape
    scales = {f"{name}_scale": ((outputs, inputs // (group or inputs)), scale)}
    if s.inputs:
        return {name: (shape, s.dtype), **scales}
    words = {f"{name}_packed": ((outputs, -(-inputs * s.bits // 32)), torch.int32)}
    return {**words, **scales, f"{name}_shape": ((2,), torch.int64)}


def tensors_of(name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """What a folder holds of the weight ``name``: the tensors of its :func:`layout`."""
    s = SCHEMES[weight.scheme]
    if s.inputs:
        return {name: weight.values, f"{name}_scale": weight.scale}
    shape = torch.tensor(weight.values.shape)
    return {f"{name}_packed": packed(weight.values, s.bits), f"{name}_scale": weight.scale, f"{name}_shape": shape}


def quantization_config(scheme: str, ignored: list[str]) -> dict[str, Any]:
    """What config.json says of a folder's weights. ``ignored``: linear layers outside of the blocks."""
    s = SCHEMES[scheme]

    def numbers(bits: int, strategy: str, group: int | None = None) -> dict[str, Any]:
        return {
            "num_bits": bits, "type": "float" if s.floating else "int", "symmetric": True, "strategy": strategy,
            "group_size": group, "dynamic": strategy == "token",
        }  # fmt: skip

    form = "pack-quantized" if not s.inputs else "float-quantized" if s.floating else "int-quantized"
    group = {
        "targets": ["Linear"],
        "weights": numbers(s.bits, "group" if s.group else "channel", s.group),
        "input_activations": numbers(s.bits, "token") if s.inputs else None,
        "output_activations": None,
        "format": form,
    }
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
    for scheme, s in SCHEMES.items():
        wanted = quantization_config(scheme, [])["config_groups"]["group_0"]
        if wanted["format"] == form and all(_agree(group.get(k), wanted[k]) for k in ("weights", "input_activations")):
            return scheme, group["weights"].get("group_size") if s.group else None
    raise CheckpointError(
        f"{where} is quantised with weights {group.get('weights')}, inputs {group.get('input_activations')} in the "
        f"format {form!r}, which is none of {', '.join(SCHEMES)} here; {_WAYS_OUT}"
    )


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
        scheme: see :mod:`megatron_ds.inference.quantization`. group: inputs that share a scale, None: all.
        quantized: names of the weights in fewer bits.

    Raises:
        CheckpointError: another scheme, or a quantised tensor without its scale.
    """

    def __init__(self, path: Path):
        super().__init__(path)
        self.scheme, self.group = scheme_of(self.config.pop("quantization_config"), str(path))
        scales = [name.removesuffix("_scale") for name in self.shapes if name.endswith(".weight_scale")]
        self.quantized = frozenset(scales)
        whole = {name: self._take(name) for name in scales}
        for name in self.shapes:
            if name.endswith(_PARTS):
                raise CheckpointError(f"{path}: {name} is part of a quantised tensor without its scale")
        for name, (shape, dtype) in whole.items():
            self.shapes[name], self.dtypes[name] = shape, dtype

    def require_plain(self) -> None:
        """Quantised is what it is."""

    def check_dtype(self, name: str) -> None:
        if name not in self.quantized and self.dtypes[name] in (torch.int8, E4M3):
            raise CheckpointError(f"{self.path}: {name} is {self.dtypes[name]} and has no {name}_scale")
        super().check_dtype(name)

    def read_quantized(self, name: str) -> QuantizedWeight:
        """The weight ``name``."""
        s, scale = SCHEMES[self.scheme], self.read(f"{name}_scale")
        if s.inputs:
            return QuantizedWeight(self.scheme, self.read(name), scale.view(len(scale), -1))
        values = unpacked(self.read(f"{name}_packed"), s.bits, self.shapes[name][1])
        return QuantizedWeight(self.scheme, values, scale.view(len(values), -1))

    def _take(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Let the tensors of a weight be none of their own; returns the shape and dtype that it stands for."""
        dtype, shape = self.dtypes[f"{name}_scale"], self.shapes.get(name, ())
        if f"{name}_shape" in self.shapes:
            shape = tuple(self.read(f"{name}_shape").tolist())
        if len(shape) != 2 or min(shape) < 1:
            is_now = list(shape) or "not there"
            raise CheckpointError(f"{self.path}: {name}_scale is that of no matrix: {name} is {is_now}")
        wanted = layout(name, shape, self.scheme, self.group, dtype)
        found = {part: (self.shapes.pop(part), self.dtypes[part]) for part in wanted if part in self.shapes}
        if len(scale := found[f"{name}_scale"][0]) == 1:
            found[f"{name}_scale"] = (*scale, 1), dtype
        shapes = ({part: of_part for part, (of_part, _) in tensors.items()} for tensors in (found, wanted))
        if next(shapes) != next(shapes) or not dtype.is_floating_point or found.get(name) != wanted.get(name):
            groups = f" in groups of {self.group}" if self.group else ""
            raise CheckpointError(
                f"{self.path}: {name} is kept as {_told(found)}, where {self.scheme!r}{groups} has {_told(wanted)}"
            )
        return shape, dtype


def _told(tensors: Plan) -> str:
    return ", ".join(f"{name} {list(shape)} of {dtype}" for name, (shape, dtype) in tensors.items())


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
