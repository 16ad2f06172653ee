"""tools/sample_images.py and tools/convert.py on a diffusion transformer, called as a user calls them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiTTransformer2DModel
from dit_checkpoints import configuration, write_checkpoint
from matplotlib import image

from megatron_ds.data.cli import guarded
from megatron_ds.train.launch import run_main

TOOLS = Path(__file__).parents[2] / "tools"


def tool(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"{name}_tool", TOOLS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded  # dataclasses and tyro look their annotations up there
    spec.loader.exec_module(loaded)
    return loaded


def sample(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["sample_images.py", *map(str, arguments)])
    return run_main(tool("sample_images").main)


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
    DiTTransformer2DModel.from_pretrained(tmp_path / "pipeline" / "transformer")
    convert.main(convert.ToDiffusers(tmp_path / "run", tmp_path / "alone"))
    convert.main(convert.FromDiffusers(tmp_path / "alone", tmp_path / "back"))
    assert (tmp_path / "back" / "step-00000000" / "manifest.json").exists()
    wrong = convert.ToDiffusers(tmp_path / "run", tmp_path / "x", vae=tmp_path)
    assert guarded(lambda: convert.main(wrong)) == 2
    assert "--vae does nothing" in capsys.readouterr().err


def test_the_demos_configuration_is_laid_out_on_8_and_on_many_ranks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("pretrain_dit", TOOLS.parent / "examples" / "pretrain_dit.py")
    assert spec is not None and spec.loader is not None
    entry = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(entry)
    config = str(TOOLS.parent / "examples" / "configs" / "diffusion" / "digits.toml")
    for world, batch in ((8, 64), (4096, 16384)):
        more = ["--world-size", str(world), "--rank", str(world - 1), "--train.global-batch", str(batch)]
        monkeypatch.setattr("sys.argv", ["pretrain_dit.py", "--config", config, "--dry-run", *more])
        assert run_main(entry.main) == 0
        shown = capsys.readouterr().out
        assert f"mesh of {world} ranks: pp=2" in shown and "layers 2 to 3 with head" in shown
