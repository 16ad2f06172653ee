"""What the tests of preprocessing share: texts, block sizes, and reading results back without the library."""

from __future__ import annotations

import json
from pathlib import Path

import indexed_reference
import pytest

from megatron_ds.data import source_text, sources
from megatron_ds.data.indexed import IndexedDataset
from megatron_ds.data.parts import PreprocessOptions
from megatron_ds.data.preprocess import preprocess
from megatron_ds.data.verify import verify

REPOSITORY = Path(__file__).resolve().parents[2]
TEXTS = [f"document {i}: {'word ' * (i % 7)}é🙂\n" for i in range(40)]


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": t, "n": i}) + "\n" for i, t in enumerate(texts)).encode()


def texts_of(prefix: Path) -> list[str]:
    """Read back with the independent reader and Python's own bytes."""
    _, documents = indexed_reference.read(prefix)
    assert all(len(document) == 1 for document in documents)
    return [bytes(sequence).decode() for (sequence,) in documents]


def run(
    inputs: list[Path], prefix: Path, options: PreprocessOptions | None = None, workers: int = 0, **more: bool
) -> list[str]:
    preprocess([str(p) for p in inputs], prefix, options or PreprocessOptions("bytes"), workers, **more)
    verify(IndexedDataset(prefix))
    assert not list(prefix.parent.glob("*.parts")) and not list(prefix.parent.glob("*.tmp"))
    return texts_of(prefix)


def blocks_of(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MIN_BLOCK", size)
    monkeypatch.setattr(sources, "MAX_BLOCK", size)
    monkeypatch.setattr(source_text, "STREAM_BLOCK", size)


class Killed(BaseException):
    pass


def outputs(prefix: Path) -> dict[str, bytes]:
    names = (".bin", ".idx", ".manifest.json", ".bad.jsonl")
    return {name: Path(f"{prefix}{name}").read_bytes() for name in names if Path(f"{prefix}{name}").exists()}
