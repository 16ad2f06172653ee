"""Which of a folder's files, tensors and settings are read: those that `transformers` reads, all of them, no others."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import LLAMA3, loaded, make, make_bert, our_logits, their_logits
from safetensors.torch import load_file, save_file

from megatron_ds.convert.folder import HFFolder
from megatron_ds.convert.hugging_face import export_hf, import_hf
from megatron_ds.errors import CheckpointError, ConfigError
from megatron_ds.inference.served_model import find

TOKENS = torch.randint(0, 131, (2, 24), generator=torch.Generator().manual_seed(0))
SHORT = {key: value for key, value in LLAMA3.items() if key != "original_max_position_embeddings"}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A Llama with tied embeddings."""
    make("llama3-tied").save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    make("llama-gqa").save_pretrained(tmp_path / "hf", max_shard_size="12KB")
    return tmp_path / "hf"


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Add tensors to a folder's one file, in order; None removes."""
    held = load_file(folder / SINGLE)
    kept = {name: tensor for name, tensor in {**held, **tensors}.items() if tensor is not None}
    save_file(kept, folder / SINGLE, {"format": "pt"})


def configure(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def check_equal(folder: Path, said: str = "") -> None:
    """The import computes what `transformers` computes of the folder, and so does its export; ``said`` is said."""
    notes: list[str] = []
    import_hf(folder, folder.parent / "ours", warn=notes.append)
    want = their_logits(folder, TOKENS, torch.float64)
    # Sines of rotary positions are fp32 in either, and differ in their last bits.
    bound = 1e-12 if "bert" in (folder / "config.json").read_text().lower() else 1e-5
    assert (our_logits(loaded(folder.parent / "ours").double(), TOKENS) - want).abs().max() < bound
    export_hf(folder.parent / "ours", folder.parent / "back")
    assert torch.equal(their_logits(folder.parent / "back", TOKENS, torch.float64), want)
    assert said in "\n".join(notes) and bool(notes) == bool(said), notes


# --- files ------------------------------------------------------------------------------------------------------


def test_a_stale_index_beside_a_newer_file_is_not_believed(sharded: Path, tmp_path: Path) -> None:
    make("qwen2").save_pretrained(tmp_path / "other")
    make("llama-gqa").save_pretrained(tmp_path / "new")
    tensors = load_file(tmp_path / "new" / SINGLE)
    save_file({name: tensor + 0.05 for name, tensor in tensors.items()}, sharded / SINGLE, {"format": "pt"})
    check_equal(sharded, "model.safetensors is read, as transformers does; model.safetensors.index.json beside it")
    with torch.no_grad():
        assert (our_logits(loaded(tmp_path / "ours"), TOKENS) - make("llama-gqa")(TOKENS).logits).abs().max() > 1e-2


def test_shards_and_index_that_disagree_are_one_error(sharded: Path, tmp_path: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    places = index["weight_map"]
    name, file = "model.norm.weight", places["model.norm.weight"]
    other = next(shard for shard in places.values() if shard != file)

    def refused(match: str) -> None:
        with pytest.raises(CheckpointError, match=match):
            import_hf(sharded, tmp_path / "ours")
        assert not (tmp_path / "ours").exists()

    (sharded / INDEX).write_text(json.dumps({"weight_map": {**places, name: other}}))
    refused(f"the index says that {name} is in {other}, but it is in {file}: index and shards are of different saves")
    (sharded / INDEX).write_text(json.dumps({"weight_map": {**places, "gone": other}}))
    refused(f"the index says that gone is in {other}, but it is in no file")
    (sharded / INDEX).write_text(json.dumps(index))
    held = load_file(sharded / other)
    save_file({**held, name: torch.ones(24)}, sharded / other, {"format": "pt"})
    refused(f"{name} is in .*only one of them can be meant")
    for text in ("[]", "{}", '{"weight_map": {"a": 1}}', "[" * 200_000):
        (sharded / INDEX).write_text(text)
        refused("index.json")
    (sharded / INDEX).unlink()
    refused("has model-00001-of-.* but no model.safetensors.index.json")


def test_nothing_outside_the_folder_is_read(sharded: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    make("llama-gqa").save_pretrained(secret)
    (secret / "tokenizer.json").write_text('{"secret": 1}')
    index = json.loads((sharded / INDEX).read_text())

    def refused() -> None:
        with pytest.raises(CheckpointError, match="leads out of the folder, and nothing outside it is read"):
            import_hf(sharded, tmp_path / "ours")
        assert not any(path.is_file() and "secret" in path.read_text() for path in tmp_path.glob("ours/*/*.json"))

    for outside in ("../secret/model.safetensors", str(secret / SINGLE), "shards/../../secret/model.safetensors"):
        (sharded / "shards").mkdir(exist_ok=True)
        (sharded / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(index["weight_map"], outside)}))
        refused()
    (sharded / INDEX).write_text(json.dumps(index))
    for name in (
        "tokenizer.json",
        "generation_config.json",
        "LICENSE",
        INDEX,
        index["weight_map"]["model.norm.weight"],
    ):
        kept = (sharded / name).read_bytes() if (sharded / name).exists() else None
        (sharded / name).unlink(missing_ok=True)
        (sharded / name).symlink_to(secret / "tokenizer.json")
        refused()
        (sharded / name).unlink()
        if kept is not None:
            (sharded / name).write_bytes(kept)
    import_hf(sharded, tmp_path / "ours")


def test_a_folder_that_is_a_link_to_itself_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(CheckpointError, match=r"loop/config\.json cannot be read: .* levels of symbolic links"):
        HFFolder(tmp_path / "loop")


def test_the_links_of_the_hubs_cache_are_followed(llama: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(llama.iterdir()):
        shutil.copyfile(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    import_hf(snapshot, tmp_path / "ours")
    assert (tmp_path / "ours" / "hf" / "generation_config.json").is_file()


@pytest.mark.parametrize("name", ["config.json", SINGLE, "tokenizer.json"])
def test_a_fifo_in_a_files_place_is_refused_at_once(llama: Path, tmp_path: Path, name: str) -> None:
    (llama / name).unlink(missing_ok=True)
    os.mkfifo(llama / name)
    with pytest.raises(CheckpointError, match=f"{name} cannot be read: .*FIFO"):
        import_hf(llama, tmp_path / "ours")


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
def test_pickled_weights_are_read_without_running_them(llama: Path, tmp_path: Path, legacy: bool) -> None:
    tensors = load_file(llama / SINGLE)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]  # as such files have it
    (llama / SINGLE).unlink()
    torch.save(tensors, llama / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    check_equal(llama, "the weights are pickled; torch reads them with weights_only, which runs no code of them")


def test_pickled_shards_are_read_by_their_index(llama: Path) -> None:
    tensors = load_file(llama / SINGLE)
    (llama / SINGLE).unlink()
    places = {name: f"pytorch_model-0000{1 + index % 2}-of-00002.bin" for index, name in enumerate(tensors)}
    for file in set(places.values()):
        torch.save({name: tensors[name] for name in tensors if places[name] == file}, llama / file)
    (llama / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    check_equal(llama, "the weights are pickled")


class Malicious:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda path: {"a": Malicious(path)}, "weights-only reader"),
        (lambda path: {"model": {"a": torch.zeros(1)}}, "names and dense tensors"),
        (lambda path: {"a": torch.zeros(2, 2).to_sparse()}, "names and dense tensors"),
        (lambda path: torch.zeros(1), "names and dense tensors"),
    ],
    ids=["code", "nested", "sparse", "bare"],
)
def test_a_pickle_that_is_no_state_runs_nothing(
    llama: Path, tmp_path: Path, state: Callable[[Path], Any], message: str
) -> None:
    (llama / SINGLE).unlink()
    torch.save(state(tmp_path / "ran"), llama / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=message):
        import_hf(llama, tmp_path / "ours")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "ours").exists()


def test_quantised_weights_are_refused_with_the_way_out(llama: Path, tmp_path: Path) -> None:
    def refused(match: str) -> None:
        with pytest.raises(CheckpointError, match=f"{match}.* quantised.*: dequantise first"):
            import_hf(llama, tmp_path / "ours")
        assert not (tmp_path / "ours").exists()

    name = "model.layers.0.mlp.down_proj.weight"
    weight = load_file(llama / SINGLE)[name]
    for dtype in (torch.float8_e4m3fn, torch.int8, torch.uint8):
        change(llama, **{name: weight.to(dtype)})
        refused(name)
    for quantization in ({"quant_method": "fp8", "weight_block_size": [128, 128]}, {"quant_method": "gptq", "bits": 4}):
        configure(llama, quantization_config=quantization)
        refused(f"|{quantization['quant_method']}")


def test_an_adapter_to_the_weights_is_not_passed_over(llama: Path, tmp_path: Path) -> None:
    (llama / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "somebody/llama"}')
    for lacking in ((), ("config.json", SINGLE)):
        for name in lacking:
            (llama / name).unlink()
        for read in (find, lambda path: import_hf(path, tmp_path / "ours")):
            with pytest.raises(CheckpointError, match=r"adapter_config.json.* is not read here: merge it"):
                read(llama)


def test_importing_twice_names_a_way_that_there_is(llama: Path, tmp_path: Path) -> None:
    import_hf(llama, tmp_path / "ours")
    with pytest.raises(CheckpointError) as caught:
        import_hf(llama, tmp_path / "ours")
    assert str(caught.value).endswith("step-00000000 exists already; import into another folder, or remove it first")


# --- tensors ----------------------------------------------------------------------------------------------------


def test_a_head_of_its_own_is_used_although_the_file_says_tied(llama: Path) -> None:
    change(llama, **{"lm_head.weight": torch.randn(131, 24, generator=torch.Generator().manual_seed(1))})
    check_equal(llama, "lm_head.weight differs from model.embed_tokens.weight: the model gets a head of its own")


def test_an_equal_head_and_a_head_alone_are_tied(llama: Path, tmp_path: Path) -> None:
    embedding = load_file(llama / SINGLE)["model.embed_tokens.weight"]
    change(llama, **{"lm_head.weight": embedding.clone()})
    check_equal(llama)
    shutil.rmtree(tmp_path / "ours")
    shutil.rmtree(tmp_path / "back")
    change(llama, **{"model.embed_tokens.weight": None})
    check_equal(llama)


@pytest.mark.parametrize(
    "name", ["cls.predictions.decoder.weight", "cls.predictions.decoder.bias", "cls.predictions.bias", "decoder"]
)
def test_a_berts_second_copies_are_what_transformers_takes_them_for(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "hf"
    make_bert().save_pretrained(folder)
    shapes = {"cls.predictions.decoder.weight": (131, 24), "cls.predictions.decoder.bias": (131,)}
    shapes = {key: shape for key, shape in shapes.items() if name in (key, "decoder") or key.startswith(name)}
    change(
        folder, **{key: torch.randn(shape, generator=torch.Generator().manual_seed(1)) for key, shape in shapes.items()}
    )
    check_equal(folder, "differs from" if shapes else "")


def test_berts_of_the_first_hour_are_read_and_what_is_left_out_is_said(tmp_path: Path) -> None:
    """As `bert-base-uncased` is published: gamma and beta, the pooler and the next-sentence head."""
    folder = tmp_path / "hf"
    make_bert().save_pretrained(folder)
    tensors = load_file(folder / SINGLE)
    old = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for n, t in tensors.items()
    }
    assert len(old.keys() - tensors.keys()) == 12
    extra = {"bert.pooler.dense.weight": torch.zeros(24, 24), "cls.seq_relationship.bias": torch.zeros(2)}
    save_file({**old, **extra}, folder / SINGLE, {"format": "pt"})
    check_equal(folder, "left out, for the model here has no use for them: bert.pooler.dense.weight, cls.seq_rel")


# --- settings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rotary_pct": 0.25}, "config.json has settings that are not known here.*: rotary_pct=0.25. If they change"),
        ({"logit_scale": 0.5, "use_cache": False}, "logit_scale=0.5. If"),
        ({"residual_multiplier": 0, "attention_multiplier": None}, "not known here.*: residual_multiplier=0. If"),
        ({"rope_parameters": {**LLAMA3, "attention_factor": 2.0}}, "rope_parameters in config.json has settings"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5 in rope"),
        ({"rope_scaling": {**LLAMA3, "factor": 2.0}}, "which differ; remove one of them"),
        ({"rope_parameters": SHORT}, "has rope_type='llama3' without original_max_position_embeddings, and what"),
        ({"hidden_size": None}, "config.json lacks hidden_size"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder=True in config.json is not supported, only False"),
        ({"tie_encoder_decoder": True}, "tie_encoder_decoder=True"),
    ],
)  # fmt: skip
def test_a_setting_that_is_not_understood_is_refused(
    llama: Path, tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    configure(llama, **values)
    with pytest.raises(ConfigError, match=message):
        import_hf(llama, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
