"""Every reader of a file from elsewhere, given a FIFO, a device, a directory or a text that is nested without end.

One error of the library's own at once: none waits, fills the memory or ends in a traceback.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from megatron_ds.checkpoint import resolve
from megatron_ds.config import load_toml
from megatron_ds.convert.folder import HFFolder
from megatron_ds.data.cache import cached_arrays
from megatron_ds.data.chat import load_template
from megatron_ds.data.dataset_files import read_manifest
from megatron_ds.data.indexed import IndexedDataset
from megatron_ds.data.indexed_writer import IndexedDatasetWriter
from megatron_ds.data.tokenizer_base import read_special_tokens
from megatron_ds.deepspeed_json import from_deepspeed
from megatron_ds.engine.without_memory import Filler
from megatron_ds.errors import MegatronDSError
from megatron_ds.pipeline.timeline import Timeline

DEEP = b"[" * 200_000


def fifo(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def deep(path: Path) -> None:
    path.write_bytes(DEEP)


def objects(path: Path) -> None:
    path.write_bytes(b'{"a":' * 200_000)


def huge_header(path: Path) -> None:
    path.write_bytes((1 << 60).to_bytes(8, "little") + b"{}")


def a_directory(path: Path) -> None:
    path.mkdir()


MAKERS = (fifo, endless, deep, objects, huge_header, a_directory)


def dataset(folder: Path) -> Path:
    with IndexedDatasetWriter(folder / "text", np.uint16) as writer:
        writer.add_document([1, 2, 3])
    return folder / "text"


# Which file of a folder is what it should not be, and what reads it.
READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a run's settings": ("run.toml", lambda folder: load_toml(folder / "run.toml")),
    "a DeepSpeed file": ("ds.json", lambda folder: from_deepspeed(folder / "ds.json")),
    "latest": ("latest", resolve),
    "a checkpoint": ("step-00000001/manifest.json", resolve),
    "an index": ("text.idx", lambda folder: IndexedDataset(folder / "text")),
    "tokens": ("text.bin", lambda folder: IndexedDataset(folder / "text")),
    "a timeline": ("rank.json", lambda folder: Timeline.from_json_files([folder / "rank.json"])),
    "a config.json": ("config.json", lambda folder: HFFolder(folder)),
    "a chat template": ("t.jinja", lambda folder: load_template(str(folder / "t.jinja"), "bytes")),
    "a folder of weights": ("model.safetensors", lambda folder: Filler(nn.Linear(1, 1), 0, folder)),
    "weights": ("model.safetensors", lambda folder: HFFolder(folder)),
}


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("reader", READERS)
def test_a_reader_takes_no_harm(tmp_path: Path, reader: str, make: Callable[[Path], None]) -> None:
    name, read = READERS[reader]
    (tmp_path / "config.json").write_text("{}")
    dataset(tmp_path)
    (tmp_path / "step-00000001").mkdir()
    (tmp_path / name).unlink(missing_ok=True)
    make(tmp_path / name)
    if reader == "a chat template" and make in (deep, objects, huge_header):
        read(tmp_path)  # to Jinja that is a text like any other
        return
    with pytest.raises(MegatronDSError):
        read(tmp_path)


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_a_file_that_may_be_missing_is_missing_or_an_error(tmp_path: Path, make: Callable[[Path], None]) -> None:
    """Beside a dataset and in a tokenizer's folder: what is no file is none, what is no JSON is said."""
    make(tmp_path / "text.manifest.json")
    make(tmp_path / "tokenizer_config.json")
    empty = tmp_path / "empty"
    empty.mkdir()
    for read in (lambda folder: read_manifest(str(folder / "text")), read_special_tokens):
        with contextlib.suppress(MegatronDSError):
            assert read(tmp_path) == read(empty)


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_a_cache_that_is_none_is_made_again(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "index")
    made = cached_arrays(tmp_path / "index", {"a": 1}, lambda: {"x": np.arange(3, dtype="<i8")})
    assert made["x"].tolist() == [0, 1, 2]
