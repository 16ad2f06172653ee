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
import xxhash

from megatron_ds.data import chunk_checks, dataset_files
from megatron_ds.data.cache import default_cache_dir, locked
from megatron_ds.data.chunk_checks import CheckedArray
from megatron_ds.data.dataset_files import require_checksum
from megatron_ds.errors import DataError
from megatron_ds.files import checksum, read_json, replacing

_STATED = "the manifest", "copy it there again"
OPTIONAL = ("manifest.json", "loss_mask")
_COMPLETE = "fetched.json"
"""Says which version of the remote files a folder of the cache belongs to; written last."""


def is_url(prefix: str) -> bool:
    return "://" in prefix


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
                with replacing(folder / _COMPLETE) as temporary:
                    temporary.write_text(json.dumps({"url": url, "identity": identity}))
    sums = _manifest(prefix).get("bin", {}).get("chunks", [])
    if sums and len(sums) != _chunks(identity["bin"]["size"]):
        raise DataError(f"{url}.manifest.json has checksums of {len(sums)} chunks; .bin does not have as many")
    return RemoteDataset(url, prefix, identity, bool(sums), tuple(sums), filesystem, f"{path}.bin")


class RemoteTokens(CheckedArray):
    """The tokens of a remote dataset: a chunk is fetched when the first process of the node reads it."""

    def __init__(self, remote: RemoteDataset, dtype: np.dtype):
        self._remote = remote
        self._mutex = threading.Lock()
        path = Path(f"{remote.prefix}.bin")
        with _writing(path.parent):
            self._file = open(path, "r+b", buffering=0)  # noqa: SIM115  (kept open for its lifetime)
            self._sums_file = open(f"{path}.sums", "r+b", buffering=0)  # noqa: SIM115
        super().__init__(path, dtype, np.memmap(self._sums_file, dtype="<u8", mode="r"), chunk_checks.FETCH_BYTES)

    def _compare(self, chunk: int) -> None:
        """Make sure that the chunk is there and is what arrived."""
        start, content = self._chunk(chunk)
        # The lock on a byte of the file keeps other processes out, the mutex other threads of this one.
        with self._mutex:
            fcntl.lockf(self._sums_file, fcntl.LOCK_EX, 1, chunk)
            try:
                if not self._sums[chunk]:
                    self._fetch(chunk, start, content.size)
                elif _sum(content.data) != self._sums[chunk]:
                    raise DataError(
                        f"{self.path}, the copy of {self._remote.url}.bin on this node, is damaged in {_named(chunk)}: "
                        f"it is not what was fetched. Delete {self.path.parent} to fetch it again"
                    )
            finally:
                fcntl.lockf(self._sums_file, fcntl.LOCK_UN, 1, chunk)

    def _fetch(self, chunk: int, start: int, size: int) -> None:
        remote, where = self._remote, f"{self._remote.url}.bin, {_named(chunk)}"
        with _told(remote.url):
            content = remote.filesystem.cat_file(remote.bin_path, start=start, end=start + size)
        if len(content) != size:
            raise DataError(f"{where}: expected {size} bytes, found {len(content)}: the file changed or was cut off")
        if remote.chunk_sums:
            require_checksum(where, checksum(content), remote.chunk_sums[chunk], *_STATED)
        with _writing(self.path.parent):
            os.pwrite(self._file.fileno(), content, start)
            os.fdatasync(self._file.fileno())  # the checksum must not survive a crash that its chunk did not
            os.pwrite(self._sums_file.fileno(), struct.pack("<Q", _sum(content)), 8 * chunk)


def _named(chunk: int) -> str:
    return f"chunk {chunk} of {chunk_checks.FETCH_BYTES >> 20} MB"


def _sum(content: bytes | memoryview) -> int:
    """A chunk's checksum, never 0: that stands for a chunk which is not there."""
    return xxhash.xxh3_64_intdigest(content) or 1


def _chunks(size: int) -> int:
    return -(-size // chunk_checks.FETCH_BYTES)


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
    for name in identity.keys() - {"bin"}:
        content_path = Path(f"{prefix}.{name}")
        size = content_path.stat().st_size
        if size != identity[name]["size"]:
            raise DataError(f"{url}.{name}: expected {identity[name]['size']} bytes, found {size}")
        if name in stated:
            digest = dataset_files.checksum(content_path)
            require_checksum(f"{url}.{name}", digest, stated[name]["xxh3"], *_STATED)
    if "bin" in stated and stated["bin"]["bytes"] != identity["bin"]["size"]:
        raise DataError(f"{url}.bin: expected {stated['bin']['bytes']} bytes, found {identity['bin']['size']}")


def _manifest(prefix: str) -> dict[str, Any]:
    """The ``files`` of the manifest that was fetched, empty without one."""
    files: dict[str, Any] = (dataset_files.read_manifest(prefix) or {}).get("files", {})
    return files


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
