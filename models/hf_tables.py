"""Hugging Face's names, layouts and configurations of the models that ``gpt.py`` can be, and BERT's.

Every rule is an exact pair of transforms; that they are also the right ones only equal logits can prove, and
``tests/checkpoint/test_hf_logits.py`` compares those with ``transformers``' own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_ds.checkpoint import hf
from megatron_ds.checkpoint.hf import TokenizerLike
from megatron_ds.checkpoint.hf_architecture import Architecture, Rule, Shapes, must_be, needs
from megatron_ds.config import ModelConfig
from megatron_ds.errors import ConfigError
from megatron_ds.models.gpt import GPT
from megatron_ds.models.hf_bert import BERT_FOR_MASKED_LM
from megatron_ds.models.hf_layouts import (
    both,
    interleaved_qkv,
    same,
    separate_gate_up,
    separate_qkv,
    stacked_qkv,
    transposed,
    vocabulary,
)
from megatron_ds.shard import spec_of

LLAMA3_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def export_hf(
    checkpoint: str | Path,
    out_dir: str | Path,
    dtype: torch.dtype | None = None,
    tokenizer: TokenizerLike | None = None,
    progress: bool = False,
) -> Path:
    """:func:`megatron_ds.checkpoint.hf.export_hf` with the architectures of this module."""
    return hf.export_hf(checkpoint, out_dir, ARCHITECTURES, dtype, tokenizer, progress)


def import_hf(
    hf_dir: str | Path,
    out_dir: str | Path,
    dtype: torch.dtype | None = None,
    vocab_multiple: int | None = None,
    progress: bool = False,
) -> Path:
    """:func:`megatron_ds.checkpoint.hf.import_hf` with the architectures of this module."""
    return hf.import_hf(hf_dir, out_dir, ARCHITECTURES, dtype, vocab_multiple, progress)


def global_shapes(config: ModelConfig) -> Shapes:
    """Name to global shape of every tensor of the model."""
    specs = [spec_of(parameter) for parameter in GPT(config, device="meta").parameters()]
    return {spec.name: spec.global_shape for spec in specs}


def _qkv_bias(c: ModelConfig) -> bool:
    return c.bias if c.qkv_bias is None else c.qkv_bias


# --- GPT-2 ----------------------------------------------------------------------------------------------------

GELU_TO_HF = {"gelu_tanh": "gelu_new", "gelu": "gelu"}
GELU_FROM_HF = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


def _gpt2_rules(c: ModelConfig) -> list[Rule]:
    ours, theirs = "layers.{i}", "transformer.h.{i}"
    return [
        vocabulary("embedding.weight", "transformer.wte.weight"),
        same("position.weight", "transformer.wpe.weight"),
        *both(same, f"{ours}.attention_norm", f"{theirs}.ln_1"),
        stacked_qkv(f"{ours}.attention.qkv.weight", f"{theirs}.attn.c_attn.weight", conv=True),
        stacked_qkv(f"{ours}.attention.qkv.bias", f"{theirs}.attn.c_attn.bias", conv=False),
        transposed(f"{ours}.attention.out.weight", f"{theirs}.attn.c_proj.weight"),
        same(f"{ours}.attention.out.bias", f"{theirs}.attn.c_proj.bias"),
        *both(same, f"{ours}.mlp_norm", f"{theirs}.ln_2"),
        transposed(f"{ours}.mlp.up.weight", f"{theirs}.mlp.c_fc.weight"),
        same(f"{ours}.mlp.up.bias", f"{theirs}.mlp.c_fc.bias"),
        transposed(f"{ours}.mlp.down.weight", f"{theirs}.mlp.c_proj.weight"),
        same(f"{ours}.mlp.down.bias", f"{theirs}.mlp.c_proj.bias"),
        *both(same, "final_norm", "transformer.ln_f"),
        *([] if c.tied_embeddings else [vocabulary("head.weight", "lm_head.weight")]),
    ]


def _gpt2_problems(c: ModelConfig) -> list[str]:
    return [
        *needs(c, position="learned", norm="layernorm", activation=tuple(GELU_TO_HF), bias=True, qkv_bias=(None, True)),
        *needs(c, kv_heads=(None, c.num_heads), head_dim=(None, c.hidden_size // c.num_heads)),
        *needs(c, family="gpt", token_types=0),
        *needs(c, qk_norm=False, embedding_norm=False),
    ]


def _gpt2_to_config(c: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": c.vocab_size,
        "n_positions": c.max_positions,
        "n_embd": c.hidden_size,
        "n_layer": c.num_layers,
        "n_head": c.num_heads,
        "n_inner": c.ffn_size,
        "activation_function": GELU_TO_HF[c.activation],
        "layer_norm_epsilon": c.norm_eps,
        "initializer_range": c.init_std,
        "attn_pdrop": c.attention_dropout,
        "resid_pdrop": c.hidden_dropout,
        "embd_pdrop": c.hidden_dropout,
        "tie_word_embeddings": c.tied_embeddings,
    }


def _gpt2_from_config(config: dict[str, Any]) -> dict[str, Any]:
    must_be(config, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    activation = config.get("activation_function", "gelu_new")
    if activation not in GELU_FROM_HF:
        raise ConfigError(f"activation_function={activation!r} is not supported; known: {', '.join(GELU_FROM_HF)}")
    h = config.get("n_embd", 768)
    return {
        "num_layers": config.get("n_layer", 12),
        "hidden_size": h,
        "num_heads": config.get("n_head", 12),
        "ffn_hidden_size": config.get("n_inner") or 4 * h,
        "vocab_size": config.get("vocab_size", 50257),
        "max_positions": config.get("n_positions", 1024),
        "position": "learned",
        "norm": "layernorm",
        "norm_eps": config.get("layer_norm_epsilon", 1e-5),
        "activation": GELU_FROM_HF[activation],
        "bias": True,
        "tied_embeddings": config.get("tie_word_embeddings", True),
        "init_std": config.get("initializer_range", 0.02),
        "attention_dropout": config.get("attn_pdrop", 0.1),
        "hidden_dropout": config.get("resid_pdrop", 0.1),
    }


# --- Llama, and Qwen 2 and 3, which are Llama with biases on q, k, v or with norms on q, k ----------------------


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


def _llama_problems(c: ModelConfig) -> list[str]:
    return [
        *needs(c, position="rope", norm="rmsnorm", activation="swiglu", qkv_bias=(None, c.bias)),
        *needs(c, family="gpt", token_types=0),
        *needs(c, qk_norm=False, embedding_norm=False),
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


def _rope_from_config(config: dict[str, Any]) -> dict[str, Any]:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ConfigError(f"rope_type={kind!r} in config.json is not supported, only 'default' and 'llama3'")
    scaling = {name: rope[name] for name in LLAMA3_SCALING} if kind == "llama3" else None
    return {
        "position": "rope",
        "rope_theta": float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
        "rope_scaling": scaling,
    }


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


def _llama_from_config(config: dict[str, Any]) -> dict[str, Any]:
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


def _qwen2_from_config(config: dict[str, Any]) -> dict[str, Any]:
    must_be(config, use_sliding_window=False)
    return {**_llama_from_config(config), "bias": False, "qkv_bias": True}


def _qwen3_from_config(config: dict[str, Any]) -> dict[str, Any]:
    must_be(config, use_sliding_window=False, attention_bias=False)
    return {**_llama_from_config(config), "head_dim": config.get("head_dim", 128), "qk_norm": True}


# --- BLOOM ----------------------------------------------------------------------------------------------------


def _bloom_rules(c: ModelConfig) -> list[Rule]:
    ours, theirs = "layers.{i}", "transformer.h.{i}"
    return [
        vocabulary("embedding.weight", "transformer.word_embeddings.weight"),
        *both(same, "embedding_norm", "transformer.word_embeddings_layernorm"),
        *both(same, f"{ours}.attention_norm", f"{theirs}.input_layernorm"),
        *both(interleaved_qkv, f"{ours}.attention.qkv", f"{theirs}.self_attention.query_key_value"),
        *both(same, f"{ours}.attention.out", f"{theirs}.self_attention.dense"),
        *both(same, f"{ours}.mlp_norm", f"{theirs}.post_attention_layernorm"),
        *both(same, f"{ours}.mlp.up", f"{theirs}.mlp.dense_h_to_4h"),
        *both(same, f"{ours}.mlp.down", f"{theirs}.mlp.dense_4h_to_h"),
        *both(same, "final_norm", "transformer.ln_f"),
        *([] if c.tied_embeddings else [vocabulary("head.weight", "lm_head.weight")]),
    ]


def _bloom_problems(c: ModelConfig) -> list[str]:
    return [
        *needs(c, position="alibi", norm="layernorm", activation="gelu_tanh", bias=True, qkv_bias=(None, True)),
        *needs(c, kv_heads=(None, c.num_heads), head_dim=(None, c.hidden_size // c.num_heads)),
        *needs(c, family="gpt", token_types=0),
        *needs(c, qk_norm=False, embedding_norm=True, ffn_hidden_size=(None, 4 * c.hidden_size)),
    ]


def _bloom_to_config(c: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "n_layer": c.num_layers,
        "n_head": c.num_heads,
        "layer_norm_epsilon": c.norm_eps,
        "initializer_range": c.init_std,
        "attention_dropout": c.attention_dropout,
        "hidden_dropout": c.hidden_dropout,
        "seq_length": c.max_positions,
        "tie_word_embeddings": c.tied_embeddings,
    }


def _bloom_from_config(config: dict[str, Any]) -> dict[str, Any]:
    must_be(config, apply_residual_connection_post_layernorm=False)
    return {
        "num_layers": config.get("n_layer", config.get("num_hidden_layers", 2)),
        "hidden_size": config.get("hidden_size", config.get("n_embed", 64)),
        "num_heads": config.get("n_head", config.get("num_attention_heads", 8)),
        "vocab_size": config.get("vocab_size", 250880),
        "max_positions": config.get("seq_length", 2048),
        "position": "alibi",
        "norm": "layernorm",
        "norm_eps": config.get("layer_norm_epsilon", 1e-5),
        "activation": "gelu_tanh",
        "bias": True,
        "embedding_norm": True,
        "tied_embeddings": config.get("tie_word_embeddings", True),
        "init_std": config.get("initializer_range", 0.02),
        "attention_dropout": config.get("attention_dropout", 0.0),
        "hidden_dropout": config.get("hidden_dropout", 0.0),
    }


# --- the table of tables --------------------------------------------------------------------------------------

ROTARY_BUFFERS = (r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",)

ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture(
        "GPT2LMHeadModel",
        "gpt2",
        "transformer.",
        _gpt2_rules,
        global_shapes,
        _gpt2_to_config,
        _gpt2_from_config,
        _gpt2_problems,
        ignored=(r"h\.\d+\.attn\.(masked_)?bias",),
    ),
    Architecture(
        "LlamaForCausalLM",
        "llama",
        "model.",
        _llama_rules,
        global_shapes,
        _llama_to_config,
        _llama_from_config,
        _llama_problems,
        ROTARY_BUFFERS,
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
        ROTARY_BUFFERS,
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
        ROTARY_BUFFERS,
    ),
    Architecture(
        "BloomForCausalLM",
        "bloom",
        "transformer.",
        _bloom_rules,
        global_shapes,
        _bloom_to_config,
        _bloom_from_config,
        _bloom_problems,
    ),
    BERT_FOR_MASKED_LM,
)
