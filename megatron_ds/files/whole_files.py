"""Read small files that other people made: a regular file of bounded size, or one error at once.

A FIFO in a file's place would block its reader for ever, a device would never end, and a text of 200,000 brackets or
of a terabyte would take the process with it. Every reader of small files goes through here.

The readers raise ``OSError`` (cannot be opened, not a regular file, too large) or ``ValueError`` (not UTF-8, not
JSON, nested too deeply), which the caller turns into its own error with the name of the file.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

MOST_BYTES = 256 << 20
"""Of a file that is read whole: above any tokenizer, configuration or index of shards."""

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def open_regular(path: str | Path) -> IO[bytes]:
    """Open a regular file to read its bytes; never waits, whatever lies there."""
    # Without O_NONBLOCK the open itself would wait for a FIFO's writer; it changes nothing for a regular file.
    return os.fdopen(_open(path), "rb")


def check_regular(path: str | Path) -> None:
    """An ``OSError`` unless ``path`` is a regular file that can be read: before a library opens it by its name."""
    os.close(_open(path))


def read_bytes(path: str | Path, most: int = MOST_BYTES) -> bytes:
    """All of a regular file of at most ``most`` bytes."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise OSError(errno.EFBIG, f"it has {size:,} bytes, and such a file at most {most:,}", str(path))
        return file.read(size)  # not `most`: that many bytes would be allocated first


def read_text(path: str | Path, most: int = MOST_BYTES) -> str:
    """All of a regular UTF-8 file, without the byte order mark that some editors put in front."""
    return read_bytes(path, most).decode("utf-8-sig")


def read_json(path: str | Path, most: int = MOST_BYTES, pairs: Callable[..., Any] | None = None) -> Any:
    """The JSON value in a regular file; ``pairs``: what makes an object of its (name, value) pairs."""
    return parse_json(read_bytes(path, most), pairs)


def read_object(path: str | Path, error: Callable[[str], Exception], way_out: str = "") -> dict[str, Any]:
    """The JSON object in a regular file; else an ``error`` of the caller's class, with the way out."""
    try:
        value = read_json(path)
    except (OSError, ValueError) as reason:
        raise error(f"{path} cannot be read: {reason}{way_out}") from reason
    if not isinstance(value, dict):
        raise error(f"{path} holds no JSON object but {type(value).__name__}{way_out}")
    return value


def parse_json(text: str | bytes, pairs: Callable[..., Any] | None = None) -> Any:
    """``json.loads``, whose every failure is a ``ValueError``."""
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _open(path: str | Path) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        what = next((name for test, name in _KINDS if test(mode)), "something else")
        code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise OSError(code, f"it is {what}, not a regular file", str(path))
    return fd
