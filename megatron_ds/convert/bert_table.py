"""Hugging Face's names and configurations of BERT, RoBERTa and ModernBERT."""

from __future__ import annotations

from typing import Any

from megatron_ds.config import ModelConfig
from megatron_ds.convert.architecture import Architecture, Rule
from megatron_ds.convert.attention_fields import ModernBertWindows, Rope, RopeOfLayers
from megatron_ds.convert.layouts import (
    Layout,
    rules,
    same,
    separate_qkv,
    stacked_gate_up,
    stacked_qkv,
    twice,
    vocabulary,
)
from megatron_ds.convert.settings import Settings
from megatron_ds.convert.translations import Fixed, Key, Ours, Same, Translation, Values


def _encoder(model: str) -> list[Rule]:
    """BERT's and RoBERTa's embeddings and blocks."""
    inputs = f"{model}.embeddings"
    before = {
        "embedding": f"{inputs}.word_embeddings",
        "position": f"{inputs}.position_embeddings",
        "token_type": f"{inputs}.token_type_embeddings",
        "embedding_norm": f"{inputs}.LayerNorm",
    }
    inside: dict[str, str | Layout] = {
        "attention.qkv": separate_qkv("attention.self", ("query", "key", "value")),
        "attention.out": "attention.output.dense",
        "attention_norm": "attention.output.LayerNorm",
        "mlp.up": "intermediate.dense",
        "mlp.down": "output.dense",
        "mlp_norm": "output.LayerNorm",
    }
    return rules(before, f"{model}.encoder.layer.{{i}}", inside, {})


def _head(transform: str, norm: str, bias: str, decoder: str, tied: bool) -> list[Rule]:
    """What lies between the last block and the logits. A head of its own computes with its own bias; the other is of no
    use, but there."""
    return [
        *(same(f"transform.{what}", f"{transform}.{what}") for what in ("weight", "bias")),
        *(same(f"transform_norm.{what}", f"{norm}.{what}") for what in ("weight", "bias")),
        vocabulary("head.weight", f"{decoder}.weight"),
        vocabulary("head.bias", bias) if tied else twice(vocabulary("head.bias", f"{decoder}.bias"), bias),
    ]


def _bert(c: ModelConfig) -> list[Rule]:
    head = "cls.predictions"
    last = _head(
        f"{head}.transform.dense", f"{head}.transform.LayerNorm", f"{head}.bias", f"{head}.decoder", c.tied_embeddings
    )
    return [*_encoder("bert"), *last]


def _sentences(c: ModelConfig) -> list[Rule]:
    pooler, head = "bert.pooler.dense", "cls.seq_relationship"
    more = [("pooler", pooler), ("sentence", head)]
    return [
        *_bert(c),
        *(same(f"{ours}.{what}", f"{theirs}.{what}") for ours, theirs in more for what in ("weight", "bias")),
    ]


def _roberta(c: ModelConfig) -> list[Rule]:
    last = _head("lm_head.dense", "lm_head.layer_norm", "lm_head.bias", "lm_head.decoder", c.tied_embeddings)
    return [*_encoder("roberta"), *last]


def _modernbert(c: ModelConfig) -> list[Rule]:
    before = {"embedding": "model.embeddings.tok_embeddings", "embedding_norm": "model.embeddings.norm"}
    inside: dict[str, str | Layout] = {
        "attention_norm": "attn_norm",
        "attention.qkv": stacked_qkv("attn.Wqkv"),
        "attention.out": "attn.Wo",
        "mlp_norm": "mlp_norm",
        "mlp.gate_up": stacked_gate_up("mlp.Wi"),
        "mlp.down": "mlp.Wo",
    }
    after = {
        "final_norm": "model.final_norm",
        "transform": "head.dense",
        "transform_norm": "head.norm",
        "head": "decoder",
    }
    return rules(before, "model.layers.{i}", inside, after)


class _Positions:
    """RoBERTa: the rows of positions up to that of the padding token's number are not positions."""

    def read(self, config: Settings) -> dict[str, Any]:
        offset = config.get("pad_token_id", 1) + 1
        return {"position_offset": offset, "max_positions": config.get("max_position_embeddings", 512) - offset}

    def write(self, model: Values) -> dict[str, Any]:
        offset = model["position_offset"]
        return {"max_position_embeddings": model["max_positions"] + offset, "pad_token_id": offset - 1}


def _settings(gelus: dict[str, str], vocabulary_size: int, *own: Translation) -> tuple[Translation, ...]:
    return (
        Key("num_layers", "num_hidden_layers", 12),
        Key("hidden_size", "hidden_size", 768),
        Key("num_heads", "num_attention_heads", 12),
        Key("ffn_hidden_size", "intermediate_size", 3072),
        Key("vocab_size", "vocab_size", vocabulary_size),
        Key("token_types", "type_vocab_size", 2),
        Key("norm_eps", "layer_norm_eps", 1e-12),
        Key("activation", "hidden_act", "gelu", gelus),
        Key("tied_embeddings", "tie_word_embeddings", True),
        Key("init_std", "initializer_range", 0.02),
        Key("attention_dropout", "attention_probs_dropout_prob", 0.1),
        Key("hidden_dropout", "hidden_dropout_prob", 0.1),
        Ours(family="bert", position="learned", norm="layernorm", bias=True, embedding_norm=True),
        Fixed(is_decoder=False, add_cross_attention=False, position_embedding_type="absolute"),
        *own,
    )


_LAYERS = ModernBertWindows(("full", "window", "window"), 128, every="global_attn_every_n_layers", full_first=True)
_MODERNBERT: tuple[Translation, ...] = (
    Key("num_layers", "num_hidden_layers", 22),
    Key("hidden_size", "hidden_size", 768),
    Key("num_heads", "num_attention_heads", 12),
    Key("ffn_hidden_size", "intermediate_size", 1152),
    Key("vocab_size", "vocab_size", 50368),
    Key("max_positions", "max_position_embeddings", 8192),
    Key("norm_eps", "norm_eps", 1e-5),
    Key("norm_bias", "norm_bias", False),
    Key("activation", "hidden_activation", "gelu", {"gelu": "geglu"}),
    Key("tied_embeddings", "tie_word_embeddings", True),
    Key("init_std", "initializer_range", 0.02),
    Key("attention_dropout", "attention_dropout", 0.0),
    Same("bias", ("attention_bias", "classifier_bias"), False),
    Key("mlp_bias", "mlp_bias", False),
    Key("head_bias", "decoder_bias", True),
    RopeOfLayers("global_rope_theta", "local_rope_theta", (160_000.0, 10_000.0), _LAYERS, Rope(kinds=())),
    _LAYERS,
    Ours(family="bert", norm="layernorm", norm_position="pre", embedding_norm=True, first_norm=False),
    Fixed(classifier_activation="gelu", embedding_dropout=0.0, mlp_dropout=0.0, position_embedding_type="absolute"),
)

_POOLER = tuple(
    f"pooler_{what}" for what in ("fc_size", "num_attention_heads", "num_fc_layers", "size_per_head", "type")
)
_BERT_SETTINGS = _settings(
    {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"},
    30522,
    Key("max_positions", "max_position_embeddings", 512),
)
_BERT: dict[str, Any] = {
    "ignored": (r"embeddings\.position_ids",),
    "copies": {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    # The first BERTs' files, which are still the published ones, name the parameters of a norm so.
    "renamed": ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")),
    "harmless": ("classifier_dropout", "directionality", "cross_attention_hidden_size", *_POOLER),
}

BERTS: tuple[Architecture, ...] = (
    Architecture(
        "BertForMaskedLM",
        "bert",
        "bert.",
        _bert,
        settings=_BERT_SETTINGS,
        dropped=(r"pooler\..*", r"cls\.seq_relationship\..*"),
        **_BERT,
    ),
    Architecture(
        "BertForPreTraining",
        "bert",
        "bert.",
        _sentences,
        settings=(*_BERT_SETTINGS, Ours(sentence_head=True)),
        **_BERT,
    ),
    Architecture(
        "RobertaForMaskedLM",
        "roberta",
        "roberta.",
        _roberta,
        _settings({"gelu": "gelu"}, 50265, _Positions()),
        ignored=(r"embeddings\.position_ids",),
        dropped=(r"pooler\..*",),
        copies={
            "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
            "lm_head.decoder.bias": "lm_head.bias",
        },
        harmless=("classifier_dropout",),
    ),
    Architecture(
        "ModernBertForMaskedLM",
        "modernbert",
        "model.",
        _modernbert,
        _MODERNBERT,
        copies={"decoder.weight": "model.embeddings.tok_embeddings.weight"},
        harmless=(
            *("classifier_pooling", "classifier_dropout", "deterministic_flash_attn", "sparse_prediction"),
            *("sparse_pred_ignore_index", "reference_compile", "initializer_cutoff_factor", "repad_logits_with_grad"),
            "layer_norm_eps",
        ),
    ),
)
