"""Preprocessing that is stopped, killed or run twice, and inputs that change meanwhile."""

from __future__ import annotations

import contextlib
import gc
import gzip
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from preprocess_helpers import REPOSITORY, TEXTS, Killed, blocks_of, jsonl, outputs, run
from small_disk import small_disk

from megatron_ds.data import sources
from megatron_ds.data.parts import Counts, PartMaker, PreprocessOptions
from megatron_ds.data.preprocess import preprocess
from megatron_ds.data.source_text import Block, SourceOptions
from megatron_ds.errors import DataError


def test_any_number_of_workers_writes_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MIN_BLOCK", 200)
    source = tmp_path / "in.jsonl"
    source.write_bytes(jsonl(TEXTS * 3))
    run([source], tmp_path / "none", workers=0)
    run([source], tmp_path / "three", workers=3)
    assert outputs(tmp_path / "none") == outputs(tmp_path / "three")


@pytest.mark.parametrize("compressed", [False, True])
def test_stopped_at_every_block_and_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compressed: bool
) -> None:
    """In this process: an exception after each number of blocks; blocks that were finished are not made again."""
    blocks_of(700, monkeypatch)
    source = tmp_path / ("in.jsonl.gz" if compressed else "in.jsonl")
    content = jsonl(TEXTS) + b"bad line\n" + jsonl(TEXTS[::-1])
    source.write_bytes(gzip.compress(content) if compressed else content)
    run([source], tmp_path / "whole")
    expected = outputs(tmp_path / "whole")
    real, made = PartMaker.__call__, []

    for survivors in range(1, 30):

        def killing(maker: PartMaker, block: Block, survivors: int = survivors) -> tuple[int, Counts]:
            if len(made) == survivors:
                raise Killed
            done = real(maker, block)
            made.append(block.name)
            return done

        monkeypatch.setattr(PartMaker, "__call__", killing)
        made.clear()
        prefix = tmp_path / f"stopped{survivors}"
        try:
            preprocess([str(source)], prefix, PreprocessOptions("bytes"), 0)
        except Killed:
            assert not prefix.with_suffix(".idx").exists()
            first = list(made)
            monkeypatch.setattr(PartMaker, "__call__", lambda m, b: (made.append(b.name), real(m, b))[1])
            run([source], prefix)
            assert made[: len(first)] == first and len(set(made)) == len(made)
        assert outputs(prefix) == expected
        if len(made) == survivors:
            break
    else:
        pytest.fail("never ran to its end")


def test_the_progress_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    blocks_of(700, monkeypatch)
    source = tmp_path / "in.jsonl"
    source.write_bytes(jsonl(TEXTS))
    run([source], tmp_path / "out", show_progress=True)
    tokens = sum(len(text.encode()) for text in TEXTS)
    last = capfd.readouterr().err.split("\r")[-1]
    assert re.search(rf"preprocess: 100%.*\[\d\d:\d\d<\d\d:\d\d, .*B/s, 40 docs, {tokens:,} tokens\]", last), last
    run([source], tmp_path / "quiet")
    assert capfd.readouterr().err == ""


def _preprocess_alone(source: Path, prefix: Path) -> None:
    gc.freeze()  # a collection would copy the whole heap of the process it was forked from
    os.setsid()  # its workers are of its group
    preprocess([str(source)], prefix, PreprocessOptions("bytes"), 2)


def test_killed_at_random_moments_and_continued(tmp_path: Path) -> None:
    """The whole process group, SIGKILL: while it starts, between and inside blocks, and in the merge."""
    source = tmp_path / "in.jsonl"
    source.write_bytes(jsonl([f"{i} {t}" * 200 for i in range(40) for t in TEXTS]))  # about 13 MB, 13 blocks
    run([source], tmp_path / "whole", workers=0)
    prefix = tmp_path / "killed"
    draw, killed = random.Random(1), 0
    for wanted in (0, 1, 4, 9, 13):  # parts that are there when the signal is sent, or shortly before
        # Forked: what a new interpreter imports before it begins would take longer than all else here.
        process = multiprocessing.get_context("fork").Process(target=_preprocess_alone, args=(source, prefix))
        process.start()
        assert process.pid is not None
        while process.is_alive() and len(list(tmp_path.glob("killed.parts/*.part"))) < wanted:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.01))
        killed += process.is_alive()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()  # before it had a group of its own
        process.join()
    assert killed >= 3, "it ended before it was killed"  # a busy machine may look too late for the others
    run([source], prefix, workers=2)
    assert outputs(prefix) == outputs(tmp_path / "whole")


def test_workers_do_not_outlive_their_parent(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(jsonl([t * 500 for t in TEXTS * 200]))
    command = [sys.executable, str(REPOSITORY / "tools/preprocess_data.py"), "--input", str(source), "--quiet"]
    command += ["--tokenizer", "bytes", "--output-prefix", str(tmp_path / "out"), "--workers", "2"]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("out.parts/*.bin")) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        while _group_members(process.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert _group_members(process.pid) == []
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _group_members(group: int) -> list[int]:
    members = []
    for entry in Path("/proc").iterdir():
        try:
            state, _, found = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
        except (OSError, ValueError):
            continue
        if entry.name.isdigit() and int(found) == group and state != "Z":
            members.append(int(entry.name))
    return members


@pytest.fixture
def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """(input, prefix) of a run that was stopped after its first block."""
    blocks_of(300, monkeypatch)
    source, prefix = tmp_path / "in.jsonl", tmp_path / "out"
    source.write_bytes(jsonl(TEXTS))
    real = PartMaker.__call__

    def stop_after_first(maker: PartMaker, block: Block) -> None:
        real(maker, block)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(PartMaker, "__call__", stop_after_first)
        with pytest.raises(Killed):
            preprocess([str(source)], prefix, PreprocessOptions("bytes"), 0)
    return source, prefix


def test_what_a_run_leaves_in_its_folder_of_inputs_is_none(interrupted: tuple[Path, Path]) -> None:
    source, prefix = interrupted
    assert run([source.parent], prefix) == TEXTS  # it goes on, beside the plan of before
    source.write_bytes(source.read_bytes() + b"{\n")
    for _ in range(2):  # beside a manifest, and bad records
        assert run([source.parent], prefix) == TEXTS
        assert len(Path(f"{prefix}.bad.jsonl").read_text().splitlines()) == 1


def test_a_changed_input_is_noticed(interrupted: tuple[Path, Path]) -> None:
    source, prefix = interrupted
    content = source.read_bytes()
    source.write_bytes(content.replace(b"document 39", b"document XX"))
    with pytest.raises(DataError, match=r"with other inputs or settings: .*in\.jsonl: (mtime_ns|sampled_xxh3) was"):
        run([source], prefix)
    source.write_bytes(content + b"\n")
    with pytest.raises(DataError, match=r"settings: inputs: .*in\.jsonl: size was \d+, is now"):
        run([source], prefix)
    assert run([source], prefix, restart=True) == TEXTS


def test_changed_settings_are_noticed(interrupted: tuple[Path, Path]) -> None:
    source, prefix = interrupted
    with pytest.raises(DataError, match=r"settings\.append_eod was False, is now True"):
        run([source], prefix, PreprocessOptions("bytes", append_eod=True))
    with pytest.raises(DataError, match=r"settings\.source\.key was 'text', is now 'n'"):
        run([source], prefix, PreprocessOptions("bytes", source=SourceOptions("n")))
    with pytest.raises(DataError, match=r"inputs had 1 entries, now 2"):
        run([source, source], prefix)


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".part"])
def test_a_damaged_part_is_made_again(interrupted: tuple[Path, Path], suffix: str) -> None:
    source, prefix = interrupted
    (part,) = Path(f"{prefix}.parts").glob(f"*{suffix}")
    content = bytearray(part.read_bytes())
    content[0] ^= 1
    part.write_bytes(content)
    assert run([source], prefix) == TEXTS


def test_an_input_that_changes_meanwhile_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(jsonl(TEXTS))
    real = PartMaker.__call__
    monkeypatch.setattr(PartMaker, "__call__", lambda *a: (real(*a), source.write_bytes(jsonl(TEXTS[::-1])))[0])
    with pytest.raises(DataError, match="an input changed while it was read"):
        run([source], tmp_path / "out")
    assert not (tmp_path / "out.idx").exists()


def test_a_full_disk_is_named_and_what_fitted_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks_of(20_000, monkeypatch)
    (tmp_path / "in.jsonl").write_bytes(jsonl(["x" * 10_000] * 100))
    with small_disk(tmp_path, 1, "tmpfs") as disk:
        with pytest.raises(OSError, match="No space left on device") as told:
            preprocess([str(tmp_path / "in.jsonl")], disk / "out", PreprocessOptions("bytes"), 0)
        assert told.value.filename == str(disk / "out")
        assert [path.name for path in disk.iterdir()] == ["out.parts"]
        kept = list((disk / "out.parts").glob("*.part"))
        assert kept and all(path.with_suffix(".bin").is_file() for path in kept)


def test_two_runs_on_one_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(jsonl(TEXTS))
    real, refused = PartMaker.__call__, []

    def start_another(maker: PartMaker, block: Block) -> tuple[int, Counts]:
        with pytest.raises(DataError, match="another run is writing this dataset"):
            preprocess([str(source)], tmp_path / "out", PreprocessOptions("bytes"), 0)
        refused.append(block)
        return real(maker, block)

    monkeypatch.setattr(PartMaker, "__call__", start_another)
    assert run([source], tmp_path / "out") == TEXTS and refused


@pytest.mark.parametrize("restart", [False, True])
def test_a_folder_of_others_is_not_removed_as_a_runs_parts(tmp_path: Path, restart: bool) -> None:
    """Here it holds the very inputs."""
    (folder := tmp_path / "out.parts").mkdir()
    (source := folder / "in.jsonl").write_bytes(jsonl(TEXTS))
    with pytest.raises(DataError, match=r"out\.parts is where the parts .* holds in\.jsonl, which is of none; choose"):
        preprocess([str(folder)], tmp_path / "out", PreprocessOptions("bytes"), 0, restart)
    assert source.read_bytes() == jsonl(TEXTS)
    source.rename(tmp_path / "in.jsonl")
    (folder / "000000-000000.bin").touch()  # what a run leaves that is killed while it removes them
    assert run([tmp_path / "in.jsonl"], tmp_path / "out") == TEXTS
