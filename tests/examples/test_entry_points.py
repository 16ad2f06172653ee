"""What examples/pretrain_gpt.py and examples/demo.py promise, called as a user calls them but in this process."""

from __future__ import annotations

import re
import types
from pathlib import Path

import pytest
from scripts_as_modules import load_script

from megatron_ds.config import RunConfig, from_dict, load_toml, parse
from megatron_ds.config.diffusion import DiffusionRun
from megatron_ds.train.demonstration import mesh_for
from megatron_ds.train.launch import run_main

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
PAGES = ("README.md", "tools/benchmark/README.md")
CONFIGS = sorted((EXAMPLES / "configs").glob("*.toml"))


def module(name: str) -> types.ModuleType:
    loaded = load_script(f"examples/{name}.py")
    return loaded


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["pretrain_gpt.py", *arguments])
    return run_main(module("pretrain_gpt").main)


# The mesh and batch with which a model of each configuration would use a large cluster.
LARGE = {
    "gpt2-124m": ["--train.global-batch", "16384", "--train.micro-batch", "1"],
    "gpt2-345m": ["--train.global-batch", "4096", "--train.micro-batch", "1"],
    "llama-1.3b": ["--mesh.tp", "8", "--train.global-batch", "8192"],
    "llama3-8b": ["--mesh.tp", "8", "--mesh.pp", "4"],
    "gpt3-175b": [],
    "bloom-176b": ["--mesh.tp", "8", "--mesh.pp", "16", "--train.global-batch", "2048", "--pipeline.split", "cost"],
    "demo": ["--train.global-batch", "8192"],
    "bert-base": ["--train.global-batch", "32768", "--train.micro-batch", "2"],
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_dry_runs_from_one_replica_to_16384_ranks(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    mesh = load_toml(path).mesh
    replica = mesh.tp * mesh.pp
    monkeypatch.chdir(tmp_path)
    common = ["--config", str(path), "--dry-run"]
    large = LARGE[path.stem]
    if path.stem == "bloom-176b":  # its own split is for 12 stages
        text = re.sub(r"layers_per_stage = .*", "", path.read_text())
        (tmp_path / "bloom.toml").write_text(text)
        common_large = ["--config", str(tmp_path / "bloom.toml"), "--dry-run"]
    else:
        common_large = common
    # One replica alone has thousands of micro-batches a stage of the largest models: seconds of simulation.
    few = ["--train.global-batch", "64", "--train.micro-batch", "1"] if mesh.pp > 8 else []
    for arguments in (
        [*common, *few],
        [*common, *few, "--world-size", str(2 * replica), "--rank", str(2 * replica - 1)],
        [*common_large, "--world-size", "16384", "--rank", "9999", *large],
    ):
        assert call(monkeypatch, *arguments) == 0
        shown = capsys.readouterr().out
        rank = int(arguments[arguments.index("--rank") + 1]) if "--rank" in arguments else 0
        assert f"[{rank}]" in shown and f"\nrank {rank}: pp " in shown
        for kind in ("parameters", "gradients", "optimizer", "total"):
            size = re.search(rf"^  {kind} +([\d,]+) bytes", shown, re.MULTILINE)
            assert size is not None and int(size[1].replace(",", "")) > 0
        assert re.search(r"bubble \d+\.\d% of the time", shown)
    assert [p.name for p in tmp_path.iterdir() if p.name != "bloom.toml"] == []  # nothing is written


def test_the_dry_run_compares_layouts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--model.num-layers", "2", "--model.hidden-size", "64", "--model.num-heads", "4"]
    assert call(monkeypatch, *small, "--dry-run", "--layouts", "--world-size", "2", "--gpu-gb", "24") == 0
    shown = capsys.readouterr().out
    assert "of 24 GB" in shown and re.findall(r"^ +(\d) +(\d) +(\d)  .*\*", shown, re.MULTILINE) == [
        ("1", "1", "2"),
        ("1", "2", "1"),
        ("2", "1", "1"),
    ]


def test_help_names_what_is_not_a_setting_and_every_setting(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "--help") == 0
    shown = capsys.readouterr().out
    for option in ("--config FILE", "--print-config", "--dry-run", "--world-size N", "--rank R", "--layouts"):
        assert option in shown
    for option in ("--output", "--mesh.tp", "--pipeline.layers-per-stage", "--checkpoint.resume", "--timeout"):
        assert option in shown


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_print_config_is_a_file_that_means_the_same(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert call(monkeypatch, "--config", str(path), "--print-config", "--optimizer.lr", "0.125") == 0
    (tmp_path / "printed.toml").write_text(capsys.readouterr().out)
    again = load_toml(tmp_path / "printed.toml")
    assert again == parse(["--config", str(path), "--optimizer.lr", "0.125"])
    assert again.optimizer.lr == 0.125 and again.model == load_toml(path).model


@pytest.mark.parametrize(
    ("arguments", "size"),
    [
        (["--data.tokenizer", "bytes"], 257),
        (["--data.tokenizer", "bytes", "--model.vocab-size", "300"], 300),
        (["--data.tokenizer", "nowhere"], 50257),  # which the run itself refuses
    ],
)
def test_the_vocabulary_is_the_tokenizers_unless_it_is_given(
    arguments: list[str], size: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, *arguments, "--print-config") == 0
    assert f"\nvocab_size = {size}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "3"], "unknown option --rank"),
        (["--dry-run", "--rank"], "--rank needs a number, as in --rank 8"),
        (["--dry-run", "--rank", "-1"], "--rank needs a number"),
        (["--dry-run", "--rank", "1"], "--rank 1 is not a rank of --world-size 1; use 0 to 0"),
        (["--dry-run", "--mesh.tp", "2", "--world-size", "3"], "world_size=3 cannot be divided"),
    ],
)
def test_wrong_options_are_one_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, *arguments) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and message in err


def test_a_dry_run_without_a_world_size_is_of_the_meshs_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "--dry-run", "--mesh.tp", "2", "--mesh.pp", "3", "--mesh.dp", "4") == 0
    assert "mesh of 24 ranks: pp=3 x dp=4 x cp=1 x tp=2" in capsys.readouterr().out


# --- the demo ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpus", "ranks", "product"), [(0, 8, 4), (1, 1, 1), (2, 2, 2), (3, 2, 2), (5, 4, 4), (8, 8, 4), (16, 8, 4)]
)
def test_the_demo_takes_the_largest_mesh_that_fits_and_says_when_it_is_smaller(
    gpus: int, ranks: int, product: int, capsys: pytest.CaptureFixture[str]
) -> None:
    got, settings = mesh_for(gpus)
    options = dict(zip(settings[::2], settings[1::2]))
    assert got == ranks and int(options["--mesh.tp"]) * int(options["--mesh.pp"]) == product
    assert ranks % product == 0
    assert (f"{gpus} GPU(s), not 8: training on {ranks} rank(s)" in capsys.readouterr().out) == (0 < gpus < 8)


def test_the_demos_batch_divides_on_every_mesh_it_may_choose() -> None:
    config = load_toml(EXAMPLES / "configs" / "demo.toml")
    for gpus in range(10):
        ranks, settings = mesh_for(gpus)
        options = dict(zip(settings[::2], settings[1::2]))
        dp = ranks // (int(options["--mesh.tp"]) * int(options["--mesh.pp"]))
        portion = config.train.micro_batch * dp
        assert config.train.global_batch % portion == 0, f"{gpus} GPUs: {portion} does not divide the batch"


def test_every_path_that_the_readme_names_exists() -> None:
    text = "".join((ROOT / page).read_text() for page in PAGES)
    named = set(re.findall(r"(?:examples|tools|megatron_ds)/[\w./-]*\w", text))
    missing = [name for name in named if not (ROOT / name).exists() and "…" not in name]
    assert len(named) > 8 and not missing


def test_every_option_that_the_readme_names_exists() -> None:
    runs = [from_dict(run, {}, "test") for run in (RunConfig, DiffusionRun)]
    options = [
        option for page in PAGES for option in re.findall(r"--((?:[a-z]+)\.[a-z0-9-]+)", (ROOT / page).read_text())
    ]
    assert len(options) > 20
    for option in options:
        section, field = option.replace("-", "_").split(".")
        known = [set(getattr(type(getattr(run, section, None)), "model_fields", {})) for run in runs]
        assert any(names & {field, field.removeprefix("no_")} for names in known), option


def test_the_reading_path_is_as_short_as_the_readme_says() -> None:
    said = re.search(r"12 files and 2,500 lines: (.*?)\.\n", (ROOT / "README.md").read_text(), re.DOTALL)
    assert said is not None
    files = [ROOT / "megatron_ds" / name for name in re.findall(r"`([\w/]+\.py)`", said[1])]
    assert len(files) == 12
    assert sum(len(file.read_text().splitlines()) for file in files) <= 2500
