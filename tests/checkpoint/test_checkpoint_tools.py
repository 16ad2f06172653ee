"""The command lines: what they print, and one clean line where the input is at fault."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from checkpoint_state import save_virtually
from hf_models import make
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Finished:
    returncode: int
    stdout: str
    stderr: str


Tool = Callable[..., Finished]


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tool:
    """Runs a tool as ``__main__`` with these arguments, in this process: importing torch again takes seconds."""

    def run(name: str, *arguments: object) -> Finished:
        path = ROOT / "tools" / name
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "160")
        capsys.readouterr()
        status = 0
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as stop:
            status = int(stop.code or 0)
        return Finished(status, *capsys.readouterr())

    return run


def test_convert_there_and_back(tmp_path: Path, tool: Tool) -> None:
    make("llama-gqa").save_pretrained(tmp_path / "hf")
    there = tool("convert.py", "from-hf", tmp_path / "hf", tmp_path / "ours", "--vocab-multiple", "8")
    assert there.returncode == 0, there.stderr
    assert there.stdout.strip() == str(tmp_path / "ours" / "step-00000000")
    assert "LlamaForCausalLM from hf: 100%" in there.stderr
    back = tool("convert.py", "to-hf", tmp_path / "ours", tmp_path / "back", "--tokenizer", "bytes")
    assert back.returncode == 0, back.stderr
    one, two = (load_file(tmp_path / folder / "model.safetensors") for folder in ("hf", "back"))
    assert one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)
    assert (tmp_path / "back" / "tokenizer.json").exists()
    again = tool("convert.py", "to-hf", tmp_path / "ours", tmp_path / "back")
    assert again.returncode == 2
    assert again.stderr.startswith(f"error: {tmp_path / 'back'} exists and is not an empty directory")


def test_inspect_lists_and_verifies(tmp_path: Path, tool: Tool) -> None:
    step = save_virtually(tmp_path, 5, tp=2, zero=2)
    shown = tool("inspect_checkpoint.py", tmp_path, "--kind", "exp_avg", "--meta")
    assert shown.returncode == 0, shown.stderr
    assert "step 5, saved by 4 ranks, 4 files" in shown.stdout
    assert "layers.*.attention.qkv.weight" in shown.stdout and "4 x 3 x 2 x 6" in shown.stdout
    assert '"consumed_samples": 40' in shown.stdout and "every checksum is right" in shown.stdout
    for rank in (1, 3):
        path = step / f"rank-0000{rank}.safetensors"
        data = bytearray(path.read_bytes())
        data[9] ^= 4
        path.write_bytes(data)
    damaged = tool("inspect_checkpoint.py", step)
    assert damaged.returncode == 2
    lines = damaged.stderr[damaged.stderr.index("error: ") :].splitlines()
    assert [Path(line.split(" is damaged")[0]).name for line in lines] == [
        "rank-00001.safetensors",
        "rank-00003.safetensors",
    ]
    missing = tool("inspect_checkpoint.py", tmp_path / "nowhere")
    assert missing.returncode == 2 and missing.stderr == f"error: {tmp_path / 'nowhere'} does not exist\n"
