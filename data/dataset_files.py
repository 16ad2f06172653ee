"""The files of a dataset beside its tokens, and what tells a file from another version of itself."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import xxhash

from megatron_ds.errors import DataError
from megatron_ds.files import read_json

READ_BYTES = 16 << 20
MASK_SUFFIX = "loss_mask"
"""``PREFIX.loss_mask`` holds one byte a token of a dataset of conversations: 1 where it is learnt."""
MANIFEST, SUMS = "manifest.json", "sums"
SAMPLES, SAMPLE_BYTES = 16, 4096


def file_of(prefix: str, suffix: str) -> Path:
    """A file of the dataset at ``prefix``: ``bin``, ``idx``, :data:`MASK_SUFFIX`, :data:`MANIFEST` or :data:`SUMS`."""
    return Path(f"{prefix}.{suffix}")


def read_manifest(prefix: str) -> dict[str, Any] | None:
    """How the dataset was made, if this library made it: inputs, settings, tokenizer, counts, checksums."""
    path = file_of(prefix, MANIFEST)
    if not os.path.lexists(path):
        return None
    try:
        manifest: dict[str, Any] = read_json(path)
        for kind in ("bin", "idx", *(manifest["files"].keys() & {MASK_SUFFIX})):
            _texts(manifest["files"][kind], "xxh3")
        if manifest.get("tokenizer") is not None:
            _texts(manifest["tokenizer"], "spec", "xxh3")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is damaged ({type(error).__name__}: {error}); delete it to use the dataset without its checksums"
        ) from None
    return manifest


def _texts(values: dict[str, Any], *names: str) -> None:
    wrong = [name for name in names if not isinstance(values[name], str)]
    if wrong:
        raise TypeError(f"{wrong[0]} is {values[wrong[0]]!r}, not a text")


def pieces(path: Path, size: int = READ_BYTES) -> Iterator[bytes]:
    """The content of a file."""
    with path.open("rb") as file:
        while piece := file.read(size):
            yield piece


def checksum(path: Path) -> str:
    """xxh3-64 of a file, in hexadecimal; empty where there is none."""
    if not path.is_file():
        return ""
    digest = xxhash.xxh3_64()
    for piece in pieces(path):
        digest.update(piece)
    return digest.hexdigest()


def require_checksum(what: object, found: str, stated: str, where: str, way_out: str) -> None:
    """A ``DataError`` unless the checksum of ``what`` is the one that is stated ``where``."""
    if found != stated:
        raise DataError(
            f"{what} is not the file that was written: its checksum is {found}, but {where} says {stated}. It was "
            f"damaged, swapped or changed: {way_out}"
        )


def file_identity(path: Path) -> dict[str, Any]:
    """What tells a file from every other version of itself without reading it all: its size, its times of change
    (contents, and inode) and a checksum of 16 pieces spread over it."""
    digest = xxhash.xxh3_64()
    try:
        status = path.stat()
        with path.open("rb") as file:
            for number in range(SAMPLES):
                file.seek(max(0, (status.st_size - SAMPLE_BYTES) * number // (SAMPLES - 1)))
                digest.update(file.read(SAMPLE_BYTES))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "sampled_xxh3": digest.hexdigest()}


def files_identity(paths: Sequence[Path]) -> dict[str, Any]:
    """The number of files, and a checksum of what :func:`file_identity` says of each: the same for copies of them."""
    digest = xxhash.xxh3_128()
    for path in paths:
        found = file_identity(path)
        digest.update(f"{found['size']} {found['sampled_xxh3']}\n".encode())
    return {"files": len(paths), "xxh3": digest.hexdigest()}
