"""Hugging Face's names and configurations of Llama, and of its kin.

Qwen 2 and 3 are Llama with biases or norms more, Mistral is Llama with a window, Phi-3 with fused matrices.
"""

from __future__ import annotations

from typing import Any

from megatron_ds.config import ModelConfig
from megatron_ds.convert.architecture import Architecture, Rule, needs
from megatron_ds.convert.layouts import (
    global_shapes,
    grouped_qkv,
    same,
    separate_gate_up,
    separate_qkv,
    stacked_gate_up,
    vocabulary,
)
from megatron_ds.convert.settings import Settings, must_be
from megatron_ds.errors import ConfigError

LLAMA3_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_ROTARY_BUFFERS = (r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",)
_COPIES = {"lm_head.weight": "model.embed_tokens.weight"}
_WINDOW = ("sliding_window", "max_window_layers")  # nothing, while use_sliding_window is false


def _qkv_bias(c: ModelConfig) -> bool:
    return c.bias if c.qkv_bias is None else c.qkv_bias


def _llama_rules(c: ModelConfig) -> list[Rule]:
    ours, theirs = "layers.{i}", "model.layers.{i}"
    rules = [
        vocabulary("embedding.weight", "model.embed_tokens.weight"),
        same(f"{ours}.attention_norm.weight", f"{theirs}.input_layernorm.weight"),
        separate_qkv(f"{ours}.attention.qkv.weight", f"{theirs}.self_attn", "weight"),
        same(f"{ours}.attention.out.weight", f"{theirs}.self_attn.o_proj.weight"),
        same(f"{ours}.mlp_norm.weight", f"{theirs}.post_attention_layernorm.weight"),
        separate_gate_up(f"{ours}.mlp.gate_up.weight", f"{theirs}.mlp", "weight"),
        same(f"{ours}.mlp.down.weight", f"{theirs}.mlp.down_proj.weight"),
        same("final_norm.weight", "model.norm.weight"),
    ]
    if _qkv_bias(c):
        rules.append(separate_qkv(f"{ours}.attention.qkv.bias", f"{theirs}.self_attn", "bias"))
    if c.bias:
        rules.append(same(f"{ours}.attention.out.bias", f"{theirs}.self_attn.o_proj.bias"))
        rules.append(separate_gate_up(f"{ours}.mlp.gate_up.bias", f"{theirs}.mlp", "bias"))
        rules.append(same(f"{ours}.mlp.down.bias", f"{theirs}.mlp.down_proj.bias"))
    if c.qk_norm:
        rules.append(same(f"{ours}.attention.q_norm.weight", f"{theirs}.self_attn.q_norm.weight"))
        rules.append(same(f"{ours}.attention.k_norm.weight", f"{theirs}.self_attn.k_norm.weight"))
    if not c.tied_embeddings:
        rules.append(vocabulary("head.weight", "lm_head.weight"))
    return rules


def _phi3_rules(c: ModelConfig) -> list[Rule]:
    fused = {
        "layers.{i}.attention.qkv.weight": grouped_qkv(
            "layers.{i}.attention.qkv.weight", "model.layers.{i}.self_attn.qkv_proj.weight"
        ),
        "layers.{i}.mlp.gate_up.weight": stacked_gate_up(
            "layers.{i}.mlp.gate_up.weight", "model.layers.{i}.mlp.gate_up_proj.weight"
        ),
    }
    return [fused.get(rule.ours, rule) for rule in _llama_rules(c)]


def _llama_problems(c: ModelConfig) -> list[str]:
    return [
        *needs(c, position="rope", norm="rmsnorm", activation="swiglu", qkv_bias=(None, c.bias)),
        *needs(c, family="gpt", token_types=0),
        *needs(c, qk_norm=False, embedding_norm=False),
    ]


def _mistral_problems(c: ModelConfig) -> list[str]:
    return [*_llama_problems(c), *needs(c, bias=False)]


def _phi3_problems(c: ModelConfig) -> list[str]:
    return [
        *_mistral_problems(c),
        *needs(c, head_dim=(None, c.hidden_size // c.num_heads)),
        *(["model.rope_scaling=None (it is set)"] if c.rope_scaling else []),
    ]


def _qwen2_problems(c: ModelConfig) -> list[str]:
    return [
        *needs(c, position="rope", norm="rmsnorm", activation="swiglu", bias=False, qkv_bias=True),
        *needs(c, family="gpt", token_types=0),
        *needs(c, qk_norm=False, embedding_norm=False),
        *needs(c, head_dim=(None, c.hidden_size // c.num_heads)),
    ]


def _qwen3_problems(c: ModelConfig) -> list[str]:
    return [
        *needs(c, position="rope", norm="rmsnorm", activation="swiglu", bias=False, qkv_bias=(None, False)),
        *needs(c, family="gpt", token_types=0),
        *needs(c, qk_norm=True, embedding_norm=False),
    ]


def _rope_to_config(c: ModelConfig) -> dict[str, Any]:
    """In the words of ``transformers`` 4 and of 5, which agree with each other."""
    scaling = None
    if c.rope_scaling:
        scaling = {"rope_type": "llama3", **{name: c.rope_scaling[name] for name in LLAMA3_SCALING}}
    return {
        "rope_theta": c.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_type": "default", **(scaling or {}), "rope_theta": c.rope_theta},
    }


def _rope_from_config(config: Settings) -> dict[str, Any]:
    """In the words of either; `transformers` lets ``rope_scaling`` win where a file has both."""
    must_be(config, rope_interleaved=False, partial_rotary_factor=1.0)
    theta, newer, older = (
        config.get("rope_theta", 10000.0),
        config.inner("rope_parameters"),
        config.inner("rope_scaling"),
    )
    found = [_one_rope(rope, theta) for rope in (older, newer) if rope is not None]
    if len(found) == 2 and found[0] != found[1]:
        raise ConfigError(
            f"config.json has rope_scaling={dict(older or {})} and rope_parameters={dict(newer or {})}, which differ; "
            "remove one of them"
        )
    theta, scaling = found[0] if found else (float(theta), None)
    return {"position": "rope", "rope_theta": theta, "rope_scaling": scaling}


def _one_rope(rope: Settings, theta: float) -> tuple[float, dict[str, Any] | None]:
    """(theta, Llama 3's scaling or None)"""
    must_be(rope, partial_rotary_factor=1.0)
    kind, older = rope.get("rope_type"), rope.get("type")
    kind = kind or older or "default"
    theta = float(rope.get("rope_theta", theta))
    if kind not in ("default", "llama3"):
        raise ConfigError(f"rope_type={kind!r} in config.json is not supported, only 'default' and 'llama3'")
    if kind == "default":
        return theta, None
    lacking = [name for name in LLAMA3_SCALING if rope.get(name) is None]
    if lacking:
        raise ConfigError(
            f"{rope.where} has rope_type='llama3' without {', '.join(lacking)}, and what was trained with cannot be "
            "guessed; write them into the file, as the model's authors give them"
        )
    return theta, {name: rope[name] for name in LLAMA3_SCALING}


def _llama_to_config(c: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.ffn_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.groups,
        "head_dim": c.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": c.max_positions,
        "rms_norm_eps": c.norm_eps,
        "initializer_range": c.init_std,
        "attention_dropout": c.attention_dropout,
        "attention_bias": c.bias,
        "mlp_bias": c.bias,
        "tie_word_embeddings": c.tied_embeddings,
        **_rope_to_config(c),
    }


def _qwen_to_config(c: ModelConfig) -> dict[str, Any]:
    config = {**_llama_to_config(c), "use_sliding_window": False}
    del config["mlp_bias"]
    return config


def _mistral_to_config(c: ModelConfig) -> dict[str, Any]:
    unknown = ("attention_bias", "mlp_bias")
    return {**{k: v for k, v in _llama_to_config(c).items() if k not in unknown}, "sliding_window": None}


def _phi3_to_config(c: ModelConfig) -> dict[str, Any]:
    values = {k: v for k, v in _mistral_to_config(c).items() if k != "head_dim"}
    return {**values, "resid_pdrop": c.hidden_dropout, "embd_pdrop": c.hidden_dropout}


def _llama_from_config(config: Settings) -> dict[str, Any]:
    must_be(config, hidden_act="silu")
    bias = bool(config.get("attention_bias", False))
    if bool(config.get("mlp_bias", False)) != bias:
        raise ConfigError(
            f"attention_bias={bias} with mlp_bias={not bias} in config.json is not supported; both must be the same"
        )
    n, h = config["num_attention_heads"], config["hidden_size"]
    return {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": h,
        "num_heads": n,
        "kv_heads": config.get("num_key_value_heads") or n,
        "head_dim": config.get("head_dim") or h // n,
        "ffn_hidden_size": config["intermediate_size"],
        "vocab_size": config["vocab_size"],
        "max_positions": config.get("max_position_embeddings", 2048),
        "norm": "rmsnorm",
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "activation": "swiglu",
        "bias": bias,
        "tied_embeddings": config.get("tie_word_embeddings", False),
        "init_std": config.get("initializer_range", 0.02),
        "attention_dropout": config.get("attention_dropout", 0.0),
        **_rope_from_config(config),
    }


def _no_window(config: Settings, default: int | None, max_positions: int) -> None:
    """Refuse a window that the longest sequence does not fit into; null is none, whatever the class's default."""
    window = config.get("sliding_window", None if "sliding_window" in config else default)
    if window is not None and window < max_positions:
        raise ConfigError(
            f"sliding_window={window} in config.json is not supported: every token sees all that came before it here. "
            f"For sequences of {window} tokens at most it makes no difference: set max_position_embeddings to {window}"
        )


def _mistral_from_config(config: Settings) -> dict[str, Any]:
    positions = config.get("max_position_embeddings", 131072)
    _no_window(config, 4096, positions)
    kv_heads = config.get("num_key_value_heads", 8)
    return {**_llama_from_config(config), "kv_heads": kv_heads, "max_positions": positions}


def _phi3_from_config(config: Settings) -> dict[str, Any]:
    positions, dropout = config.get("max_position_embeddings", 4096), config.get("resid_pdrop", 0.0)
    _no_window(config, None, positions)
    must_be(config, embd_pdrop=dropout)
    eps = config.get("rms_norm_eps", 1e-5)
    fields = {**_llama_from_config(config), "max_positions": positions, "norm_eps": eps, "hidden_dropout": dropout}
    if fields["rope_scaling"]:
        raise ConfigError("Phi-3 knows no llama3 scaling; rope_parameters in config.json must have rope_type 'default'")
    return fields


def _full_attention(config: Settings) -> None:
    """Refuse layers that see a part of the sequence alone; a window that is not used says nothing."""
    must_be(config, use_sliding_window=False, use_mrope=False)
    other = set(config.get("layer_types", ())) - {"full_attention"}
    if other:
        raise ConfigError(f"layer_types with {sorted(other)} in config.json are not supported, only 'full_attention'")


def _qwen2_from_config(config: Settings) -> dict[str, Any]:
    _full_attention(config)
    return {**_llama_from_config(config), "bias": False, "qkv_bias": True}


def _qwen3_from_config(config: Settings) -> dict[str, Any]:
    _full_attention(config)
    must_be(config, attention_bias=False)
    return {**_llama_from_config(config), "head_dim": config.get("head_dim", 128), "qk_norm": True}


LLAMAS: tuple[Architecture, ...] = (
    Architecture(
        "LlamaForCausalLM",
        "llama",
        "model.",
        _llama_rules,
        global_shapes,
        _llama_to_config,
        _llama_from_config,
        _llama_problems,
        ignored=_ROTARY_BUFFERS,
        copies=_COPIES,
        harmless=("is_llama_config", "max_sequence_length"),
    ),
    Architecture(
        "MistralForCausalLM",
        "mistral",
        "model.",
        _llama_rules,
        global_shapes,
        _mistral_to_config,
        _mistral_from_config,
        _mistral_problems,
        ignored=_ROTARY_BUFFERS,
        copies=_COPIES,
    ),
    Architecture(
        "Phi3ForCausalLM",
        "phi3",
        "model.",
        _phi3_rules,
        global_shapes,
        _phi3_to_config,
        _phi3_from_config,
        _phi3_problems,
        ignored=_ROTARY_BUFFERS,
        copies=_COPIES,
        harmless=("original_max_position_embeddings",),  # says something for long sequences alone, which scale
    ),
    Architecture(
        "Qwen2ForCausalLM",
        "qwen2",
        "model.",
        _llama_rules,
        global_shapes,
        _qwen_to_config,
        _qwen2_from_config,
        _qwen2_problems,
        ignored=_ROTARY_BUFFERS,
        copies=_COPIES,
        harmless=_WINDOW,
    ),
    Architecture(
        "Qwen3ForCausalLM",
        "qwen3",
        "model.",
        _llama_rules,
        global_shapes,
        _qwen_to_config,
        _qwen3_from_config,
        _qwen3_problems,
        ignored=_ROTARY_BUFFERS,
        copies=_COPIES,
        harmless=_WINDOW,
    ),
)
