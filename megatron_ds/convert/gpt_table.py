"""Hugging Face's names and configurations of GPT-2, BLOOM, GPT-NeoX, GPT-J, OPT and Falcon."""

from __future__ import annotations

from typing import Any

from megatron_ds.config import ModelConfig
from megatron_ds.convert.architecture import Architecture, Rule
from megatron_ds.convert.attention_fields import Rope
from megatron_ds.convert.layouts import Layout, conv, interleaved_qkv, rules, separate_qkv, stacked_qkv
from megatron_ds.convert.settings import Settings
from megatron_ds.convert.translations import GELUS, Fixed, Key, Ours, Translation, Values, dropouts
from megatron_ds.errors import ConfigError


def _gpt2(c: ModelConfig) -> list[Rule]:
    inside: dict[str, str | Layout] = {
        "attention_norm": "ln_1",
        "attention.qkv": stacked_qkv("attn.c_attn", conv=True),
        "attention.out": conv("attn.c_proj"),
        "mlp_norm": "ln_2",
        "mlp.up": conv("mlp.c_fc"),
        "mlp.down": conv("mlp.c_proj"),
    }
    before = {"embedding": "transformer.wte", "position": "transformer.wpe"}
    return rules(before, "transformer.h.{i}", inside, {"final_norm": "transformer.ln_f", "head": "lm_head"})


# BLOOM, GPT-NeoX and Falcon come from one code base, and call most things alike.
_MEGATRON: dict[str, str | Layout] = {
    "attention_norm": "input_layernorm",
    "attention.qkv": interleaved_qkv("self_attention.query_key_value"),
    "attention.out": "self_attention.dense",
    "mlp_norm": "post_attention_layernorm",
    "mlp.up": "mlp.dense_h_to_4h",
    "mlp.down": "mlp.dense_4h_to_h",
}
_AFTER = {"final_norm": "transformer.ln_f", "head": "lm_head"}


def _bloom(c: ModelConfig) -> list[Rule]:
    before = {"embedding": "transformer.word_embeddings", "embedding_norm": "transformer.word_embeddings_layernorm"}
    return rules(before, "transformer.h.{i}", _MEGATRON, _AFTER)


def _falcon(c: ModelConfig) -> list[Rule]:
    two = {"attention_norm": "ln_attn", "mlp_norm": "ln_mlp"} if c.residual == "parallel" else {}
    return rules({"embedding": "transformer.word_embeddings"}, "transformer.h.{i}", {**_MEGATRON, **two}, _AFTER)


def _neox(c: ModelConfig) -> list[Rule]:
    attention: dict[str, str | Layout] = {
        "attention.qkv": interleaved_qkv("attention.query_key_value"),
        "attention.out": "attention.dense",
    }
    after = {"final_norm": "gpt_neox.final_layer_norm", "head": "embed_out"}
    return rules({"embedding": "gpt_neox.embed_in"}, "gpt_neox.layers.{i}", {**_MEGATRON, **attention}, after)


def _gptj(c: ModelConfig) -> list[Rule]:
    inside: dict[str, str | Layout] = {
        "attention_norm": "ln_1",
        "attention.qkv": separate_qkv("attn"),
        "attention.out": "attn.out_proj",
        "mlp.up": "mlp.fc_in",
        "mlp.down": "mlp.fc_out",
    }
    return rules({"embedding": "transformer.wte"}, "transformer.h.{i}", inside, _AFTER)


def _opt(c: ModelConfig) -> list[Rule]:
    inside: dict[str, str | Layout] = {
        "attention_norm": "self_attn_layer_norm",
        "attention.qkv": separate_qkv("self_attn"),
        "attention.out": "self_attn.out_proj",
        "mlp_norm": "final_layer_norm",
        "mlp.up": "fc1",
        "mlp.down": "fc2",
    }
    before = {"embedding": "model.decoder.embed_tokens", "position": "model.decoder.embed_positions"}
    after = {"final_norm": "model.decoder.final_layer_norm", "head": "lm_head"}
    return rules(before, "model.decoder.layers.{i}", inside, after)


# --- settings ---------------------------------------------------------------------------------------------------

_NORM = Ours(norm="layernorm")
_TIED = Key("tied_embeddings", "tie_word_embeddings", True)
_INIT = Key("init_std", "initializer_range", 0.02)
_EPS = Key("norm_eps", "layer_norm_epsilon", 1e-5)
# Of a head that sums a sequence up, which language models do not have.
_SUMMARY = tuple(f"summary_{what}" for what in ("type", "use_proj", "activation", "proj_to_labels", "first_dropout"))


def _gpt_sizes(layers: int, heads: int, width: int, vocabulary: int, positions: int) -> tuple[Translation, ...]:
    """In GPT-2's words."""
    return (
        Key("num_layers", "n_layer", layers),
        Key("hidden_size", "n_embd", width),
        Key("num_heads", "n_head", heads),
        Key("ffn_hidden_size", "n_inner", None),
        Key("vocab_size", "vocab_size", vocabulary),
        Key("max_positions", "n_positions", positions),
        Key("activation", "activation_function", "gelu_new", {"gelu_new": "gelu_tanh", **GELUS}),
        _EPS,
        _INIT,
        _NORM,
    )


def _bloom_sizes(layers: Key, heads: Key, width: int, vocabulary: int) -> tuple[Translation, ...]:
    """BLOOM's and Falcon's, of which each calls layers and heads as the other's older files do."""
    return (
        layers,
        heads,
        Key("hidden_size", "hidden_size", width, older=("n_embed",)),
        Key("vocab_size", "vocab_size", vocabulary),
        Key("attention_dropout", "attention_dropout", 0.0),
        Key("hidden_dropout", "hidden_dropout", 0.0),
        _EPS,
        _INIT,
        _NORM,
        _TIED,
    )


class _FourTimes(Translation):
    """BLOOM: the MLP is four times as wide as the model."""

    def read(self, config: Settings) -> dict[str, Any]:
        width = config.get("hidden_size", config.get("n_embed", 64))
        if config.get("n_inner", 4 * width) != 4 * width:
            raise ConfigError(f"n_inner={config['n_inner']} in {config.where} is not supported, only {4 * width}")
        return {"ffn_hidden_size": 4 * width}


class _OptBlocks:
    """OPT: norms before a layer or (350m) behind the sum; embeddings as wide as the model."""

    def read(self, config: Settings) -> dict[str, Any]:
        width, own = config["hidden_size"], config.get("word_embed_proj_dim")
        if own not in (None, width):
            raise ConfigError(
                f"word_embed_proj_dim={own} in {config.where} is not supported, only hidden_size={width}: embeddings "
                "here are as wide as the model"
            )
        return {"norm_position": "pre" if config.get("do_layer_norm_before", True) else "post"}

    def write(self, model: Values) -> dict[str, Any]:
        return {"do_layer_norm_before": model["norm_position"] == "pre", "word_embed_proj_dim": model["hidden_size"]}


class _FalconBlocks:
    """Falcon: key/value heads and residuals follow from four switches, not all of which go together."""

    def read(self, config: Settings) -> dict[str, Any]:
        newer, heads = (
            config.get("new_decoder_architecture", False),
            config.get("num_attention_heads", config.get("n_head", 71)),
        )
        several, beside = config.get("num_kv_heads", config.get("n_head_kv", heads)), config.get("parallel_attn", True)
        one, norms = config.get("multi_query", True), config.get("num_ln_in_parallel_attn", 2 if newer else 1)
        if (newer and not beside) or (norms == 2 and not newer):
            raise ConfigError(
                f"new_decoder_architecture={newer} with parallel_attn={beside} and num_ln_in_parallel_attn={norms} in "
                f"{config.where} is no model that Falcon's own code can run"
            )
        residual = ("parallel" if norms == 2 else "parallel_one_norm") if beside else "sequential"
        return {"kv_heads": several if newer else 1 if one else heads, "residual": residual}

    def write(self, model: Values) -> dict[str, Any]:
        groups, heads, residual = model["kv_heads"], model["num_heads"], model["residual"]
        newer = residual == "parallel" or (groups not in (1, heads) and residual != "sequential")
        return {
            "new_decoder_architecture": newer,
            "parallel_attn": residual != "sequential",
            "multi_query": groups == 1,
            "num_kv_heads": groups,
            "num_ln_in_parallel_attn": 2 if residual == "parallel" else 1,
        }


class _FalconPositions:
    """Falcon: rotary, or (RW) ALiBi, whose biases are rounded and scaled."""

    def read(self, config: Settings) -> dict[str, Any]:
        rope = Rope().read(config)
        return {"position": "alibi", "alibi": "rounded"} if config.get("alibi", False) else rope

    def write(self, model: Values) -> dict[str, Any]:
        alibi = model["position"] == "alibi"
        return {"alibi": alibi, **({} if alibi else Rope().write(model))}


_BLOOM_KERNELS = (
    *("masked_softmax_fusion", "attention_softmax_in_fp32", "bias_dropout_fusion"),
    *("skip_bias_add", "skip_bias_add_qkv", "offset_alibi"),
)

GPT2 = Architecture(
    "GPT2LMHeadModel",
    "gpt2",
    "transformer.",
    _gpt2,
    (
        *_gpt_sizes(12, 12, 768, 50257, 1024),
        Key("attention_dropout", "attn_pdrop", 0.1),
        dropouts("resid_pdrop", "embd_pdrop", default=0.1),
        _TIED,
        Ours(position="learned", bias=True),
        Fixed(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False),
    ),
    ignored=(r"h\.\d+\.attn\.(masked_)?bias",),
    copies={"lm_head.weight": "transformer.wte.weight"},
    harmless=(*_SUMMARY, "n_ctx", "n_special", "predict_special_tokens", "reorder_and_upcast_attn"),
)
BLOOM = Architecture(
    "BloomForCausalLM",
    "bloom",
    "transformer.",
    _bloom,
    (
        *_bloom_sizes(
            Key("num_layers", "n_layer", 2, older=("num_hidden_layers",)),
            Key("num_heads", "n_head", 8, older=("num_attention_heads",)),
            width=64,
            vocabulary=250880,
        ),
        _FourTimes(),
        Key("max_positions", "seq_length", 2048),
        Ours(position="alibi", bias=True, embedding_norm=True, activation="gelu_tanh"),
        # The slow way of transformers leaves out the biases behind attention and MLP.
        Fixed(apply_residual_connection_post_layernorm=False, slow_but_exact=False),
    ),
    copies={"lm_head.weight": "transformer.word_embeddings.weight"},
    harmless=_BLOOM_KERNELS,
)
GPT_NEOX = Architecture(
    "GPTNeoXForCausalLM",
    "gpt_neox",
    "gpt_neox.",
    _neox,
    (
        Key("num_layers", "num_hidden_layers"),
        Key("hidden_size", "hidden_size"),
        Key("num_heads", "num_attention_heads"),
        Key("ffn_hidden_size", "intermediate_size"),
        Key("vocab_size", "vocab_size"),
        Key("max_positions", "max_position_embeddings", 2048),
        Key("activation", "hidden_act", "gelu", {"gelu": "gelu", "gelu_fast": "gelu_tanh", **GELUS}),
        Key("norm_eps", "layer_norm_eps", 1e-5),
        Key("attention_dropout", "attention_dropout", 0.0),
        Key("hidden_dropout", "hidden_dropout", 0.0),
        Key("tied_embeddings", "tie_word_embeddings", False),
        Key("bias", "attention_bias", True),
        Rope(theta_key="rotary_emb_base", fraction_key="rotary_pct", fraction=0.25),
        Key("residual", "use_parallel_residual", True, {True: "parallel", False: "sequential"}),
        _INIT,
        _NORM,
        Ours(mlp_bias=True),
    ),
    ignored=(r"layers\.\d+\.attention\.((masked_)?bias|rotary_emb\.inv_freq)",),
    copies={"embed_out.weight": "gpt_neox.embed_in.weight"},
    renamed=((r"^lm_head\.", "embed_out."),),
    harmless=("classifier_dropout",),
)
GPTJ = Architecture(
    "GPTJForCausalLM",
    "gptj",
    "transformer.",
    _gptj,
    (
        *_gpt_sizes(28, 16, 4096, 50400, 2048),
        Key("rotary_dim", "rotary_dim", 64),
        Key("attention_dropout", "attn_pdrop", 0.0),
        dropouts("resid_pdrop", "embd_pdrop"),
        Key("tied_embeddings", "tie_word_embeddings", False),
        Ours(position="rope", rotary_interleaved=True, residual="parallel_one_norm"),
        Ours(bias=False, mlp_bias=True, head_bias=True),
        Fixed(scale_attn_weights=True, rotary=True),
    ),
    ignored=(r"h\.\d+\.attn\.((masked_)?bias|embed_positions)",),
    copies={"lm_head.weight": "transformer.wte.weight"},
    harmless=(*_SUMMARY, "n_ctx", "n_special", "predict_special_tokens"),
)
OPT = Architecture(
    "OPTForCausalLM",
    "opt",
    "model.",
    _opt,
    (
        Key("num_layers", "num_hidden_layers", 12),
        Key("hidden_size", "hidden_size"),
        Key("num_heads", "num_attention_heads", 12),
        Key("ffn_hidden_size", "ffn_dim", 3072),
        Key("vocab_size", "vocab_size", 50272),
        Key("max_positions", "max_position_embeddings", 2048),
        Key("activation", "activation_function", "relu", {"relu": "relu", **GELUS}),
        Key("attention_dropout", "attention_dropout", 0.0),
        Key("hidden_dropout", "dropout", 0.1),
        Key("init_std", "init_std", 0.02),
        Key("bias", "enable_bias", True),
        _OptBlocks(),
        _NORM,
        _TIED,
        Ours(position="learned", position_offset=2, norm_eps=1e-5),
        Fixed(
            layer_norm_elementwise_affine=True, _remove_final_layer_norm=False, layerdrop=0.0, activation_dropout=0.0
        ),
    ),
    copies={"lm_head.weight": "model.decoder.embed_tokens.weight"},
)
FALCON = Architecture(
    "FalconForCausalLM",
    "falcon",
    "transformer.",
    _falcon,
    (
        *_bloom_sizes(
            Key("num_layers", "num_hidden_layers", 32, older=("n_layer",)),
            Key("num_heads", "num_attention_heads", 71, older=("n_head",)),
            width=4544,
            vocabulary=65024,
        ),
        Key("ffn_hidden_size", "ffn_hidden_size", None),
        Key("max_positions", "max_position_embeddings", 2048),
        Key("activation", "activation", "gelu", GELUS),
        Key("bias", "bias", False),
        _FalconPositions(),
        _FalconBlocks(),
        Fixed(apply_residual_connection_post_layernorm=False),
    ),
    copies={"lm_head.weight": "transformer.word_embeddings.weight"},
)
