"""Cached latents and text embeddings: what is in them, who wrote them, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scripts_as_modules import load_script
from small_images import damage, photograph, write_captions, write_classes, write_text_encoder, write_vae

from megatron_ds.data.image_source import open_images
from megatron_ds.data.image_transforms import Crop, load_pixels
from megatron_ds.data.latent_cache import LatentCache, sample_latents
from megatron_ds.data.latent_encoders import EncoderFolders, VaeConfig
from megatron_ds.data.latent_writer import CacheSettings, CacheWriter
from megatron_ds.errors import DataError
from megatron_ds.train.launch import run_main

SETTINGS = CacheSettings(64, 16, 2.0, batch=2, shard_rows=3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images with classes and with captions, a VAE and two text encoders."""
    root = tmp_path_factory.mktemp("latents")
    write_classes(root / "classes")
    write_captions(root / "captions")
    write_vae(root / "vae")
    write_text_encoder(root / "text-1", 16, projected=False)
    write_text_encoder(root / "text-2", 24, projected=True, seed=1)
    return root


def writer(images: Path, encoders: EncoderFolders, output: Path, settings: CacheSettings = SETTINGS) -> CacheWriter:
    source = open_images(images)
    return CacheWriter(source, encoders, settings, output)


def write(
    root: Path, output: Path, rank: int = 0, world_size: int = 1, settings: CacheSettings = SETTINGS
) -> list[str]:
    made = writer(root / "classes", EncoderFolders(root / "vae"), output, settings)
    made.begin()
    return made.write(rank, world_size, torch.device("cpu"))


@pytest.fixture(scope="module")
def classes(folders: Path) -> Path:
    write(folders, folders / "once")
    return folders / "once"


def test_the_scale_of_a_vae_that_does_not_say_it_is_the_classs_own(folders: Path, tmp_path: Path) -> None:
    """Configurations of Stable Diffusion 1's VAEs are older than the setting."""
    from diffusers import AutoencoderKL

    shutil.copytree(folders / "vae", tmp_path / "vae")
    where = tmp_path / "vae" / "config.json"
    config = json.loads(where.read_text())
    for value in (None, 0, "x"):
        where.write_text(json.dumps({**config, "scaling_factor": value}))
        with pytest.raises(DataError, match=f"scaling_factor={value!r} of config.json is no number above 0"):
            VaeConfig.read(tmp_path / "vae")
    left_out = {name: value for name, value in config.items() if name not in ("scaling_factor", "shift_factor")}
    where.write_text(json.dumps(left_out))
    theirs = AutoencoderKL.from_pretrained(tmp_path / "vae").config
    found = VaeConfig.read(tmp_path / "vae")
    assert (found.scale, found.shift) == (theirs.scaling_factor, theirs.shift_factor or 0.0)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_row_is_what_the_encoder_makes_of_the_image(folders: Path, classes: Path) -> None:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(folders / "vae")
    source, cache = open_images(folders / "classes"), LatentCache(classes)
    assert len(cache) == 10 and cache.buckets.keys() == {(12, 20), (16, 16), (20, 12)}
    assert (cache.scale, cache.shift) == (0.25, 0.5)
    assert [rows.tolist() for rows in cache.buckets.values()] == [[0, 1, 2, 3], [4, 5], [6, 7, 8, 9]]
    found = cache.rows([6, 9])  # the first and the last of those that are higher than wide
    for place, row in enumerate((2, 9)):
        pixels = load_pixels(source.content(row), Crop(80, 48))
        with torch.no_grad():
            out = vae.encode(torch.from_numpy(pixels.values[None])).latent_dist
        torch.testing.assert_close(torch.from_numpy(found["latents"][place]), (out.mean[0] - 0.5) * 0.25)
        torch.testing.assert_close(torch.from_numpy(found["latents_std"][place]), out.std[0] * 0.25)
    assert found["labels"].tolist() == [0, 1] and cache.classes == ("china", "flower")
    assert found["original_size"].tolist() == [[120, 90]] * 2 and found["target_size"].tolist() == [[80, 48]] * 2
    assert found["crop_top_left"].tolist() == [[0, 6]] * 2  # 90 x 2/3 = 60 wide, of which 48 are kept
    with pytest.raises(DataError, match="rows of 2 buckets"):
        cache.rows([0, 4])
    first = sample_latents(found, 1, [7, 8])
    assert np.array_equal(first, sample_latents(found, 1, [7, 8]))
    other = sample_latents(found, 1, [107, 108])
    spread = (first - other) / found["latents_std"] / np.sqrt(2)
    assert abs(spread.mean()) < 0.1 and abs(spread.std() - 1) < 0.1


def test_three_ranks_write_the_files_of_one(folders: Path, classes: Path) -> None:
    for rank in (2, 0, 1):
        write(folders, folders / "three", rank, 3)
    assert contents(folders / "three") == contents(classes)
    assert LatentCache(folders / "three").identity == LatentCache(classes).identity


def test_a_run_that_was_killed_goes_on_and_damage_is_noticed(folders: Path, classes: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    shutil.copytree(classes, again)
    (again / "shard-00001.safetensors").unlink()
    os.mkfifo(again / "shard-00001.safetensors")
    with pytest.raises(DataError, match="it is a FIFO, not a regular file"):
        LatentCache(again)
    (again / "shard-00001.safetensors").unlink()
    with pytest.raises(DataError, match=r"shard-00001.safetensors is missing: the cache is not finished"):
        LatentCache(again)
    damaged = bytearray((again / "shard-00002.safetensors").read_bytes())
    damaged[-3] ^= 1  # of a row's last field
    (again / "shard-00002.safetensors").write_bytes(damaged)
    kept = (again / "shard-00000.safetensors").stat().st_mtime_ns
    shutil.copy(classes / "shard-00001.safetensors", again)
    with pytest.raises(DataError, match=r"shard-00002.safetensors is damaged: row 1 does not match"):
        LatentCache(again).rows([4, 5])
    write(folders, again)
    assert contents(again) == contents(classes) and (again / "shard-00000.safetensors").stat().st_mtime_ns == kept


def test_a_cache_of_another_encoder_is_not_continued_nor_mixed(folders: Path, classes: Path, tmp_path: Path) -> None:
    write_vae(tmp_path / "vae", scale=0.5)
    (tmp_path / "classes").symlink_to(folders / "classes")
    with pytest.raises(DataError, match=r"another folder") as error:
        write(tmp_path, classes)
    assert "vae.config was" in str(error.value)
    write(tmp_path, tmp_path / "other")
    mixed = tmp_path / "mixed"
    shutil.copytree(classes, mixed)
    shutil.copy(tmp_path / "other" / "shard-00001.safetensors", mixed)
    with pytest.raises(DataError, match=r"shard-00001.* belongs to another cache.*scale 0.5"):
        LatentCache(mixed)
    text = (mixed / "cache.json").read_text()
    (mixed / "cache.json").write_text(text.replace('"scale": 0.25', '"scale": 0.5'))
    with pytest.raises(DataError, match="does not match its checksum"):
        LatentCache(mixed)


def test_text_is_encoded_as_sdxl_and_as_one_encoder_do(folders: Path, tmp_path: Path) -> None:
    import transformers

    both = (folders / "text-1", folders / "text-2")
    made = writer(folders / "captions", EncoderFolders(folders / "vae", both, both), tmp_path / "two")
    made.begin()
    made.write(0, 1, torch.device("cpu"))
    cache = LatentCache(tmp_path / "two")
    found = cache.rows([0])
    first = transformers.CLIPTextModel.from_pretrained(both[0])
    second = transformers.CLIPTextModelWithProjection.from_pretrained(both[1])
    tokenizer = transformers.AutoTokenizer.from_pretrained(both[0])

    def states(text: str) -> tuple[torch.Tensor, torch.Tensor]:
        ids = tokenizer([text], padding="max_length", return_tensors="pt").input_ids
        with torch.no_grad():
            one, other = (m(ids, output_hidden_states=True) for m in (first, second))
        return torch.cat([one.hidden_states[-2], other.hidden_states[-2]], -1), other.text_embeds

    for arrays, text in ((found, "a temple with 0 roofs"), (cache.empty, "")):
        hidden, pooled = states(text)
        torch.testing.assert_close(torch.from_numpy(arrays["text"]), hidden)
        torch.testing.assert_close(torch.from_numpy(arrays["pooled"]), pooled)
    assert [e["class"] for e in cache.texts["encoders"]] == ["CLIPTextModel", "CLIPTextModelWithProjection"]
    one = EncoderFolders(folders / "vae", both[:1], both[:1])
    settings = dataclasses.replace(SETTINGS, text_states="last", store="float16", spread=False)
    made = writer(folders / "captions", one, tmp_path / "one", settings)
    made.begin()
    made.write(0, 1, torch.device("cpu"))
    last = LatentCache(tmp_path / "one")
    assert last.fields == ("crop_top_left", "latents", "original_size", "pooled", "target_size", "text")
    ids = tokenizer(["a temple with 0 roofs"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        out = first(ids)
    found = last.rows([0])
    torch.testing.assert_close(torch.from_numpy(found["text"]), out.last_hidden_state, atol=2e-3, rtol=1e-3)
    assert np.array_equal(sample_latents(found, 0, [5]), found["latents"])
    with pytest.raises(DataError, match=r"other images, settings or encoders: text had 1 entries, now 2"):
        writer(folders / "captions", EncoderFolders(folders / "vae", both, both), tmp_path / "one", settings)
    other = EncoderFolders(folders / "vae", both[::-1], both)
    with pytest.raises(DataError, match=r"encoders: text: class was 'CLIPTextModel', is now 'CLIPTextModelWith"):
        writer(folders / "captions", other, tmp_path / "two")
    (tmp_path / "two" / "empty.safetensors").unlink()
    with pytest.raises(DataError, match="is missing"):
        _ = LatentCache(tmp_path / "two").empty


def test_an_encoder_that_overflows_is_an_error(folders: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(folders / "vae")
    with torch.no_grad():
        vae.quant_conv.weight.mul_(1e6)
    vae.save_pretrained(tmp_path / "vae")
    (tmp_path / "classes").symlink_to(folders / "classes")
    half = dataclasses.replace(SETTINGS, dtype="float16")
    with pytest.raises(DataError, match=r"latents of .*china/0.png are not finite.*use --dtype bfloat16 or float32"):
        write(tmp_path, tmp_path / "half", settings=half)
    with pytest.raises(DataError, match=r"too much for --store float16"):
        write(tmp_path, tmp_path / "stored", settings=dataclasses.replace(SETTINGS, store="float16"))
    assert not list((tmp_path / "half").glob("*.safetensors"))


def test_images_that_do_not_decode_are_left_out_or_fatal(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "classes", tmp_path / "classes")
    (tmp_path / "vae").symlink_to(folders / "vae")
    whole = damage(tmp_path / "classes" / "china" / "1.png")
    (tmp_path / "classes" / "china" / "3.png").write_text("no image")
    (left_out,) = write(tmp_path, tmp_path / "skipped")
    assert left_out.startswith(f"{whole}: ") and "data stream" in left_out
    assert write(tmp_path, tmp_path / "skipped") == [left_out]
    made = writer(tmp_path / "classes", EncoderFolders(tmp_path / "vae"), tmp_path / "skipped")
    assert made.unreadable == [str(tmp_path / "classes" / "china" / "3.png")]
    cache = LatentCache(tmp_path / "skipped")
    assert len(cache) == 8 and [row for row, _ in cache.bad] == [1] and "data stream" in cache.bad[0][1]
    fatal = dataclasses.replace(SETTINGS, on_error="fail")
    with pytest.raises(DataError, match=r"1 of 10 images cannot be decoded: .*china/3.png; remove"):
        write(tmp_path, tmp_path / "fatal", settings=fatal)
    (tmp_path / "classes" / "china" / "3.png").unlink()
    with pytest.raises(DataError, match=r"china/1.png cannot be decoded: .*--data.on-error skip"):
        write(tmp_path, tmp_path / "fatal", settings=fatal)
    assert not list((tmp_path / "fatal").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bucket_step": 6}, "--bucket-step 6: the VAE makes one of 4 pixels; use 4 or 8"),
        ({"resolution": 50}, "50 is no multiple of 16; use 48 or 64"),
        ({"max_ratio": 0.5}, "use 1 for squares alone"),
        ({"batch": 0}, "--batch 0: use 1 or more"),
        ({"text_tokens": 0}, "--text-tokens 0: use 1 or more"),
    ],
)
def test_settings_that_cannot_work(change: dict[str, Any], message: str, folders: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        write(folders, tmp_path / "x", settings=dataclasses.replace(SETTINGS, **change))
    assert not (tmp_path / "x").exists()


def test_encoders_that_cannot_be_used(folders: Path, tmp_path: Path) -> None:
    text, vae = folders / "text-1", folders / "vae"
    for encoders, message in (
        (EncoderFolders(text), "holds CLIPTextModel, not AutoencoderKL"),
        (EncoderFolders(vae, (vae,), (text,)), "holds AutoencoderKL; use CLIPTextModel or"),
        (EncoderFolders(vae, (text,), ()), "1 text encoders with 0 tokenizers"),
        (EncoderFolders(vae, (text,), (vae,)), "holds no tokenizer"),
        (EncoderFolders(folders), "config.json cannot be read"),
    ):
        with pytest.raises(DataError, match=message):
            writer(folders / "captions", encoders, tmp_path / "x")
    with pytest.raises(DataError, match="--text-tokens 5 is of T5's texts, and no encoder is a T5; leave it out"):
        long = dataclasses.replace(SETTINGS, text_tokens=5)
        writer(folders / "captions", EncoderFolders(vae, (text,), (text,)), tmp_path / "x", long)
    with pytest.raises(DataError, match="the images have no captions to encode"):
        writer(folders / "classes", EncoderFolders(vae, (text,), (text,)), tmp_path / "x")
    copy = tmp_path / "vae"
    shutil.copytree(vae, copy)
    (copy / "diffusion_pytorch_model.safetensors").rename(copy / "diffusion_pytorch_model.bin")
    with pytest.raises(DataError, match="other formats can hold code"):
        writer(folders / "captions", EncoderFolders(copy), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_the_tool_writes_and_goes_on(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = load_script("tools/cache_latents.py")
    images = tmp_path / "photos"
    images.mkdir()
    photograph("china").save(images / "wide.jpg")
    (images / "x.jpg").write_text("no image")
    common = [images, "--vae", folders / "vae", "--output", tmp_path / "cache", "--resolution", 32, "--device", "cpu"]
    threads = torch.get_num_threads()

    def call(*more: object) -> int:
        monkeypatch.setattr("sys.argv", ["cache_latents.py", *map(str, (*common, *more))])
        try:
            return run_main(tool.main)
        finally:
            torch.set_num_threads(threads)

    assert call("--bucket-step", 32) == 0
    said = capsys.readouterr().out
    assert (
        "1 latents: 1 of 8 x 8" in said and f"left out 1, which are no images, or cut off:\n  {images}/x.jpg\n" in said
    )
    before = contents(tmp_path / "cache")
    assert call("--bucket-step", 32) == 0 and contents(tmp_path / "cache") == before
    assert call("--text-tokens", 0) == 2 and "--text-tokens 0: use 1 or more" in capsys.readouterr().err
    assert call("--bucket-step", 32, "--dtype", "bfloat16") == 2
    assert "settings.dtype was 'float32', is now 'bfloat16'" in capsys.readouterr().err
    assert json.loads(before["cache.json"])["plan"]["settings"]["resolution"] == 32
