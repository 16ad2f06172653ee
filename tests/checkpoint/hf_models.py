"""Tiny models of `transformers` with random weights everywhere, biases and norms included."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_ds.checkpoint import Checkpoint, FlatShard, load
from megatron_ds.checkpoint.meta import model_config
from megatron_ds.config import ModelConfig
from megatron_ds.models.families import class_of
from megatron_ds.models.transformer import Transformer
from megatron_ds.shard import spec_of

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_LLAMA: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _family(name: str, sizes: dict[str, Any], head: str = "ForCausalLM") -> Callable[..., Any]:
    """What makes a model of a class of `transformers`, of its own defaults but for the sizes and what is given."""

    def make_model(**changes: Any) -> Any:
        import transformers

        kind = {"Gemma3": "Gemma3Text"}.get(name, name)
        config = getattr(transformers, f"{kind}Config")(**{**sizes, **changes})
        return getattr(transformers, f"{name}{head}")(config)

    return make_model


_GPT2: dict[str, Any] = {"vocab_size": 131, "n_positions": 64, "n_embd": 24, "n_layer": 3, "n_head": 4}
_BLOOM = {"vocab_size": 131, "hidden_size": 24, "n_layer": 3, "n_head": 6}
_FALCON = {"vocab_size": 131, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 6}
_BERT = {key: value for key, value in _LLAMA.items() if "kv" not in key and "key_value" not in key}
_OPT = {"vocab_size": 131, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 40}
_ENDS = {"bos_token_id": 0, "eos_token_id": 0}

_gpt2 = _family("GPT2", {**_GPT2, **_ENDS}, "LMHeadModel")
_llama, _qwen2, _mistral = _family("Llama", _LLAMA), _family("Qwen2", _LLAMA), _family("Mistral", _LLAMA)
_qwen3 = _family("Qwen3", {**_LLAMA, "head_dim": 8})
_bloom = _family("Bloom", _BLOOM)
_phi3 = _family("Phi3", {**_LLAMA, "pad_token_id": 0})
_olmo2 = _family("Olmo2", {**_LLAMA, "num_key_value_heads": 6, "rope_parameters": {"rope_theta": 5e5}})
_gemma2 = _family("Gemma2", {**_LLAMA, "head_dim": 8, "query_pre_attn_scalar": 5, "sliding_window": 12})
_gemma3 = _family("Gemma3", {**_LLAMA, "num_hidden_layers": 7, "head_dim": 8, "sliding_window": 12})
_starcoder2 = _family("Starcoder2", {**_LLAMA, "rope_parameters": {"rope_theta": 1e6}})
_neox = _family("GPTNeoX", {**_BERT, "hidden_size": 32, "num_attention_heads": 4})
_gptj = _family("GPTJ", {**_GPT2, **_ENDS, "rotary_dim": 4})
_opt = _family("OPT", {**_OPT, "max_position_embeddings": 64, "word_embed_proj_dim": 24})
_falcon = _family("Falcon", {**_FALCON, "max_position_embeddings": 64})
_roberta = _family("Roberta", {**_BERT, "max_position_embeddings": 66, "type_vocab_size": 1}, "ForMaskedLM")
_berts = {head: _family("Bert", _BERT, head) for head in ("ForMaskedLM", "ForPreTraining")}
_modernbert = _family("ModernBert", {**_BERT, "num_hidden_layers": 5, "pad_token_id": 0}, "ForMaskedLM")


def _rope(kind: str, theta: float = 1e6, **settings: Any) -> dict[str, Any]:
    return {"rope_theta": theta, "rope_type": kind, "factor": 4.0, **settings}


MODELS: dict[str, Callable[[], Any]] = {
    "gpt2": _gpt2,
    "gpt2-untied-erf-narrow": lambda: _gpt2(tie_word_embeddings=False, activation_function="gelu", n_inner=40),
    "llama-gqa": _llama,
    "llama3-tied": lambda: _llama(tie_word_embeddings=True, rope_parameters={"rope_theta": 5e5, **LLAMA3}),
    "llama-biases-wide-heads": lambda: _llama(attention_bias=True, mlp_bias=True, head_dim=8, num_key_value_heads=6),
    "qwen2": _qwen2,
    "qwen3": lambda: _qwen3(tie_word_embeddings=True),
    "bloom": _bloom,
    "mistral": lambda: _mistral(sliding_window=None, head_dim=8, rope_parameters={"rope_theta": 1e6}),
    "phi3": lambda: _phi3(rms_norm_eps=1e-5, resid_pdrop=0.1, embd_pdrop=0.1),
    "mistral-window": lambda: _mistral(sliding_window=64, rms_norm_eps=1e-5),
}
# Each with the settings of its published models that change what is computed, shrunk.
FAMILIES: dict[str, Callable[[], Any]] = {
    "mistral-7b": lambda: _mistral(sliding_window=12, rms_norm_eps=1e-5),
    "phi3-mini": lambda: _phi3(num_key_value_heads=6, sliding_window=20),
    "phi4-mini": lambda: _phi3(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}),
    "phi3-mini-128k": lambda: _phi3(
        num_key_value_heads=6,
        max_position_embeddings=1024,
        original_max_position_embeddings=32,
        rope_scaling={"type": "longrope", "short_factor": [1.0, 1.1], "long_factor": [1.3, 4.0]},
    ),
    "phi3-medium-short": lambda: _phi3(
        max_position_embeddings=1024,
        original_max_position_embeddings=64,
        rope_scaling={"type": "longrope", "short_factor": [1.02, 1.1], "long_factor": [1.3, 4.0]},
    ),
    "phi4-mini-long": lambda: _phi3(
        hidden_size=48,
        max_position_embeddings=1024,
        original_max_position_embeddings=32,
        partial_rotary_factor=0.75,
        tie_word_embeddings=True,
        rope_scaling={"type": "longrope", "short_factor": [1.0, 1.5, 1.0], "long_factor": [1.0, 1.2, 7.0]},
    ),
    "llama-longrope": lambda: _llama(
        rope_parameters=_rope(
            "longrope",
            1e4,
            short_factor=[1, 1.1],
            long_factor=[1.3, 4.0],
            original_max_position_embeddings=40,
            attention_factor=1.25,
        )
    ),
    "llama-attention-bias": lambda: _llama(attention_bias=True),
    "llama-mlp-bias": lambda: _llama(mlp_bias=True),
    "llama-linear": lambda: _llama(rope_parameters=_rope("linear", 1e4)),
    "llama-dynamic": lambda: _llama(rope_parameters=_rope("dynamic", 1e4), max_position_embeddings=32),
    "qwen2-yarn": lambda: _qwen2(rope_parameters=_rope("yarn", original_max_position_embeddings=16)),
    "llama-yarn": lambda: _llama(
        rope_parameters=_rope(
            "yarn",
            1e4,
            original_max_position_embeddings=16,
            beta_fast=16,
            beta_slow=2,
            mscale=0.7,
            mscale_all_dim=0.9,
            truncate=False,
        )
    ),
    "qwen2-windows": lambda: _qwen2(use_sliding_window=True, sliding_window=12, max_window_layers=2),
    "olmo2": _olmo2,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gemma3-linear": lambda: _gemma3(
        rope_parameters={
            "full_attention": _rope("linear"),
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        layer_types=["full_attention", "sliding_attention", *["full_attention"] * 5],
    ),
    "starcoder2": lambda: _starcoder2(sliding_window=12),
    "pythia": _neox,
    "neox-sequential": lambda: _neox(use_parallel_residual=False, hidden_act="gelu_fast", rotary_pct=1.0),
    "gpt-j": _gptj,
    "opt": _opt,
    "opt-norm-last": lambda: _opt(do_layer_norm_before=False),
    "falcon-7b": _falcon,
    "falcon-40b": lambda: _falcon(new_decoder_architecture=True, num_kv_heads=2),
    "falcon-11b": lambda: _falcon(new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1),
    "falcon-rw-1b": lambda: _falcon(
        alibi=True, parallel_attn=False, multi_query=False, bias=True, num_attention_heads=12, hidden_size=48
    ),
    "falcon-sequential": lambda: _falcon(parallel_attn=False, multi_query=False, bias=True),
    "bert": _berts["ForMaskedLM"],
    "bert-pretraining": _berts["ForPreTraining"],
    "roberta": _roberta,
    "modernbert": lambda: _modernbert(local_attention=10),
}


def make(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The model, in evaluation mode, every parameter drawn from (name, order) alone."""
    model = {**MODELS, **FAMILIES}[name]().to(dtype).eval()
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            norm_weight = parameter.dim() == 1 and bool((parameter == 1).all())
            parameter.copy_(1 + noise if norm_weight else noise)
    return model


def make_bert(**changes: Any) -> Any:
    """A BERT with every parameter random, in evaluation mode."""
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"vocab_size": 131, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(**{**sizes, "intermediate_size": 40, "max_position_embeddings": 64, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)  # of the initial weights, under what is added
        model = BertForMaskedLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def parameter_pieces(model: torch.nn.Module) -> list[FlatShard]:
    return [FlatShard.of(spec_of(parameter), "param", parameter.data) for parameter in model.parameters()]


def loaded(checkpoint: Path) -> Transformer:
    """The model in a checkpoint."""
    with Checkpoint(checkpoint) as opened:
        config = model_config(ModelConfig, opened.meta, opened.directory)
    model = class_of(config)(config)
    load(checkpoint, parameter_pieces(model))
    return model


def our_logits(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    """``[b, s, v]``"""
    batch = {"tokens": tokens, "position_ids": torch.arange(tokens.shape[1]).expand_as(tokens)}
    with torch.no_grad():
        return model.eval().logits(batch)


def logits_of(model: Any, tokens: torch.Tensor, grad: bool = False) -> torch.Tensor:
    """``[b, s, v]`` of a model of ``transformers``."""
    with torch.set_grad_enabled(grad):
        out = model(tokens)
    logits: torch.Tensor = out.prediction_logits if "prediction_logits" in out else out.logits
    return logits


def their_logits(folder: Path, tokens: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The same of the model that ``transformers`` loads from a folder, computed in ``dtype``."""
    import transformers

    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    return logits_of(getattr(transformers, name).from_pretrained(folder, dtype=dtype).eval(), tokens)
