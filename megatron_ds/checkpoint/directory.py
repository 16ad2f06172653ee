"""A run's checkpoint directory: which checkpoints are in it, which one ``latest`` means, which of them is good."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_ds.checkpoint.manifest import MANIFEST, REPLACED, STEP, Manifest, rank_name, step_of
from megatron_ds.checkpoint.manifest_file import check_size, read_manifest
from megatron_ds.errors import CheckpointError, RaisedAs, not_there
from megatron_ds.files import checksum, read_bytes, replacing, sync_directory, write_text_durably

LATEST = "latest"


def steps_in(directory: Path) -> list[Path]:
    """The checkpoints under ``directory`` that were committed, oldest step first."""
    if not directory.is_dir():
        return []
    named = {path.name: path for path in directory.iterdir()}
    found = [
        (step, path)
        for name, path in named.items()
        if (step := step_of(path)) is not None
        and not (name.endswith(REPLACED) and name.removesuffix(REPLACED) in named)
    ]
    return [path for _, path in sorted(found)]


def in_place(step: Path) -> Path:
    """Where the checkpoint of this path is: there, or beside it where a save that replaces it died half-way."""
    moved = step.with_name(step.name + REPLACED)
    return moved if STEP.fullmatch(step.name) and not step.exists() and moved.exists() else step


# --- latest ---------------------------------------------------------------------------------------------------


@contextmanager
def replacing_latest(directory: Path, name: str) -> Iterator[None]:
    """On leaving, ``latest`` names the checkpoint ``name``; a full disk is met before the body runs."""
    present = directory / LATEST
    if present.exists() and not present.is_file() and not present.is_dir():
        present.unlink()  # a FIFO, or a link to a device, under a name that is ours: it only keeps training from saving
    with replacing(present) as pointer:
        write_text_durably(pointer, f"{name} {checksum(name.encode())}\n")
        yield


def point_latest(directory: Path, name: str) -> None:
    """Make the checkpoint ``name`` the one that is loaded next."""
    with replacing_latest(directory, name):
        pass
    sync_directory(directory)


def read_latest(directory: Path) -> str:
    """The step name that ``latest`` holds; a :class:`CheckpointError` if it is damaged."""
    path = directory / LATEST
    with RaisedAs(CheckpointError, f"{path} cannot be read", OSError, ValueError):
        text = read_bytes(path, 4096).decode()
        name, digest = text.split()
    if digest != checksum(name.encode()):
        raise CheckpointError(f"{path} is damaged: {name!r} does not match its checksum")
    if not STEP.fullmatch(name):
        raise CheckpointError(f"{path} points to {name!r}, which is not the name of a checkpoint beside it")
    return name


# --- what a path means ----------------------------------------------------------------------------------------


def find(path: str | Path, share: tuple[int, int] = (0, 0)) -> tuple[Path, Manifest]:
    """The step directory that ``path`` means, and its manifest: itself, or the one that its ``latest`` points to.

    Args:
        share: (this one, of how many): which of the checkpoint's files to look for, see :func:`look_at`.

    Raises:
        CheckpointError: there is none, or it is damaged or incomplete (naming another that looks whole).
    """
    path = Path(path)
    if path.name in ("", ".."):  # ".", for one: what belongs to a step is found by its name, beside it
        path = Path(os.path.abspath(path))
    if (path / MANIFEST).exists() or STEP.match(path.name):
        step, directory = path, path.parent
    elif not path.is_dir():
        raise CheckpointError(not_there(path))
    elif not os.path.lexists(path / LATEST):
        if steps_in(path):
            raise CheckpointError(f"{path} has no file `latest`" + way_out(path))
        of_others = f"{path} is a model of transformers or diffusers, no checkpoint: tools/convert.py makes one of it"
        nothing = f"{path} holds no checkpoint: no manifest.json, no `latest`, no step-* directory"
        raise CheckpointError(of_others if (path / "config.json").exists() else nothing)
    else:
        try:
            step, directory = path / read_latest(path), path
        except CheckpointError as error:
            raise CheckpointError(str(error) + way_out(path)) from None
    try:
        return in_place(step), look_at(in_place(step), share)
    except CheckpointError as error:
        raise CheckpointError(str(error) + way_out(directory, besides=step)) from None


def resolve(path: str | Path) -> Path:
    """The step directory that ``path`` means (see :func:`find`)."""
    return find(path)[0]


def read_meta(path: str | Path) -> dict[str, Any]:
    """The ``meta`` that was given to ``save``, of the checkpoint that ``path`` means (see :func:`find`)."""
    return find(path)[1].meta


def look_at(step: Path, share: tuple[int, int] = (0, 1)) -> Manifest:
    """The manifest, after a quick look: it is right, and each file is there and has its size.

    Args:
        share: (this one, of how many): of ranks that look together each looks for its part of the files. Of 0: none.

    Raises:
        CheckpointError: what is wrong.
    """
    manifest = read_manifest(step)
    own, shares = share
    if shares:
        files = manifest.index.sizes.files
        first, last = files * own // shares, files * (own + 1) // shares
        for number, size in enumerate(manifest.index.file_sizes(first, last), first):
            check_size(step / rank_name(number), size)
    return manifest


def way_out(directory: Path, besides: Path | None = None) -> str:
    """What to do where a checkpoint of ``directory`` cannot be loaded. Contents are not read for it."""
    for path in reversed(steps_in(directory)):
        if besides is not None and path.name.removesuffix(REPLACED) == besides.name:
            continue
        try:
            look_at(path)
        except CheckpointError:
            continue
        return (
            f"; {path} looks whole (its checksums were not read): load that one by its own path, or resume with "
            "--checkpoint.resume-from last-good, which reads them"
        )
    return "; there is no other checkpoint there that looks whole"
