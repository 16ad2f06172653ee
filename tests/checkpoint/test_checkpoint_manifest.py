"""Manifests whose own checksum is right and whose content is not: each is refused before anything is read by it."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_state import save_virtually, shards_of_rank, wrong_shards

from megatron_ds.checkpoint import Checkpoint, FlatShard, load, resolve, save
from megatron_ds.checkpoint.directory import find
from megatron_ds.checkpoint.index import BlockFile, IndexSizes, Words, write_blocks
from megatron_ds.checkpoint.last_good import last_good
from megatron_ds.checkpoint.save import commit, prepare, write_rank
from megatron_ds.errors import CheckpointError
from megatron_ds.files import checksum
from megatron_ds.testing import run_ranks

Json = dict[str, Any]


def read_json(step: Path) -> Json:
    value: Json = json.loads((step / "manifest.json").read_text())
    del value["checksum"]
    return value


def write_json(step: Path, value: Json) -> None:
    """With a right checksum, as only somebody who means it, or a defect, would."""
    body = json.dumps(value)[1:]
    (step / "manifest.json").write_text(f'{{"checksum":"{checksum(body.encode())}",\n{body}')


def read_index(step: Path) -> tuple[Json, IndexSizes, Words]:
    """The manifest, and all words of the index."""
    value = read_json(step)
    described = dict(value["index"])
    digest = described.pop("checksum")
    sizes = IndexSizes(**described)
    return value, sizes, BlockFile(step / "manifest.index", sizes.words, digest)(0, sizes.words).copy()


def write_index(step: Path, value: Json, words: Words) -> None:
    """With right checksums."""
    write_json(step, {**value, "index": {**value["index"], "checksum": write_blocks(step / "manifest.index", words)}})


def at(*path: str | int) -> Callable[[Json, Any], None]:
    """Sets what is at this path of the manifest; ``...`` removes it."""

    def put(value: Json, new: Any) -> None:
        place: Any = value
        for name in path[:-1]:
            place = place[name]
        if new is ...:
            del place[path[-1]]
        else:
            place[path[-1]] = new

    return put


EMBEDDING = ("tensors", "param", "embedding.weight")
Wrong = list[tuple[Callable[[Json, Any], None], Any, str]]
FIELDS: Wrong = [
    *((at(name), ..., f"lacks ['{name}']") for name in ("step", "world_size", "meta", "chunk_bytes", "tensors")),
    *((at("step"), bad, "step is ") for bad in (-1, 1.0, True, "1", None, 1 << 70)),
    *((at("world_size"), bad, "world_size is ") for bad in (0, -4, [], "6")),
    (at("meta"), [], "meta is [], not an object"),
    *((at("chunk_bytes"), bad, "chunk_bytes is ") for bad in (0, -1, 1 << 60, 4097, 8.0, "8")),
    (at("chunk_bytes"), 4096, "checksums"),
    (at("tensors"), [], "tensors is [], not an object"),
    (at("tensors", "param"), 3, "tensors 'param' is 3, not an object"),
    (at("version"), 0, "version 0; this library reads"),
    (at(*EMBEDDING), [], "not an object"),
    (at(*EMBEDDING, "dtype"), "F128", "has dtype 'F128', not one of"),
    (at(*EMBEDDING, "dtype"), ["F32"], "has dtype ['F32'], not one of"),
    (at(*EMBEDDING, "dtype"), "F64", "at byte"),
    (at(*EMBEDDING, "shape"), [-24, 6], "the shape of param of 'embedding.weight' is -24"),
    (at(*EMBEDDING, "shape"), [24, 6.0], "is 6.0"),
    (at(*EMBEDDING, "shape"), [1 << 62, 1 << 62, 0], "more elements than can be counted"),
    (at(*EMBEDDING, "parts"), ..., "lacks ['parts']"),
    (at("index"), ..., "lacks ['index']"),
    (at("index"), 5, "the index is 5, not an object"),
    (at("index", "checksum"), 5, "the index has the checksum 5"),
    (at("index", "checksum"), "0123456789abcdef", "its block 0 does not match its checksum"),
    (at("index", "files"), -1, "a size of the index is -1"),
    (at("index", "files"), 1 << 70, "a size of the index is 11805"),
    (at("index", "files"), 7, "it was truncated or replaced"),
    (at("index", "parts"), 3, "not a whole number from 0 to"),
    (at("index", "parts"), 1 << 40, "parts, and the index 1099511627776"),
    (at("index", "dims"), 3, "and the parts of the index 3 dims"),
    (at("index", "dims"), 1 << 40, "the dims of the index is 1099511627776"),
    (at(*EMBEDDING, "parts"), 1 << 40, "not a whole number from 0 to"),
    (at(*EMBEDDING, "parts"), 0, "parts, and the index"),
]
SHAPES: Wrong = [
    *((at(*EMBEDDING, "shape"), bad, "overlap or leave a gap") for bad in ([48, 6], [1 << 50, 6])),
    (at(*EMBEDDING, "shape"), [20, 6], "overlap or leave a gap|which is not inside it"),
    (at(*EMBEDDING, "shape"), [24], "overlap or leave a gap|which is not inside it"),
    (at(*EMBEDDING, "shape"), [12, 12], "overlap or leave a gap|which is not inside it"),
]
# Of a row of the index: column, value.
IN_A_FILE: list[tuple[int, int, str]] = [
    (0, -1, "has 1 checksums"),
    (0, 1 << 60, "has 1 checksums"),
    (0, 4096, "it was truncated or replaced"),
    (1, 1, "checksums"),
    (1, 1 << 62, "checksums"),
    (1, -1, "checksums"),
]
REACH, FILE, START, OFFSET, SHAPE = 0, 1, 2, 3, 7
IN_A_PART: list[tuple[int, int, str]] = [
    (REACH, 0, "overlap or leave a gap"),
    (REACH, -(1 << 63), "overlap or leave a gap"),
    (FILE, 6, "is in file 6, but only 6 are listed"),
    (FILE, -1, "is in file -1, but"),
    (START, 1 << 40, "which has"),
    (START, (1 << 63) - 1, "which has"),
    (START, -4, "at bytes -4-"),
    (START, 4097, "at bytes 4097-"),
    (OFFSET, 23, "which is not inside it"),
    (OFFSET, -1, "which is not inside it"),
    (OFFSET, 1, "overlap or leave a gap"),
    (OFFSET + 2, 1, "which is not inside it"),
    (SHAPE, 1, "overlap or leave a gap"),
    (SHAPE, 0, "which is not inside it"),
    (SHAPE, -4, "which is not inside it"),
    (SHAPE + 1, 1 << 60, "which is not inside it"),
    (SHAPE + 2, 0, "which is not inside it"),
]


def fresh(tmp_path: Path) -> Path:
    save_virtually(tmp_path, 1)
    return save_virtually(tmp_path, 2)


def check_refused(directory: Path, message: str) -> None:
    with pytest.raises(CheckpointError) as refused:
        load(directory, shards_of_rank(1, 0, 1, 0, fill=None))
    assert message in str(refused.value), (message, str(refused.value))
    assert "step-00000001 looks whole" in str(refused.value)


def test_every_field_is_checked(tmp_path: Path) -> None:
    step = fresh(tmp_path)
    good = read_json(step)
    write_json(step, good)
    load(tmp_path, flat_shards := shards_of_rank(1, 0, 1, 0, fill=None))
    assert wrong_shards(flat_shards) == []
    for put, new, message in FIELDS:
        bad = copy.deepcopy(good)
        put(bad, new)
        write_json(step, bad)
        check_refused(tmp_path, message)
    for put, new, message in SHAPES:
        bad = copy.deepcopy(good)
        put(bad, new)
        write_json(step, bad)
        with pytest.raises(CheckpointError, match=message), Checkpoint(step) as checkpoint:
            checkpoint.read("embedding.weight")


def test_every_number_of_the_index_is_checked(tmp_path: Path) -> None:
    step = fresh(tmp_path)
    value, sizes, good = read_index(step)
    assert (sizes.files, sizes.dims) == (6, 4)
    first = len(good) - sizes.parts * sizes.row + find(step)[1].tensors["param", "embedding.weight"].first * sizes.row
    for start, cases in ((0, IN_A_FILE), (first, IN_A_PART)):
        for column, new, message in cases:
            bad = good.copy()
            bad[start + column] = new
            write_index(step, value, bad)
            check_refused(tmp_path, message)
            with Checkpoint(step) as checkpoint:
                assert checkpoint.check_everything()
    # Nobody reads wrong values by these, but a whole check finds them.
    for place, new in ((1, good[1] + 1), (2 * sizes.files, 7), (first, good[first] + 1)):
        bad = good.copy()
        bad[place] = new
        write_index(step, value, bad)
        with Checkpoint(step) as checkpoint:
            assert checkpoint.check_everything(), place


def test_two_parts_that_cover_the_same_half(tmp_path: Path) -> None:
    """Numbers and bytes are right, one half is there twice and the other in no part."""
    data = torch.arange(8.0)
    halves = [FlatShard("w", "param", (8,), (0,), (8,), 4 * i, 4 * i + 4, data[4 * i : 4 * i + 4]) for i in range(2)]
    step = save(tmp_path, 1, halves, {})

    def change(part: int, name: str, by: int) -> None:
        """Adds to a number of a part."""
        value, sizes, words = read_index(step)
        words[len(words) - (2 - part) * sizes.row + {"start": START, "offset": OFFSET}[name]] += by
        write_index(step, value, words)

    change(1, "offset", -4)
    with pytest.raises(CheckpointError, match=r"the parts of param of 'w' of shape \[8\] overlap or leave a gap"):
        load(tmp_path, [FlatShard.whole("w", "param", torch.zeros(8))])
    change(1, "offset", 4)
    load(tmp_path, [target := FlatShard.whole("w", "param", torch.zeros(8))])
    assert torch.equal(target.data, torch.arange(8.0))
    change(1, "start", -4)
    with pytest.raises(CheckpointError, match=r"two parts lie at byte \d+ of file 0"):
        load(tmp_path, [target])


def test_ranks_that_save_the_same_half_are_refused(tmp_path: Path) -> None:
    partial = prepare(tmp_path, 1, 0)
    for rank in range(2):
        write_rank(partial, rank, [FlatShard("w", "param", (8,), (0,), (8,), 0, 4, torch.zeros(4))])
    with pytest.raises(CheckpointError, match="two parts hold the same elements, and others are in none"):
        commit(tmp_path, 1, 2, {})


def test_a_copy_of_an_older_step_is_not_the_newest(tmp_path: Path) -> None:
    fresh(tmp_path)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000003")
    with pytest.raises(CheckpointError, match="step-00000003 holds step 1: it was copied or renamed"):
        resolve(tmp_path / "step-00000003")
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "best")  # a name of one's own says nothing of a step
    assert resolve(tmp_path / "best") == tmp_path / "best"


@pytest.mark.parametrize(
    "name", ["../other/step-00000001", "/tmp/step-00000001", ".", "best", "step-00000001.incomplete"]
)
def test_latest_points_to_a_step_beside_it(tmp_path: Path, name: str) -> None:
    fresh(tmp_path / "other")
    fresh(tmp_path / "run")
    (tmp_path / "run" / "latest").write_text(f"{name} {checksum(name.encode())}\n")
    with pytest.raises(CheckpointError, match=r"not the name of a checkpoint beside it.*step-00000002 looks whole"):
        resolve(tmp_path / "run")


@pytest.mark.parametrize(
    "name",
    ["latest", "step-00000002/manifest.json", "step-00000002/manifest.index", "step-00000002/rank-00003.safetensors"],
)
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, name: str, make: Callable[[Path], None]) -> None:
    fresh(tmp_path)
    (tmp_path / name).unlink()
    make(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"step-0000000[12] looks whole"):
        load(tmp_path, shards_of_rank(1, 0, 1, 0, fill=None))


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 200_000, "7", "null}", '"step": NaN'], ids=lambda t: t[:6])
def test_a_manifest_that_is_no_object(tmp_path: Path, text: str) -> None:
    step = fresh(tmp_path)
    (step / "manifest.json").write_text(f'{{"checksum":"{checksum(text.encode())}",\n{text}')
    with pytest.raises(CheckpointError, match=r"manifest\.json is malformed: "):
        resolve(tmp_path)


# --- the last good one ----------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def good_of_ranks(directory: str) -> tuple[str, list[str]]:
    import torch.distributed as dist

    from megatron_ds.mesh import Axis

    world = Axis("world", dist.get_rank(), 2, dist.group.WORLD, (0, 1))
    path, passed = last_good(Path(directory), world)
    return path.name, passed


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_last_good_one_is_found_by_its_contents(tmp_path: Path, ranks: int) -> None:
    for step in (1, 2, 3, 4):
        save_virtually(tmp_path, step)
    flip(tmp_path / "step-00000004" / "rank-00001.safetensors")
    flip(tmp_path / "step-00000003" / "rank-00004.safetensors")
    if ranks == 1:
        path, passed = last_good(tmp_path)
        assert path == tmp_path / "step-00000002"
    else:
        (name, passed), other = run_ranks(good_of_ranks, 2, str(tmp_path))
        assert (name, passed) == other and name == "step-00000002"
    assert len(passed) == 2 and "step-00000004/rank-00001.safetensors is damaged" in passed[0]
    assert "step-00000003/rank-00004.safetensors is damaged" in passed[1]
    flat_shards = shards_of_rank(1, 0, 1, 0, fill=None)
    load(tmp_path / "step-00000002", flat_shards)
    assert wrong_shards(flat_shards) == []


def test_steps_before_the_latest_come_before_those_after_it(tmp_path: Path) -> None:
    for step in (1, 2, 5, 3):  # a run that was taken up again from step 2
        save_virtually(tmp_path, step)
    assert last_good(tmp_path)[0].name == "step-00000003"
    flip(tmp_path / "step-00000003" / "rank-00000.safetensors")
    assert last_good(tmp_path)[0].name == "step-00000002"
    for step in (1, 2):
        (tmp_path / f"step-0000000{step}" / "manifest.json").unlink()
    assert last_good(tmp_path)[0].name == "step-00000005"
    flip(tmp_path / "step-00000005" / "rank-00000.safetensors")
    with pytest.raises(CheckpointError, match=r"holds no good checkpoint:\n.*step-00000003/rank-00000") as refused:
        last_good(tmp_path)
    assert len(str(refused.value).splitlines()) == 5
    with pytest.raises(CheckpointError, match="there is none at all"):
        last_good(tmp_path / "nowhere")
