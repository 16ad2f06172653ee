"""What a model's folder holds besides weights goes through import, fine-tuning and export as it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hf_models import make

from megatron_ds.checkpoint import Checkpoint, FlatShard, save
from megatron_ds.convert.carried_files import keep_template, keep_tokenizer, take_along
from megatron_ds.convert.hugging_face import export_hf, import_hf
from megatron_ds.data.chat import ChatTemplate
from megatron_ds.data.tokenizers import ByteTokenizer, load_tokenizer
from megatron_ds.errors import CheckpointError

EOS = [128, 129, 130]
FILES = {
    "generation_config.json": '{"eos_token_id": [128, 129, 130], "temperature": 0.6,\n "do_sample": true}',
    "special_tokens_map.json": '{"eos_token": "<|endoftext|>"}',
    "tokenizer_config.json": '{"eos_token": "<|endoftext|>", "chat_template": "{{ messages }}", "more": 1}',
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tools.jinja": "{{ tools }}",
    "LICENSE": "Own licence",
    "USE_POLICY.md": "Be kind",
    "README.md": "---\nlicense: own\n---\n# A card",
    "results.yaml": "a: 1",
    "picture.png": "a picture of the card",
}
NOT_TAKEN = {"modeling.py": "import os", ".gitattributes": "x", "notes.pt": "x", "original/params.json": "{}"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "hf"
    make("llama-gqa").save_pretrained(folder)
    ByteTokenizer().save_hf(folder)
    for name, text in {**FILES, **NOT_TAKEN}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    config = json.loads((folder / "config.json").read_text())
    config |= {"eos_token_id": EOS, "pad_token_id": 5, "temperature": 0.6, "architectures": None}
    del config["bos_token_id"]  # then it is the class's default: 1
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def fine_tuned(start: Path, checkpoints: Path, length: int = 8, **model: Any) -> Path:
    """A later checkpoint as a run that starts from ``start`` saves it; with other settings of the model, if told."""
    with Checkpoint(start) as source:
        settings = {"model": {**source.meta["config"]["model"], **model}, "train": {"sequence_length": length}}
        meta = {"config": settings, "step": 3}
        flat_shards = [FlatShard.whole(name, "param", source.read(name)) for name in source.names()]
    save(checkpoints, 3, flat_shards, meta)
    take_along(start, checkpoints)
    return checkpoints


@pytest.mark.parametrize("tokenizer", [None, "the same", "the same, with a token of its settings"])
def test_import_training_and_export_change_none_of_it(folder: Path, tmp_path: Path, tokenizer: str | None) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    if tokenizer is not None and tokenizer != "the same":
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "extra_special_tokens": ["<|image|>"]}))
    said: list[str] = []
    import_hf(folder, tmp_path / "ours", warn=said.append)
    assert said == [f"{folder}: not taken along: modeling.py, notes.pt, original/"]
    run = fine_tuned(tmp_path / "ours", tmp_path / "run")
    given = None if tokenizer is None else load_tokenizer(str(tmp_path / "ours" / "tokenizer"))
    export_hf(run, tmp_path / "back", tokenizer=given)
    for name in (*FILES, "tokenizer.json"):
        assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes(), name
    assert not [name for name in NOT_TAKEN if (tmp_path / "back" / name).exists()]
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["eos_token_id"], config["pad_token_id"], config["temperature"]) == (EOS, 5, 0.6)
    generation = GenerationConfig.from_pretrained(tmp_path / "back")
    assert generation.eos_token_id == EOS and generation.temperature == 0.6
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert model.config.bos_token_id == 1 and model.generation_config.eos_token_id == EOS
    assert AutoTokenizer.from_pretrained(tmp_path / "back").chat_template is not None


def test_another_tokenizer_replaces_the_old_one_and_its_ids_alone(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": {"type": "other"}}))
    for name, old in (("config.json", "mask_token_id"), ("generation_config.json", "suppress_tokens")):
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**settings, old: [7] if name.startswith("gen") else 7}))
    import_hf(folder, tmp_path / "ours")
    export_hf(tmp_path / "ours", tmp_path / "back", tokenizer=ByteTokenizer())
    generation = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": 256, "temperature": 0.6, "do_sample": True}
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["eos_token_id"], config["pad_token_id"], config["temperature"]) == (256, None, 0.6)
    assert "mask_token_id" not in config
    there = {path.name for path in (tmp_path / "back").iterdir()}
    assert {"LICENSE", "README.md"} <= there and not {"special_tokens_map.json", "chat_template.jinja"} & there


def test_a_grown_vocabulary_does_not_take_the_smaller_tokenizer(folder: Path, tmp_path: Path) -> None:
    import_hf(folder, tmp_path / "ours")
    run = fine_tuned(tmp_path / "ours", tmp_path / "run", vocab_size=140)
    notes: list[str] = []
    export_hf(run, tmp_path / "back", warn=notes.append)
    assert not (tmp_path / "back" / "tokenizer.json").exists() and (tmp_path / "back" / "LICENSE").exists()
    assert len(notes) == 1 and "140 tokens where the original's has 131: no tokenizer goes with the model" in notes[0]


def test_the_tokenizer_that_a_run_names_goes_with_it(folder: Path, tmp_path: Path) -> None:
    """From scratch, and in place of an imported model's, whose vocabulary grew; the same one stays as it came."""
    import_hf(folder, tmp_path / "ours")
    (tmp_path / "ours" / "tokenizer" / "chat_template.jinja").write_text("{{ mine }}")
    for same in (folder, tmp_path / "ours" / "tokenizer" / "tokenizer.json"):
        keep_tokenizer(str(same), load_tokenizer(str(same), fast=False), tmp_path / "ours", 131)
    assert (tmp_path / "ours" / "tokenizer" / "chat_template.jinja").read_text() == "{{ mine }}"
    said: list[str] = []
    bare = fine_tuned(tmp_path / "ours", tmp_path / "bare", vocab_size=140)
    for kept in ("tokenizer", "hf"):
        shutil.rmtree(bare / kept)
    export_hf(bare, tmp_path / "nothing", warn=said.append)
    assert len(said) == 1 and said[0].startswith("no tokenizer goes with the model")
    (tmp_path / "own").mkdir()
    other = json.loads((folder / "tokenizer.json").read_text())
    other["added_tokens"].append({**other["added_tokens"][0], "id": 257, "content": "<|im_end|>"})
    (tmp_path / "own" / "tokenizer.json").write_text(json.dumps(other))
    (tmp_path / "own" / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    grown = fine_tuned(tmp_path / "ours", tmp_path / "grown", vocab_size=140)
    for run in (bare, grown):
        keep_tokenizer(str(tmp_path / "own"), load_tokenizer(str(tmp_path / "own"), fast=False), run, 140)
        export_hf(run, tmp_path / run.name / "back", warn=said.append)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert (run / "back" / name).read_bytes() == (tmp_path / "own" / name).read_bytes()
        for name in ("config.json", "generation_config.json"):
            assert json.loads((run / "back" / name).read_text())["eos_token_id"] == 257
        assert not (run / "back" / "chat_template.jinja").exists()
    assert len(said) == 1 and (grown / "back" / "LICENSE").exists()
    keep_template(ChatTemplate("{{ own }}"), tmp_path / "ours")
    export_hf(tmp_path / "ours", tmp_path / "templated")
    assert (tmp_path / "templated" / "chat_template.jinja").read_text() == "{{ own }}"
    assert not (tmp_path / "templated" / "additional_chat_templates").exists()


@pytest.mark.parametrize(
    ("imported", "max_positions", "length", "exported"),
    [(True, 64, 48, 64), (True, 64, 96, 96), (False, 1024, 96, 96), (False, 1024, 4096, 4096), (False, 80, 48, 80)],
)
def test_the_context_of_rotary_positions_is_the_longest_sequence_trained_on(
    imported: bool, max_positions: int, length: int, exported: int, folder: Path, tmp_path: Path
) -> None:
    """1024 is the setting's default, of which a model from scratch knows nothing."""
    import_hf(folder, tmp_path / "ours")
    run = fine_tuned(tmp_path / "ours", tmp_path / "run", length, max_positions=max_positions)
    if not imported:
        shutil.rmtree(run / "hf")
    export_hf(run, tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["max_position_embeddings"] == exported


def test_a_folder_without_generation_settings_gets_those_of_its_configuration(folder: Path, tmp_path: Path) -> None:
    (folder / "generation_config.json").unlink()
    import_hf(folder, tmp_path / "ours")
    export_hf(tmp_path / "ours", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text()) == {
        "eos_token_id": EOS,
        "pad_token_id": 5,
    }


def test_what_cannot_be_taken_along_is_said(folder: Path, tmp_path: Path) -> None:
    import_hf(folder, tmp_path / "ours")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be copied to"):
        take_along(tmp_path / "ours", tmp_path / "file")
    (tmp_path / "ours" / "hf" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"hf/config\.json cannot be read"):
        export_hf(tmp_path / "ours", tmp_path / "back")
    assert not (tmp_path / "back").exists()
