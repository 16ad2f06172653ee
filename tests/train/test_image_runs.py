"""Runs on images of files and on cached latents: the same on every mesh, resumed bitwise, and what is refused."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dit_rank import main
from scripts_as_modules import load_script
from small_images import write_captions, write_classes, write_text_encoder, write_vae
from started_ranks import started

from megatron_ds.checkpoint import Checkpoint
from megatron_ds.convert.dit_pipelines import export_pipeline
from megatron_ds.data import latent_encoders
from megatron_ds.data.image_source import open_images
from megatron_ds.data.image_transforms import Crop, load_pixels
from megatron_ds.data.latent_cache import LatentCache
from megatron_ds.data.latent_encoders import EncoderFolders, LatentDecoder
from megatron_ds.data.latent_writer import CacheSettings, CacheWriter
from megatron_ds.errors import ConfigError, DataError
from megatron_ds.files import read_json
from megatron_ds.train.launch import run_main
from megatron_ds.train.report import read_losses

SMALL = [
    *("--model.num-layers", "2", "--model.hidden-size", "16", "--model.num-heads", "2", "--model.num-classes", "2"),
    *("--model.zero-init-std", "0.02", "--train.global-batch", "4", "--train.micro-batch", "1", "--threads", "1"),
    *("--log.no-tensorboard", "--log.no-progress", "--device", "cpu", "--precision.dtype", "fp64"),
    *("--optimizer.schedule", "constant", "--optimizer.min-lr", "0", "--optimizer.warmup-steps", "0"),
]
PIXELS = [
    *("--model.image-size", "32", "--model.channels", "3", "--model.patch-size", "8", "--data.max-ratio", "2"),
    *("--data.bucket-step", "8", "--data.bucket-batch", "2", "--data.crop", "random", "--data.flip"),
    *("--data.valid", "2", "--data.workers", "1", "--train.eval-every", "2", "--train.eval-batches", "1"),
]
LATENTS = [
    *("--data.source", "latents", "--model.image-size", "16", "--model.channels", "4", "--model.patch-size", "4"),
    *("--data.bucket-batch", "2", "--data.valid", "0", "--model.num-classes", "1000"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten images in two classes and three buckets, a VAE, and their latents."""
    root = tmp_path_factory.mktemp("runs")
    write_classes(root / "classes")
    write_vae(root / "vae")
    write_cache(root, "cache")
    return root


def write_cache(root: Path, name: str, vae: str = "vae", **change: Any) -> None:
    source = open_images(root / "classes")
    settings = dataclasses.replace(CacheSettings(64, 16, 2.0, batch=2), **change)
    writer = CacheWriter(source, EncoderFolders(root / vae), settings, root / name)
    writer.begin()
    writer.write(0, 1, torch.device("cpu"))


def train(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["pretrain_dit.py", *map(str, arguments)])
    return run_main(main)


def weights(output: Path) -> dict[str, torch.Tensor]:
    with Checkpoint(output / "checkpoints") as saved:
        return {name: saved.read(name) for name in saved.names("param")}


def folder_run(root: Path, output: Path) -> list[str]:
    return [*SMALL, *PIXELS, "--data.source", "folder", "--data.path", str(root / "classes"), "--output", str(output)]


@pytest.fixture(scope="module")
def once(root: Path) -> Path:
    """Five steps of 4: epochs have 8 images and end in the middle of the run."""
    with pytest.MonkeyPatch.context() as patch:
        assert train(patch, *folder_run(root, root / "once"), "--train.steps", 5) == 0
    return root / "once"


def test_a_run_that_stops_within_an_epoch_ends_with_the_same_bits(
    root: Path, once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    twice = folder_run(root, tmp_path / "twice")
    assert train(monkeypatch, *twice, "--train.steps", 3) == 0
    said = capsys.readouterr().out
    assert "images in 3 buckets (height x width)" in said and "have fewer than 2 images" not in said
    assert train(monkeypatch, *twice, "--train.steps", 5, "--checkpoint.resume", "--data.bucket-batch", 1) == 2
    assert "bucket_batch: 2 -> 1" in capsys.readouterr().err
    assert train(monkeypatch, *twice, "--train.steps", 5, "--checkpoint.resume") == 0
    assert read_losses(tmp_path / "twice") == read_losses(once)
    one, two = weights(once), weights(tmp_path / "twice")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_four_ranks_see_what_one_sees(root: Path, once: Path, tmp_path: Path) -> None:
    meshed = [*folder_run(root, tmp_path / "many"), "--train.steps", "5", "--mesh.pp", "2"]
    with started(tmp_path / "ranks", [meshed] * 4, main=main) as ranks:
        assert ranks.wait(120) == [0] * 4, ranks.everything()
    one, many = read_losses(once), read_losses(tmp_path / "many")
    assert len(one) == 5 and many == pytest.approx(one, rel=1e-9)
    for name, weight in weights(once).items():
        torch.testing.assert_close(weights(tmp_path / "many")[name], weight, rtol=1e-7, atol=1e-9)


def test_latents_of_another_scale_are_refused_on_resuming_and_on_drawing(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = [*SMALL, *LATENTS, "--output", tmp_path / "run", "--train.steps", 2]
    assert train(monkeypatch, *run, "--data.path", root / "cache") == 0
    write_vae(root / "other-vae", scale=0.5, shift=None)
    write_cache(root, "other", "other-vae")
    capsys.readouterr()
    resumed = [*run, "--checkpoint.resume", "--data.changed", "accept"]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert train(monkeypatch, *resumed, "--data.path", root / "other") == 2
    error = capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert "was trained on latents of scale 0.25, shift 0.5" in error and "has latents of scale 0.5" in error

    tool = load_script("tools/sample_images.py")

    def sample(*arguments: object) -> int:
        common = [tmp_path / "run" / "checkpoints", "--steps", 1, "--columns", 1, "--classes", 0, "--device", "cpu"]
        monkeypatch.setattr("sys.argv", ["x", *map(str, (*common, "--output", tmp_path / "x.png", *arguments))])
        return run_main(tool.main)

    assert (
        sample() == 2
        and "trained on latents of an AutoencoderKL; give its folder with --vae" in capsys.readouterr().err
    )
    assert sample("--vae", root / "other-vae") == 2
    assert "its configuration (its scaling_factor?) differ" in capsys.readouterr().err
    write_vae(tmp_path / "third-vae", seed=5)
    assert sample("--vae", tmp_path / "third-vae") == 2 and "its weights differ" in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()
    assert sample("--vae", root / "vae") == 0 and (tmp_path / "x.png").exists()
    with pytest.raises(ConfigError, match=r"latents are shifted by 0.5, which DiTPipeline does not undo"):
        export_pipeline(tmp_path / "run" / "checkpoints", tmp_path / "pipeline", EncoderFolders(root / "vae"))
    run = [*SMALL, *LATENTS, "--output", tmp_path / "unshifted", "--train.steps", 1]
    capsys.readouterr()
    started_from = ["--checkpoint.init-from", tmp_path / "run" / "checkpoints"]
    assert train(monkeypatch, *run, "--data.path", root / "other", *started_from) == 0
    assert "warning: they were trained on latents of scale 0.25, shift 0.5, " in capsys.readouterr().out
    checkpoints, exported = tmp_path / "unshifted" / "checkpoints", tmp_path / "pipeline"
    for vae, problem in ((root / "vae", "configuration .its scaling_factor"), (None, "give its folder with --vae")):
        with pytest.raises(DataError, match=problem):
            export_pipeline(checkpoints, exported, EncoderFolders(vae))
    export_pipeline(checkpoints, exported, EncoderFolders(root / "other-vae"))
    assert read_json(exported / "vae" / "config.json")["scaling_factor"] == 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--objective.prediction", "v"], "of another model or seed (objective.prediction: 'epsilon' -> 'v')"),
        (["--data.path", "three"], "has class 2, and model.num_classes=2 are numbered 0 to 1"),
        (["--data.path", "one"], "are of one class"),
        (["--data.path", "broken"], "1 of 10 images cannot be decoded: "),
    ],
)
def test_a_run_that_is_refused_overwrites_nothing(
    change: list[str],
    message: str,
    root: Path,
    once: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(root / "classes" / "china", tmp_path / "one" / "china")
    for name in ("three", "broken"):
        shutil.copytree(root / "classes", tmp_path / name)
    shutil.copytree(root / "classes" / "china", tmp_path / "three" / "temple")
    (tmp_path / "broken" / "china" / "0.png").write_text("no image")
    change = [str(tmp_path / word) if (tmp_path / word).exists() else word for word in change]
    before = {path: path.read_bytes() for path in once.rglob("*") if path.is_file()}
    run = [*folder_run(root, once), "--train.steps", 7, "--checkpoint.resume", "--data.changed", "accept"]
    assert train(monkeypatch, *run, *change) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1, error
    assert {path: path.read_bytes() for path in once.rglob("*") if path.is_file()} == before


def test_weights_are_not_trained_for_another_objective(
    root: Path, once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a new run's settings leave out is the checkpoint's, as for the model; what they contradict is refused."""
    new = [*folder_run(root, tmp_path / "new"), "--train.steps", 1, "--checkpoint.init-from", once / "checkpoints"]
    assert train(monkeypatch, *new, "--objective.prediction", "v") == 2
    assert "objective.prediction: 'epsilon' -> 'v'. What is left out is taken" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    flow = [*folder_run(root, tmp_path / "flow"), "--train.steps", 1, "--objective.prediction", "flow"]
    assert train(monkeypatch, *flow, "--objective.schedule", "flow") == 0
    new[-1] = tmp_path / "flow" / "checkpoints"
    assert train(monkeypatch, *new) == 0
    with Checkpoint(tmp_path / "new" / "checkpoints") as now:
        assert [now.meta["config"]["objective"][name] for name in ("prediction", "schedule")] == ["flow", "flow"]


def test_what_is_trained_on_is_decoded_as_it_was_encoded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale, or a shift, on one side only is noticed."""
    from diffusers import AutoencoderKL

    cache, vae = LatentCache(root / "cache"), AutoencoderKL.from_pretrained(root / "vae")
    meta = {"data": {"latents": {"scale": cache.scale, "shift": cache.shift, "vae": cache.encoder}}}
    pixels = load_pixels(open_images(root / "classes").content(2), Crop(80, 48)).values[None]
    with torch.no_grad():
        wanted = vae.decode(vae.encode(torch.from_numpy(pixels)).latent_dist.mean).sample
    (row,) = cache.buckets[20, 12][:1]
    latents = torch.from_numpy(cache.rows([row])["latents"])
    decoder = LatentDecoder(root / "vae", meta, torch.device("cpu"))
    torch.testing.assert_close(decoder.decode(latents), wanted, rtol=1e-4, atol=1e-5)
    for wrong in ({"scale": 1.0}, {"shift": 0.0}):
        changed = {"data": {"latents": {**meta["data"]["latents"], **wrong}}}
        found = LatentDecoder(root / "vae", changed, torch.device("cpu")).decode(latents)
        assert (found - wanted).abs().max() > 0.01
    assert latent_encoders.latents_of({}) is None and latent_encoders.latents_of({"data": None}) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--model.num-classes", "1"], "has class 1, and model.num_classes=1 are numbered 0 to 0; use"),
        (["--model.patch-size", "16", "--data.bucket-step", "8"], "images of 24 x 40: 24 is not a multiple of"),
        (["--data.bucket-batch", "3", "--train.micro-batch", "2"], "data.bucket_batch=3 is not a multiple of"),
        (["--data.bucket-batch", "64"], "none of 3 buckets has the 64 images"),
        (["--data.bucket-step", "12"], "model.image_size=32 is not a multiple of data.bucket_step=12"),
        (["--data.valid", "10"], "data.valid=10 of 10 images leaves none"),
        (
            ["--train.micro-batch", "4", "--data.bucket-batch", "4", "--data.valid", "3"],
            "data.valid=3: no bucket keeps the 4 images of train.micro_batch",
        ),
        (["--model.channels", "4"], "images of data.source='folder' have 1 or 3"),
        (["--data.source", "digits"], "data.path"),
        (["--data.source", "tar"], "holds no .tar"),
        (["--data.path", "nowhere"], "nowhere does not exist"),
    ],
)
def test_what_does_not_fit_is_one_error_before_training(
    change: list[str],
    message: str,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train(monkeypatch, *folder_run(root, tmp_path / "x"), "--train.steps", 1, *change) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and "Traceback" not in error, error
    assert not (tmp_path / "x").exists()


def test_folders_that_cannot_be_trained_on(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = tmp_path / "one"
    shutil.copytree(root / "classes" / "china", one / "china")
    shutil.copytree(root / "classes" / "china", tmp_path / "none")
    broken = tmp_path / "broken"
    shutil.copytree(root / "classes", broken)
    (broken / "china" / "0.png").write_text("no image")
    cut = broken / "flower" / "4.jpg"
    cut.write_bytes(cut.read_bytes()[:-1000])
    for path, message in (
        (one, "are of one class; put those of each class into a subfolder of its own, or set model.num_classes=1"),
        (tmp_path / "none", "has no classes: put the images of each class into a subfolder"),
        (broken, "2 of 10 images cannot be decoded: "),
    ):
        assert train(monkeypatch, *folder_run(root, tmp_path / "x"), "--train.steps", 1, "--data.path", path) == 2
        assert message in capsys.readouterr().err
    for path in (one, tmp_path / "none"):
        run = [*folder_run(root, tmp_path / f"of-{path.name}"), "--train.steps", 1, "--data.path", path]
        assert train(monkeypatch, *run, "--model.num-classes", 1, "--data.bucket-batch", 1, "--data.valid", 2) == 0
    skipped = [*folder_run(root, tmp_path / "x"), "--train.steps", 1, "--data.path", broken, "--data.on-error", "skip"]
    assert train(monkeypatch, *skipped, "--model.num-classes", 5) == 0
    said = capsys.readouterr().out
    assert f"2 of 10 files are no images, or cut off, and are left out, {broken}/china/0.png first" in said
    assert f"model.num_classes=5, of which {broken} has 2" in said
    for more, message in (
        (["--model.channels", 3], "has latents of 4 channels, not model.channels=3"),
        (["--data.path", root], "cache.json is missing or damaged"),
        (["--data.flip"], "data.flip"),
    ):
        run = [*SMALL, *LATENTS, "--data.path", root / "cache", "--output", tmp_path / "y", "--train.steps", 1, *more]
        assert train(monkeypatch, *run) == 2 and message in capsys.readouterr().err
    write_cache(root, "squares", max_ratio=1.0)
    run = [*SMALL, *LATENTS, "--data.path", root / "squares", "--output", tmp_path / "y", "--train.steps", 1]
    assert train(monkeypatch, *run, "--model.image-size", 32) == 2
    assert "has images of 16 x 16 alone; use model.image_size=16" in capsys.readouterr().err
    assert np.array_equal(LatentCache(root / "squares").labels, [0] * 5 + [1] * 5)


def test_texts_of_a_cache_train_joint_blocks(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_captions(tmp_path / "captions")
    source = open_images(tmp_path / "captions")
    for seed, name in enumerate(("texts", "other-texts")):
        words = write_text_encoder(tmp_path / f"encoder-{seed}", 16, projected=True, seed=seed)
        encoders = EncoderFolders(root / "vae", (words,), (words,))
        writer = CacheWriter(source, encoders, CacheSettings(64, 16, 2.0, batch=2), tmp_path / name)
        writer.begin()
        writer.write(0, 1, torch.device("cpu"))
    folder = tmp_path / "texts"
    empty = LatentCache(folder).empty
    (_, tokens, width), (_, pooled) = empty["text"].shape, empty["pooled"].shape
    run = [*SMALL, *LATENTS, "--data.path", folder, "--train.steps", 2, "--model.condition", "text"]
    sizes_of_text = ["--model.text-size", width, "--model.text-tokens", tokens, "--model.pooled-size", pooled]
    assert train(monkeypatch, *run, *sizes_of_text, "--output", tmp_path / "run") == 0
    assert all(np.isfinite(read_losses(tmp_path / "run")))
    capsys.readouterr()
    again = [*run, *sizes_of_text, "--output", tmp_path / "run", "--checkpoint.resume", "--train.steps", 3]
    assert train(monkeypatch, *again, "--data.path", tmp_path / "other-texts") == 2
    assert "with texts of {'encoders': [{'class': 'CLIPTextModelWithProjection'" in capsys.readouterr().err
    assert train(monkeypatch, *run, *sizes_of_text[:4], "--output", tmp_path / "x") == 2
    assert f"'pooled' is [{pooled}] a sample, not [2048]; set model.pooled_size" in capsys.readouterr().err
    assert train(monkeypatch, *run, *sizes_of_text[:2], "--output", tmp_path / "x") == 2
    assert "set model.text_tokens and model.text_size" in capsys.readouterr().err
