"""A tiny Llama as a folder of Hugging Face, sharded and with a tokenizer, made without `transformers`."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
}


def weights() -> dict[str, torch.Tensor]:
    h, f, v, kv = 16, 24, 40, 8
    shapes = {"model.embed_tokens.weight": (v, h), "model.norm.weight": (h,), "lm_head.weight": (v, h)}
    for i in range(2):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}{name}.weight": (h,) for name in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{layer}self_attn.{n}_proj.weight": (h if n in "qo" else kv, h) for n in "qkvo"}
        shapes |= {f"{layer}mlp.{name}_proj.weight": (f, h) for name in ("gate", "up")}
        shapes[f"{layer}mlp.down_proj.weight"] = (h, f)
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write(folder: Path, shards: int = 3) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3], "temperature": 0.7}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "model_max_length": 64}))
    (folder / "README.md").write_text("a model card\n")
    tensors = list(weights().items())
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
        return folder
    places = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        own = dict(tensors[shard::shards])
        places |= dict.fromkeys(own, name)
        save_file(own, folder / name, {"format": "pt"})
    index = {"metadata": {"total_size": 4 * sum(t.numel() for _, t in tensors)}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return folder
