"""Hugging Face's names, layouts and configurations of the models that ``gpt.py`` can be, and BERT's.

Every rule is an exact pair of transforms; that they are also the right ones only equal logits can prove, and
``tests/checkpoint/test_hf_logits.py`` compares those with ``transformers``' own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_ds.config import ModelConfig
from megatron_ds.convert import hugging_face
from megatron_ds.convert.architecture import Architecture, Rule, needs
from megatron_ds.convert.bert_table import BERT_FOR_MASKED_LM
from megatron_ds.convert.hugging_face import TokenizerLike
from megatron_ds.convert.layouts import (
    both,
    global_shapes,
    interleaved_qkv,
    same,
    stacked_qkv,
    transposed,
    vocabulary,
)
from megatron_ds.convert.llama_table import LLAMAS
from megatron_ds.convert.settings import Settings, must_be
from megatron_ds.errors import ConfigError

__all__ = ["ARCHITECTURES", "export_hf", "global_shapes", "import_hf"]


def export_hf(
    checkpoint: str | Path,
    out_dir: str | Path,
    dtype: torch.dtype | None = None,
    tokenizer: TokenizerLike | None = None,
    progress: bool = False,
    say: Callable[[str], None] | None = None,
) -> Path:
    """:func:`megatron_ds.convert.hugging_face.export_hf` with the architectures of this module."""
    return hugging_face.export_hf(checkpoint, out_dir, ARCHITECTURES, dtype, tokenizer, progress, say=say)


def import_hf(
    hf_dir: str | Path,
    out_dir: str | Path,
    dtype: torch.dtype | None = None,
    vocab_multiple: int | None = None,
    progress: bool = False,
    say: Callable[[str], None] | None = None,
) -> Path:
    """:func:`megatron_ds.convert.hugging_face.import_hf` with the architectures of this module."""
    return hugging_face.import_hf(hf_dir, out_dir, ARCHITECTURES, dtype, vocab_multiple, progress, say=say)


# --- GPT-2 ----------------------------------------------------------------------------------------------------

GELU_TO_HF = {"gelu_tanh": "gelu_new", "gelu": "gelu"}
GELU_FROM_HF = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


# Of a head that sums a sequence up, which language models do not have.
_SUMMARY = tuple(f"summary_{what}" for what in ("type", "use_proj", "activation", "proj_to_labels", "first_dropout"))


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


def _gpt2_from_config(config: Settings) -> dict[str, Any]:
    must_be(config, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    activation = config.get("activation_function", "gelu_new")
    if activation not in GELU_FROM_HF:
        raise ConfigError(f"activation_function={activation!r} is not supported; known: {', '.join(GELU_FROM_HF)}")
    h, dropout = config.get("n_embd", 768), config.get("resid_pdrop", 0.1)
    if config.get("embd_pdrop", 0.1) != dropout:
        raise ConfigError(
            f"embd_pdrop={config['embd_pdrop']} beside resid_pdrop={dropout} in config.json is not supported; they "
            "must be the same here, and may be changed: dropout is no part of a trained model"
        )
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
        "hidden_dropout": dropout,
    }


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


def _bloom_from_config(config: Settings) -> dict[str, Any]:
    h = config.get("hidden_size", config.get("n_embed", 64))
    must_be(config, apply_residual_connection_post_layernorm=False, n_inner=4 * h)
    return {
        "num_layers": config.get("n_layer", config.get("num_hidden_layers", 2)),
        "hidden_size": h,
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


_BLOOM_KERNELS = (
    *("slow_but_exact", "masked_softmax_fusion", "attention_softmax_in_fp32", "bias_dropout_fusion"),
    *("skip_bias_add", "skip_bias_add_qkv", "offset_alibi"),
)

# --- the table of tables --------------------------------------------------------------------------------------

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
        copies={"lm_head.weight": "transformer.wte.weight"},
        harmless=(*_SUMMARY, "n_ctx", "n_special", "predict_special_tokens", "reorder_and_upcast_attn"),
    ),
    *LLAMAS,
    Architecture(
        "BloomForCausalLM",
        "bloom",
        "transformer.",
        _bloom_rules,
        global_shapes,
        _bloom_to_config,
        _bloom_from_config,
        _bloom_problems,
        copies={"lm_head.weight": "transformer.word_embeddings.weight"},
        harmless=_BLOOM_KERNELS,
    ),
    BERT_FOR_MASKED_LM,
)
