"""Datasets at a URL of any filesystem that fsspec knows, read through a cache on this node's disk.

The index comes whole. The tokens come in chunks, when they are first read, into a sparse file of the final size; a
second file holds each chunk's checksum (8 bytes), 0 until the chunk is on the disk. All processes of the node share
both, and each chunk is fetched once. Where the dataset has a manifest of this library, every chunk and file is compared
with its checksum on arrival; and each process compares a chunk of the copy with its checksum before it first reads
it, so that a damaged copy is named too.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megatron_ds.data import dataset_files
from megatron_ds.data.cache import default_cache_dir, locked
from megatron_ds.data.dataset_files import CheckedArray, file_checksum, read_manifest, require_checksum
from megatron_ds.errors import DataError, RaisedAs
from megatron_ds.files import checksum, read_json, replacing

_STATED = "the manifest", "copy it there again"
OPTIONAL = ("manifest.json", "loss_mask")
_VALIDATORS = "ETag", "Last-Modified", "Content-MD5", "Digest"
"""What a web server says of a file's version (RFC 9110, section 8.8)."""
_COMPLETE = "fetched.json"
"""Says which version of the remote files a folder of the cache belongs to; written last."""


def is_url(prefix: str) -> bool:
    return "://" in prefix


class RemoteDataset:
    """A dataset at ``url``, a prefix. Its index, and manifest and loss mask where there are, are copied into the cache.

    Attributes:
        prefix: of the copy.
        identity: tells this version of the remote files from any other.
        chunk_sums: of a manifest, which then vouches for every byte on arrival.

    Raises:
        DataError: no such files, a filesystem that is not installed or does not answer, files that are not those of
            the manifest, or that changed since they were cached, or a cache folder that cannot be written.
    """

    def __init__(self, url: str, cache_dir: Path | None = None):
        import fsspec  # type: ignore[import-untyped]

        with RaisedAs(DataError, f"{url} cannot be read", ImportError, ValueError):
            self.filesystem, self.path = fsspec.core.url_to_fs(url)
        name = Path(self.path).name
        folder = (cache_dir or default_cache_dir()) / f"{checksum(url.encode())}-{name}"
        self.url, self.prefix = url, str(folder / name)
        with _told(url):
            found = {kind: self._identity(kind) for kind in ("idx", "bin", *OPTIONAL)}
        self.identity = {kind: value for kind, value in found.items() if value is not None}
        chunks = _chunks(size := self.identity["bin"]["size"])
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with locked(folder / "lock"):
                if (folder / _COMPLETE).is_file():
                    self._compare_with_cached(folder)
                else:
                    self._fetch_all_but_tokens()
                    for suffix, length in (("bin", size), ("bin.sums", 8 * chunks)):
                        with open(f"{self.prefix}.{suffix}", "wb") as file:
                            file.truncate(length)
                    with replacing(folder / _COMPLETE) as temporary:
                        temporary.write_text(json.dumps({"url": url, "identity": self.identity}))
        self.chunk_sums: list[str] = self._manifest().get("bin", {}).get("chunks", [])
        if self.chunk_sums and len(self.chunk_sums) != chunks:
            raise DataError(
                f"{url}.manifest.json has checksums of {len(self.chunk_sums)} chunks; .bin does not have as many"
            )

    def _identity(self, kind: str) -> dict[str, Any] | None:
        path = f"{self.path}.{kind}"
        try:
            info, version = self.filesystem.info(path), str(self.filesystem.ukey(path))
        except FileNotFoundError:
            if kind in OPTIONAL:
                return None
            raise
        if "http" in self.filesystem.protocol:  # fsspec's key is made of the address alone
            version = " ".join([version, *(str(info[name]) for name in _VALIDATORS if name in info)])
        return {"size": int(info["size"]), "version": version}

    def _compare_with_cached(self, folder: Path) -> None:
        cached, now = read_json(folder / _COMPLETE)["identity"], self.identity
        for name in {**cached, **now}:
            if cached.get(name) != now.get(name):
                raise DataError(
                    f"{self.url}.{name} changed since it was cached: it was {cached.get(name)}, is now "
                    f"{now.get(name)}. To read the new version, delete {folder}"
                )

    def _fetch_all_but_tokens(self) -> None:
        """Sizes of what was fetched are compared, and checksums where the manifest has them."""
        copies = {name: Path(f"{self.prefix}.{name}") for name in self.identity if name != "bin"}
        with _told(self.url):
            for name, copy in copies.items():
                self.filesystem.get_file(f"{self.path}.{name}", str(copy))
        stated = self._manifest()
        for name, remote in self.identity.items():
            found = copies[name].stat().st_size if name in copies else remote["size"]
            expected = remote["size"] if name in copies else stated.get("bin", {}).get("bytes", found)
            if found != expected:
                raise DataError(f"{self.url}.{name}: expected {expected} bytes, found {found}")
            if name in stated and name in copies:
                require_checksum(f"{self.url}.{name}", file_checksum(copies[name]), stated[name]["xxh3"], *_STATED)

    def _manifest(self) -> dict[str, Any]:
        """The ``files`` of the manifest that was fetched, empty without one."""
        files: dict[str, Any] = (read_manifest(self.prefix) or {}).get("files", {})
        return files


class RemoteTokens(CheckedArray):
    """The tokens of a remote dataset: a chunk is fetched when the first process of the node reads it."""

    def __init__(self, remote: RemoteDataset, dtype: np.dtype):
        self._remote = remote
        self._mutex = threading.Lock()
        path = Path(f"{remote.prefix}.bin")
        with _writing(path.parent):
            self._file = open(path, "r+b", buffering=0)  # noqa: SIM115  (kept open for its lifetime)
            self._sums_file = open(f"{path}.sums", "r+b", buffering=0)  # noqa: SIM115
        super().__init__(path, dtype, np.memmap(self._sums_file, dtype="<u8", mode="r"), dataset_files.FETCH_BYTES)

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
            content = remote.filesystem.cat_file(f"{remote.path}.bin", start=start, end=start + size)
        if len(content) != size:
            raise DataError(f"{where}: expected {size} bytes, found {len(content)}: the file changed or was cut off")
        if remote.chunk_sums:
            require_checksum(where, checksum(content), remote.chunk_sums[chunk], *_STATED)
        with _writing(self.path.parent):
            os.pwrite(self._file.fileno(), content, start)
            os.fdatasync(self._file.fileno())  # the checksum must not survive a crash that its chunk did not
            os.pwrite(self._sums_file.fileno(), struct.pack("<Q", _sum(content)), 8 * chunk)


def _named(chunk: int) -> str:
    return f"chunk {chunk} of {dataset_files.FETCH_BYTES >> 20} MB"


def _sum(content: bytes | memoryview) -> int:
    """A chunk's checksum, never 0: that stands for a chunk which is not there."""
    return xxhash.xxh3_64_intdigest(content) or 1


def _chunks(size: int) -> int:
    return -(-size // dataset_files.FETCH_BYTES)


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
