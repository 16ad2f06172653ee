"""Configurations from TOML files and command lines, and back to TOML."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import tyro
from pydantic import BaseModel

from megatron_ds.config.other_names import suggestion
from megatron_ds.config.schema import BaseRunConfig
from megatron_ds.config.text import RunConfig
from megatron_ds.errors import ConfigError
from megatron_ds.files import read_text

C = TypeVar("C", bound=BaseModel)
R = TypeVar("R", bound=BaseRunConfig)


def _known_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _known_keys(field.annotation, f"{prefix}{name}.")
    return keys


def from_dict(config_class: type[C], values: dict[str, Any], source: str) -> C:
    """Build a configuration from nested plain values; ConfigError names the dotted key, the value and the rule."""
    try:
        return config_class.model_validate(values)
    except pydantic.ValidationError as invalid:
        known = _known_keys(config_class)
        lines = []
        for error in invalid.errors():
            key = ".".join(str(part) for part in error["loc"])
            if error["type"] == "extra_forbidden":
                lines.append(f"unknown key {key!r}{suggestion(key, known)}")
            else:
                lines.append(f"{key} = {error['input']!r}: {_rule(error)}")
        raise ConfigError(f"{source}: " + "; ".join(lines)) from None


def _rule(error: Mapping[str, Any]) -> str:
    """What pydantic says, our own rules in the same words as its."""
    return str(error["msg"]).removeprefix("Value error, ")


def load_toml(path: str | Path) -> RunConfig:
    """The configuration of a TOML file of a run on text; keys left out have their defaults."""
    return from_dict(RunConfig, read_toml(path), str(path))


def read_toml(path: str | Path) -> dict[str, Any]:
    """The plain values of a TOML file."""
    try:
        return tomllib.loads(read_text(path))
    except FileNotFoundError:
        raise ConfigError(f"--config {path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config {path}: not UTF-8, at byte {error.start}; save it as UTF-8") from None
    except (ValueError, RecursionError) as invalid:  # an integer of over 4,300 digits: a plain ValueError
        raise ConfigError(f"--config {path}: not valid TOML: {invalid}") from None


def parse(
    arguments: Sequence[str] | None = None,
    description: str | None = None,
    defaults: Callable[[R], dict[str, Any]] | None = None,
    config_class: type[R] = RunConfig,  # type: ignore[assignment]
) -> R:
    """The configuration of ``[--config FILE] [--dotted.key value ...]``; later overrides win.

    ``--help`` shows each field with its meaning and its value after the file was read.

    Args:
        defaults: given the settings as they are without it, values for those that are given nowhere, as nested plain
            values; for settings that follow from others.
        config_class: the family's; default: a run on text.
    """
    rest = list(sys.argv[1:] if arguments is None else arguments)
    rest = [part for a in rest for part in (a.split("=", 1) if a.startswith("--config=") else [a])]
    given: dict[str, Any] = {}
    source = "command line"
    if "--config" in rest:
        at = rest.index("--config")
        if at + 1 == len(rest):
            raise ConfigError("--config needs a file name, e.g. --config examples/configs/gpt2-345m.toml")
        source = rest[at + 1]
        given = read_toml(source)
        del rest[at : at + 2]
        if "--config" in rest:
            raise ConfigError("--config is given twice; use one file, and options for what differs")
    _reject_unknown_flags(config_class, rest)
    config = _override(from_dict(config_class, given, source), rest, description)
    values = {} if defaults is None else defaults(config)
    return _override(from_dict(config_class, _under(values, given), source), rest, description) if values else config


def _under(values: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """``given``, with ``values`` for what it leaves out, section by section."""
    sections = {name: {**section, **given.get(name, {})} for name, section in values.items()}
    return {**given, **sections}


def _override(default: R, options: Sequence[str], description: str | None) -> R:
    """``default`` with what the options of the command line say."""
    printed = io.StringIO()
    try:
        # Every rank parses: what tyro prints would be there once a rank, so it becomes part of the one error.
        with contextlib.redirect_stderr(printed):
            return tyro.cli(type(default), args=options, default=default, description=description)
    except SystemExit as left:
        if not left.code:
            raise  # --help
        raise ConfigError(f"command line: {_reason(type(default), left, printed.getvalue())}") from None


def _reason(config_class: type[BaseModel], left: SystemExit, printed: str) -> str:
    """Why tyro gave up: the field, its value and the rule where the schema refused it, else tyro's own words."""
    cause: BaseException | None = left
    while cause is not None and not isinstance(cause, pydantic.ValidationError):
        cause = cause.__context__
    if cause is not None:
        section = _prefixes(config_class).get(cause.title, "")
        return "; ".join(
            f"{section}{'.'.join(map(str, e['loc']))} = {e['input']!r}: {_rule(e)}" for e in cause.errors()
        )
    lines = [line.strip("│ ") for line in printed.splitlines()]
    lines = [line for line in lines if line and not line.startswith(("╭", "╰", "─"))]
    return " ".join(line for line in lines if not line.startswith("For full helptext"))


def _prefixes(section: type[BaseModel], prefix: str = "") -> dict[str, str]:
    """By the name of a section's class, what its keys begin with; nothing for a class of several sections."""
    found: dict[str, str] = {}
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            own = f"{prefix}{name}."
            for title, keys in {field.annotation.__name__: own, **_prefixes(field.annotation, own)}.items():
                found[title] = "" if title in found else keys
    return found


def _reject_unknown_flags(config_class: type[BaseModel], arguments: Sequence[str]) -> None:
    known = {key.replace("_", "-") for key in _known_keys(config_class)}
    known |= {_negated(key) for key in known} | {"help", "config"}
    for argument in arguments:
        if argument.startswith("--"):
            flag = argument[2:].split("=")[0].replace("_", "-")
            if flag not in known:
                raise ConfigError(f"command line: unknown option --{flag}{suggestion(flag, known, '--')}")


def _negated(key: str) -> str:
    head, _, last = key.rpartition(".")
    return f"{head}.no-{last}" if head else f"no-{last}"


def to_toml(config: BaseRunConfig) -> str:
    """The configuration as a TOML file that reads back to the same values; unset optional keys are left out."""
    return values_to_toml(config.to_dict())


def values_to_toml(values: dict[str, Any]) -> str:
    """Some of a configuration's settings, as nested plain values, as a TOML file."""
    lines = [
        f"{key} = {_toml(value)}" for key, value in values.items() if value is not None and not isinstance(value, dict)
    ]
    for section, fields in values.items():
        if isinstance(fields, dict):
            lines += ["", f"[{section}]"] if lines else [f"[{section}]"]
            lines += [f"{key} = {_toml(value)}" for key, value in fields.items() if value is not None]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {_toml(item)}" for k, item in value.items() if item is not None) + " }"
    if isinstance(value, float):
        return repr(value)
    # JSON's strings are TOML's, but for surrogate pairs and a bare DEL.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
