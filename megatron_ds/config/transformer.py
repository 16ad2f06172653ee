"""What has to fit together in the ``model`` section of a transformer, and between it and other sections."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from megatron_ds.errors import divisors, multiples_around, one_of

if TYPE_CHECKING:
    from megatron_ds.config.text import ModelConfig, RunConfig

_CONTEXT = "original_max_position_embeddings"
_YARN = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
_FACTORS = ("short_factor", "long_factor")
# Of each kind of rotary scaling what it needs, and what it may have, by the names that transformers has for them.
ROPE_SCALING: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = MappingProxyType(
    {
        "linear": (("factor",), ()),
        "dynamic": (("factor", _CONTEXT), ()),
        "llama3": (("factor", "low_freq_factor", "high_freq_factor", _CONTEXT), ()),
        "yarn": (("factor", _CONTEXT), _YARN),
        "longrope": (("factor", _CONTEXT, *_FACTORS), ("attention_factor",)),
    }
)


def transformer_faults(config: RunConfig) -> Iterator[str]:
    """Why a GPT or a BERT cannot be built, split over tp, or fed with these samples, if it cannot."""
    yield from _attention_faults(config.model)
    yield from split_faults(config.model, config.mesh.tp)
    yield from _position_faults(config.model, config.train.sequence_length)
    yield from _block_faults(config.model)
    if config.model.num_kv_heads < config.mesh.tp and config.precision.fp8 != "none":
        yield (
            f"precision.fp8={config.precision.fp8!r} with model.kv_heads={config.model.num_kv_heads} < mesh.tp="
            f"{config.mesh.tp}: what repeats key/value heads has no products in FP8; use mesh.tp="
            f"{config.model.num_kv_heads} or fewer"
        )
    m, mesh, length = config.model, config.mesh, config.train.sequence_length
    if not m.causal and (config.data.conversations or config.data.fim.rate):
        yield "data.conversations and data.fim.rate are for model.family='gpt': a BERT predicts masked tokens of texts"
    if mesh.sequence_parallel and mesh.tp > 1 and length % mesh.tp:
        yield (
            f"train.sequence_length={length} cannot be split over mesh.tp={mesh.tp} for sequence parallelism; use "
            f"{multiples_around(length, mesh.tp)}, or --mesh.no-sequence-parallel"
        )


def _attention_faults(m: ModelConfig) -> Iterator[str]:
    if m.num_heads % m.num_kv_heads:
        yield (
            f"model.num_heads={m.num_heads} is not a multiple of model.kv_heads={m.num_kv_heads}; "
            f"kv_heads may be {divisors(m.num_heads)}"
        )
    if m.head_dim is None and m.hidden_size % m.num_heads:
        yield (
            f"model.hidden_size={m.hidden_size} is not a multiple of model.num_heads={m.num_heads}; "
            f"use {multiples_around(m.hidden_size, m.num_heads)}, or set model.head_dim"
        )


def split_faults(m: ModelConfig, tp: int, name: str = "mesh.tp") -> Iterator[str]:
    """Why a model cannot be split over ``tp`` ranks, a setting that is called ``name``."""
    if m.num_kv_heads % tp and (tp % m.num_kv_heads or m.num_heads % tp):
        heads = m.num_heads
        may = [
            t for t in range(1, heads + 1) if heads % t == 0 and (m.num_kv_heads % t == 0 or t % m.num_kv_heads == 0)
        ]
        yield (
            f"model.{'num_heads' if m.kv_heads is None else 'kv_heads'}={m.num_kv_heads} cannot be split over "
            f"{name}={tp}; tp may be {one_of(may)}"
        )
    elif m.num_kv_heads < tp and m.qk_norm and m.qk_norm_over == "projection":
        yield (
            f"model.kv_heads={m.num_kv_heads} are fewer than {name}={tp}, and the norm over all of them "
            "(model.qk_norm_over='projection') is not known to be of repeated heads; use "
            f"{name}={m.num_kv_heads} or fewer"
        )
    if m.ffn_size % tp:
        yield (
            f"model.ffn_hidden_size={m.ffn_size} cannot be split over {name}={tp}; "
            f"use {multiples_around(m.ffn_size, tp)}"
        )
    if m.padded_vocab % tp:
        yield (
            f"the vocabulary padded to {m.padded_vocab} (model.vocab_size={m.vocab_size}, "
            f"model.vocab_multiple={m.vocab_multiple}) cannot be split over {name}={tp}; "
            f"use model.vocab_multiple={math.lcm(m.vocab_multiple, tp)}"
        )


def _block_faults(m: ModelConfig) -> Iterator[str]:
    place = m.resolved["norm_position"]
    if m.residual != "sequential" and place != "pre":
        yield (
            f"model.residual={m.residual!r} with model.norm_position={place!r}: attention and MLP side by side have "
            "their norms before them; use model.norm_position='pre', or model.residual='sequential'"
        )
    if len(m.attention_pattern) > m.num_layers or not m.attention_pattern:
        yield (
            f"model.attention_pattern has {len(m.attention_pattern)} entries for model.num_layers={m.num_layers} "
            f"layers; use 1 to {m.num_layers}, which are repeated"
        )


def rotary_faults(m: ModelConfig) -> Iterator[str]:
    """Why the heads of a model cannot be turned by their positions, wherever it comes from."""
    rotated = m.rotary_dim or m.head_size
    if m.position == "rope" and rotated % 2:
        name = "head_dim" if m.rotary_dim is None else "rotary_dim"
        yield f"rotary positions need an even {name}, not {rotated}; use {multiples_around(rotated, 2)}"
    if rotated > m.head_size:
        yield f"model.rotary_dim={m.rotary_dim} is more than the {m.head_size} dims of a head; use that or fewer"
    if rotated == 2 and (m.rope_scaling or {}).get("rope_type") == "dynamic":
        yield (
            "model.rope_scaling.rope_type='dynamic' does nothing with 2 rotated dims of a head: they turn by 1 a token "
            "for any model.rope_theta, which it raises; leave model.rope_scaling out"
        )
    if m.position == "rope" and m.rope_scaling is not None:
        found = list(_scaling_faults(dict(m.rope_scaling), rotated // 2))
        yield from found or _undefined_angles(m.rope_scaling, m.rope_theta)


def _undefined_angles(scaling: Mapping[str, Any], theta: float) -> Iterator[str]:
    """Where the formula of a scaling divides by zero, or a blend runs backwards."""
    kind = scaling.get("rope_type", "llama3")
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        yield (
            f"model.rope_scaling.high_freq_factor={scaling['high_freq_factor']} should be above "
            f"low_freq_factor={scaling['low_freq_factor']}: wavelengths between the two are blended"
        )
    if kind == "yarn" and theta == 1.0:
        yield (
            "model.rope_theta=1.0 makes all wavelengths one, of which model.rope_scaling.rope_type='yarn' would "
            "stretch the long ones; use another rope_theta, or 'linear'"
        )
    if kind == "longrope" and "attention_factor" not in scaling and scaling[_CONTEXT] <= 1:
        yield (
            f"model.rope_scaling.{_CONTEXT}={scaling[_CONTEXT]} should be above 1: by its logarithm longrope "
            "scales cos and sin; or give attention_factor"
        )


def _position_faults(m: ModelConfig, length: int) -> Iterator[str]:
    yield from rotary_faults(m)
    if m.position == "alibi" and not m.causal:
        yield (
            "model.position='alibi' with model.family='bert': ALiBi's bias is for tokens that look back; use "
            "'learned', 'rope' or 'none'"
        )
    if m.position == "learned" and length > m.max_positions:
        yield (
            f"train.sequence_length={length} is longer than model.max_positions={m.max_positions}; "
            "raise max_positions or shorten the sequence"
        )


def _scaling_faults(scaling: dict[str, Any], planes: int) -> Iterator[str]:
    kind = scaling.pop("rope_type", "llama3")
    if kind not in ROPE_SCALING:
        yield f"model.rope_scaling.rope_type={kind!r} is not known; use {', '.join(ROPE_SCALING)}"
        return
    needed, optional = ROPE_SCALING[str(kind)]
    lacking, unknown = sorted(set(needed) - set(scaling)), sorted(set(scaling) - {*needed, *optional})
    if lacking:
        yield f"model.rope_scaling={scaling} lacks {lacking}"
    if unknown:
        yield f"model.rope_scaling={scaling} has {unknown}, which rope_type={kind!r} does not take; leave them out"
    for name in set(scaling) & {*needed, *optional}:
        value, switch = scaling[name], name == "truncate"
        if name in _FACTORS:
            if not (isinstance(value, tuple | list) and len(value) == planes and all(map(_positive, value))):
                yield (
                    f"model.rope_scaling.{name}={value!r} should be {planes} positive numbers, one for every two "
                    "rotated dims of a head"
                )
        elif not (isinstance(value, bool) if switch else _positive(value)):
            yield f"model.rope_scaling.{name}={value!r} should be {'true or false' if switch else 'a positive number'}"


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
