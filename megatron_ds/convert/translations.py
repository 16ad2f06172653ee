"""How the settings of a config.json are ours: small two-way translations, of which a family's table is made.

Each has ``read``, from a config.json to fields of :class:`ModelConfig`, and ``write``, from a model's resolved settings
to keys of config.json. A model can be expressed by a class where what is written reads back as the same settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_ds.convert.settings import Settings, must_be
from megatron_ds.errors import ConfigError

Values = Mapping[str, Any]


class Translation(Protocol):
    """Some settings of a model, at Hugging Face and here. What is the same of every model is not written."""

    def read(self, config: Settings) -> dict[str, Any]: ...

    def write(self, model: Values) -> dict[str, Any]:
        return {}


class _Required:
    """No default: a config.json without the key says nothing of the model."""


REQUIRED = _Required()
GELUS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh"}


@dataclass(frozen=True)
class Key:
    """One setting that both have.

    Attributes:
        ours, theirs: its names. default: the class's own, for files that leave the key out.
        values: their values to ours, where they differ; of several for one of ours the first is written.
        null: a null in the file means none, and not the default. older: names that older files have for it.
    """

    ours: str
    theirs: str
    default: Any = REQUIRED
    values: Mapping[Any, Any] | None = None
    null: bool = False
    older: tuple[str, ...] = ()

    def read(self, config: Settings) -> dict[str, Any]:
        name = next((name for name in (self.theirs, *self.older) if config.has(name)), self.theirs)
        if name not in config and self.default is REQUIRED:
            value = config[self.theirs]
        else:
            value = config.get(name, None if self.null and name in config else self.default)
            value = config[name] if value is REQUIRED else value
        if self.values is None or value is None:
            return {self.ours: value}
        if value not in self.values:
            known = ", ".join(map(str, self.values))
            raise ConfigError(f"{name}={value!r} in {config.where} is not supported; known: {known}")
        return {self.ours: self.values[value]}

    def write(self, model: Values) -> dict[str, Any]:
        value = model[self.ours]
        if self.values is not None:
            same = [theirs for theirs, ours in self.values.items() if ours == value]
            value = (same or list(self.values))[0]
        return {self.theirs: value}


@dataclass(frozen=True)
class Same:
    """One setting of ours for several of theirs, which must agree."""

    ours: str
    theirs: tuple[str, ...]
    default: Any
    why: str = "they must be the same here"

    def read(self, config: Settings) -> dict[str, Any]:
        found = {name: config.get(name, self.default) for name in self.theirs}
        first, *others = found
        for other in others:
            if found[other] != found[first]:
                raise ConfigError(
                    f"{other}={found[other]} beside {first}={found[first]} in {config.where} is not supported; "
                    f"{self.why}"
                )
        return {self.ours: found[first]}

    def write(self, model: Values) -> dict[str, Any]:
        return dict.fromkeys(self.theirs, model[self.ours])


def dropouts(*theirs: str, default: float = 0.0) -> Same:
    return Same("hidden_dropout", theirs, default, "they must be the same here; dropout is no part of a trained model")


class Ours(Translation):
    """What every model of the class is here."""

    def __init__(self, **fields: Any):
        self.fields = fields

    def read(self, config: Settings) -> dict[str, Any]:
        return dict(self.fields)


class Fixed:
    """Their settings that have one value here. ``written``: config.json says so."""

    def __init__(self, written: bool = False, **theirs: Any):
        self.written, self.theirs = written, theirs

    def read(self, config: Settings) -> dict[str, Any]:
        must_be(config, **self.theirs)
        return {}

    def write(self, model: Values) -> dict[str, Any]:
        return dict(self.theirs) if self.written else {}


class EmbeddingRoot(Translation):
    """Gemma: token embeddings are multiplied with the root of their width."""

    def read(self, config: Settings) -> dict[str, Any]:
        return {"embedding_scale": float(config["hidden_size"] ** 0.5)}


class QueryScalar:
    """Gemma's ``query_pre_attn_scalar``."""

    def read(self, config: Settings) -> dict[str, Any]:
        return {"attention_scalar": float(config.get("query_pre_attn_scalar", 256))}

    def write(self, model: Values) -> dict[str, Any]:
        value = model["attention_scalar"]
        return {"query_pre_attn_scalar": int(value) if value == int(value) else value}
