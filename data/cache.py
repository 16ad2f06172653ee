"""Results that are computed once a node and read by all its ranks.

The first process to come takes a lock and computes; the others wait and read. A result appears by an atomic rename
and carries its *key* (the identity of the files it was made from, and the settings): with another key it does not
count, so nothing stale is ever read. A directory that cannot be written is no error: the next candidate is used,
and in the end the result is computed without being kept.

Nowhere is a link followed that has taken a file's name.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from megatron_ds.files import checksum, parse_json, replacing

_TYPES = {"I64": "<i8", "I32": "<i4", "U8": "u1", "U64": "<u8", "F64": "<f8"}


def default_cache_dir() -> Path:
    return Path.home() / ".cache" / "megatron-ds"


def candidates(path: Path, cache_dir: Path | None = None) -> list[Path]:
    """Where a cached file may be: in ``cache_dir`` if that is given, else at ``path``, else in this user's own cache
    folder, named after ``path``."""
    whole = Path(os.path.realpath(path.parent)) / path.name  # the file itself may be a link to nowhere, or to itself
    unique = f"{checksum(os.fsencode(whole))}-{path.name}"
    first = path if cache_dir is None else cache_dir / unique
    try:
        return [first, default_cache_dir() / unique]
    except RuntimeError:  # a user without a home
        return [first]


def open_plain(path: Path, flags: int) -> int:
    """A descriptor of a regular file; a link, a pipe or a device that stands in its place is an ``OSError``."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is not a regular file")
    return descriptor


def first_difference(before: Any, now: Any, where: str = "") -> str:
    """Where two JSON values first differ, and how, for an error message; empty where they are equal."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in {**before, **now}:
            label = f"{before['path']}: {name}" if "path" in before and name != "path" else f"{where}{name}"
            if found := first_difference(before.get(name), now.get(name), f"{label}." if "path" not in before else ""):
                return found if found.startswith(label) else f"{label}{'' if found[0] == ' ' else ': '}{found}"
        return ""
    if isinstance(before, list) and isinstance(now, list):
        for one, other in zip(before, now):
            if found := first_difference(one, other):
                return found
        return f" had {len(before)} entries, now {len(now)}" if len(before) != len(now) else ""
    return f" was {before!r}, is now {now!r}" if before != now else ""


def cached_arrays(
    path: Path,
    key: dict[str, Any],
    build: Callable[[], dict[str, npt.NDArray]],
    cache_dir: Path | None = None,
) -> dict[str, npt.NDArray]:
    """The arrays that ``build`` returns, mapped read-only from a file that all processes of the node share.

    The file, one of the :func:`candidates` for ``path``, is safetensors; its header also holds the key (JSON values on
    which the result depends) and a checksum of the arrays, which is compared whenever it is opened: a damaged one
    is made again. Exceptions of ``build`` pass through, and nothing is kept then.
    """
    text, files = json.dumps(key, sort_keys=True), candidates(path, cache_dir)
    for file in files:
        if (found := _read(file, text)) is not None:
            return found
    for file in files:
        with contextlib.ExitStack() as stack:
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(file.with_name(file.name + ".lock")))
            except OSError:
                continue  # read-only, full or missing: try the next place
            if (found := _read(file, text)) is not None:
                return found  # made by another process while this one waited
            built = build()
            with contextlib.suppress(OSError), replacing(file) as temporary:
                _write(temporary, text, built)
            return built
    return build()


def _read(file: Path, key: str) -> dict[str, npt.NDArray] | None:
    """The arrays in a file; None where it is missing, damaged or of another key."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        with open(open_plain(file, os.O_RDONLY), "rb") as opened:
            raw = np.memmap(opened, np.uint8, "r")
        start = 8 + int(raw[:8].view("<u8")[0])
        header = parse_json(raw[8:start].tobytes())
        metadata = header.pop("__metadata__")
        if metadata["key"] == key and metadata["xxh3"] == checksum(raw[start:].data):
            return {
                name: raw[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]]
                .view(_TYPES[entry["dtype"]])
                .reshape(entry["shape"])
                for name, entry in header.items()
            }
    return None


def _write(file: Path, key: str, arrays: dict[str, npt.NDArray]) -> None:
    """Write a file that was just made, and nothing that somebody put in its place."""
    content = safetensors.numpy.save(arrays)
    body = content[8 + int.from_bytes(content[:8], "little") :]
    metadata = {"key": key, "xxh3": checksum(body)}
    with open(open_plain(file, os.O_WRONLY | os.O_TRUNC), "wb") as opened:
        opened.write(safetensors.numpy.save(arrays, metadata))


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold an exclusive lock on a file made for it; a process that dies lets it go. No-op where files cannot be locked.

    Raises:
        BlockingIOError: another process holds it, and ``wait`` is False.
        OSError: the file cannot be made, or is a link.
    """
    while True:
        with open(open_plain(path, os.O_RDWR | os.O_CREAT), "r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise
            except OSError:
                pass
            try:
                # The holder before removed the file: whoever comes next would lock another one of the same name.
                if not os.path.samestat(os.fstat(file.fileno()), path.lstat()):
                    continue
            except FileNotFoundError:
                continue
            try:
                yield
                return
            finally:
                path.unlink(missing_ok=True)
