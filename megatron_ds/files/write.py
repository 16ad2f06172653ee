"""Write files so that a reader finds the old contents or the new, and nothing between."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def temporary_beside(path: str | Path) -> Iterator[Path]:
    """Yields the path of a new file to write, for the caller to rename to ``path``; on leaving it is removed otherwise.

    It is locked meanwhile. What a process that was killed has left beside ``path`` is not locked any more, and removed
    first: whatever its host or container was, where process ids would say nothing.

    Raises:
        OSError: it cannot be made; or ``path`` is a directory, a device or the like, which a file must not replace.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        code = errno.EISDIR if path.is_dir() else errno.EEXIST
        raise OSError(code, "it is no regular file, and is not replaced by one", str(path))
    for leftover in path.parent.glob(f"{glob.escape(path.name)}.{'[0-9a-f]' * 8}.tmp"):
        _remove_unlocked(leftover)
    while True:
        temporary = Path(f"{path}.{secrets.token_hex(4)}.tmp")
        try:
            descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None  # the name that was given
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # another process removes it
                continue
            except OSError:  # where files cannot be locked nothing is removed
                pass
            if not temporary.exists():
                continue
            yield temporary
            return
        finally:
            try:
                temporary.unlink(missing_ok=True)
            finally:
                os.close(descriptor)


def _remove_unlocked(path: Path) -> None:
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        finally:
            os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields the path of a temporary file to write; on leaving, it takes the place of ``path`` in one operation.

    Left by an exception, ``path`` is as it was and the temporary file is removed.
    """
    with temporary_beside(path) as temporary:
        yield temporary
        os.replace(temporary, path)


def write_text_durably(path: Path, text: str) -> None:
    """Write and fsync a small file (its directory entry is made durable by :func:`sync_directory`)."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        sync_and_close(file)


def write_json(path: Path, value: Any) -> None:
    """Write and fsync a value as JSON to be read by people."""
    write_text_durably(path, json.dumps(value, indent=2) + "\n")


def sync_and_close(file: IO[bytes] | IO[str]) -> None:
    """Close a file once its bytes are on the disk, so that a later rename cannot outlive them."""
    with file:
        file.flush()
        os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
