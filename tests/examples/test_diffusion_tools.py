"""tools/sample_images.py and tools/convert.py on a diffusion transformer, called as a user calls them."""

from __future__ import annotations

import math
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, SD3Transformer2DModel
from dit_checkpoints import configuration, write_checkpoint
from matplotlib import image
from safetensors.torch import save_file
from scripts_as_modules import load_script

from megatron_ds.checkpoint import Checkpoint
from megatron_ds.config import from_dict
from megatron_ds.config.diffusion import DiffusionRun
from megatron_ds.convert.dit_folder import global_shapes
from megatron_ds.convert.dit_tables import SD3
from megatron_ds.data.cli import guarded
from megatron_ds.train.launch import run_main

EXAMPLES = Path(__file__).parents[2] / "examples"


def tool(name: str, folder: str = "tools") -> Any:
    loaded = load_script(f"{folder}/{name}.py")
    return loaded


def sample(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["sample_images.py", *map(str, arguments)])
    return run_main(tool("sample_images").main)


def pretrain(monkeypatch: pytest.MonkeyPatch, *arguments: object, name: str = "digits") -> int:
    """examples/pretrain_dit.py with the demo's configuration, or another."""
    config = EXAMPLES / "configs" / "diffusion" / f"{name}.toml"
    monkeypatch.setattr("sys.argv", ["pretrain_dit.py", "--config", *map(str, (config, *arguments))])
    return run_main(tool("pretrain_dit", "examples").main)


def test_a_grid_has_a_row_for_each_class(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run", configuration())
    grid = tmp_path / "grid.png"
    common = (tmp_path / "run", "--steps", 2, "--device", "cpu")
    assert sample(monkeypatch, *common, "--output", grid, "--classes", 4, 5, 6, "--columns", 2) == 0
    assert image.imread(grid).shape[:2] == (3 * 50, 2 * 50)
    # The weights of the last step draw something else than their average.
    last = tmp_path / "last.png"
    assert (
        sample(monkeypatch, *common, "--output", last, "--classes", 4, 5, 6, "--columns", 2, "--weights", "last") == 0
    )
    assert last.read_bytes() != grid.read_bytes()


def test_a_grid_has_a_row_for_each_text(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = {"condition": "text", "num_classes": 1000, "text_size": 6, "text_tokens": 4, "pooled_size": 5}
    write_checkpoint(tmp_path / "run", configuration({"prediction": "flow", "schedule": "flow"}, **text))
    prompts, grid = tmp_path / "prompts.safetensors", tmp_path / "grid.png"
    save_file({"text": torch.randn(2, 3, 6), "pooled": torch.randn(2, 5)}, prompts)
    common = (tmp_path / "run", "--steps", 2, "--device", "cpu", "--output", grid, "--embeddings", prompts)
    assert sample(monkeypatch, *common, "--columns", 3, "--size", 8, 4) == 0
    assert image.imread(grid).shape[:2] == (2 * 50, 3 * 26)
    assert sample(monkeypatch, *common, "--classes", 3) == 2
    assert "an image is of a class or of a text; give one of them" in capsys.readouterr().err
    prompts.write_bytes(b"")
    assert sample(monkeypatch, *common) == 2
    assert f"--embeddings {prompts} cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--scheduler", "flow"), "no scheduler 'flow' for objective.schedule='linear'"),
        (("--tp", 2), "world_size=1 cannot be divided"),
        (("--classes", 1001), "class 1001 is none of the model's"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(
    arguments: tuple[Any, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_checkpoint(tmp_path / "run", configuration())
    assert sample(monkeypatch, tmp_path / "run", "--output", tmp_path / "x.png", "--device", "cpu", *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "x.png").exists()


def test_a_model_goes_to_diffusers_and_comes_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert = tool("convert")
    write_checkpoint(tmp_path / "run", configuration())
    convert.main(convert.ToDiffusers(tmp_path / "run", tmp_path / "pipeline", pipeline=True))
    assert "draw with a num_inference_steps that divides 1000: " in capsys.readouterr().out
    DiTTransformer2DModel.from_pretrained(tmp_path / "pipeline" / "transformer")
    convert.main(convert.ToDiffusers(tmp_path / "run", tmp_path / "alone"))
    convert.main(convert.FromDiffusers(tmp_path / "alone", tmp_path / "back"))
    assert (tmp_path / "back" / "step-00000000" / "manifest.json").exists()
    wrong = convert.ToDiffusers(tmp_path / "run", tmp_path / "x", vae=tmp_path)
    assert guarded(lambda: convert.main(wrong)) == 2
    assert "--vae does nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "world", "batch", "shown"),
    [
        ("digits", 8, 64, "layers 2 to 3 with head"),
        ("digits", 4096, 16384, "layers 2 to 3 with head"),
        ("dit-xl2-256", 8, 256, "parameters on this rank: 674,834,720"),
        ("dit-xl2-512", 1024, 16384, "layers 0 to 27 with embedding and head"),
        ("mmdit-8b", 256, 4096, "layers 19 to 37 with head"),
        ("mmdit-8b", 16384, 65536, "layers 19 to 37 with head"),
    ],
)
def test_every_configuration_is_laid_out_on_its_ranks_and_on_many(
    name: str, world: int, batch: int, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--world-size", str(world), "--rank", str(world - 1), "--train.global-batch", str(batch)]
    assert pretrain(monkeypatch, "--dry-run", *more, name=name) == 0
    said = capsys.readouterr().out
    assert f"mesh of {world} ranks: pp=" in said and shown in said and "activations on a GPU, estimated: " in said


def test_a_dry_run_says_which_layers_compute_in_fp8(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fp8 = ("--precision.fp8", "blockwise", "--precision.fp8-min-features", 1024)
    assert pretrain(monkeypatch, "--dry-run", *fp8, name="dit-xl2-256") == 0
    assert "FP8 (blockwise): 112 of 112 linear layers" in capsys.readouterr().out


def test_a_size_without_a_configuration_is_said() -> None:
    script = ["bash", str(EXAMPLES / "pretrain_dit_xl2.sh"), "--pixels", "300", "--dry-run"]
    ran = subprocess.run(script, capture_output=True, text=True, check=False)
    assert ran.returncode == 2 and ran.stderr == "error: --pixels 300 has no configuration; use 256 or 512\n"


def test_models_have_the_published_number_of_parameters() -> None:
    """DiT-XL/2's weights are published with the positions among them; the joint model is counted by `diffusers`."""
    found = {}
    for path in (EXAMPLES / "configs" / "diffusion").glob("*.toml"):
        config = from_dict(DiffusionRun, tomllib.loads(path.read_text()), path.stem)
        found[path.stem] = sum(math.prod(shape) for shape in global_shapes(config.model).values())
        assert path.stem == "digits" or f"{found[path.stem]:,}" in path.read_text()
        if path.stem == "mmdit-8b":
            settings = {k: v for k, v in SD3.to_config(config.model).items() if not k.startswith("_")}
    assert found.keys() == {"digits", "dit-xl2-256", "dit-xl2-512", "mmdit-8b"}
    assert found["dit-xl2-256"] == found["dit-xl2-512"] == 675_129_632 - 256 * 1152
    with torch.device("meta"):
        assert found["mmdit-8b"] == sum(p.numel() for p in SD3Transformer2DModel(**settings).parameters())


def test_a_resumed_run_ends_with_the_bits_of_one_that_was_not_stopped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights, AdamW's moments and the moving average; and what they mean cannot be changed."""
    small = [
        *("--model.num-layers", 2, "--model.hidden-size", 16, "--model.num-heads", 2, "--mesh.tp", 1, "--mesh.pp", 1),
        *(
            "--train.global-batch",
            8,
            "--train.micro-batch",
            4,
            "--optimizer.schedule",
            "constant",
            "--optimizer.min-lr",
            0,
        ),
        *("--optimizer.warmup-steps", 0, "--train.eval-every", 2, "--train.eval-batches", 1, "--threads", 1),
        *("--log.no-tensorboard", "--log.no-progress", "--device", "cpu"),
    ]
    once, twice = [*small, "--output", tmp_path / "once"], [*small, "--output", tmp_path / "twice"]
    assert pretrain(monkeypatch, *once, "--train.steps", 4) == 0
    assert pretrain(monkeypatch, *twice, "--train.steps", 2) == 0
    resumed = [*twice, "--train.steps", 4, "--checkpoint.resume"]
    assert pretrain(monkeypatch, *resumed, "--objective.prediction", "epsilon") == 2
    assert "of another model or seed (objective.prediction: 'v' -> 'epsilon')" in capsys.readouterr().err
    assert pretrain(monkeypatch, *resumed, "--objective.min-snr", 5) == 0  # how errors are weighted may
    assert pretrain(monkeypatch, *twice, "--train.steps", 2) == 2  # it would overwrite the run
    shutil.rmtree(tmp_path / "twice")
    assert pretrain(monkeypatch, *twice, "--train.steps", 2) == 0
    assert pretrain(monkeypatch, *resumed) == 0
    with Checkpoint(tmp_path / "once" / "checkpoints") as one, Checkpoint(tmp_path / "twice" / "checkpoints") as two:
        for kind in ("param", "ema", "exp_avg", "exp_avg_sq"):
            assert one.names(kind) == two.names(kind) and len(one.names(kind)) == 31
            assert all(torch.equal(one.read(name, kind), two.read(name, kind)) for name in one.names(kind))
        assert not torch.equal(one.read("final.weight", "ema"), one.read("final.weight"))
