"""What a table for one Hugging Face architecture consists of, and how one is chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import ValidationError

from megatron_ds.config import ModelConfig
from megatron_ds.convert.settings import Settings
from megatron_ds.convert.translations import Translation
from megatron_ds.errors import ConfigError

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Rule:
    """One of our tensors and what it is at Hugging Face.

    Args:
        ours: global name; ``{i}`` stands for the layer.
        theirs: one name, or several where we fuse what they keep apart.
        to_hf: (config, our tensor) to their tensors, in the order of ``theirs``.
        from_hf: (config, their tensors) to ours. The exact inverse. Both also run on meta tensors, for shapes.
    """

    ours: str
    theirs: tuple[str, ...]
    to_hf: Callable[[ModelConfig, torch.Tensor], Sequence[torch.Tensor]]
    from_hf: Callable[[ModelConfig, Sequence[torch.Tensor]], torch.Tensor]

    def of_layer(self, index: int) -> Rule:
        names = tuple(name.replace("{i}", str(index)) for name in self.theirs)
        return Rule(self.ours.replace("{i}", str(index)), names, self.to_hf, self.from_hf)


@dataclass(frozen=True)
class Architecture:
    """A class of ``transformers`` and how our models map to it.

    Args:
        name: the class (``LlamaForCausalLM``). model_type: its ``model_type`` in config.json.
        prefix: of the base model's names (``model.``), which some published files leave out.
        table: config to the rules of all tensors that such a model can have, ``{i}`` not yet replaced.
        shapes: config to our global shapes.
        settings: the translations of its config.json.
        ignored: patterns of names in published files that hold no weights (masks, cached angles).
        dropped: patterns of weights that ours has no use for (heads of other losses); that they are left out is said.
        copies: tensors that files may hold a second time, to the names they are tied to. Where a file's two differ,
            the copy is what the class computes with, and what is read.
        renamed: (pattern, replacement) of names in files of an earlier time.
        harmless: keys of config.json that change nothing of what the model computes.
    """

    name: str
    model_type: str
    prefix: str
    table: Callable[[ModelConfig], Sequence[Rule]]
    shapes: Callable[[ModelConfig], Shapes]
    settings: tuple[Translation, ...]
    ignored: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    copies: Mapping[str, str] = field(default_factory=dict)
    renamed: tuple[tuple[str, str], ...] = ()
    harmless: tuple[str, ...] = ()

    def to_config(self, config: ModelConfig) -> dict[str, Any]:
        """What config.json says beyond ``architectures`` and the like."""
        model = config.resolved
        return {key: value for part in self.settings for key, value in part.write(model).items()}

    def from_config(self, config: Settings) -> dict[str, Any]:
        """The fields of :class:`ModelConfig`; a :class:`ConfigError` that names what our model does not have."""
        try:
            return {name: value for part in self.settings for name, value in part.read(config).items()}
        except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
            raise ConfigError(f"{config.where} has a value of a wrong type or size: {error}") from error

    def problems(self, config: ModelConfig) -> list[str]:
        """What this class cannot express: the settings that do not come back from its config.json."""
        wanted = config.resolved
        try:
            found = ModelConfig(**self.from_config(Settings(self.to_config(config)))).resolved
        except (ConfigError, ValidationError) as error:
            return [str(error)]
        return [
            f"model.{name}={found[name]!r} (it is {value!r})"
            for name, value in wanted.items()
            if name not in config.free and found[name] != value
        ]

    def rules(self, config: ModelConfig) -> list[Rule]:
        """Those of tensors that the model has, ``{i}`` not yet replaced."""
        layers, shapes = {0, config.num_layers - 1}, self.shapes(config)
        return [rule for rule in self.table(config) if any(rule.of_layer(i).ours in shapes for i in layers)]

    def expanded(self, config: ModelConfig) -> list[Rule]:
        """The rules with every layer written out, layer by layer: the order in which published files hold them."""
        rules, shapes = self.table(config), self.shapes(config)
        layered = [rule for rule in rules if "{i}" in rule.ours]
        first = rules.index(layered[0])
        before, after = rules[:first], [rule for rule in rules[first:] if rule not in layered]
        every = [*before, *(rule.of_layer(i) for i in range(config.num_layers) for rule in layered), *after]
        return [rule for rule in every if rule.ours in shapes]


def choose(config: ModelConfig, architectures: Sequence[Architecture]) -> Architecture:
    """The first architecture that can express the model; a :class:`ConfigError` that says what is in the way."""
    sparse = config.attention.sparse.mode
    if sparse != "none":
        raise ConfigError(
            f"model.attention.sparse.mode={sparse!r} cannot be exported: Hugging Face's models would attend to "
            "everything and compute something else"
        )
    found = [(architecture.problems(config), architecture) for architecture in architectures]
    for problems, architecture in found:
        if not problems:
            return architecture
    # How positions enter tells the families apart; after that, the fewest obstacles.
    problems, closest = min(found, key=lambda pair: (any("model.position=" in text for text in pair[0]), len(pair[0])))
    raise ConfigError(
        f"no Hugging Face architecture known here can express this model; the closest, {closest.name}, needs "
        f"{'; '.join(problems)}"
    )


def architecture_of(config: dict[str, Any], architectures: Sequence[Architecture]) -> Architecture:
    names = config.get("architectures") or []
    for architecture in architectures:
        if architecture.name in names or (not names and architecture.model_type == config.get("model_type")):
            return architecture
    known = ", ".join(architecture.name for architecture in architectures)
    (_, missing), near = min(
        ((_missing(config, architecture), architecture.name) for architecture in architectures),
        key=lambda pair: pair[0][0],
    )
    raise ConfigError(
        f"architectures={names} (model_type={config.get('model_type')!r}) of config.json is not supported; "
        f"known: {known}. The "
        f"nearest is {near}, which is not enough: {missing or 'the settings are known, but not the class'}"
    )


def _missing(config: dict[str, Any], architecture: Architecture) -> tuple[int, str]:
    """How many of a config.json's settings an architecture does not know, and which; most where one contradicts it."""
    settings, harmless = Settings(dict(config)), architecture.harmless
    try:
        architecture.from_config(settings)
    except ConfigError as error:
        return len(config), str(error)
    left = settings.unread(harmless)
    return len(left), ", ".join(f"{key}={settings[key]!r}" for key in left)
