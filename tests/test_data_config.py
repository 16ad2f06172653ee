"""Settings of data and batches: what contradicts itself is refused with the value, the rule and the way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_config import config

from megatron_ds.config import load_toml, parse, to_toml, validate
from megatron_ds.errors import ConfigError

BLEND = [[0.7, "a"], [0.3, "s3://bucket/b"]]
FIM = {"rate": 0.5, "tokens": ["<P>", "<M>", "<S>"]}

REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {},
        "data.prefix is not set: give the path or URL of a .bin/.idx pair without its suffix "
        "(tools/preprocess_data.py makes one), data.blend for several, or --data.synthetic",
    ),
    (
        {"prefix": "a", "blend": BLEND, "train_blend": BLEND},
        "data.prefix and data.blend and data.train_blend each say where the samples come from; keep one of them "
        "(--data.prefix None unsets the one of a file)",
    ),
    (
        {"valid_blend": BLEND},
        "data.valid_blend without data.train_blend: nothing to train on; give data.train_blend too, or data.blend",
    ),
    (
        {"train_blend": BLEND, "split": "99,1"},
        "data.split='99,1' does nothing: data.train_blend and its like are whole datasets of each split; "
        "leave it out, or use data.blend",
    ),
    (
        {"blend": [[1, "a"], [0, "b"]]},
        "data.blend: the weight 0 of 'b' must be positive; leave it out for none",
    ),
    (
        {"prefix": "0.7 a 1 b"},
        "data.prefix='0.7 a 1 b' is one dataset; a blend is --data.blend 0.7 a 1 b",
    ),
    (
        {"prefix": "a", "tokenizer": "t", "fim": {"rate": 0.5}},
        "data.fim.rate=0.5 needs data.fim.tokens: the names of the prefix, middle and suffix sentinels, e.g. "
        "'<|fim_prefix|>' '<|fim_middle|>' '<|fim_suffix|>'",
    ),
    (
        {"prefix": "a", "fim": FIM},
        "data.fim.rate=0.5 needs data.tokenizer: it knows the sentinels, and the end of a document",
    ),
    (
        {"prefix": "a", "tokenizer": "t", "fim": FIM, "conversations": True},
        "data.fim.rate=0.5 with data.conversations: a conversation is not rearranged; use data.fim.rate=0, or train "
        "on texts",
    ),
]


@pytest.mark.parametrize(("data", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_contradicts_itself_is_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        validate(config(data={"synthetic": False, **data}), 1)
    assert str(refused.value) == message


RAMP = "train.batch_ramp={} (start, increment, samples)"


@pytest.mark.parametrize(("ramp", "message"), [
    (
        (2, 4, 10),
        " does not lead to train.global_batch=8: 2 plus whole increments of 4 must make it; use an increment that "
        "divides 6",
    ),
    ((8, 2, 10), " starts at or above train.global_batch=8; start below it"),
    ((10, 2, 10), " starts at or above train.global_batch=8; start below it"),
    ((5, 3, 10), ": the start 5 is not a multiple of train.micro_batch=2 x dp=1 = 2; use 4 or 6"),
])  # fmt: skip
def test_a_ramp_that_leads_nowhere_is_refused(ramp: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        validate(config(train={"batch_ramp": ramp}), 1)
    assert RAMP.format(list(ramp)) + message in str(refused.value)


def test_a_ramp_divides_over_the_replicas() -> None:
    ramped = config(train={"batch_ramp": (4, 4, 100)})
    validate(ramped, 2)
    with pytest.raises(ConfigError, match=r"the start 4 is not a multiple of train\.micro_batch=2 x dp=4 = 8; use 8"):
        validate(ramped, 4)


def test_the_command_line_says_what_the_file_says(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(
        '[data]\nblend = [[0.7, "a"], [0.3, "s3://bucket/b"]]\ntokenizer = "t"\n'
        'fim = { rate = 0.5, tokens = ["<P>", "<M>", "<S>"] }\n[train]\nbatch_ramp = [2, 2, 100]\n'
    )
    arguments = ["--data.blend", "0.7", "a", "0.3", "s3://bucket/b", "--data.tokenizer", "t", "--data.fim.rate", "0.5"]
    arguments += ["--data.fim.tokens", "<P>", "<M>", "<S>", "--train.batch-ramp", "2", "2", "100"]
    from_file, given = load_toml(tmp_path / "run.toml"), parse(arguments)
    assert from_file == given and from_file.data.blend == ((0.7, "a"), (0.3, "s3://bucket/b"))
    (tmp_path / "printed.toml").write_text(to_toml(given))
    assert load_toml(tmp_path / "printed.toml") == given
    assert parse(["--config", str(tmp_path / "run.toml"), "--data.blend", "1", "c"]).data.blend == ((1.0, "c"),)
    (tmp_path / "prefix.toml").write_text('[data]\nprefix = "a"\n')
    assert parse(["--config", str(tmp_path / "prefix.toml"), "--data.prefix", "None"]).data.prefix is None


@pytest.mark.parametrize(("arguments", "parts"), [
    (["--data.blend", "0.7", "a", "b"], ["--data.blend", "'b'"]),
    (["--data.fim.rate", "2"], ["data.fim.rate = 2.0", "less than or equal to 1"]),
    (["--train.batch-ramp", "2", "2"], ["--train.batch-ramp", "input length 2 did not match"]),
    (["--data.blnd", "1", "a"], ["unknown option --data.blnd; did you mean '--data.blend'?"]),
])  # fmt: skip
def test_what_does_not_parse_is_named(arguments: list[str], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(arguments)
    assert all(part in str(refused.value) for part in parts), refused.value
