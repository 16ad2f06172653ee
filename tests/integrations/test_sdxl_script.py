"""examples/finetune_sdxl.py as a user calls it: SDXL's classes at a size for tests, photographs of scikit-learn."""

from __future__ import annotations

import shutil
import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from PIL import Image
from scripts_as_modules import load_script
from sdxl_tiny import save_pipeline

from megatron_ds.checkpoint.directory import steps_in
from megatron_ds.data.latent_writer import CacheSettings
from megatron_ds.errors import ConfigError, DataError, MegatronDSError
from megatron_ds.integrations.sdxl import latents, training
from megatron_ds.mesh import Mesh
from megatron_ds.testing import run_ranks
from megatron_ds.train.launch import RankInfo

EXAMPLES = Path(__file__).parents[2] / "examples"
STEPS = 3


def script() -> ModuleType:
    module = load_script("examples/finetune_sdxl.py")
    return module


def call(folder: Path, output: str, *arguments: str) -> None:
    common = ["--pretrained_model_name_or_path", str(folder / "base"), "--output_dir", str(folder / output)]
    common += ["--resolution", "16", "--train_batch_size", "2", "--gradient_accumulation_steps", "2", "--use_ema"]
    common += ["--learning_rate", "1e-3", "--adam_epsilon", "1e-6", "--checkpointing_steps", "1", "--log_every", "2"]
    common += ["--snr_gamma", "5", "--proportion_empty_prompts", "0.2", "--max_train_steps", str(STEPS)]
    if "--latents" not in arguments:
        common += ["--train_data_dir", str(folder / "photos")]
    with mock.patch.object(sys, "argv", ["finetune_sdxl.py", *common, *arguments]):
        assert script().main(RankInfo()) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline, and nine photographs with captions."""
    from sklearn.datasets import load_sample_image

    folder = tmp_path_factory.mktemp("sdxl")
    save_pipeline(folder / "base")
    (folder / "photos").mkdir()
    for number in range(9):
        name, word = ("china.jpg", "a temple") if number % 2 else ("flower.jpg", "a flower")
        top, left = 40 * number, 50 * number
        photo = load_sample_image(name)[top : top + 60, left : left + 40 + 5 * number]
        Image.fromarray(photo).save(folder / "photos" / f"{number}.png")
        (folder / "photos" / f"{number}.txt").write_text(word)
    return folder


class Terminated(training.MetricsFile):
    """Rank 0 gets SIGTERM in the first step."""

    def on_step(self, step: int, *arguments: Any) -> None:
        super().on_step(step, *arguments)
        if step == 1:
            signal.raise_signal(signal.SIGTERM)


def runs(folder: Path) -> None:
    call(folder, "whole", "--checkpoints_total_limit", "2", "--gradient_checkpointing", "--random_flip")
    resume = [
        "--resume_from_checkpoint",
        "latest",
        "--gradient_checkpointing",
        "--latents",
        str(folder / "whole/latents"),
    ]
    with mock.patch.object(training, "MetricsFile", Terminated):
        call(folder, "parts", *resume)
    assert [path.name for path in steps_in(folder / "parts" / "checkpoints")][-1] == "step-00000002"
    assert not (folder / "parts" / "model_index.json").exists()
    call(folder, "parts", *resume)


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    run_ranks(runs, 2, folder)
    return folder


def test_a_run_that_is_stopped_and_resumed_is_the_same_bit_for_bit(trained: Path) -> None:
    name = "unet/diffusion_pytorch_model.safetensors"
    whole, parts, base = (safetensors.torch.load_file(trained / run / name) for run in ("whole", "parts", "base"))
    assert all(torch.equal(value, parts[key]) for key, value in whole.items())
    assert sum(not torch.equal(value, base[key]) for key, value in whole.items()) > 0.9 * len(base)
    assert [path.name for path in steps_in(trained / "whole" / "checkpoints")] == ["step-00000002", "step-00000003"]
    assert (trained / "whole" / "metrics.jsonl").read_text().count("\n") == STEPS


def test_images_that_are_left_out_are_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos, whole = tmp_path / "photos", (folder / "photos" / "8.png").read_bytes()
    photos.mkdir()
    middle = len(whole) // 2
    damaged = whole[:middle] + bytes(200) + whole[middle + 200 :]
    for name, content in (("broken", damaged), ("good", whole), ("half", whole[:middle])):
        (photos / f"{name}.png").write_bytes(content)
        (photos / f"{name}.txt").write_text("a flower")
    base = folder / "base"
    settings = CacheSettings(16, 8, batch=1)
    cache = latents.write_latents(Mesh.single(), photos, base, base / "vae", settings, tmp_path / "latents")
    said = capsys.readouterr().out
    assert len(cache) == 1 and f"left out 1, which are no images, or cut off:\n  {photos}/half.png\n" in said
    assert f"left out 1, which cannot be decoded to their end:\n  {photos}/broken.png: " in said


def test_the_folder_is_a_pipeline_that_generates(trained: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(trained / "whole")
    images = pipe("a temple", num_inference_steps=2, height=16, width=16, output_type="np").images
    assert images.shape == (1, 16, 16, 3) and np.isfinite(images).all()
    assert pipe.scheduler.config.prediction_type == "epsilon"


def test_adapters_alone_are_trained_and_load(trained: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    call(trained, "lora", "--rank", "2", "--latents", str(trained / "whole/latents"), "--mixed_precision", "bf16")
    weights = safetensors.torch.load_file(trained / "lora" / "pytorch_lora_weights.safetensors")
    assert weights and all("lora" in name and value.dtype == torch.float32 for name, value in weights.items())
    assert max(float(value.abs().max()) for name, value in weights.items() if "lora_B" in name or "up" in name) > 0
    assert not (trained / "lora" / "unet").exists()
    pipe = StableDiffusionXLPipeline.from_pretrained(trained / "base")

    def image() -> Any:
        torch.manual_seed(0)
        return pipe("a flower", num_inference_steps=2, height=16, width=16, output_type="np").images

    before = image()
    pipe.load_lora_weights(trained / "lora")
    assert np.abs(image() - before).max() > 0


def test_an_update_too_small_for_bf16_is_in_the_folder(trained: Path) -> None:
    """AdamW's first update moves a weight by the learning rate at most, besides the decay."""
    small = ["--learning_rate", "1e-6", "--max_train_steps", "1", "--latents", str(trained / "whole/latents")]
    call(trained, "small", "--mixed_precision", "bf16", *small)
    name = "unet/diffusion_pytorch_model.safetensors"
    found, base = (safetensors.torch.load_file(trained / run / name) for run in ("small", "base"))
    moved = torch.cat([(found[key].double() - value.double()).abs().flatten() for key, value in base.items()])
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert moved.median() > 3e-7 and moved.max() < 1.2e-6


@pytest.mark.parametrize(
    ("output", "arguments", "error", "message"),
    [
        ("new", ["--resolution", "1020"], ConfigError, "use 1016 or 1024"),
        ("new", ["--proportion_empty_prompts", "1.5"], ConfigError, "use 0 to less than 1"),
        ("new", ["--checkpoints_total_limit", "0"], ConfigError, "use 1 or more"),
        ("new", ["--latents", "whole/latents", "--encode_batch_size", "4"], ConfigError, "nothing is encoded with"),
        ("whole", [], ConfigError, "--resume_from_checkpoint latest"),
        ("new", ["--train_data_dir", "uncaptioned"], DataError, "no captions"),
        ("new", ["--pretrained_model_name_or_path", "photos"], ConfigError, "no pipeline of diffusers"),
        ("whole", ["--resume_from_checkpoint", "latest", "--prediction_type", "v_prediction"], None, "epsilon there"),
        ("whole", ["--resume_from_checkpoint", "latest", "--rank", "2", "--random_flip"], None, "rank of LoRA: None"),
        ("whole", ["--resume_from_checkpoint", "latest", "--seed", "1", "--latents", "whole/latents"], None, "seed: 0"),
        ("whole", ["--resume_from_checkpoint", "latest"], DataError, "settings"),
        ("new", ["--latents", "whole/latents", "--pretrained_vae_model_name_or_path", "other"], DataError, "the VAE"),
        ("new", ["--latents", "whole/latents", "--resolution", "24"], DataError, "resolution=16, and 24 is asked for"),
        ("new", ["--latents", "whole/latents", "--center_crop"], DataError, "crop='random', and 'centre' is asked for"),
        ("new", ["--latents", "whole/latents", "--pretrained_model_name_or_path", "texts"], DataError, "two text enc"),
        ("new", ["--resume_from_checkpoint", "step-7"], None, "step-7"),
    ],
)
def test_what_is_wrong_is_said_before_training(
    trained: Path, output: str, arguments: list[str], error: type[Exception] | None, message: str
) -> None:
    (trained / "uncaptioned").mkdir(exist_ok=True)
    shutil.copy(trained / "photos" / "1.png", trained / "uncaptioned")
    if "other" in arguments and not (trained / "other").exists():
        shutil.copytree(trained / "base" / "vae", trained / "other")
        weights = safetensors.torch.load_file(trained / "other" / "diffusion_pytorch_model.safetensors")
        first = next(iter(weights))
        changed = {**weights, first: weights[first] + 1}
        safetensors.torch.save_file(changed, trained / "other" / "diffusion_pytorch_model.safetensors")
    if "texts" in arguments and not (trained / "texts").exists():
        shutil.copytree(trained / "base", trained / "texts")
        config = trained / "texts" / "tokenizer_2" / "tokenizer_config.json"
        config.write_text(config.read_text() + " ")
    known = {"uncaptioned", "photos", "whole/latents", "other", "texts"}
    arguments = [str(trained / argument) if argument in known else argument for argument in arguments]
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    with pytest.raises(error or MegatronDSError, match=message):
        call(trained, output, *arguments)
    after = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    assert all(after.get(path) == content for path, content in before.items()), "nothing is overwritten"


def test_the_dry_run_is_of_the_pipelines_own_unet(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(folder, "nothing", "--dry_run", "--rank", "4")
    shown = capsys.readouterr().out.splitlines()
    every, trained = (
        int(words.split()[-1].replace(",", "")) for words in shown[0].split(" of them")[0].split(" parameters")
    )
    assert 1e6 < every < 2e6 and trained < every / 20
    for number in range(1, 9):
        assert sum(line.startswith(f"{number} GPU") and line.count(",") >= 4 for line in shown) == 2
    assert not (folder / "nothing").exists() and not dist.is_initialized()
