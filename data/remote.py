"""Datasets at a URL of any filesystem that fsspec knows, read through a cache on this node's disk.

The index comes whole. The tokens come in chunks, when they are first read, into a sparse file of the final size; a
second file holds each chunk's checksum (8 bytes), 0 until the chunk is on the disk. All processes of the node share
both, and each chunk is fetched once. Where the dataset has a manifest of this library, every chunk and file is compared
with its checksum on arrival; and each process compares a chunk of the copy with its checksum before it first reads it
(1 to 2 ms for 16 MB), so that a damaged copy is named too.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from megatron_ds.data.cache import locked
from megatron_ds.errors import DataError
from megatron_ds.files import read_json, replacing

CHUNK_BYTES = 16 << 20
OPTIONAL = ("manifest.json", "loss_mask")
_COMPLETE = "fetched.json"
"""Says which version of the remote files a folder of the cache belongs to; written last."""


def is_url(prefix: str) -> bool:
    return "://" in prefix


def default_cache_dir() -> Path:
    return Path.home() / ".cache" / "megatron-ds"


@dataclass(frozen=True)
class RemoteDataset:
    """A dataset whose index lies at ``prefix`` in the cache.

    ``identity`` tells this version of the remote files from any other; ``checked``: a manifest vouches for every
    byte, on arrival.
    """

    url: str
    prefix: str
    identity: dict[str, Any]
    checked: bool
    chunk_sums: tuple[str, ...]
    filesystem: Any
    bin_path: str

    def tokens(self, dtype: np.dtype) -> RemoteTokens:
        return RemoteTokens(self, dtype)


def open_remote(url: str, cache_dir: Path | None = None) -> RemoteDataset:
    """Bring the index (and manifest and loss mask, where there are) of ``url``, a prefix, into the cache.

    Raises:
        DataError: no such files, a filesystem that is not installed or does not answer, files that are not those of
            the manifest, or that changed since they were cached, or a cache folder that cannot be written.
    """
    import fsspec  # type: ignore[import-untyped]

    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise DataError(f"{url} cannot be read: {error}") from None
    unique = xxhash.xxh3_64_hexdigest(url.encode())
    folder = (cache_dir or default_cache_dir()) / f"{unique}-{Path(path).name}"
    prefix = str(folder / Path(path).name)
    with _told(url):
        found = {name: _identity(filesystem, f"{path}.{name}", name in OPTIONAL) for name in ("idx", "bin", *OPTIONAL)}
    identity = {name: value for name, value in found.items() if value is not None}
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / "lock"):
            _compare_with_cached(url, folder, identity)
            if not (folder / _COMPLETE).is_file():
                with _told(url):
                    for name in identity:
                        if name != "bin":
                            filesystem.get_file(f"{path}.{name}", f"{prefix}.{name}")
                    _check_arrived(url, prefix, identity)
                size = identity["bin"]["size"]
                for suffix, length in (("bin", size), ("bin.sums", 8 * _chunks(size))):
                    with open(f"{prefix}.{suffix}", "wb") as file:
                        file.truncate(length)
                _commit(folder / _COMPLETE, {"url": url, "identity": identity})
    sums = _manifest(prefix).get("bin", {}).get("chunks", [])
    if sums and len(sums) != _chunks(identity["bin"]["size"]):
        raise DataError(f"{url}.manifest.json has checksums of {len(sums)} chunks; .bin does not have as many")
    return RemoteDataset(url, prefix, identity, bool(sums), tuple(sums), filesystem, f"{path}.bin")


class RemoteTokens:
    """Looks like the array of all tokens where a dataset needs it: ``size``, ``dtype``, an index or a slice."""

    def __init__(self, remote: RemoteDataset, dtype: np.dtype):
        self._remote, self.dtype = remote, dtype
        with _writing(Path(remote.prefix).parent):
            self._file = open(f"{remote.prefix}.bin", "r+b", buffering=0)  # noqa: SIM115  (kept open for its lifetime)
            self._sums_file = open(f"{remote.prefix}.bin.sums", "r+b", buffering=0)  # noqa: SIM115
        self._bytes = remote.identity["bin"]["size"]
        self._map: npt.NDArray = np.memmap(self._file, dtype=dtype, mode="r")
        self._content: npt.NDArray[np.uint8] = np.memmap(self._file, dtype=np.uint8, mode="r")
        self._sums: npt.NDArray[np.uint64] = np.memmap(self._sums_file, dtype="<u8", mode="r")
        self._compared = np.zeros(self._sums.size, bool)
        self._mutex = threading.Lock()
        self.size = int(self._map.size)

    def __getitem__(self, where: int | slice) -> Any:
        start, stop, step = where.indices(self.size) if isinstance(where, slice) else (where, where + 1, 1)
        if stop > start:
            first, last = start * self.dtype.itemsize // CHUNK_BYTES, (stop * self.dtype.itemsize - 1) // CHUNK_BYTES
            for chunk in range(first, last + 1):
                if not self._compared[chunk]:
                    self._fetch(chunk)
        assert step == 1, "tokens are read in runs"
        return self._map[where]

    def _fetch(self, chunk: int) -> None:
        """Make sure that the chunk is there and is what arrived."""
        start = chunk * CHUNK_BYTES
        stop = min(start + CHUNK_BYTES, self._bytes)
        # The lock on a byte of the file keeps other processes out, the mutex other threads of this one.
        with self._mutex:
            fcntl.lockf(self._sums_file, fcntl.LOCK_EX, 1, chunk)
            try:
                if not self._sums[chunk]:
                    with _told(self._remote.url):
                        content = self._remote.filesystem.cat_file(self._remote.bin_path, start=start, end=stop)
                    self._check(chunk, content, stop - start)
                    with _writing(Path(self._remote.prefix).parent):
                        os.pwrite(self._file.fileno(), content, start)
                        os.fdatasync(
                            self._file.fileno()
                        )  # the checksum must not survive a crash that its chunk did not
                        os.pwrite(self._sums_file.fileno(), struct.pack("<Q", _sum(content)), 8 * chunk)
                elif _sum(self._content[start:stop].data) != self._sums[chunk]:
                    folder = Path(self._remote.prefix).parent
                    raise DataError(
                        f"{self._remote.prefix}.bin, the copy of {self._remote.url}.bin on this node, is damaged in "
                        f"chunk {chunk} of {CHUNK_BYTES >> 20} MB: it is not what was fetched. Delete {folder} to "
                        "fetch it again"
                    )
                self._compared[chunk] = True
            finally:
                fcntl.lockf(self._sums_file, fcntl.LOCK_UN, 1, chunk)

    def _check(self, chunk: int, content: bytes, expected: int) -> None:
        where = f"{self._remote.url}.bin, chunk {chunk} of {CHUNK_BYTES >> 20} MB"
        if len(content) != expected:
            raise DataError(
                f"{where}: expected {expected} bytes, found {len(content)}: the file changed or was cut off"
            )
        if self._remote.chunk_sums:
            found = xxhash.xxh3_64_hexdigest(content)
            if found != self._remote.chunk_sums[chunk]:
                raise DataError(
                    f"{where} is not what was written: its checksum is {found}, but the manifest says "
                    f"{self._remote.chunk_sums[chunk]}. It was damaged, swapped or changed: copy it there again"
                )


def _sum(content: bytes | memoryview) -> int:
    """A chunk's checksum, never 0: that stands for a chunk which is not there."""
    return xxhash.xxh3_64_intdigest(content) or 1


def _chunks(size: int) -> int:
    return -(-size // CHUNK_BYTES)


def _identity(filesystem: Any, path: str, optional: bool) -> dict[str, Any] | None:
    try:
        return {"size": int(filesystem.info(path)["size"]), "version": str(filesystem.ukey(path))}
    except FileNotFoundError:
        if optional:
            return None
        raise


def _compare_with_cached(url: str, folder: Path, identity: dict[str, Any]) -> None:
    if not (folder / _COMPLETE).is_file():
        return
    cached = read_json(folder / _COMPLETE)["identity"]
    changed = [name for name in {**cached, **identity} if cached.get(name) != identity.get(name)]
    if changed:
        raise DataError(
            f"{url}.{changed[0]} changed since it was cached: it was {cached.get(changed[0])}, is now "
            f"{identity.get(changed[0])}. To read the new version, delete {folder}"
        )


def _check_arrived(url: str, prefix: str, identity: dict[str, Any]) -> None:
    """Sizes of what was fetched, and checksums where the manifest has them."""
    stated = _manifest(prefix)
    for name in identity:
        if name == "bin":
            continue
        content_path = Path(f"{prefix}.{name}")
        size = content_path.stat().st_size
        if size != identity[name]["size"]:
            raise DataError(f"{url}.{name}: expected {identity[name]['size']} bytes, found {size}")
        if name in stated:
            found = xxhash.xxh3_64_hexdigest(content_path.read_bytes())
            if found != stated[name]["xxh3"]:
                raise DataError(
                    f"{url}.{name} is not the file that was written: its checksum is {found}, but the manifest says "
                    f"{stated[name]['xxh3']}. It was damaged, swapped or changed: copy it there again"
                )
    if "bin" in stated and stated["bin"]["bytes"] != identity["bin"]["size"]:
        raise DataError(f"{url}.bin: expected {stated['bin']['bytes']} bytes, found {identity['bin']['size']}")


def _manifest(prefix: str) -> dict[str, Any]:
    """The ``files`` of the manifest that was fetched, empty without one."""
    path = Path(f"{prefix}.manifest.json")
    if not path.is_file():
        return {}
    try:
        files = read_json(path)["files"]
        return files if isinstance(files, dict) else {}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"the manifest {path} is damaged: {error!r}") from None


def _commit(path: Path, content: dict[str, Any]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content))


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """A disk that is full or cannot be written, as an error of ours with the way out."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"the copy of a remote dataset cannot be kept in {folder}: {error}; set data.cache_dir to a folder on a "
            "disk of this node with room for it"
        ) from None


@contextlib.contextmanager
def _told(url: str) -> Iterator[None]:
    """Errors of a filesystem, of whatever class its library has, as ours."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{url} is not a dataset: there is no {error.args[-1]}") from None
    except Exception as error:
        raise DataError(f"{url} cannot be read: {type(error).__name__}: {error}") from None
