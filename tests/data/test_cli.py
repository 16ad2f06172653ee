"""The frame of the tools: one line for what the system refuses, and quiet when nobody reads on."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_ds.data.cli import guarded
from megatron_ds.errors import DataError

TOOLS = Path(__file__).parents[2] / "tools"


def raises(error: BaseException) -> Callable[[], int]:
    def program() -> int:
        raise error

    return program


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (DataError("a sentence"), 2, "error: a sentence\n"),
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), 2, "error: a/b: Permission denied\n"),
        (
            OSError(errno.EMFILE, "Too many open files", "f"),
            2,
            "error: f: Too many open files; allow more open files with `ulimit -n`\n",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            2,
            "error: No space left on device; free some space, or choose another place\n",
        ),
        (
            Exception("I/O error: No space left on device (os error 28)"),  # as tokenizers and safetensors raise it
            2,
            "error: I/O error: No space left on device (os error 28); free some space, or choose another place\n",
        ),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 141, ""),
        (SystemExit(0), 0, ""),
        (SystemExit(3), 3, ""),
    ],
)
def test_errors_are_a_line_and_an_exit_status(
    error: BaseException, code: int, said: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_ds.data.cli._leave_stdout", lambda: None)
    assert guarded(raises(error)) == code
    assert capfd.readouterr().err == said


@pytest.mark.parametrize("error", [ValueError("a defect"), OSError(errno.EBADF, "Bad file descriptor")])
def test_defects_keep_their_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        guarded(raises(error))


def test_what_the_program_returns_is_its_status() -> None:
    assert guarded(lambda: None) == 0 and guarded(lambda: 7) == 7


def tool(name: str, *arguments: object, **settings: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOLS / name), *map(str, arguments)]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, **settings)  # type: ignore[call-overload,no-any-return]


def test_nobody_reads_on_or_nothing_can_be_written() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = tool("build_corpus.py", "--help", stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")
    if Path("/dev/full").is_char_device():
        with open("/dev/full", "w") as full:
            done = tool("build_corpus.py", "--help", stdout=full)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "No space left" in done.stderr


@pytest.mark.parametrize("where", ["{tmp}", "{tmp}/file/below", "/proc/none", "{tmp}/fifo"])
@pytest.mark.parametrize(
    "command",
    [
        ["build_corpus.py", "--source", "{tmp}/texts", "--suffix", ".txt", "--output"],
        ["train_tokenizer.py", "--input", "{tmp}/texts", "--vocab-size", "300", "--output"],
        ["preprocess_data.py", "--quiet", "--input", "{tmp}/texts", "--tokenizer", "bytes", "--output-prefix"],
        ["show_schedule.py", "--pp", "2", "--micro-batches", "2", "--png"],
    ],
    ids=lambda command: command[0],
)
def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path, command: list[str], where: str) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("some words of a text " * 20)
    filled = [part.format(tmp=tmp_path) for part in (*command, where)]
    done = tool(*filled, stdout=subprocess.DEVNULL)
    beside = (("preprocess_data.py", "{tmp}"), ("preprocess_data.py", "{tmp}/fifo"), ("train_tokenizer.py", "{tmp}"))
    if (command[0], where) in beside:
        assert "Traceback" not in done.stderr, "its files may go there, or beside it"
        return
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ") and not last.startswith(f"error: {filled[-1]}."), "a name that nobody has given"


@pytest.mark.skipif(not __file__.isascii(), reason="Python does not find its packages there itself")
def test_a_path_that_the_locale_cannot_print(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("text")
    output = tmp_path / "größe.jsonl"
    ascii_only = {**os.environ, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    arguments = ["--source", tmp_path / "texts", "--suffix", ".txt", "--output", output]
    done = tool("build_corpus.py", *arguments, env=ascii_only, stdout=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    assert output.exists() and "1 documents" in done.stdout
    prefix = tmp_path / "größe"
    arguments = ["--input", output, "--tokenizer", "bytes", "--output-prefix", prefix, "--workers", "0"]
    done = tool("preprocess_data.py", *arguments, env=ascii_only, stdout=subprocess.PIPE)
    assert done.returncode == 0 and Path(f"{prefix}.idx").exists(), done.stderr


def test_examples_in_the_help_are_lines_of_their_own() -> None:
    shown = tool("build_corpus.py", "--help", stdout=subprocess.PIPE).stdout
    assert "\n    python tools/build_corpus.py --output runs/corpus.jsonl --max-megabytes 8\n" in shown
    shown = tool("train_tokenizer.py", "--help", stdout=subprocess.PIPE).stdout
    assert shown.count("\n    python tools/train_tokenizer.py --input ") == 2


def test_a_schedule_that_nobody_could_look_at() -> None:
    done = tool("show_schedule.py", "--pp", "1000000", stdout=subprocess.DEVNULL)
    assert done.returncode == 2
    assert "pp=1000000 x chunks=1 x micro_batches=8 have 16,000,000 forwards and backwards" in done.stderr
