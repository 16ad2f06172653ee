"""To and from Hugging Face: every bit comes back, and what cannot be expressed is refused by name."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import LLAMA3, MODELS, make
from safetensors.torch import load_file, save_file

from megatron_ds.checkpoint import Checkpoint, FlatShard, read_meta, save
from megatron_ds.config import ModelConfig
from megatron_ds.convert.hugging_face import export_hf, import_hf
from megatron_ds.data.tokenizers import ByteTokenizer
from megatron_ds.errors import CheckpointError, ConfigError
from megatron_ds.models.families import global_shapes
from megatron_ds.testing import run_ranks


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found.update(load_file(file))
    return found


def differing(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> list[str]:
    names = sorted(one.keys() | two.keys())
    return [
        name
        for name in names
        if name not in one
        or name not in two
        or (one[name].dtype, one[name].shape) != (two[name].dtype, two[name].shape)
        or not torch.equal(one[name].view(torch.uint8), two[name].view(torch.uint8))
    ]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_import_then_export_is_bitwise(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    from transformers import AutoModelForCausalLM

    original = make(name, dtype)
    original.save_pretrained(tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "ours")
    export_hf(tmp_path / "ours", tmp_path / "back")
    assert differing(tensors_in(tmp_path / "hf"), tensors_in(tmp_path / "back")) == []
    original, again = (
        AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype="auto").eval() for folder in ("hf", "back")
    )
    assert type(again) is type(original) and again.dtype == dtype
    before, after = original.config.to_dict(), again.config.to_dict()
    # What is new in the second is what the first left to defaults; nothing they both say may differ, except names.
    cosmetic = {"_name_or_path", "architectures", "n_inner", "seq_length"}
    assert {key for key in before if before[key] != after.get(key)} <= cosmetic
    tokens = torch.arange(40).view(2, 20) * 3 % 131
    with torch.no_grad():
        assert torch.equal(original(tokens).logits, again(tokens).logits)


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
def test_export_then_import_is_bitwise(tmp_path: Path, name: str) -> None:
    make(name).save_pretrained(tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "one")
    export_hf(tmp_path / "one", tmp_path / "out")
    import_hf(tmp_path / "out", tmp_path / "two")
    with Checkpoint(tmp_path / "one") as one, Checkpoint(tmp_path / "two") as two:
        assert one.meta == two.meta and one.names() == two.names()
        assert differing({n: one.read(n) for n in one.names()}, {n: two.read(n) for n in two.names()}) == []


@pytest.mark.parametrize("name", MODELS)
def test_the_import_has_the_models_own_names_and_shapes(tmp_path: Path, name: str) -> None:
    make(name).save_pretrained(tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "ours")
    with Checkpoint(tmp_path / "ours") as checkpoint:
        config = ModelConfig(**checkpoint.meta["config"]["model"])
        assert {n: checkpoint.shape(n) for n in checkpoint.names()} == global_shapes(config)
        rows = checkpoint.read("embedding.weight")
        assert rows.shape[0] == 256 and not rows[131:].any() and rows[130].any()


def test_files_are_cut_and_indexed(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    original = make("llama-gqa")
    original.save_pretrained(tmp_path / "hf", max_shard_size="12KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 4
    import_hf(tmp_path / "hf", tmp_path / "ours", file_bytes=10_000)
    step = tmp_path / "ours" / "step-00000000"
    assert len(list(step.glob("rank-*.safetensors"))) > 4
    export_hf(tmp_path / "ours", tmp_path / "back", file_bytes=10_000)
    count = len(list((tmp_path / "back").glob("*.safetensors")))
    assert count > 4 and (tmp_path / "back" / f"model-00001-of-{count:05d}.safetensors").exists()
    assert differing(tensors_in(tmp_path / "hf"), tensors_in(tmp_path / "back")) == []
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_in(tmp_path / "back").values())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert differing(dict(original.state_dict()), dict(again.state_dict())) == []


def test_published_names_without_the_prefix_and_with_buffers(tmp_path: Path) -> None:
    """The `gpt2` on the hub: no `transformer.`, masks among the weights."""
    make("gpt2").save_pretrained(tmp_path / "hf")
    tensors = tensors_in(tmp_path / "hf")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    bare["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(bare, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    import_hf(tmp_path / "hf", tmp_path / "ours")
    export_hf(tmp_path / "ours", tmp_path / "back")
    assert differing(tensors, tensors_in(tmp_path / "back")) == []


def test_the_dtype_can_be_changed_on_the_way(tmp_path: Path) -> None:
    make("llama-gqa").save_pretrained(tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "ours", vocab_multiple=1)
    export_hf(tmp_path / "ours", tmp_path / "half", dtype=torch.bfloat16)
    want = {name: tensor.bfloat16() for name, tensor in tensors_in(tmp_path / "hf").items()}
    assert differing(want, tensors_in(tmp_path / "half")) == []
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    with Checkpoint(tmp_path / "ours") as checkpoint:
        assert checkpoint.shape("embedding.weight") == (131, 24)
    large = load_file(tmp_path / "hf" / "model.safetensors")
    large["model.norm.weight"][3] = -70_000.0
    save_file(large, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(ConfigError, match=r"final_norm\.weight has values up to 7e\+04, and float16 ends at 65504"):
        import_hf(tmp_path / "hf", tmp_path / "narrow", dtype=torch.float16)


def test_the_tokenizer_goes_with_the_model(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    make("gpt2").save_pretrained(tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "ours")
    export_hf(tmp_path / "ours", tmp_path / "back", tokenizer=ByteTokenizer())
    text = "the same text, äöü"
    assert AutoTokenizer.from_pretrained(tmp_path / "back")(text)["input_ids"] == list(text.encode())
    assert GenerationConfig.from_pretrained(tmp_path / "back").eos_token_id == 256
    assert json.loads((tmp_path / "back" / "config.json").read_text())["bos_token_id"] is None
    import_hf(tmp_path / "back", tmp_path / "again")
    copied = {path.name for path in (tmp_path / "again" / "tokenizer").iterdir()}
    assert copied == {"tokenizer.json", "tokenizer_config.json"}
    assert json.loads((tmp_path / "again" / "hf" / "config.json").read_text())["eos_token_id"] == 256


# --- streaming ------------------------------------------------------------------------------------------------

LIMIT = 150 << 20


def write_a_large_model(directory: str) -> int:
    """A Llama of 430 MB, in files of 20 MB, without ever holding it."""
    from megatron_ds.checkpoint.stream import StreamWriter, plan_bytes

    config = ModelConfig(
        num_layers=32, hidden_size=512, num_heads=8, ffn_hidden_size=1408, vocab_size=512, position="rope",
        norm="rmsnorm", activation="swiglu", bias=False,
    )  # fmt: skip
    plan = {name: (shape, torch.float32) for name, shape in global_shapes(config).items()}
    meta = {"config": {"model": config.model_dump(mode="json")}}
    with StreamWriter(Path(directory), 0, meta, plan, file_bytes=20_000_000) as writer:
        for index, name in enumerate(writer.order):
            writer.write(name, torch.full(plan[name][0], float(index)))
    return plan_bytes(plan)


def convert_with_little_memory(directory: str) -> tuple[int, list[str]]:
    """There and back while the process may hold at most LIMIT more of memory of its own (RLIMIT_DATA)."""
    folder = Path(directory)
    size = write_a_large_model(str(folder / "ours"))  # also warms up whatever the libraries allocate once
    status = Path("/proc/self/status").read_text()
    held = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (held + LIMIT, held + LIMIT))
    export_hf(folder / "ours", folder / "hf", file_bytes=20_000_000)
    import_hf(folder / "hf", folder / "back", file_bytes=20_000_000)
    with Checkpoint(folder / "ours") as one, Checkpoint(folder / "back") as two:
        return size, [name for name in one.names() if not torch.equal(one.read(name), two.read(name))]


def test_no_process_holds_the_whole_model(tmp_path: Path) -> None:
    [(size, wrong)] = run_ranks(convert_with_little_memory, 1, str(tmp_path))
    assert size > 2.5 * LIMIT and wrong == []


# --- refusals -------------------------------------------------------------------------------------------------


def tiny_checkpoint(directory: Path, **model: Any) -> Path:
    fields: dict[str, Any] = {"num_layers": 1, "hidden_size": 8, "num_heads": 2, "vocab_size": 10, "vocab_multiple": 2}
    config = ModelConfig(**{**fields, **model})
    flat_shards = [FlatShard.whole(name, "param", torch.zeros(shape)) for name, shape in global_shapes(config).items()]
    return save(directory, 1, flat_shards, {"config": {"model": config.model_dump(mode="json")}})


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"norm": "rmsnorm"}, r"GPT2LMHeadModel, needs model\.norm='layernorm' \(it is 'rmsnorm'\)"),
        ({"kv_heads": 1}, r"GPT2LMHeadModel, needs model\.kv_heads=2 \(it is 1\)"),
        ({"head_dim": 6}, r"needs model\.head_dim=4 \(it is 6\)"),
        ({"qkv_bias": False}, r"needs model\.qkv_bias=True \(it is False\)"),
        ({"logit_softcap": 30.0}, r"needs model\.logit_softcap=None \(it is 30\.0\)"),
        ({"window": 4}, r"needs model\.window=None \(it is 4\)"),
        ({"activation": "relu"}, r"GPT2LMHeadModel, needs model\.activation='gelu_tanh' \(it is 'relu'\)"),
        ({"position": "none"}, r"needs model\.position='learned' \(it is 'none'\)"),
        ({"position": "alibi"}, r"BloomForCausalLM, needs model\.embedding_norm=True"),
        (
            {"position": "rope", "norm": "rmsnorm", "activation": "swiglu", "bias": True, "qk_norm": True},
            r"LlamaForCausalLM, needs model\.qk_norm=False \(it is True\)",
        ),
        (
            {"position": "rope", "norm": "layernorm", "activation": "swiglu", "bias": False},
            r"LlamaForCausalLM, needs model\.norm='rmsnorm'",
        ),
    ],
)
def test_a_model_that_hugging_face_cannot_express(tmp_path: Path, model: dict[str, Any], message: str) -> None:
    tiny_checkpoint(tmp_path / "ours", **model)
    with pytest.raises(ConfigError, match=message):
        export_hf(tmp_path / "ours", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ("gpt2", {"activation_function": "relu"}, "'relu' in config.json is not supported; known: gelu_new"),
        ("llama-gqa", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        (
            "llama-gqa",
            {"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 16}},
            "has rope_type='longrope' without short_factor, long_factor, and what",
        ),
        ("llama-gqa", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "without original_max_position_emb"),
        (
            "llama-gqa",
            {"rope_parameters": {**LLAMA3, "mscale": 0.7}},
            r"rope_parameters .* not known here.*: mscale=0\.7",
        ),
        ("llama-gqa", {"rope_scaling": LLAMA3}, "and rope_parameters=.*, which differ; remove one of them"),
        ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'.* known: 'default', 'longrope'$"),
        (
            "llama-gqa",
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0}},
            "describes what cannot be computed: model.rope_scaling.original_max_position_embeddings=0 should be a pos",
        ),
        ("llama-gqa", {"rope_parameters": {**LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor=1.0 should be above"),
        ("phi3", {"embd_pdrop": 0.0}, "embd_pdrop=0.0"),
        (
            "qwen2",
            {"layer_types": ["sliding_attention"] * 3},
            "and use_sliding_window is false.*; one of them is wrong",
        ),
        ("gemma2", {"layer_types": ["full_attention"]}, "layer_types in config.json has 1 entries for 3 layers"),
        ("gemma2", {"layer_types": ["chunked_attention"] * 3}, "'chunked_attention', which is not supported; known"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        ("gemma2", {"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 in config.json should be 1 to 65536"),
        ("gemma2", {"hidden_size": "24"}, "config.json has a value of a wrong type or size"),
        ("falcon-7b", {"num_attention_heads": 0}, "describes a model that is not supported"),
        ("opt", {"word_embed_proj_dim": 12}, "word_embed_proj_dim=12 .* only hidden_size=24"),
        ("falcon-7b", {"parallel_attn": False, "new_decoder_architecture": True}, "no model that Falcon's own code"),
        ("falcon-7b", {"num_ln_in_parallel_attn": 2}, "no model that Falcon's own code can run"),
        ("modernbert", {"mlp_dropout": 0.1}, "mlp_dropout=0.1"),
        ("modernbert", {"classifier_bias": True}, "classifier_bias=True beside attention_bias=False"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm"),
        ("bloom", {"n_inner": 48}, "n_inner=48 in config.json is not supported, only 96"),
        ("bloom", {"slow_but_exact": True, "pretraining_tp": 2}, "slow_but_exact=True"),
        ("gpt2", {"architectures": "T5Model"}, "architectures='T5Model' of config.json is no list of classes"),
        ("llama-gqa", {"vocab_size": 0}, "vocab_size"),
    ],
)
def test_an_hf_model_that_we_cannot_express(tmp_path: Path, name: str, change: dict[str, Any], message: str) -> None:
    make(name).save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ConfigError, match=message):
        import_hf(tmp_path / "hf", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_an_hf_folder_that_is_not_what_it_says(tmp_path: Path) -> None:
    make("llama-gqa").save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    moved = tensors.pop("model.layers.1.mlp.up_proj.weight")
    tensors["model.layers.0.input_layernorm.weight"] = torch.zeros(5)
    save_file({**tensors, "model.layers.9.mlp.up_proj.weight": moved}, file, {"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        import_hf(tmp_path / "hf", tmp_path / "ours")
    assert str(caught.value).splitlines()[1:] == [
        "  missing: model.layers.1.mlp.up_proj.weight",
        "  unexpected: model.layers.9.mlp.up_proj.weight",
        "  of another shape than config.json says: model.layers.0.input_layernorm.weight: [5] instead of [24]",
    ]
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="cannot be read"):
        import_hf(tmp_path / "hf", tmp_path / "ours")
    file.unlink()
    (tmp_path / "hf" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin cannot be read by torch's weights-only reader"):
        import_hf(tmp_path / "hf", tmp_path / "ours")
    (tmp_path / "hf" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        import_hf(tmp_path / "hf", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_nothing_is_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_checkpoint(tmp_path / "ours")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="is not an empty directory"):
        export_hf(tmp_path / "ours", tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(ConfigError, match="is a folder that is there; give the name of one that is to be made"):
        export_hf(tmp_path / "ours", ".")
    make("gpt2").save_pretrained(tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "imported")
    with pytest.raises(CheckpointError, match="step-00000000 exists already"):
        import_hf(tmp_path / "hf", tmp_path / "imported")


def test_a_checkpoint_that_does_not_fit_its_own_configuration(tmp_path: Path) -> None:
    save(tmp_path / "none", 1, [FlatShard.whole("w", "param", torch.zeros(1))], {})
    with pytest.raises(CheckpointError, match=r"its meta has no config\.model"):
        export_hf(tmp_path / "none", tmp_path / "out")
    meta = read_meta(tiny_checkpoint(tmp_path / "ours"))
    save(tmp_path / "other", 1, [FlatShard.whole("embedding.weight", "param", torch.zeros(10, 9))], meta)
    with pytest.raises(CheckpointError, match=r"missing from the checkpoint: layers\.0\.att") as caught:
        export_hf(tmp_path / "other", tmp_path / "out")
    assert "embedding.weight: [10, 9] in the checkpoint, [10, 8] in the model" in str(caught.value)


def test_damage_found_half_way_leaves_no_output(tmp_path: Path) -> None:
    step = tiny_checkpoint(tmp_path / "ours")
    path = step / "rank-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="is damaged"):
        export_hf(tmp_path / "ours", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours"]


def test_both_spellings_of_rope_scaling_are_read(tmp_path: Path) -> None:
    """`transformers` 4 wrote rope_theta and rope_scaling, 5 writes rope_parameters."""
    make("llama3-tied").save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text())
    assert config.pop("rope_parameters")["rope_theta"] == 5e5
    path.write_text(json.dumps({**config, "rope_theta": 5e5, "rope_scaling": LLAMA3}))
    import_hf(tmp_path / "hf", tmp_path / "ours")
    model = read_meta(tmp_path / "ours")["config"]["model"]
    assert model["rope_theta"] == 5e5
    assert model["rope_scaling"] == {key: value for key, value in LLAMA3.items() if key != "rope_type"}


@pytest.mark.parametrize("kind", ["longrope", "su", "yarn"])
@pytest.mark.parametrize("context", [32, None])
def test_the_older_names_of_longrope_and_where_its_context_stands(
    tmp_path: Path, kind: str, context: int | None
) -> None:
    """Phi-3's: beside the scaling, where it is 4096 if nothing is said, whatever the scaling says."""
    make("phi3-mini-128k").save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"]
    lists = {"short_factor": [1.0, 1.1], "long_factor": [1.3, 4.0]}
    scaling = {"type": kind, "original_max_position_embeddings": 7, **lists}
    own = {"original_max_position_embeddings": context, "max_position_embeddings": 16384}
    path.write_text(json.dumps({**config, **own, "rope_scaling": scaling}))
    import_hf(tmp_path / "hf", tmp_path / "ours")
    found = read_meta(tmp_path / "ours")["config"]["model"]["rope_scaling"]
    trained = context or 4096
    assert found == {
        "rope_type": "longrope", "original_max_position_embeddings": trained, "factor": 16384 / trained, **lists
    }  # fmt: skip
