"""What our diffusion transformers are in `diffusers`: told a class a `DiTTransformer2DModel`, told a text a
`SD3Transformer2DModel`.

Every rule is an exact pair of transforms. Each block of their DiT has embeddings of time and class of its own, which
are copies of one in published models; ours is one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_ds.config.diffusion import DiTConfig
from megatron_ds.config.read import from_dict
from megatron_ds.convert.architecture import Rule
from megatron_ds.convert.layouts import same
from megatron_ds.convert.settings import Settings, must_be
from megatron_ds.errors import ConfigError
from megatron_ds.models.patches import sine_positions

_KINDS = ("weight", "bias")
_BOOKKEEPING = ("_class_name", "_diffusers_version", "_name_or_path", "norm_num_groups")


@dataclass(frozen=True)
class Table:
    """A class of `diffusers`.

    Attributes:
        rules: of every tensor.
        constants: their tensors that follow from the configuration, in fp32.
        to_config: config.json of the model, or a ConfigError where the class cannot say what the model is.
        from_config: the model that a config.json describes, every setting of it read or refused.
    """

    name: str
    rules: Callable[[DiTConfig], list[Rule]]
    constants: Callable[[DiTConfig], Mapping[str, Tensor]]
    to_config: Callable[[DiTConfig], dict[str, Any]]
    from_config: Callable[[Settings], DiTConfig]


def table_of(c: DiTConfig) -> Table:
    return SD3 if c.has_text else DIT


def table_named(name: str, where: str) -> Table:
    for table in (DIT, OLDER_DIT, SD3):
        if table.name == name:
            return table
    raise ConfigError(f"{where} describes a {name}; this imports {DIT.name} and {SD3.name}")


def _same(ours: str, theirs: str) -> list[Rule]:
    return [same(f"{ours}.{kind}", f"{theirs}.{kind}") for kind in _KINDS]


def _stacked(ours: str, theirs: str, count: int, *, swapped: bool = False) -> list[Rule]:
    """``count`` matrices of ``h`` rows, which they have as one; ``swapped``: scale before shift."""
    turn = (lambda w: w.flip(0)) if swapped else (lambda w: w)

    def join(c: DiTConfig, ws: Sequence[Tensor]) -> Tensor:
        return turn(ws[0].view(count, c.hidden_size, *ws[0].shape[1:]))

    def split(c: DiTConfig, w: Tensor) -> Sequence[Tensor]:
        return (turn(w).flatten(0, 1),)

    return [Rule(f"{ours}.{kind}", (f"{theirs}.{kind}",), split, join) for kind in _KINDS]


def _qkv(ours: str, theirs: Sequence[str]) -> list[Rule]:
    def split(c: DiTConfig, w: Tensor) -> list[Tensor]:
        return [w[:, part].reshape(c.hidden_size, *w.shape[3:]) for part in range(3)]

    def join(c: DiTConfig, ws: Sequence[Tensor]) -> Tensor:
        return torch.stack([w.view(c.num_heads, c.head_size, *w.shape[1:]) for w in ws], dim=1)

    return [Rule(f"{ours}.{kind}", tuple(f"{name}.{kind}" for name in theirs), split, join) for kind in _KINDS]


def _patches() -> list[Rule]:
    def split(c: DiTConfig, w: Tensor) -> Sequence[Tensor]:
        return (w.view(c.hidden_size, c.channels, c.patch_size, c.patch_size),)

    def join(c: DiTConfig, ws: Sequence[Tensor]) -> Tensor:
        return ws[0].reshape(c.hidden_size, -1)

    weight = Rule("patches.weight", ("pos_embed.proj.weight",), split, join)
    return [weight, same("patches.bias", "pos_embed.proj.bias")]


def _mlp(ours: str, theirs: str) -> list[Rule]:
    return [*_same(f"{ours}.up", f"{theirs}.net.0.proj"), *_same(f"{ours}.down", f"{theirs}.net.2")]


def _dit_rules(c: DiTConfig) -> list[Rule]:
    blocks = [f"transformer_blocks.{i}" for i in range(c.num_layers)]

    def copied(ours: str, theirs: str) -> Rule:
        names = tuple(f"{block}.norm1.emb.{theirs}" for block in blocks)
        return Rule(ours, names, lambda c, w: (w,) * len(names), lambda c, ws: ws[0], copies=True)

    found = [*_patches(), copied("condition.classes.weight", "class_embedder.embedding_table.weight")]
    for ours, theirs in (("time_in", "linear_1"), ("time_out", "linear_2")):
        found += [copied(f"condition.{ours}.{kind}", f"timestep_embedder.{theirs}.{kind}") for kind in _KINDS]
    for i, block in enumerate(blocks):
        found += [
            *_stacked(f"layers.{i}.modulation", f"{block}.norm1.linear", 6),
            *_qkv(f"layers.{i}.attention.qkv", [f"{block}.attn1.to_{part}" for part in "qkv"]),
            *_same(f"layers.{i}.attention.out", f"{block}.attn1.to_out.0"),
            *_mlp(f"layers.{i}.mlp", f"{block}.ff"),
        ]
    return [*found, *_stacked("final_modulation", "proj_out_1", 2), *_same("final", "proj_out_2")]


def _refuse(c: DiTConfig, name: str, **wanted: Any) -> None:
    if c.attention.sparse.mode != "none":
        raise ConfigError(
            f"model.attention.sparse.mode={c.attention.sparse.mode!r} cannot be exported: {name} attends to all patches"
        )
    for setting, value in wanted.items():
        if c.resolved[setting] != value:
            said = f"model.{setting}={c.resolved[setting]!r}"
            raise ConfigError(f"{said} cannot be exported: {name} has {value!r} only")


def _dit_to_config(c: DiTConfig) -> dict[str, Any]:
    _refuse(c, DIT.name, ffn_hidden_size=4 * c.hidden_size, activation="gelu_tanh", qk_norm=False, positions="sines")
    _refuse(c, DIT.name, position_grid=None)
    return {
        "_class_name": DIT.name,
        "num_attention_heads": c.num_heads,
        "attention_head_dim": c.head_size,
        "in_channels": c.channels,
        "out_channels": c.out_channels,
        "num_layers": c.num_layers,
        "attention_bias": True,
        "sample_size": c.image_size,
        "patch_size": c.patch_size,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": c.num_classes,
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "norm_eps": c.norm_eps,
    }


def _dit_from_config(config: Settings) -> DiTConfig:
    must_be(config, attention_bias=True, activation_fn="gelu-approximate", norm_type="ada_norm_zero", dropout=0.0)
    must_be(config, norm_elementwise_affine=False, upcast_attention=False)
    heads, channels = config.get("num_attention_heads", 16), config.get("in_channels", 4)
    fields = {
        "num_layers": config.get("num_layers", 28),
        "hidden_size": heads * config.get("attention_head_dim", 72),
        "num_heads": heads,
        "image_size": config.get("sample_size", 32),
        "channels": channels,
        "learned_variance": _learns_variance(config, channels, channels),
        "patch_size": config.get("patch_size", 2),
        "num_classes": config.get("num_embeds_ada_norm", 1000),
        "norm_eps": config.get("norm_eps", 1e-5),
    }
    config.check_all_read(_BOOKKEEPING)
    return from_dict(DiTConfig, fields, config.where)


def _older_dit_from_config(config: Settings) -> DiTConfig:
    """Of the class that was both a DiT and others, with defaults that are no DiT's: nothing may be left to them."""
    for name in (
        *("attention_bias", "activation_fn", "norm_type", "norm_elementwise_affine", "num_embeds_ada_norm"),
        *("num_attention_heads", "attention_head_dim", "num_layers", "in_channels", "sample_size", "patch_size"),
    ):
        config[name]
    must_be(config, attention_type="default", caption_channels=None, cross_attention_dim=None, num_vector_embeds=None)
    must_be(config, only_cross_attention=False, double_self_attention=False, use_linear_projection=False)
    must_be(config, interpolation_scale=None, use_additional_conditions=None)
    return _dit_from_config(config)


def _learns_variance(config: Settings, channels: int, default: int) -> bool:
    predicted = config.get("out_channels", default)
    if predicted not in (channels, 2 * channels):
        raise ConfigError(
            f"{config.where}: out_channels={predicted} beside in_channels={channels}: a model predicts as many "
            "channels as it sees, or twice as many where it learns variances"
        )
    return bool(predicted != channels)


def _sd3_rules(c: DiTConfig) -> list[Rule]:
    embedder = "time_text_embed"
    found = [
        *_patches(),
        *_same("text", "context_embedder"),
        *_same("condition.time_in", f"{embedder}.timestep_embedder.linear_1"),
        *_same("condition.time_out", f"{embedder}.timestep_embedder.linear_2"),
        *_same("condition.pooled_in", f"{embedder}.text_embedder.linear_1"),
        *_same("condition.pooled_out", f"{embedder}.text_embedder.linear_2"),
    ]
    for i in range(c.num_layers):
        image, text, block = f"layers.{i}.image", f"layers.{i}.text", f"transformer_blocks.{i}"
        last = i == c.num_layers - 1
        found += [
            *_stacked(f"{image}.modulation", f"{block}.norm1.linear", 6),
            *_stacked(f"{text}.modulation", f"{block}.norm1_context.linear", 2 if last else 6, swapped=last),
            *_qkv(f"{image}.attention.qkv", [f"{block}.attn.to_{part}" for part in "qkv"]),
            *_qkv(f"{text}.attention.qkv", [f"{block}.attn.add_{part}_proj" for part in "qkv"]),
            *_same(f"{image}.attention.out", f"{block}.attn.to_out.0"),
            *_mlp(f"{image}.mlp", f"{block}.ff"),
        ]
        if c.qk_norm:
            for part in "qk":
                norm = f"attention.{part}_norm.weight"
                found.append(same(f"{image}.{norm}", f"{block}.attn.norm_{part}.weight"))
                found.append(same(f"{text}.{norm}", f"{block}.attn.norm_added_{part}.weight"))
        if not last:
            found += [
                *_same(f"{text}.attention.out", f"{block}.attn.to_add_out"),
                *_mlp(f"{text}.mlp", f"{block}.ff_context"),
            ]
    return [*found, *_stacked("final_modulation", "norm_out.linear", 2, swapped=True), *_same("final", "proj_out")]


def _sd3_constants(c: DiTConfig) -> dict[str, Tensor]:
    """The table of positions, which is in the file where images take its middle."""
    if c.position_grid is None:
        return {}
    whole = (c.position_grid, c.position_grid)
    return {"pos_embed.pos_embed": sine_positions(c.hidden_size, whole, c.grid, c.position_grid).unsqueeze(0)}


def _sd3_to_config(c: DiTConfig) -> dict[str, Any]:
    _refuse(c, SD3.name, ffn_hidden_size=4 * c.hidden_size, activation="gelu_tanh", positions="sines", norm_eps=1e-6)
    return {
        "_class_name": SD3.name,
        "sample_size": c.image_size,
        "patch_size": c.patch_size,
        "in_channels": c.channels,
        "out_channels": c.out_channels,
        "num_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "attention_head_dim": c.head_size,
        "joint_attention_dim": c.text_size,
        "caption_projection_dim": c.hidden_size,
        "pooled_projection_dim": c.pooled_size,
        "pos_embed_max_size": c.position_grid,
        "qk_norm": "rms_norm" if c.qk_norm else None,
        "dual_attention_layers": [],
    }


def _sd3_from_config(config: Settings) -> DiTConfig:
    heads, channels = config.get("num_attention_heads", 18), config.get("in_channels", 16)
    width = heads * config.get("attention_head_dim", 64)
    must_be(config, caption_projection_dim=width)
    if dual := config.get("dual_attention_layers", []):
        raise ConfigError(
            f"dual_attention_layers={list(dual)} in {config.where} is not supported: blocks have one attention here, "
            "over text and image"
        )
    if config.get("qk_norm", "rms_norm") != "rms_norm":
        raise ConfigError(f"qk_norm={config['qk_norm']!r} in {config.where} is not supported, only 'rms_norm' and none")
    fields = {
        "condition": "text",
        "num_layers": config.get("num_layers", 18),
        "hidden_size": width,
        "num_heads": heads,
        "image_size": config.get("sample_size", 128),
        "channels": channels,
        "learned_variance": _learns_variance(config, channels, 16),
        "patch_size": config.get("patch_size", 2),
        "position_grid": config.get("pos_embed_max_size", None if "pos_embed_max_size" in config else 96),
        "text_size": config.get("joint_attention_dim", 4096),
        "pooled_size": config.get("pooled_projection_dim", 2048),
        "qk_norm": config.has("qk_norm"),
    }
    config.check_all_read(_BOOKKEEPING)
    return from_dict(DiTConfig, fields, config.where)


DIT = Table("DiTTransformer2DModel", _dit_rules, lambda c: {}, _dit_to_config, _dit_from_config)
# As the published DiT-XL/2 was saved.
OLDER_DIT = replace(DIT, name="Transformer2DModel", from_config=_older_dit_from_config)
SD3 = Table("SD3Transformer2DModel", _sd3_rules, _sd3_constants, _sd3_to_config, _sd3_from_config)
