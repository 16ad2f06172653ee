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


def _gpt2(**changes: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 131, "n_positions": 64, "n_embd": 24, "n_layer": 3, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, "bos_token_id": 0, "eos_token_id": 0, **changes}))


def _llama(**changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**{**_LLAMA, **changes}))


def _qwen2(**changes: Any) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**{**_LLAMA, **changes}))


def _qwen3(**changes: Any) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**{**_LLAMA, "head_dim": 8, **changes}))


def _bloom(**changes: Any) -> Any:
    from transformers import BloomConfig, BloomForCausalLM

    sizes = {"vocab_size": 131, "hidden_size": 24, "n_layer": 3, "n_head": 6}
    return BloomForCausalLM(BloomConfig(**{**sizes, **changes}))


def _mistral(**changes: Any) -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**{**_LLAMA, **changes}))


def _phi3(**changes: Any) -> Any:
    from transformers import Phi3Config, Phi3ForCausalLM

    return Phi3ForCausalLM(Phi3Config(**{**_LLAMA, "pad_token_id": 0, **changes}))


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
    "mistral-window": lambda: _mistral(sliding_window=64, rms_norm_eps=1e-5),
    "phi3": lambda: _phi3(rms_norm_eps=1e-5, resid_pdrop=0.1, embd_pdrop=0.1),
}


def make(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The model, in evaluation mode, every parameter drawn from (name, order) alone."""
    model = MODELS[name]().to(dtype).eval()
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            norm_weight = parameter.dim() == 1 and parameter.mean() > 0.5
            parameter.copy_(1 + noise if norm_weight else noise)
    return model


def make_bert(**changes: Any) -> Any:
    """A BERT with every parameter random, in evaluation mode."""
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"vocab_size": 131, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(**{**sizes, "intermediate_size": 40, "max_position_embeddings": 64, **changes})
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


def their_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """The same of the model that ``transformers`` loads from a folder."""
    import transformers

    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    with torch.no_grad():
        logits: torch.Tensor = (
            getattr(transformers, name).from_pretrained(folder, dtype=torch.float32).eval()(tokens).logits
        )
    return logits
