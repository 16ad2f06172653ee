"""Settings out of range, of the wrong type or at odds with each other: a run that can be, or one error that names them.

Every field of a run's configuration, of an engine's and of a DeepSpeed file, and every option of every tool.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import json
import math
import random
import tomllib
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from damage import refused
from scripts_as_modules import load_script
from started_ranks import TINY, pretrain_gpt

from megatron_ds.config import RunConfig, from_dict, parse, to_toml, validate
from megatron_ds.config.engine import EngineConfig
from megatron_ds.deepspeed_json.keys import KEYS
from megatron_ds.engine import read_config
from megatron_ds.models.families import task_of
from megatron_ds.train.dry_run import dry_run
from megatron_ds.train.launch import run_main

NUMBERS = (
    0,
    -1,
    1,
    2,
    3,
    7,
    0.5,
    -0.0,
    1e-300,
    1e30,
    math.nan,
    math.inf,
    -math.inf,
    1 << 31,
    1 << 53,
    1 << 64,
    10**400,
)
OTHERS = (True, False, None, "", "x", "1", "0x10", "nan", "\0", "\ud800", [], [1], [-1], [1, 2, 3, 4], {}, {"a": 1})


def fields(values: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from fields(value, (*path, name))
        else:
            yield (*path, name)


def put(values: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for name in path[:-1]:
        values = values.setdefault(name, {})
    values[path[-1]] = value


def wrong(draw: random.Random, names: list[tuple[str, ...]]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for path in draw.sample(names, draw.choice((1, 1, 2, 4))):
        value = draw.choice(NUMBERS if draw.random() < 0.7 else OTHERS)
        print(f"{'.'.join(path)} = {value if not isinstance(value, int) or value < 1 << 80 else 'a huge number'!r}")
        yield path, value


def put_wrong(draw: random.Random, values: dict[str, Any]) -> list[str]:
    """Change some values; the names of their fields."""
    chosen = list(wrong(draw, sorted(fields(values))))
    for path, value in chosen:
        put(values, path, value)
    return [path[-1] for path, _ in chosen]


def finite(value: Any) -> bool:
    if isinstance(value, dict | list | tuple):
        return all(finite(item) for item in (value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


@pytest.fixture(scope="module")
def tiny() -> dict[str, Any]:
    """The settings of the smallest run there is."""
    return parse([*TINY], config_class=RunConfig).to_dict()


@pytest.mark.trials(40, 250)
def test_a_run(draw: random.Random, tiny: dict[str, Any], place: Path) -> None:
    """What is taken can be built: the dry run of its first and last rank, whose settings read back alike."""
    values = copy.deepcopy(tiny)
    values["output"] = str(place / "run")
    changed = put_wrong(draw, values)

    def build() -> None:
        config = from_dict(RunConfig, values, "run.toml")
        assert finite(config.to_dict())
        assert from_dict(RunConfig, tomllib.loads(to_toml(config)), "again") == config
        m = config.mesh
        world = m.tp * m.pp * m.cp * (m.dp or 1)
        validate(config, world)
        if world <= 64 and config.model.num_layers <= 64:
            text = str(dry_run(config, task_of(config), world, world - 1))
            assert "nan" not in text.split() and "inf" not in text.split()

    refused(build, *changed, *(name.replace("_", "-") for name in changed), "world_size", "data.", "model.", "train.")


@pytest.mark.trials(3, 100)
def test_an_engine(draw: random.Random) -> None:
    values = EngineConfig().model_dump(mode="json")
    changed = put_wrong(draw, values)

    def build() -> None:
        config, _ = read_config(values)
        assert finite(config.model_dump(mode="json"))

    refused(build, *changed)


DEEPSPEED = {
    "train_batch_size": 8,
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "AdamW", "params": {"lr": 0.1}},
}


@pytest.mark.trials(5, 150)
def test_a_deepspeed_file(draw: random.Random, place: Path) -> None:
    values: dict[str, Any] = json.loads(json.dumps(DEEPSPEED))
    changed = []
    for path, value in wrong(draw, [tuple(key.split(".")) for key in sorted(KEYS)]):
        with contextlib.suppress(TypeError, AttributeError):  # below a value that is no section any more
            put(values, path, value)
            changed += path
    path = place / "ds.json"
    path.write_text(json.dumps(values), errors="surrogatepass")

    def build() -> None:
        config, notes = read_config(str(path))
        assert finite(config.model_dump(mode="json")) and all(note.strip() for note in notes)

    refused(build, *changed, str(path))


# --- tools ------------------------------------------------------------------------------------------------------


def tool(name: str) -> types.ModuleType:
    """A script of tools/ as a module."""
    module = load_script(f"tools/{name}.py")
    return module


# The class of the options, and options with which the tool does its work.
TOOLS: dict[str, tuple[str, Callable[[Path, Path], list[str]]]] = {
    "build_corpus": (
        "BuildCorpus",
        lambda made, out: ["--output", f"{out}/c.jsonl", "--source", f"{made}", "--suffix", ".txt"],
    ),
    "train_tokenizer": (
        "TrainTokenizer",
        lambda made, out: ["--input", f"{made}/text.jsonl", "--output", f"{out}/t", "--vocab-size", "300"],
    ),
    "preprocess_data": (
        "PreprocessData",
        lambda made, out: [
            *("--input", f"{made}/text.jsonl", "--tokenizer", "bytes", "--output-prefix", f"{out}/d", "--workers", "0"),
        ],
    ),
    "merge_datasets": (
        "MergeDatasets",
        lambda made, out: ["--input", f"{made}/text/text", "--output-prefix", f"{out}/m"],
    ),
    "inspect_dataset": ("InspectDataset", lambda made, out: [f"{made}/text/text"]),
    "inspect_checkpoint": ("Inspect", lambda made, out: [f"{made}/nothing"]),
    "convert": ("FromHf", lambda made, out: ["from-hf", f"{made}/nothing", f"{out}/imported"]),
    "show_schedule": ("ShowSchedule", lambda made, out: []),
}
WORDS = (
    "0",
    "-1",
    "1",
    "2",
    "7",
    "0.5",
    "nan",
    "inf",
    "1e400",
    "9" * 30,
    "",
    "x",
    "\u0662",
    "/proc",
    "device",
    "/proc/x",
    "a\nb",
)


def ended(main: Callable[[], object], arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """How a program ends: its exit status and what it says on stderr."""
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr("sys.argv", ["program", *arguments])
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main()
        except SystemExit as left:
            code = left.code
    assert isinstance(code, int), code
    return code, err.getvalue()


@pytest.mark.trials(1, 40)
@pytest.mark.parametrize("name", TOOLS)
def test_a_tool(draw: random.Random, made: Path, place: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, own = TOOLS[name]
    module = tool(name)
    monkeypatch.chdir(place)
    (place / "device").symlink_to("/dev/null")  # root could replace the device itself
    options = [f.name.replace("_", "-") for f in dataclasses.fields(getattr(module, kind))]
    arguments = own(made, place)
    for option in draw.sample(options, draw.choice((1, 1, 2))):
        word = draw.choice((*WORDS, str(made / "text.jsonl"), str(place)))
        arguments += draw.choice(([f"--{option}", word], [f"--{option}", word], [f"--no-{option}"], [f"--{option}"]))
    print(name, arguments)
    options_of = getattr(module, "Command", getattr(module, kind))
    code, err = ended(lambda: module.run(module.main, options_of, module.__doc__), arguments, monkeypatch)
    print(f"{code}: {err[-1500:]}")
    assert code in (0, 1, 2) and "Traceback" not in err
    assert (code == 0) or err.strip()
    assert err.count("error: ") <= 1


@pytest.mark.trials(2, 60)
def test_the_command_line_of_a_run(
    draw: random.Random, tiny: dict[str, Any], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one more option that may be odd it shows its settings, or says in one line what is wrong."""
    names = [".".join(path).replace("_", "-") for path in sorted(fields(tiny))]
    arguments = [*TINY, "--output", str(place / "run"), "--print-config"]
    for name in draw.sample(names, draw.choice((1, 1, 2))):
        arguments += draw.choice(
            ([f"--{name}", draw.choice(WORDS)], [f"--no-{name}"], [f"--{name}"], [f"--{name}x", "1"])
        )
    print(arguments[len(TINY) + 3 :])
    code, err = ended(lambda: run_main(pretrain_gpt().main), arguments, monkeypatch)
    print(f"{code}: {err[-1500:]}")
    assert code in (0, 2) and "Traceback" not in err and err.count("error: ") == (code == 2)
    assert not (place / "run").exists()
