"""Of every family: files of any dtype, in every form that they are published in; and what families are not there."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import FAMILIES, MODELS, make
from safetensors.torch import load_file, save_file

from megatron_ds.checkpoint import Checkpoint
from megatron_ds.config import ModelConfig
from megatron_ds.convert.architecture import Architecture
from megatron_ds.convert.hugging_face import export_hf, import_hf
from megatron_ds.convert.settings import Settings
from megatron_ds.convert.tables import ARCHITECTURES
from megatron_ds.errors import ConfigError

Tensors = Mapping[str, torch.Tensor]
WEIGHTS = ("model*.safetensors*", "pytorch_model*")


def one_file(folder: Path, tensors: Tensors) -> None:
    save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})


def one_pickle(folder: Path, tensors: Tensors) -> None:
    torch.save(dict(tensors), folder / "pytorch_model.bin")


def shards(folder: Path, tensors: Tensors, stem: str, ending: str, write: Callable[[Tensors, Path], None]) -> None:
    """Three, between which the tensors of a block are divided; no order is that of the model."""
    places = {name: f"{stem}-{1 + i % 3:05d}-of-00003.{ending}" for i, name in enumerate(sorted(tensors, reverse=True))}
    for file in set(places.values()):
        write({name: tensors[name] for name in tensors if places[name] == file}, folder / file)
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"weight_map": places}))


def safetensors_shards(folder: Path, tensors: Tensors) -> None:
    shards(folder, tensors, "model", "safetensors", lambda part, file: save_file(dict(part), file, {"format": "pt"}))


def pickled_shards(folder: Path, tensors: Tensors) -> None:
    shards(folder, tensors, "pytorch_model", "bin", lambda part, file: torch.save(dict(part), file))


def mixed(tensor: torch.Tensor) -> torch.Tensor:
    """Norms and biases in fp32, matrices in bf16."""
    return tensor if tensor.dim() == 1 else tensor.bfloat16()


FORMS = (one_file, safetensors_shards, one_pickle, pickled_shards)
CASTS: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    torch.Tensor.float,
    torch.Tensor.half,
    torch.Tensor.bfloat16,
    mixed,
)
# A model of every class.
ONE_EACH = {
    "GPT2LMHeadModel": "gpt2",
    "LlamaForCausalLM": "llama-gqa",
    "MistralForCausalLM": "mistral-7b",
    "Phi3ForCausalLM": "phi3-mini-128k",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Olmo2ForCausalLM": "olmo2",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "Starcoder2ForCausalLM": "starcoder2",
    "BloomForCausalLM": "bloom",
    "GPTNeoXForCausalLM": "pythia",
    "GPTJForCausalLM": "gpt-j",
    "OPTForCausalLM": "opt",
    "FalconForCausalLM": "falcon-40b",
    "BertForMaskedLM": "bert",
    "BertForPreTraining": "bert-pretraining",
    "RobertaForMaskedLM": "roberta",
    "ModernBertForMaskedLM": "modernbert",
}


def test_there_is_a_model_of_every_class() -> None:
    assert [architecture.name for architecture in ARCHITECTURES] == list(ONE_EACH)
    assert PUBLISHED.keys() == ONE_EACH.keys()
    assert set(ONE_EACH.values()) <= {*MODELS, *FAMILIES}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("name", ONE_EACH)
def test_files_of_any_dtype_and_sharding_are_the_same_model(tmp_path: Path, name: str) -> None:
    """Every form with another dtype in another class, so that each meets each; exported, every bit is as it was."""
    folder, turn = tmp_path / "hf", list(ONE_EACH).index(name)
    make(ONE_EACH[name]).save_pretrained(folder)
    published = load_file(folder / "model.safetensors")
    for number, form in enumerate(FORMS):
        cast = CASTS[(number + turn) % len(CASTS)]
        for pattern in WEIGHTS:
            for file in folder.glob(pattern):
                file.unlink()
        tensors = {key: cast(tensor) for key, tensor in published.items()}
        form(folder, tensors)
        ours, back = tmp_path / f"ours-{number}", tmp_path / f"back-{number}"
        notes: list[str] = []
        import_hf(folder, ours, warn=notes.append)
        assert [("weights_only" in note) for note in notes] == [True] * (form in (one_pickle, pickled_shards))
        with Checkpoint(ours) as checkpoint:
            found = {checkpoint.dtype(key) for key in checkpoint.names()}
            assert found == {tensor.dtype for tensor in tensors.values()}
        export_hf(ours, back)
        exported = load_file(back / "model.safetensors")
        assert exported.keys() == tensors.keys()
        assert all(exported[key].dtype == tensors[key].dtype for key in tensors)
        assert all(torch.equal(bits(exported[key]), bits(tensors[key])) for key in tensors)


# --- settings ---------------------------------------------------------------------------------------------------

# What the published files of each family hold besides sizes and what every file has.
PUBLISHED: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": {
        "n_ctx": 1024, "summary_type": "cls_index", "summary_use_proj": True, "summary_activation": None,
        "summary_first_dropout": 0.1, "summary_proj_to_labels": True, "resid_pdrop": 0.1, "embd_pdrop": 0.1,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}, "n_special": 0,
        "predict_special_tokens": True, "output_past": True, "pruned_heads": {}, "gradient_checkpointing": False,
        "reorder_and_upcast_attn": False, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
    },
    "LlamaForCausalLM": {
        "hidden_size": 24, "num_attention_heads": 6, "num_hidden_layers": 1, "intermediate_size": 40, "vocab_size": 9,
        "pretraining_tp": 1, "rope_scaling": None, "rope_theta": 10000.0, "rope_interleaved": False, "mlp_bias": False,
        "is_llama_config": True, "max_sequence_length": 2048, "attention_bias": False, "unsloth_version": "2024.9",
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    },
    "Qwen2ForCausalLM": {
        "hidden_size": 24, "num_attention_heads": 6, "num_hidden_layers": 1, "intermediate_size": 40, "vocab_size": 9,
        "sliding_window": 32768, "use_sliding_window": False, "max_window_layers": 21, "use_mrope": False,
    },
    "Qwen3ForCausalLM": {
        "hidden_size": 24, "num_attention_heads": 6, "num_hidden_layers": 2, "intermediate_size": 40, "vocab_size": 9,
        "attention_bias": False, "head_dim": 128, "max_window_layers": 36, "rope_scaling": None, "rope_theta": 1000000,
        "sliding_window": None, "use_sliding_window": False, "layer_types": ["full_attention"] * 2,
    },
    "MistralForCausalLM": {
        "hidden_size": 24, "num_attention_heads": 8, "num_hidden_layers": 1, "intermediate_size": 40, "vocab_size": 9,
        "sliding_window": None, "rope_theta": 1000000.0, "attention_dropout": 0.0, "head_dim": 128,
    },
    "Phi3ForCausalLM": {
        "hidden_size": 24, "num_attention_heads": 6, "num_hidden_layers": 1, "intermediate_size": 40, "vocab_size": 9,
        "attention_bias": False, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "original_max_position_embeddings": 16384,
        "max_position_embeddings": 16384, "rope_scaling": None, "sliding_window": None, "auto_map": {"a": "b"},
        "full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False,
    },
    "BloomForCausalLM": {
        "attention_softmax_in_fp32": True, "bias_dropout_fusion": True, "masked_softmax_fusion": True, "n_embed": 64,
        "n_inner": None, "num_attention_heads": 8, "offset_alibi": 100, "pretraining_tp": 1, "skip_bias_add": True,
        "skip_bias_add_qkv": False, "slow_but_exact": False, "seq_length": 2048, "unk_token_id": 0,
    },
    "Olmo2ForCausalLM": {
        "hidden_size": 24, "num_attention_heads": 6, "num_hidden_layers": 1, "intermediate_size": 40, "vocab_size": 9,
        "attention_bias": False, "num_key_value_heads": 6, "rope_theta": 500000, "rope_scaling": None,
        "rms_norm_eps": 1e-06,
    },
    "Gemma2ForCausalLM": {
        "hidden_size": 24, "num_attention_heads": 6, "num_hidden_layers": 2, "intermediate_size": 40, "vocab_size": 9,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "cache_implementation": "hybrid",
        "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256,
        "sliding_window": 4096, "rope_theta": 10000.0, "attention_bias": False, "head_dim": 8,
        "sliding_window_size": 4096,
    },
    "Gemma3ForCausalLM": {
        "hidden_size": 24, "num_attention_heads": 6, "num_hidden_layers": 2, "intermediate_size": 40, "vocab_size": 9,
        "attn_logit_softcapping": None, "final_logit_softcapping": None, "cache_implementation": "hybrid",
        "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256, "rope_local_base_freq": 10000,
        "rope_theta": 1000000, "rope_scaling": None, "sliding_window": 512, "sliding_window_pattern": 6,
    },
    "Starcoder2ForCausalLM": {
        "hidden_size": 24, "num_attention_heads": 6, "num_hidden_layers": 1, "intermediate_size": 40, "vocab_size": 9,
        "activation_function": "gelu_pytorch_tanh", "hidden_act": "gelu_pytorch_tanh", "mlp_type": "default",
        "norm_epsilon": 1e-05, "norm_type": "layer_norm", "rope_theta": 999999.4420358813, "sliding_window": 4096,
        "use_bias": True, "residual_dropout": 0.1, "embedding_dropout": 0.1, "layer_norm_epsilon": 1e-05,
        "scale_attention_softmax_in_fp32": True, "scale_attn_weights": True, "attention_softmax_in_fp32": True,
        "rms_norm_eps": 1e-05,
    },
    "GPTNeoXForCausalLM": {
        "hidden_size": 24, "num_attention_heads": 6, "num_hidden_layers": 1, "intermediate_size": 40, "vocab_size": 9,
        "custom_pipeline": {"a": 1}, "classifier_dropout": 0.1,
        "rotary_emb_base": 10000, "rotary_pct": 0.25, "use_parallel_residual": True,
        "layer_norm_eps": 1e-05, "hidden_act": "gelu_fast", "attention_dropout": 0.0, "rope_scaling": None,
    },
    "GPTJForCausalLM": {
        "n_embd": 24, "n_head": 6, "n_layer": 1, "rotary": True, "rotary_dim": 4, "scale_attn_weights": True,
        "summary_activation": None, "summary_first_dropout": 0.1, "tie_word_embeddings": False, "n_inner": None,
        "gradient_checkpointing": False, "task_specific_params": {"text-generation": {"do_sample": True}},
    },
    "OPTForCausalLM": {
        "hidden_size": 24, "num_attention_heads": 6, "activation_dropout": 0.0, "do_layer_norm_before": True,
        "layerdrop": 0.0, "_remove_final_layer_norm": False, "word_embed_proj_dim": 24, "enable_bias": True,
        "layer_norm_elementwise_affine": True, "prefix": "</s>", "init_std": 0.02,
    },
    "FalconForCausalLM": {
        "alibi": False, "apply_residual_connection_post_layernorm": False, "bias": False, "multi_query": True,
        "new_decoder_architecture": False, "parallel_attn": True, "hidden_size": 4544, "num_attention_heads": 71,
    },
    "RobertaForMaskedLM": {"type_vocab_size": 1, "max_position_embeddings": 514, "layer_norm_eps": 1e-05},
    "ModernBertForMaskedLM": {
        "attention_bias": False, "classifier_activation": "gelu", "classifier_bias": False, "classifier_dropout": 0.0,
        "classifier_pooling": "mean", "decoder_bias": True, "deterministic_flash_attn": False, "norm_bias": False,
        "global_attn_every_n_layers": 3, "global_rope_theta": 160000.0, "hidden_activation": "gelu", "mlp_dropout": 0.0,
        "initializer_cutoff_factor": 2.0, "layer_norm_eps": 1e-05, "local_attention": 128, "local_rope_theta": 10000.0,
        "num_hidden_layers": 22, "reference_compile": None, "repad_logits_with_grad": False,
        "sparse_pred_ignore_index": -100, "sparse_prediction": False, "gradient_checkpointing": False,
    },
    "BertForPreTraining": {"type_vocab_size": 2, "position_embedding_type": "absolute", "use_cache": True},
    "BertForMaskedLM": {
        "directionality": "bidi", "pooler_fc_size": 768, "pooler_num_attention_heads": 12, "pooler_num_fc_layers": 3,
        "pooler_size_per_head": 128, "pooler_type": "first_token_transform", "position_embedding_type": "absolute",
        "classifier_dropout": None, "gradient_checkpointing": False, "is_decoder": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_published_files_hold_is_known(name: str) -> None:
    [architecture] = [architecture for architecture in ARCHITECTURES if architecture.name == name]
    settings = Settings({**PUBLISHED[name], "_name_or_path": "x", "torch_dtype": "float16", "eos_token_id": [1, 2]})
    architecture.from_config(settings)
    settings.check_all_read(architecture.harmless)
    with pytest.raises(ConfigError, match=r"not known here.*: unheard_of=1\."):
        Settings({"unheard_of": 1}).check_all_read(architecture.harmless)


# What a file of any class says, where the class knows it.
SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: architecture.name)
def test_what_a_file_leaves_out_is_the_default_of_its_class(architecture: Architecture) -> None:
    """A model imported with another one would be another model, and its weights would fit all the same."""
    from transformers import AutoConfig

    every = AutoConfig.for_model(architecture.model_type).to_dict()
    sizes = {key: every[key] for key in SIZES if key in every}
    said, silent = (ModelConfig(**architecture.from_config(Settings(dict(c)))).resolved for c in (every, sizes))
    assert silent == said


# What files hold that `transformers` 4 wrote, of which 5 makes rope_parameters and layer_types.
_BLOCKS = {"hidden_size": 48, "intermediate_size": 40, "num_attention_heads": 6, "num_hidden_layers": 30}
_LISTS = {"short_factor": [1.0, 1.1, 1.2], "long_factor": [1.3, 4.0, 4.1]}
_LONGER = {
    "max_position_embeddings": 9000,
    "original_max_position_embeddings": 3000,
    "rope_scaling": {"type": "longrope", **_LISTS},
}
OLDER: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 64}),
    ("mistral", {"rope_theta": 1e6, "sliding_window": None}),
    ("gemma2", {"rope_theta": 5e5, "sliding_window": 7}),
    ("gemma3_text", {"sliding_window_pattern": 4, "sliding_window": 7, "rope_local_base_freq": 3e3}),
    ("gemma3_text", {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 3, "rope_theta": 1e6}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 7}),
    ("starcoder2", {"rope_theta": 1e5, "sliding_window": 7}),
    ("phi3", {"partial_rotary_factor": 0.75, **_LONGER}),
    ("gpt_neox", {"rotary_pct": 0.47, "rotary_emb_base": 5000}),
    ("gpt_neox", {"rotary_pct": 0.9}),
    ("modernbert", {"global_attn_every_n_layers": 4, "local_attention": 10}),
    ("modernbert", {"global_attn_every_n_layers": 2, "global_rope_theta": 5e4, "local_rope_theta": 2e3}),
]


@pytest.mark.parametrize(("model_type", "older"), OLDER, ids=str)
def test_older_settings_are_read_as_transformers_reads_them(model_type: str, older: dict[str, Any]) -> None:
    from transformers import AutoConfig

    [architecture] = [each for each in ARCHITECTURES if each.model_type == model_type]
    config = {"vocab_size": 131, "num_key_value_heads": 2, **_BLOCKS, **older}
    newer = AutoConfig.for_model(model_type, **copy.deepcopy(config)).to_dict()
    got, want = (ModelConfig(**architecture.from_config(Settings(each))).resolved for each in (config, newer))
    assert got == want


# --- what is not there ------------------------------------------------------------------------------------------

# The settings of a class of `transformers` by default, the class, the nearest of ours and what it lacks.
OTHERS = [
    ("Mixtral", "ForCausalLM", "MistralForCausalLM", "num_local_experts=8"),
    ("Qwen2Moe", "ForCausalLM", "Qwen2ForCausalLM", "moe_intermediate_size=1408"),
    ("Qwen3Moe", "ForCausalLM", "Qwen3ForCausalLM", "num_experts_per_tok=8"),
    ("DeepseekV2", "ForCausalLM", "LlamaForCausalLM", "kv_lora_rank=512"),
    ("DeepseekV3", "ForCausalLM", "Qwen3ForCausalLM", "q_lora_rank=1536"),
    ("GptOss", "ForCausalLM", "Gemma2ForCausalLM", "swiglu_limit=7.0"),
    ("Llama4Text", "ForCausalLM", "LlamaForCausalLM", "num_local_experts=16"),
    ("Gemma3nText", "ForCausalLM", "Gemma3ForCausalLM", "laurel_rank=64"),
    ("Gemma3", "ForConditionalGeneration", "Gemma3ForCausalLM", "vision_config="),
    ("Gemma", "ForCausalLM", "Gemma2ForCausalLM", "its settings are understood, but it is another class"),
    ("Olmo3", "ForCausalLM", "Olmo2ForCausalLM", "sliding_window=4096"),
    ("Mamba", "ForCausalLM", "LlamaForCausalLM", "state_size=16"),
    ("T5", "ForConditionalGeneration", "BertForPreTraining", "is_encoder_decoder=True"),
    ("Electra", "ForMaskedLM", "BertForMaskedLM", "embedding_size=128"),
    ("XLMRoberta", "ForMaskedLM", "RobertaForMaskedLM", "its settings are understood, but it is another class"),
    ("Qwen2", "ForSequenceClassification", "Qwen2ForCausalLM", "its settings are understood, but it is another class"),
]


@pytest.mark.parametrize(("family", "head", "nearest", "missing"), OTHERS)
def test_another_family_is_refused_by_what_the_nearest_lacks(
    tmp_path: Path, family: str, head: str, nearest: str, missing: str
) -> None:
    import transformers

    name = family.removesuffix("Text") + head
    config = {**getattr(transformers, f"{family}Config")().to_dict(), "architectures": [name]}
    (tmp_path / "config.json").write_text(json.dumps(config, default=str))
    one_file(tmp_path, {"a": torch.zeros(1)})
    with pytest.raises(ConfigError) as refused:
        import_hf(tmp_path, tmp_path / "ours")
    message = str(refused.value)
    assert message.startswith(f"architectures=['{name}'] (model_type='")
    _, _, said = message.partition(f"of config.json is not supported. The nearest is {nearest}, which is not enough: ")
    assert missing in said.partition(". Known: GPT2LMHeadModel, ")[0] and len(message) < 1500, message
