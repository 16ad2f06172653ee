"""Small files from elsewhere: whatever lies in their place is one error at once, in bounded memory."""

from __future__ import annotations

import multiprocessing
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from megatron_ds.files import check_regular, open_regular, parse_json, read_bytes, read_json, read_text, replacing


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as own:
        own.bind(str(path))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (os.mkfifo, "it is a FIFO, not a regular file"),
        (os.mkdir, "it is a directory, not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "it is a device, not a regular file"),
        (lambda path: path.symlink_to(path), "Too many levels"),
        (lambda path: None, "No such file"),
        (a_socket, "No such device or address"),
    ],
)
@pytest.mark.parametrize("reader", [open_regular, check_regular, read_bytes, read_text, read_json])
def test_what_is_no_regular_file_is_an_error_at_once(
    tmp_path: Path, make: Callable[[Path], None], message: str, reader: Callable[[Path], object]
) -> None:
    make(tmp_path / "x")
    with pytest.raises(OSError, match=message):
        reader(tmp_path / "x")


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as file:
        file.truncate(1 << 40)  # takes no space, and would take all memory
    with pytest.raises(OSError, match="it has 1,099,511,627,776 bytes, and such a file at most 268,435,456"):
        read_json(tmp_path / "x")


@pytest.mark.parametrize(
    "text", [b"[" * 200_000, b'{"a":' * 200_000, b"9" * 5000, b"\xff\xfe{", b'{"a": 1', b""], ids=lambda text: text[:5]
)
def test_json_of_any_kind_is_a_value_or_a_value_error(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "x").write_bytes(text)
    with pytest.raises(ValueError):
        read_json(tmp_path / "x")


def test_what_is_right_is_read(tmp_path: Path) -> None:
    (tmp_path / "x").write_text('{"a": [1, 2.5, "é"]}', encoding="utf-8")
    assert read_json(tmp_path / "x") == {"a": [1, 2.5, "é"]} == parse_json(read_text(tmp_path / "x"))
    assert read_json(tmp_path / "x", pairs=list) == [("a", [1, 2.5, "é"])]
    with open_regular(tmp_path / "x") as file:
        assert file.read(3) == b'{"a'
    (tmp_path / "link").symlink_to("x")
    assert read_bytes(tmp_path / "link") == (tmp_path / "x").read_bytes()


# --- writing --------------------------------------------------------------------------------------------------


def write_forever(path: Path, ready: Connection) -> None:
    with replacing(path) as temporary:
        temporary.write_text("half")
        ready.send(None)
        signal.pause()


def test_the_next_writer_removes_what_a_killed_one_left_and_nothing_else(tmp_path: Path) -> None:
    names = ("x.old.tmp", "x.0123456.tmp", "xx.01234567.tmp")  # of somebody else
    for name in names:
        (tmp_path / name).write_text("precious")
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    other = context.Process(target=write_forever, args=(tmp_path / "x", theirs))
    other.start()
    ours.recv()
    for text in ("beside it", "after it"):
        with replacing(tmp_path / "x") as temporary:
            temporary.write_text(text)
        assert (tmp_path / "x").read_text() == text
        assert len(list(tmp_path.iterdir())) == len(names) + 1 + other.is_alive()
        other.kill()
        other.join()
    assert all((tmp_path / name).read_text() == "precious" for name in names)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/null")])
def test_what_is_no_regular_file_is_not_replaced(tmp_path: Path, make: Callable[[Path], None]) -> None:
    """As ``--output /dev/null`` would, given by root."""
    make(tmp_path / "x")
    before = (tmp_path / "x").lstat()
    with pytest.raises(OSError, match="it is no regular file, and is not replaced by one"), replacing(tmp_path / "x"):
        pytest.fail("what it would be replaced by is made in vain")
    assert os.path.samestat(before, (tmp_path / "x").lstat()) and len(list(tmp_path.iterdir())) == 1


# --- standard output ------------------------------------------------------------------------------------------

PROGRAM = """
import sys
from megatron_ds.files import print_line
for number in range(2000):
    print_line(number)
print("went on", file=sys.stderr)
"""


@pytest.mark.parametrize("where", ["> /dev/full", "| true", ">&-"])
def test_a_run_goes_on_without_a_standard_output(where: str) -> None:
    command = f"set -o pipefail; {shlex.quote(sys.executable)} -c '{PROGRAM}' {where}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr.endswith("went on\n"), done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert done.stderr.count("standard output is lost, and not needed") == (where != ">&-")
