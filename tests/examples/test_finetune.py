"""The two fine-tuning examples: short, self-explaining, and at their end a folder that the library itself loads."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts_as_modules import load_script

from megatron_ds.testing import run_ranks
from megatron_ds.train.launch import RankInfo

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ("finetune_hf", "finetune_diffusers_unet")


def run(name: str, *arguments: str) -> None:
    """As a user calls it, on every rank of the job that there is."""
    module: Any = load_script(f"examples/{name}.py")
    sys.argv = [f"{name}.py", *arguments]
    assert module.main(RankInfo()) == 0


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_short_and_its_help_teaches(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 100
    before = sys.argv
    try:
        with pytest.raises(SystemExit) as left:
            run(name, "--help")
    finally:
        sys.argv = before
    assert not left.value.code
    shown = capsys.readouterr().out
    assert f"torchrun --nproc-per-node 2 examples/{name}.py" in shown and "--output" in shown and "--config" in shown


def test_a_language_model_is_fine_tuned_and_loads(tmp_path: Path) -> None:
    """From scratch at stage 3 on two ranks; then its folder is what one process goes on from, with a DeepSpeed JSON."""
    text = tmp_path / "text.txt"
    text.write_text("to be, or not to be, that is the question. " * 200)
    common = ("--text", str(text), "--steps", "4", "--sequence", "32", "--micro-batch", "2")
    run_ranks(run, 2, "finetune_hf", "--stage", "3", "--offload", "cpu", "--output", str(tmp_path / "a"), *common)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    tokens = torch.frombuffer(bytearray(text.read_bytes()[:32]), dtype=torch.uint8).long().unsqueeze(0)
    with torch.no_grad():
        assert model(input_ids=tokens, labels=tokens).loss < 5.5  # ln 256 = 5.55: it has learnt something


def test_a_unet_is_fine_tuned_and_loads(tmp_path: Path) -> None:
    config = tmp_path / "ds.json"
    config.write_text('{"zero_optimization": {"stage": 2}, "gradient_accumulation_steps": 2}')
    arguments = ("--steps", "6", "--batch", "32", "--config", str(config), "--output", str(tmp_path / "digits"))
    run_ranks(run, 2, "finetune_diffusers_unet", *arguments)
    from diffusers import UNet2DModel

    assert UNet2DModel.from_pretrained(tmp_path / "digits").config.sample_size == 8
