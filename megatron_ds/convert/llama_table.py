"""Hugging Face's names and configurations of Llama, and of its kin.

Qwen 2 and 3 are Llama with biases or norms more, Mistral is Llama with a window, Phi-3 with fused matrices; OLMo 2 and
Gemma have other norms, StarCoder 2 LayerNorms and an MLP without a gate.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from megatron_ds.convert.architecture import Architecture
from megatron_ds.convert.attention_fields import LayerTypes, QwenWindows, Rope, RopeOfLayers
from megatron_ds.convert.layouts import (
    Layout,
    grouped_qkv,
    rules,
    separate_gate_up,
    separate_qkv,
    stacked_gate_up,
)
from megatron_ds.convert.translations import GELUS, EmbeddingRoot, Fixed, Key, Ours, QueryScalar, Translation, dropouts

SIZES: tuple[Translation, ...] = (
    Key("num_layers", "num_hidden_layers"),
    Key("hidden_size", "hidden_size"),
    Key("num_heads", "num_attention_heads"),
    Key("ffn_hidden_size", "intermediate_size"),
    Key("vocab_size", "vocab_size"),
    Key("init_std", "initializer_range", 0.02),
    Key("attention_dropout", "attention_dropout", 0.0),
)
_HEAD_DIM = Key("head_dim", "head_dim", None)
_SILU = Key("activation", "hidden_act", "silu", {"silu": "swiglu"})
_NO_BIAS = Fixed(attention_bias=False)


def _settings(*own: Translation, eps: float = 1e-6, positions: int = 2048, **kv: Any) -> tuple[Translation, ...]:
    """Llama's settings, and a family's own."""
    return (
        *SIZES,
        Key("kv_heads", "num_key_value_heads", kv.get("kv_heads")),
        Key("max_positions", "max_position_embeddings", positions),
        Key("tied_embeddings", "tie_word_embeddings", kv.get("tied", False)),
        Key("norm_eps", "rms_norm_eps", eps),
        Ours(norm="rmsnorm", bias=False),
        *own,
    )


def _gemma(*own: Translation, positions: int) -> tuple[Translation, ...]:
    return _settings(
        Key("head_dim", "head_dim", 256),
        EmbeddingRoot(),
        QueryScalar(),
        Ours(zero_centered_norm=True, norm_position="sandwich", activation="geglu_tanh"),
        Fixed(written=True, hidden_activation="gelu_pytorch_tanh"),
        Fixed(hidden_act="gelu_pytorch_tanh", use_bidirectional_attention=False),
        _NO_BIAS,
        *own,
        positions=positions,
        kv_heads=4,
        tied=True,
    )


_GEMMA2_LAYERS = LayerTypes(("window", "full"), 4096)
_GEMMA3_LAYERS = LayerTypes(("window",) * 5 + ("full",), 4096, every="sliding_window_pattern")
_WINDOW = ("sliding_window", "max_window_layers")  # nothing, while use_sliding_window is false


def _kin(
    name: str,
    model_type: str,
    settings: tuple[Translation, ...],
    other: Mapping[str, str | Layout] = MappingProxyType({}),
    harmless: tuple[str, ...] = (),
) -> Architecture:
    """An architecture with Llama's names, but for ``other`` ones."""
    inside = {**_INSIDE, **other}
    after = {"final_norm": "model.norm", "head": "lm_head"}
    return Architecture(
        name,
        model_type,
        "model.",
        lambda c: rules({"embedding": "model.embed_tokens"}, "model.layers.{i}", inside, after),
        settings,
        ignored=(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",),
        copies={"lm_head.weight": "model.embed_tokens.weight"},
        harmless=harmless,
    )


_INSIDE: dict[str, str | Layout] = {
    "attention_norm": "input_layernorm",
    "attention.qkv": separate_qkv("self_attn"),
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "attention.out": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate_up": separate_gate_up("mlp"),
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.down_proj",
}
_OUTPUTS_NORMED = {
    "attention_output_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_output_norm": "post_feedforward_layernorm",
}
LLAMAS: tuple[Architecture, ...] = (
    _kin(
        "LlamaForCausalLM",
        "llama",
        _settings(_HEAD_DIM, _SILU, Rope(), Key("bias", "attention_bias", False), Key("mlp_bias", "mlp_bias", False)),
        harmless=("is_llama_config", "max_sequence_length"),
    ),
    _kin(
        "MistralForCausalLM",
        "mistral",
        _settings(
            _HEAD_DIM,
            _SILU,
            Rope(),
            _NO_BIAS,
            Key("window", "sliding_window", 4096, null=True),
            positions=131072,
            kv_heads=8,
        ),
    ),
    _kin(
        "Phi3ForCausalLM",
        "phi3",
        _settings(
            _SILU,
            Rope(
                fraction_key="partial_rotary_factor",
                kinds=("longrope",),
                older_kinds={"su": "longrope", "yarn": "longrope"},
                context=4096,
            ),
            _NO_BIAS,
            Key("window", "sliding_window", None),
            dropouts("resid_pdrop", "embd_pdrop"),
            Fixed(mlp_bias=False, lm_head_bias=False, full_attn_mod=1, interpolate_factor=1),  # Phi-4-mini's
            eps=1e-5,
            positions=4096,
        ),
        {"attention.qkv": grouped_qkv("self_attn.qkv_proj"), "mlp.gate_up": stacked_gate_up("mlp.gate_up_proj")},
        harmless=("original_max_position_embeddings",),  # says nothing without rotary scaling
    ),
    _kin(
        "Qwen2ForCausalLM",
        "qwen2",
        _settings(_SILU, Rope(), Ours(qkv_bias=True), QwenWindows((), 4096), positions=32768),
        harmless=_WINDOW,
    ),
    _kin(
        "Qwen3ForCausalLM",
        "qwen3",
        _settings(
            Key("head_dim", "head_dim", 128),
            _SILU,
            Rope(),
            _NO_BIAS,
            Ours(qk_norm=True),
            QwenWindows((), 4096),
            positions=32768,
        ),
        harmless=_WINDOW,
    ),
    _kin(
        "Olmo2ForCausalLM",
        "olmo2",
        _settings(
            _SILU,
            Rope(),
            Key("bias", "attention_bias", False),
            Ours(norm_position="output", qk_norm=True, qk_norm_over="projection", mlp_bias=False),
            eps=1e-5,
        ),
        _OUTPUTS_NORMED,
    ),
    _kin(
        "Gemma2ForCausalLM",
        "gemma2",
        _gemma(
            Rope(),
            _GEMMA2_LAYERS,
            Key("attention_softcap", "attn_logit_softcapping", 50.0, null=True),
            Key("logit_softcap", "final_logit_softcapping", 30.0, null=True),
            positions=8192,
        ),
        _OUTPUTS_NORMED,
        harmless=("cache_implementation", "sliding_window_size"),
    ),
    _kin(
        "Gemma3ForCausalLM",
        "gemma3_text",
        _gemma(
            RopeOfLayers("rope_theta", "rope_local_base_freq", (1e6, 1e4), _GEMMA3_LAYERS),
            _GEMMA3_LAYERS,
            Ours(qk_norm=True),
            Key("logit_softcap", "final_logit_softcapping", None),
            Fixed(attn_logit_softcapping=None),
            positions=131072,
        ),
        _OUTPUTS_NORMED,
        harmless=("cache_implementation", "_sliding_window_pattern"),  # of which layer_types is the outcome
    ),
    _kin(
        "Starcoder2ForCausalLM",
        "starcoder2",
        (
            *SIZES,
            Key("init_std", "initializer_range", 0.018042),  # in place of the one among SIZES
            Key("kv_heads", "num_key_value_heads", 2),
            Key("max_positions", "max_position_embeddings", 4096),
            Key("tied_embeddings", "tie_word_embeddings", True),
            Key("norm_eps", "norm_epsilon", 1e-5),
            Key("activation", "hidden_act", "gelu_pytorch_tanh", {"gelu_pytorch_tanh": "gelu_tanh", **GELUS}),
            Key("bias", "use_bias", True),
            Rope(),
            Key("window", "sliding_window", None),
            dropouts("residual_dropout", "embedding_dropout"),
            Ours(norm="layernorm"),
            Fixed(mlp_type="default", norm_type="layer_norm", activation_function="gelu_pytorch_tanh"),
            Fixed(scale_attn_weights=True),
        ),
        {"mlp.down": "mlp.c_proj"},
        harmless=(
            *("layer_norm_epsilon", "rms_norm_eps"),
            *("scale_attention_softmax_in_fp32", "attention_softmax_in_fp32"),
        ),
    ),
)
