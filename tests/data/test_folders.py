"""Folders as inputs: none of their files is passed over unsaid."""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import Any

import pytest
from preprocess_helpers import jsonl

from megatron_ds.data.sources import iterate_texts
from megatron_ds.errors import DataError


def test_a_folder_is_read_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Suffixes of any case; hidden files and lost+found are left alone; a folder that cannot be listed is an error."""
    scandir = os.scandir
    places = ("b.jsonl", "C.JSONL", "d/E.Txt.GZ", "d/.hidden.jsonl", "__MACOSX/a.jsonl", "lost+found/a.jsonl")
    for number, name in enumerate(places):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        content = b"2" if number == 2 else jsonl([str(number)])
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("GZ") else content)
    assert sorted(iterate_texts([str(tmp_path)])) == ["0", "1", "2"]

    def refusing(path: str) -> Any:
        if Path(path).name == "d":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(DataError, match=f"the folder {tmp_path / 'd'} cannot be read: Permission denied"):
        list(iterate_texts([str(tmp_path)]))
    monkeypatch.undo()
    (tmp_path / "saved").mkdir()
    for name in ("state.json", "data-00000-of-00001.arrow"):
        (tmp_path / "saved" / name).touch()
    with pytest.raises(DataError, match=f"{tmp_path / 'saved'} is a saved dataset; name it as an input of its own"):
        list(iterate_texts([str(tmp_path)]))
