"""Hugging Face's names and configuration of BERT (``BertForMaskedLM``); see :mod:`.tables` for the others."""

from __future__ import annotations

from typing import Any

from megatron_ds.config import ModelConfig
from megatron_ds.convert.architecture import Architecture, Rule, needs
from megatron_ds.convert.layouts import both, global_shapes, same, separate_qkv, twice, vocabulary
from megatron_ds.convert.settings import Settings, must_be
from megatron_ds.errors import ConfigError

ACTIVATIONS_TO_HF = {"gelu": "gelu", "gelu_tanh": "gelu_new"}
ACTIVATIONS_FROM_HF = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


_POOLER = tuple(
    f"pooler_{what}" for what in ("fc_size", "num_attention_heads", "num_fc_layers", "size_per_head", "type")
)


def _rules(c: ModelConfig) -> list[Rule]:
    ours, theirs, inputs, head = "layers.{i}", "bert.encoder.layer.{i}", "bert.embeddings", "cls.predictions"
    names = ("query", "key", "value")
    return [
        vocabulary("embedding.weight", f"{inputs}.word_embeddings.weight"),
        same("position.weight", f"{inputs}.position_embeddings.weight"),
        same("token_type.weight", f"{inputs}.token_type_embeddings.weight"),
        *both(same, "embedding_norm", f"{inputs}.LayerNorm"),
        separate_qkv(f"{ours}.attention.qkv.weight", f"{theirs}.attention.self", "weight", names),
        separate_qkv(f"{ours}.attention.qkv.bias", f"{theirs}.attention.self", "bias", names),
        *both(same, f"{ours}.attention.out", f"{theirs}.attention.output.dense"),
        *both(same, f"{ours}.attention_norm", f"{theirs}.attention.output.LayerNorm"),
        *both(same, f"{ours}.mlp.up", f"{theirs}.intermediate.dense"),
        *both(same, f"{ours}.mlp.down", f"{theirs}.output.dense"),
        *both(same, f"{ours}.mlp_norm", f"{theirs}.output.LayerNorm"),
        *both(same, "transform", f"{head}.transform.dense"),
        *both(same, "transform_norm", f"{head}.transform.LayerNorm"),
        *(
            [vocabulary("head.bias", f"{head}.bias")]
            if c.tied_embeddings
            # Their own head computes with its own bias; the other is there, and of no use.
            else [
                vocabulary("head.weight", f"{head}.decoder.weight"),
                twice(vocabulary("head.bias", f"{head}.decoder.bias"), f"{head}.bias"),
            ]
        ),
    ]


def _problems(c: ModelConfig) -> list[str]:
    return [
        *needs(c, family="bert", position="learned", norm="layernorm", activation=tuple(ACTIVATIONS_TO_HF)),
        *needs(c, bias=True, qkv_bias=(None, True), embedding_norm=True, qk_norm=False),
        *needs(c, kv_heads=(None, c.num_heads), head_dim=(None, c.hidden_size // c.num_heads)),
        *([] if c.token_types else ["model.token_types=1 or more (it is 0)"]),
    ]


def _to_config(c: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "intermediate_size": c.ffn_size,
        "hidden_act": ACTIVATIONS_TO_HF[c.activation],
        "hidden_dropout_prob": c.hidden_dropout,
        "attention_probs_dropout_prob": c.attention_dropout,
        "max_position_embeddings": c.max_positions,
        "type_vocab_size": c.token_types,
        "initializer_range": c.init_std,
        "layer_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tied_embeddings,
    }


def _from_config(config: Settings) -> dict[str, Any]:
    must_be(config, is_decoder=False, add_cross_attention=False, position_embedding_type="absolute")
    activation = config.get("hidden_act", "gelu")
    if activation not in ACTIVATIONS_FROM_HF:
        raise ConfigError(f"hidden_act={activation!r} is not supported; known: {', '.join(ACTIVATIONS_FROM_HF)}")
    return {
        "family": "bert",
        "num_layers": config.get("num_hidden_layers", 12),
        "hidden_size": config.get("hidden_size", 768),
        "num_heads": config.get("num_attention_heads", 12),
        "ffn_hidden_size": config.get("intermediate_size", 3072),
        "vocab_size": config.get("vocab_size", 30522),
        "max_positions": config.get("max_position_embeddings", 512),
        "token_types": config.get("type_vocab_size", 2),
        "position": "learned",
        "norm": "layernorm",
        "norm_eps": config.get("layer_norm_eps", 1e-12),
        "activation": ACTIVATIONS_FROM_HF[activation],
        "bias": True,
        "embedding_norm": True,
        "tied_embeddings": config.get("tie_word_embeddings", True),
        "init_std": config.get("initializer_range", 0.02),
        "attention_dropout": config.get("attention_probs_dropout_prob", 0.1),
        "hidden_dropout": config.get("hidden_dropout_prob", 0.1),
    }


BERT_FOR_MASKED_LM = Architecture(
    "BertForMaskedLM",
    "bert",
    "bert.",
    _rules,
    global_shapes,
    _to_config,
    _from_config,
    _problems,
    ignored=(r"embeddings\.position_ids",),
    dropped=(r"pooler\..*", r"cls\.seq_relationship\..*"),
    copies={
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    # The first BERTs' files, which are still the published ones, name the parameters of a norm so.
    renamed=((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")),
    harmless=("classifier_dropout", "directionality", "cross_attention_hidden_size", *_POOLER),
)
