"""What a library raises is said as one of our errors."""

from __future__ import annotations

import pytest

from megatron_ds.errors import ConfigError, DataError, RaisedAs


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
