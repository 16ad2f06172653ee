"""The corpus of this machine's standard library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_ds.data.corpus import build_corpus
from megatron_ds.errors import DataError


def test_real_source_in_a_fixed_order_within_the_limit(tmp_path: Path) -> None:
    summary = build_corpus(tmp_path / "a.jsonl", 1.0)
    build_corpus(tmp_path / "b.jsonl", 1.0)
    content = (tmp_path / "a.jsonl").read_bytes()
    assert content == (tmp_path / "b.jsonl").read_bytes()
    records = [json.loads(line) for line in content.splitlines()]
    assert len(records) == summary.documents > 50
    assert 0.9e6 < sum(len(r["text"].encode()) for r in records) == summary.text_bytes <= 1e6
    paths = [r["path"] for r in records]
    assert paths == sorted(paths) and paths[-1] > "m"  # taken evenly from the whole tree
    standard = Path(json.__file__).parent.parent
    for record in records[::20]:
        assert record["text"] == (standard / record["path"]).read_bytes().decode()


def test_files_that_are_not_text_are_left_out(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "__pycache__").mkdir(parents=True)
    (source / "a.py").write_text("a = 'é'\n")
    (source / "b.py").write_bytes(b"\xff\xfe")
    (source / "empty.py").touch()
    (source / "__pycache__" / "c.py").write_text("no")
    summary = build_corpus(tmp_path / "out.jsonl", source=source)
    assert (summary.documents, summary.text_bytes, summary.skipped) == (1, 9, 2)
    with pytest.raises(DataError, match=r"holds no readable, non-empty \*\.rs file"):
        build_corpus(tmp_path / "out.jsonl", source=source, suffix=".rs")
