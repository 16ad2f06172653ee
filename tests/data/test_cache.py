"""Caches: built once by whoever comes first, shared, never stale, and never needed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_ds.data.cache import cached_arrays, locked


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's own folder, which is used where nothing else can be written."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


class Builder:
    def __init__(self) -> None:
        self.built = 0

    def __call__(self) -> dict[str, np.ndarray]:
        self.built += 1
        return {"a": np.arange(10), "b": np.arange(6, dtype=np.int32).reshape(2, 3)}


def assert_built(arrays: dict[str, np.ndarray]) -> None:
    assert arrays["a"].tolist() == list(range(10)) and arrays["a"].dtype == np.int64
    assert arrays["b"].tolist() == [[0, 1, 2], [3, 4, 5]] and arrays["b"].dtype == np.int32


def test_built_once_then_mapped(tmp_path: Path) -> None:
    build = Builder()
    for _ in range(3):
        arrays = cached_arrays(tmp_path / "x", {"k": 1}, build)
        assert_built(arrays)
    assert build.built == 1
    base = arrays["a"]
    while isinstance(base.base, np.ndarray):
        base = base.base
    assert isinstance(base, np.memmap) and not arrays["a"].flags.writeable
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x"]  # no lock or temporary file is left


def test_another_key_or_a_damaged_file_is_built_again(tmp_path: Path) -> None:
    build = Builder()
    cached_arrays(tmp_path / "x", {"k": 1}, build)
    assert_built(cached_arrays(tmp_path / "x", {"k": 2}, build))
    assert build.built == 2
    content = (tmp_path / "x").read_bytes()
    for damaged in (content[:-1], content[:20], b"", content[:-3] + b"\x07" + content[-2:], b"\xff" * 100):
        (tmp_path / "x").write_bytes(damaged)
        before = build.built
        assert_built(cached_arrays(tmp_path / "x", {"k": 2}, build))
        assert build.built == before + 1
        assert_built(cached_arrays(tmp_path / "x", {"k": 2}, build))
        assert build.built == before + 1


def test_a_directory_that_cannot_be_written(tmp_path: Path, home: Path) -> None:
    (tmp_path / "file").touch()
    unwritable = tmp_path / "file" / "x"  # below a file: fails for root too
    build = Builder()
    for _ in range(2):
        assert_built(cached_arrays(unwritable, {}, build))
    assert build.built == 1 and len(list(home.glob(".cache/megatron-ds/*-x"))) == 1


def test_no_place_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    build = Builder()
    for _ in range(2):
        assert_built(cached_arrays(tmp_path / "file" / "x", {}, build))
    assert build.built == 2
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])  # no home at all
    assert_built(cached_arrays(tmp_path / "file" / "x", {}, build))


def test_a_cache_directory_can_be_given(tmp_path: Path) -> None:
    build = Builder()
    for _ in range(2):
        cached_arrays(tmp_path / "x", {}, build, cache_dir=tmp_path / "cache" / "deep")
    assert build.built == 1 and len(list((tmp_path / "cache" / "deep").iterdir())) == 1
    assert not (tmp_path / "x").exists()


def test_an_error_keeps_nothing(tmp_path: Path) -> None:
    def fail() -> dict[str, np.ndarray]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cached_arrays(tmp_path / "x", {}, fail)
    assert_built(cached_arrays(tmp_path / "x", {}, Builder()))
    assert_built(cached_arrays(tmp_path / "x", {}, fail))


def _read(path: Path, log: Path, barrier: object) -> None:
    barrier.wait()  # type: ignore[attr-defined]

    def build() -> dict[str, np.ndarray]:
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.3)
        return Builder()()

    assert_built(cached_arrays(path, {}, build))


def test_one_of_many_processes_builds(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(6)
    processes = [context.Process(target=_read, args=(tmp_path / "x", tmp_path / "log", barrier)) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len((tmp_path / "log").read_text().splitlines()) == 1


def _hold(path: Path) -> None:
    with locked(path):
        path.with_suffix(".held").touch()
        time.sleep(60)


def test_a_lock_dies_with_its_holder(tmp_path: Path) -> None:
    lock = tmp_path / "x.lock"
    process = multiprocessing.get_context("fork").Process(target=_hold, args=(lock,))
    process.start()
    while not lock.with_suffix(".held").exists():
        time.sleep(0.01)
    with pytest.raises(BlockingIOError), locked(lock, wait=False):
        pass
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    build = Builder()
    assert_built(cached_arrays(tmp_path / "x", {}, build))
    assert build.built == 1


# --- somebody else on the same host -----------------------------------------------------------------------------


def test_links_and_pipes_in_place_of_files_are_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in ("x", "x.lock", "x.01234567.tmp"):
        for make in (lambda path: path.symlink_to(victim), os.mkfifo):
            folder = tmp_path / f"{name}-{make.__name__}"
            folder.mkdir()
            make(folder / name)
            for _ in range(2):
                assert_built(cached_arrays(folder / "x", {}, Builder()))
    assert victim.read_text() == "precious"
    (tmp_path / "lock").symlink_to(victim)
    with pytest.raises(OSError, match="lock"), locked(tmp_path / "lock"):
        pass
    assert victim.read_text() == "precious"


def test_a_cached_value_of_great_depth_is_made_again(tmp_path: Path) -> None:
    header = b"[" * 200_000
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header)
    assert_built(cached_arrays(tmp_path / "x", {}, Builder()))
