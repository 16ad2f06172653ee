"""Of every family: files of any dtype, in every form that they are published in; and what families are not there."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from hf_models import FAMILIES, MODELS, make
from safetensors.torch import load_file, save_file

from megatron_ds.checkpoint import Checkpoint
from megatron_ds.convert.tables import ARCHITECTURES, export_hf, import_hf
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
        import_hf(folder, ours, say=notes.append)
        assert [("weights_only" in note) for note in notes] == [True] * (form in (one_pickle, pickled_shards))
        with Checkpoint(ours) as checkpoint:
            found = {checkpoint.dtype(key) for key in checkpoint.names()}
            assert found == {tensor.dtype for tensor in tensors.values()}
        export_hf(ours, back)
        exported = load_file(back / "model.safetensors")
        assert exported.keys() == tensors.keys()
        assert all(exported[key].dtype == tensors[key].dtype for key in tensors)
        assert all(torch.equal(bits(exported[key]), bits(tensors[key])) for key in tensors)


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
    ("Granite", "ForCausalLM", "LlamaForCausalLM", "residual_multiplier=1.0"),
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
