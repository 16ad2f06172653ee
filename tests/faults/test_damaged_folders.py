"""Folders of Hugging Face, outputs of runs and swap files that were damaged: right, or refused, and nothing lost."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from pathlib import Path

import hf_folder
import numpy as np
import pytest
import torch
from checkpoints import same
from damage import TO_CONTENT, damage, files_of, refused
from safetensors.torch import load_file, save_file
from started_ranks import TINY
from test_swap_damage import content, store_of
from test_swap_damage import flip as flip_in_swap

from megatron_ds.checkpoint import Checkpoint
from megatron_ds.config import RunConfig, parse
from megatron_ds.convert.hugging_face import import_hf
from megatron_ds.data.cache import cached_arrays
from megatron_ds.errors import OffloadError
from megatron_ds.models.families import task_of
from megatron_ds.train.launch import RankInfo
from megatron_ds.train.pretrain import pretrain
from megatron_ds.train.report import read_losses

# --- folders of Hugging Face ------------------------------------------------------------------------------------


def imported(folder: Path, out: Path) -> dict[str, torch.Tensor]:
    with Checkpoint(import_hf(folder, out)) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.names()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[int, Path], dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("hf")
    made = {shards: hf_folder.write(folder / f"{shards}", shards) for shards in (1, 3)}
    return made, imported(made[3], folder / "right")


def header_only(draw: random.Random, path: Path) -> str:
    """What says which tensor is where: damage to the values themselves cannot be told from other values."""
    raw = path.read_bytes()
    size = 8 + struct.unpack("<Q", raw[:8])[0]
    front = path.with_name("front")
    front.write_bytes(raw[:size])
    text = draw.choice(TO_CONTENT)(draw, front)
    path.write_bytes(front.read_bytes() + raw[size:])
    front.unlink()
    return f"the header: {text}"


def other_tensors(draw: random.Random, path: Path) -> str:
    """A file of weights that lacks one, has one more, another's, one of another shape or of another dtype."""
    tensors = load_file(path)
    name = draw.choice(sorted(tensors))
    what = draw.choice(("lacks", "renamed", "copied", "shape", "quantised", "empty"))
    value = tensors.pop(name)
    if what == "renamed":
        tensors[name.replace("weight", "other")] = value
    elif what == "copied":
        tensors |= {
            name: value,
            "model.layers.1.mlp.up_proj.weight": torch.ones(24, 16),
            "lm_head.weight": value.clone(),
        }
    elif what == "shape":
        tensors[name] = torch.zeros(*value.shape, 2)[..., 0].clone().reshape(-1)[: draw.choice((1, 5))]
    elif what == "quantised":
        tensors[name] = value.to(torch.int8)
    elif what == "empty":
        tensors[name] = torch.zeros(0)
    save_file(tensors, path, {"format": "pt"})
    return f"{name}: {what}"


@pytest.mark.trials(8, 400)
def test_what_is_left_of_a_folder_of_hugging_face(
    draw: random.Random, whole: tuple[dict[int, Path], dict[str, torch.Tensor]], place: Path
) -> None:
    folders, right = whole
    shards = draw.choice((1, 3))
    folder = place / "hf"
    shutil.copytree(folders[shards], folder)
    weights = sorted(folder.glob("*.safetensors"))
    what = draw.choice(("header", "tensors", "files", "index", "stale"))
    if what in ("header", "tensors"):
        path = draw.choice(weights)
        print(f"{path.name}: {(header_only if what == 'header' else other_tensors)(draw, path)}")
    elif what == "files":
        damage(draw, weights, (lambda d, p: p.unlink() or "removed", header_only))
    elif what == "index" and shards == 3:
        damage(draw, [folder / "model.safetensors.index.json"])
    else:
        shutil.copytree(folders[4 - shards], folder, dirs_exist_ok=True)
    found: dict[str, torch.Tensor] = {}
    error = refused(lambda: found.update(imported(folder, place / "out")), str(folder))
    if error:
        assert not list(place.glob("out/step-0000000?")), "a checkpoint was left behind"
    else:
        assert found.keys() == right.keys() and all(torch.equal(found[name], right[name]) for name in right)


@pytest.mark.trials(2, 100)
def test_what_is_left_of_the_settings_of_hugging_face(
    draw: random.Random, whole: tuple[dict[int, Path], dict[str, torch.Tensor]], place: Path
) -> None:
    """Other numbers in them may be another model's: but there is no traceback, and no half of a checkpoint."""
    shutil.copytree(whole[0][1], place / "hf")
    damage(draw, [path for path in files_of(place / "hf") if path.suffix == ".json"])
    error = refused(lambda: imported(place / "hf", place / "out"), str(place / "hf"), "config.json", "model.")
    assert not error or not list(place.glob("out/step-0000000?"))


# --- the output of a run ----------------------------------------------------------------------------------------

OWN = ["--checkpoint.save-every", "2", "--log.no-progress"]


def train(output: Path, *more: str) -> bool:
    config = parse([*TINY, *OWN, "--output", str(output), *more], config_class=RunConfig)
    return pretrain(config, RankInfo(), task_of(config))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """A run of 4 steps, and the losses of one that went on to 6."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("run", "longer"):
        train(folder / name, "--optimizer.decay-steps", "6")
    train(folder / "longer", "--optimizer.decay-steps", "6", "--train.steps", "6", "--checkpoint.resume")
    return folder / "run", read_losses(folder / "longer")


@pytest.mark.trials(2, 150)
def test_what_is_left_of_a_run(draw: random.Random, finished: tuple[Path, list[float]], place: Path) -> None:
    """It goes on with the same numbers, or says in one error why not, and leaves everything as it is."""
    output = place / "run"
    shutil.copytree(finished[0], output)
    loose = [output / "config.toml", output / "metrics.jsonl", output / "checkpoints" / "latest", output / "lock"]
    own = [path for path in files_of(output) if path not in loose]
    damage(draw, [path for path in loose if path.exists()] if draw.random() < 0.6 else own)
    before = {path: path.read_bytes() for path in files_of(output)}
    more = ["--optimizer.decay-steps", "6", "--train.steps", "6", "--checkpoint.resume"]
    error = refused(lambda: train(output, *more), str(output))
    if not error:
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        # What is left of earlier steps, as damage that cannot be seen left it; and the new ones, as they must be.
        assert [(line["step"], line["loss"]) for line in lines][-2:] == list(enumerate(finished[1], 1))[-2:]
        return
    assert {path: path.read_bytes() for path in files_of(output) if path.name != "lock"} == {
        path: content for path, content in before.items() if path.name != "lock"
    }
    # The way on that the errors name, where there is one.
    checkpoints = output / "checkpoints"
    if not any(
        same(checkpoints / name, finished[0] / "checkpoints" / name) for name in ("step-00000002", "step-00000004")
    ):
        return
    error = refused(lambda: train(output, *more[:4], "--checkpoint.resume-from", "last-good"), str(output))
    if error:
        assert (
            "config.toml" in error or "lock" in error or "cannot be" in error or "latest is no regular file" in error
        ), error


# --- caches, swap files -----------------------------------------------------------------------------------------


@pytest.mark.trials(6, 100)
def test_what_is_left_of_a_cache(draw: random.Random, place: Path) -> None:
    """It is what it was, or is made again."""
    values = {"x": np.arange(3000, dtype="<i8"), "y": np.arange(5, dtype="<f8")}

    def use() -> None:
        found = cached_arrays(place / "index", {"a": 1}, lambda: values)
        assert found.keys() == values.keys() and all(np.array_equal(found[name], values[name]) for name in values)

    use()
    damage(draw, files_of(place))
    use()
    use()


@pytest.mark.trials(6, 250)
def test_what_is_left_of_a_swap_file(draw: random.Random, place: Path) -> None:
    """Each region reads as it was written, or is an error that names it."""
    sizes = [draw.choice((8, 4096, 3 * 8192 + 20, 4 * 8192)) for _ in range(3)]
    store, regions = store_of(place / "swap", sizes)
    size = os.fstat(store._file.fd).st_size
    what = draw.choice(("flip", "cut", "zero"))
    if what == "flip":
        flip_in_swap(store, at := draw.randrange(size), draw.randrange(1, 256))
    else:
        at = draw.randrange(size)
        os.ftruncate(store._file.fd, at)
        if what == "zero":
            os.ftruncate(store._file.fd, size)
    print(f"{what} at {at} of {size}")
    for i, region in enumerate(regions):
        inside = region.offset <= at < region.offset + region.size
        hit = inside if what == "flip" else at < region.offset + region.size
        try:
            assert torch.equal(region.read_start().wait(), content(i, region.size))
            # Zeros in place of zeros are no damage.
            assert not hit or what == "zero"
            region.release()
        except OffloadError as error:
            assert hit and region.name in str(error) and "\n" not in str(error)
            break  # the store is at an end then
    store.close()
