"""Write files so that a reader finds the old contents or the new, and nothing between."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


def temporary_beside(path: str | Path) -> Path:
    """Where this process writes a file that will get the name ``path`` once it is complete."""
    return Path(f"{path}.{os.getpid()}.tmp")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields the path of a temporary file to write; on leaving, it takes the place of ``path`` in one operation.

    Left by an exception, ``path`` is as it was and the temporary file is removed.
    """
    temporary = temporary_beside(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text_durably(path: Path, text: str) -> None:
    """Write and fsync a small file (its directory entry is made durable by :func:`sync_directory`)."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        sync_and_close(file)


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
