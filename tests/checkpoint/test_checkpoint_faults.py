"""What goes wrong with a checkpoint: kills, damaged files, full disks, another model. Each is one clear error, and
the checkpoints that were there before are still there, byte for byte."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_state import save_virtually, shards_of_rank, wrong_shards

from megatron_ds.checkpoint import Checkpoint, FlatShard, load, resolve, save
from megatron_ds.checkpoint.manifest import INCOMPLETE
from megatron_ds.checkpoint.save import prepare, prune, write_rank
from megatron_ds.errors import CheckpointError
from megatron_ds.files.direct_io import DirectFile
from megatron_ds.testing import RankFailed, run_ranks


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def load_all(path: Path) -> None:
    flat_shards = shards_of_rank(1, 0, 1, 0, fill=None)
    load(path, flat_shards)
    assert wrong_shards(flat_shards) == []


# --- kills ----------------------------------------------------------------------------------------------------


def killed_in(where: str, directory: str) -> None:
    """Save step 2 in this process, which kills itself the moment the save calls ``where``."""

    def die(*args: object, **kwargs: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(shutil if where == "rmtree" else os, where, die)
    save_virtually(Path(directory), 2, tp=1, zero=2)
    prune(Path(directory), 2, 1)


@pytest.mark.parametrize(
    ("where", "survivor"),
    [
        ("pwrite", 1),  # in the data
        ("fsync", 1),
        ("rename", 1),  # everything written, not yet visible
        ("replace", 1),  # visible, but `latest` still points to the one before
        ("rmtree", 2),  # committed, pruning the one before
    ],
)
def test_a_kill_at_any_point_leaves_a_good_latest(tmp_path: Path, where: str, survivor: int) -> None:
    save_virtually(tmp_path, 1)
    with pytest.raises(RankFailed, match=f"exit code -{signal.SIGKILL:d}"):
        run_ranks(killed_in, 1, where, str(tmp_path))
    assert resolve(tmp_path).name == f"step-{survivor:08d}"
    load_all(tmp_path)
    # The next save removes what the dead one left, whatever it was.
    save_virtually(tmp_path, 3)
    prune(tmp_path, 3, 1)
    assert resolve(tmp_path).name == "step-00000003"
    assert not list(tmp_path.glob(f"*{INCOMPLETE}"))
    load_all(tmp_path)


def test_an_incomplete_directory_is_not_read(tmp_path: Path) -> None:
    save_virtually(tmp_path, 1)
    write_rank(prepare(tmp_path, 2, 0), 0, shards_of_rank(1, 0, 1, 0))
    with pytest.raises(CheckpointError, match=r"was never completed.*step-00000001 looks whole"):
        load_all(tmp_path / f"step-00000002{INCOMPLETE}")
    load_all(tmp_path)


# --- damage ---------------------------------------------------------------------------------------------------

FILES = ["latest", "manifest.json", "manifest.index", "rank-00000.safetensors", "rank-00003.safetensors"]


def damaged_file(directory: Path, name: str) -> Path:
    return directory / name if name == "latest" else directory / "step-00000002" / name


def expect_refusal(directory: Path) -> None:
    """Loading must fail, and the error must lead to the checkpoint before, which must load."""
    with pytest.raises(CheckpointError, match=r"step-0000000[12] looks whole"):
        load_all(directory)
    load_all(directory / "step-00000001")


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_in_any_file_is_found(tmp_path: Path, name: str) -> None:
    save_virtually(tmp_path, 1)
    save_virtually(tmp_path, 2)
    path = damaged_file(tmp_path, name)
    good = path.read_bytes()
    bits = range(8 * len(good))
    chosen = list(bits) if len(bits) <= 400 else [0, 7, 64, bits[-1], *random.Random(0).sample(bits, 40)]
    for bit in chosen:
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        if name == "latest" and bad.split() == good.split():
            load_all(tmp_path)  # white space became other white space: the same words
        else:
            expect_refusal(tmp_path)
    path.write_bytes(good)
    load_all(tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_or_missing_file_is_found(tmp_path: Path, name: str) -> None:
    save_virtually(tmp_path, 1)
    save_virtually(tmp_path, 2)
    path = damaged_file(tmp_path, name)
    good = path.read_bytes()
    for size in (0, 1, len(good) // 2, len(good) - 2):
        path.write_bytes(good[:size])
        expect_refusal(tmp_path)
    path.write_bytes(good + b"\0")
    if name != "latest":
        expect_refusal(tmp_path)
    path.unlink()
    expect_refusal(tmp_path)


def test_a_file_of_another_save_is_found(tmp_path: Path) -> None:
    """What DCP loads without a word: the right names and sizes, but the bytes of another step."""
    save_virtually(tmp_path, 1)
    save_virtually(tmp_path, 2, dtype=torch.bfloat16)
    one, two = (tmp_path / f"step-0000000{step}" / "rank-00000.safetensors" for step in (1, 2))
    two.write_bytes(one.read_bytes()[: two.stat().st_size])
    expect_refusal(tmp_path)


def test_damage_in_an_untouched_chunk_does_not_stop_a_load(tmp_path: Path) -> None:
    big = FlatShard.whole("big", "param", torch.arange(6_000_000, dtype=torch.float32))
    small = FlatShard.whole("small", "param", torch.ones(4, dtype=torch.float64))  # wider, so first in the file
    step = save(tmp_path, 1, [big, small], {})
    path = step / "rank-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with Checkpoint(tmp_path) as checkpoint:
        assert torch.equal(checkpoint.read("small"), torch.ones(4, dtype=torch.float64))
        with pytest.raises(CheckpointError, match=r"bytes 16777216-\d+ do not match their checksum"):
            checkpoint.read("big")
        assert len(checkpoint.check_everything()) == 1
    with Checkpoint(tmp_path, verify=False) as checkpoint:
        assert (checkpoint.read("big") != big.data).sum() == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "holds no checkpoint"),
        (lambda path: path.mkdir() or (path / "config.json").touch(), r"model of transformers.*tools/convert\.py"),
        (
            lambda path: (path / "step-00000003").mkdir(parents=True),
            "has no file `latest`; there is no other",
        ),
    ],
)
def test_nothing_to_load(tmp_path: Path, make: Callable[[Path], None], message: str) -> None:
    make(tmp_path / "run")
    with pytest.raises(CheckpointError, match=message):
        resolve(tmp_path / "run")


def test_a_newer_format_is_refused_by_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_ds.checkpoint.manifest_file.VERSION", 99)
    save_virtually(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"version 99.*use the megatron-ds that wrote it"):
        load_all(tmp_path)


# --- another model --------------------------------------------------------------------------------------------


def test_another_model_is_named_tensor_by_tensor(tmp_path: Path) -> None:
    save_virtually(tmp_path, 1)
    flat_shards = [flat_shard for flat_shard in shards_of_rank(1, 0, 1, 0, fill=None) if flat_shard.name != "scale"]
    flat_shards += [FlatShard.whole(f"layers.{i}.new", "param", torch.zeros(1)) for i in range(30)]
    shape = FlatShard.whole("layers.0.norm.weight", "exp_avg", torch.zeros(8))
    flat_shards = [p for p in flat_shards if (p.name, p.kind) != ("layers.0.norm.weight", "exp_avg")] + [shape]
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path, flat_shards)
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("holds another model than the one being loaded:")
    assert lines[1].startswith("  missing from the checkpoint: layers.0.new, ")
    assert lines[1].count(",") == 9 and lines[1].endswith("more")
    assert lines[2] == ("  in the checkpoint but not in the model: scale, exp_avg of scale, exp_avg_sq of scale")
    assert lines[3] == "  of another shape: exp_avg of layers.0.norm.weight: [7] in the checkpoint, [8] in the model"
    assert all(
        torch.isnan(flat_shard.data).all() for flat_shard in flat_shards if flat_shard.name == "embedding.weight"
    )


def test_another_optimizer_is_no_other_model(tmp_path: Path) -> None:
    save_virtually(tmp_path, 1)
    flat_shards = [flat_shard for flat_shard in shards_of_rank(1, 0, 1, 0, fill=None) if flat_shard.kind == "param"]
    flat_shards += [FlatShard.whole(p.name, "momentum_buffer", torch.zeros(p.global_shape)) for p in flat_shards]
    with pytest.raises(CheckpointError, match=r"holds the state of another optimizer than .*:\n  missing .* of emb"):
        load(tmp_path, flat_shards)


# --- no space -------------------------------------------------------------------------------------------------


def test_too_little_space_is_said_with_numbers_before_anything_is_written(tmp_path: Path) -> None:
    save_virtually(tmp_path, 1)
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=r"step 2 needs 1010000000.02 GB, but .* has [\d.]+ [GM]B free"):
        prepare(tmp_path, 2, needed=10**18)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("limit", [1 << 12, 1 << 16], ids=["header", "data"])
def test_a_disk_that_fills_up_leaves_everything_as_it_was(tmp_path: Path, limit: int) -> None:
    """A real refusal by the kernel: the process may not make a file longer than ``limit`` bytes."""
    save_virtually(tmp_path, 1)
    before = contents(tmp_path)
    flat_shard = FlatShard.whole("w", "param", torch.zeros(1 << 20))
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        with pytest.raises(CheckpointError, match="File too large"):
            save(tmp_path, 2, [flat_shard], {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert contents(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001"]


# --- direct I/O refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("refuse_at", ["open", "transfer"])
def test_a_filesystem_without_direct_io_gets_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, refuse_at: str
) -> None:
    real_open, real_write, real_read = os.open, os.pwrite, os.preadv
    state = [*shards_of_rank(1, 0, 1, 0), FlatShard.whole("big", "param", torch.arange(5_000_001.0))]
    direct = save(tmp_path / "direct", 1, state, {})

    def is_direct(fd: int) -> bool:
        import fcntl

        return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)

    def refusing_open(path: object, flags: int, *args: int) -> int:
        if flags & os.O_DIRECT and refuse_at == "open":
            raise OSError(22, "Invalid argument")
        return real_open(path, flags, *args)  # type: ignore[arg-type]

    def refusing(real: Callable[..., int]) -> Callable[..., int]:
        def transfer(fd: int, *args: object) -> int:
            if is_direct(fd):
                raise OSError(22, "Invalid argument")
            return real(fd, *args)

        return transfer

    monkeypatch.setattr(os, "open", refusing_open)
    monkeypatch.setattr(os, "pwrite", refusing(real_write))
    monkeypatch.setattr(os, "preadv", refusing(real_read))
    buffered = save(tmp_path / "buffered", 1, state, {})
    assert contents(direct) == contents(buffered)
    targets = [FlatShard(**{**vars(p), "data": torch.zeros_like(p.data)}) for p in state]
    load(tmp_path / "buffered", targets)
    assert all(torch.equal(a.data, b.data) for a, b in zip(state, targets))
    assert "refuses direct I/O" in caplog.text


def test_direct_io_is_not_given_up_without_need(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An unaligned write would be refused too, and the fallback would hide it."""
    probe = DirectFile.create(tmp_path / "probe", 4096)
    probe.finish(10)
    assert (tmp_path / "probe").stat().st_size == 10
    if not probe.direct:
        pytest.skip("the temporary directory's filesystem refuses O_DIRECT")
    state = [FlatShard.whole("odd", "param", torch.arange(5_000_001.0)), FlatShard.whole("one", "param", torch.ones(1))]
    save(tmp_path / "run", 1, state, {})
    load(tmp_path / "run", state)
    load(tmp_path / "run", state, verify=False)
    assert caplog.text == ""
