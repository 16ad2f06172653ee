"""A run that starts from a checkpoint trains that checkpoint's model: its settings hold, and what differs is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from started_ranks import arguments, pretrain_gpt, started

from megatron_ds.checkpoint import Checkpoint, read_meta
from megatron_ds.config import ModelConfig, load_toml
from megatron_ds.convert.hugging_face import import_hf
from megatron_ds.data.gpt_dataset import SyntheticDataset
from megatron_ds.models.gpt import GPT
from megatron_ds.models.transformer import StageSettings
from megatron_ds.train.launch import run_main

# As of a training run, but for the model: that is the checkpoint's.
RUN = [
    *("--train.sequence-length", "32", "--train.global-batch", "4", "--train.steps", "1", "--device", "cpu"),
    *("--threads", "1", "--data.synthetic", "--log.no-tensorboard", "--log.no-progress", "--precision.dtype", "fp64"),
]
Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """``run(*arguments)``: the exit code of examples/pretrain_gpt.py and what it printed."""

    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["pretrain_gpt.py", *RUN, *arguments])
        capfd.readouterr()
        code = run_main(pretrain_gpt().main)
        return code, "".join(capfd.readouterr())

    return call


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama 3.1 as `transformers` writes it (``hf``), and its import (``ours``)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = LlamaConfig(
        vocab_size=131, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5,
        rope_parameters={**scaling, "rope_theta": 5e5, "original_max_position_embeddings": 16},
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder / "hf")
    import_hf(folder / "hf", folder / "ours")
    return folder


def first_loss(output: Path) -> float:
    return float(json.loads((output / "metrics.jsonl").read_text().splitlines()[0])["loss"])


def test_the_first_loss_is_that_of_transformers_though_no_setting_of_the_model_is_given(
    llama: Path, tmp_path: Path, run: Run
) -> None:
    from transformers import AutoModelForCausalLM

    code, shown = run("--output", str(tmp_path / "run"), "--checkpoint.init-from", str(llama / "ours"))
    assert code == 0, shown
    batch = SyntheticDataset(131, 32, seed=1234).rows([0, 1, 2, 3])
    theirs = AutoModelForCausalLM.from_pretrained(llama / "hf", dtype=torch.float64)
    with torch.no_grad():
        logits = theirs(torch.from_numpy(batch["tokens"])).logits
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(batch["labels"]).flatten())
    assert first_loss(tmp_path / "run") == pytest.approx(float(want), abs=1e-6)
    model = read_meta(tmp_path / "run" / "checkpoints")["config"]["model"]
    assert model == read_meta(llama / "ours")["config"]["model"] and model["rope_theta"] == 5e5
    assert (tmp_path / "run" / "checkpoints" / "hf" / "generation_config.json").is_file()  # goes on to the export
    assert load_toml(llama / "ours" / "model.toml").model == ModelConfig(**model)


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("rope-theta", "10000", "model.rope_theta: 500000.0 -> 10000.0"),
        ("norm-eps", "1e-2", "model.norm_eps: 1e-05 -> 0.01"),
        ("activation", "geglu", "model.activation: 'swiglu' -> 'geglu'"),
        ("num-layers", "1", "model.num_layers: 2 -> 1"),
        ("kv-heads", "3", "model.kv_heads: 2 -> 3"),
        ("vocab-size", "130", "model.vocab_size: 131 -> 130 (it may only grow)"),
    ],
)
def test_a_setting_that_contradicts_the_checkpoint_is_refused(
    llama: Path, tmp_path: Path, run: Run, option: str, value: str, said: str
) -> None:
    output = tmp_path / "run"
    code, shown = run(
        "--output", str(output), "--checkpoint.init-from", str(llama / "ours"), f"--model.{option}", value
    )
    assert code == 2 and f"{said}. What is left out" in shown and not output.exists()
    # A file counts as the command line does.
    text = value if value[0].isdigit() else f'"{value}"'
    (tmp_path / "given.toml").write_text(f"[model]\n{option.replace('-', '_')} = {text}\n")
    code, shown = run(
        "--dry-run", "--config", str(tmp_path / "given.toml"), "--checkpoint.init-from", str(llama / "ours")
    )
    assert code == 2 and said in shown


def test_what_is_meant_is_done_and_said(llama: Path, tmp_path: Path, run: Run) -> None:
    """Dropout, longer sequences and a larger vocabulary, whose new rows are those of a new model."""
    output = tmp_path / "run"
    code, shown = run(
        *("--output", str(output), "--checkpoint.init-from", str(llama / "ours"), "--model.vocab-size", "250"),
        *("--model.vocab-multiple", "16", "--model.max-positions", "80", "--model.hidden-dropout", "0.1"),
        *("--train.sequence-length", "80", "--optimizer.lr", "1e-30", "--optimizer.weight-decay", "0"),
    )
    assert code == 0, shown
    assert "model.vocab_size: 131 -> 250 (rows of new tokens are as the initialiser gives them)\n" in shown
    assert "model.max_positions: 64 -> 80\n" in shown and "model.hidden_dropout: 0.0 -> 0.1\n" in shown
    with Checkpoint(output / "checkpoints") as now, Checkpoint(llama / "ours") as before:
        new = GPT(ModelConfig(**now.meta["config"]["model"]), StageSettings(dtype=torch.float64))
        new.initialize(1234)
        for name, initial in (("embedding.weight", new.embedding.weight), ("head.weight", new.head.weight)):
            rows = now.read(name)
            assert rows.shape == (256, 24) and torch.equal(rows[:131], before.read(name)[:131].double())
            assert initial is not None and torch.equal(rows[131:], initial[131:]) and rows[131:250].any(dim=1).all()
            assert not rows[250:].any()
        same = "layers.1.mlp.gate_up.weight"
        assert torch.equal(now.read(same), before.read(same).double())


def test_a_run_goes_on_when_what_it_started_from_is_gone(llama: Path, tmp_path: Path, run: Run) -> None:
    source = tmp_path / "gone"
    import_hf(llama / "hf", source)
    options = ["--output", str(tmp_path / "run"), "--checkpoint.init-from", str(source), "--checkpoint.resume"]
    assert run(*options)[0] == 0
    source.rename(tmp_path / "elsewhere")
    code, shown = run(*options, "--train.steps", "2")
    assert code == 0 and "resumed from step 1 of 2" in shown
    # Nor is it another run when its newest checkpoint can no longer say what model it is of.
    manifest = tmp_path / "run" / "checkpoints" / "step-00000002" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:100])
    code, shown = run(*options, "--train.steps", "2")
    assert code == 2 and f"{manifest} is damaged" in shown and "another model" not in shown
    code, shown = run(*options[:-1], "--train.steps", "2", "--checkpoint.resume-from", "last-good")
    assert code == 0 and "resumed from step 1 of 2" in shown


def test_new_rows_are_the_same_on_every_mesh_and_zero_stage(tmp_path: Path) -> None:
    """Learned positions and a tied embedding grow; the last run is ZeRO-3, its optimizer state on the host."""
    still = ["--optimizer.lr", "1e-30", "--optimizer.weight-decay", "0", "--train.steps", "1"]
    with started(tmp_path / "first", [arguments(tmp_path / "start", *still)]) as ranks:
        assert ranks.wait() == [0], ranks.everything()
    grown = ["--checkpoint.init-from", str(tmp_path / "start" / "checkpoints"), "--model.max-positions", "1030"]
    grown += ["--model.vocab-size", "90", "--seed", "7", *still]
    host = ["--zero.stage", "3", "--zero.persistence-threshold", "0", "--zero.offload-optimizer.device", "cpu"]
    for name, count, more in (("one", 1, []), ("four", 4, ["--mesh.tp", "2", "--mesh.pp", "2"]), ("two", 2, host)):
        with started(tmp_path / f"{name}-ranks", [arguments(tmp_path / name, *grown, *more)] * count) as ranks:
            assert ranks.wait() == [0] * count, ranks.everything()
    with Checkpoint(tmp_path / "one" / "checkpoints") as one, Checkpoint(tmp_path / "start" / "checkpoints") as start:
        whole = {name: one.read(name) for name in one.names()}
        assert torch.equal(whole["embedding.weight"][:61], start.read("embedding.weight")[:61])
        assert torch.equal(whole["position.weight"][:1024], start.read("position.weight"))
        assert whole["position.weight"].shape == (1030, 16) and whole["position.weight"][1024:].any(dim=1).all()
    for name in ("four", "two"):
        with Checkpoint(tmp_path / name / "checkpoints") as other:
            assert [n for n in whole if not torch.equal(whole[n], other.read(n))] == [], name
