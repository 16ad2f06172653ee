"""What a library raises is said as one of our errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ds.errors import ConfigError, DataError, RaisedAs, not_there


def test_of_the_kinds() -> None:
    unreadable = RaisedAs(DataError, "a.txt cannot be read", OSError, ValueError)
    with pytest.raises(DataError, match=r"^a\.txt cannot be read: gone$") as caught, unreadable:
        raise FileNotFoundError("gone")
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_others_and_ours_pass() -> None:
    with pytest.raises(KeyError), RaisedAs(DataError, "a.txt cannot be read", OSError):
        raise KeyError("gone")
    with pytest.raises(ConfigError, match="set it"), RaisedAs(DataError, "a.txt cannot be read", Exception):
        raise ConfigError("set it")


def test_a_model_of_the_hub_is_told_from_a_folder_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("runs/llama", "llama", "/models/llama", "a/b/c"):
        assert not_there(name) == f"{name} does not exist"
    assert not_there("org/Model-1B").endswith("Hub: hf download org/Model-1B --local-dir FOLDER, and give that folder")
