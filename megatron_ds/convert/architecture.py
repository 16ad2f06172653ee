"""What a table for one Hugging Face architecture consists of, and how one is chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Any

import torch
from pydantic import ValidationError

from megatron_ds.config import ModelConfig
from megatron_ds.convert.settings import Settings
from megatron_ds.convert.translations import Fixed, Translation
from megatron_ds.errors import ConfigError, RaisedAs, listed
from megatron_ds.models.families import global_shapes

# Of every class here: a decoder or an encoder alone.
_WHOLE = Fixed(is_encoder_decoder=False, tie_encoder_decoder=False, add_cross_attention=False)
# How many settings that are not understood the same name makes up for.
_NAMESAKE = 16


@dataclass(frozen=True)
class Rule:
    """One of our tensors and what it is at Hugging Face.

    Args:
        ours: global name; ``{i}`` stands for the layer.
        theirs: one name, or several where we fuse what they keep apart.
        to_hf: (config of the model's family, our tensor) to their tensors, in the order of ``theirs``.
        from_hf: (config, their tensors) to ours. The exact inverse. Both also run on meta tensors, for shapes.
        copies: ``theirs`` are all the same tensor, and a folder in which they differ is refused.
    """

    ours: str
    theirs: tuple[str, ...]
    to_hf: Callable[[Any, torch.Tensor], Sequence[torch.Tensor]]
    from_hf: Callable[[Any, Sequence[torch.Tensor]], torch.Tensor]
    copies: bool = False

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
        return {name: value for part in (_WHOLE, *self.settings) for name, value in _read(part, config).items()}

    def gaps(self, config: Settings) -> list[str]:
        """What this class does not understand of the config.json of another."""
        found = []
        for part in (_WHOLE, *self.settings):
            try:
                _read(part, config)
            except ConfigError as error:
                found.append(str(error))
        return [*dict.fromkeys(found), *config.said(config.unread(self.harmless))]

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
        layers, shapes = {0, config.num_layers - 1}, global_shapes(config)
        return [rule for rule in self.table(config) if any(rule.of_layer(i).ours in shapes for i in layers)]

    def expanded(self, config: ModelConfig) -> list[Rule]:
        """The rules with every layer written out, layer by layer: the order in which published files hold them."""
        rules, shapes = self.table(config), global_shapes(config)
        layered = [rule for rule in rules if "{i}" in rule.ours]
        first = rules.index(layered[0])
        before, after = rules[:first], [rule for rule in rules[first:] if rule not in layered]
        every = [*before, *(rule.of_layer(i) for i in range(config.num_layers) for rule in layered), *after]
        return [rule for rule in every if rule.ours in shapes]


def _read(part: Translation, config: Settings) -> dict[str, Any]:
    kinds = (TypeError, ValueError, ArithmeticError, AttributeError)
    with RaisedAs(ConfigError, f"{config.where} has a value of a wrong type or size", *kinds):
        return part.read(config)


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
    if not isinstance(names, list):
        raise ConfigError(f"architectures={names!r} of config.json is no list of classes")
    for architecture in architectures:
        if architecture.name in names or (not names and architecture.model_type == config.get("model_type")):
            return architecture
    known = ", ".join(architecture.name for architecture in architectures)
    nearest, gaps = _nearest(config, str([*names, config.get("model_type")][0]), architectures)
    raise ConfigError(
        f"architectures={names} (model_type={config.get('model_type')!r}) of config.json is not supported. The "
        f"nearest is {nearest}, which is not enough: "
        f"{listed(gaps) or 'its settings are understood, but it is another class'}. Known: {known}"
    )


def _nearest(config: dict[str, Any], name: str, architectures: Sequence[Architecture]) -> tuple[str, list[str]]:
    """The class that understands most of a config.json, where a common part of the names counts too, and its gaps."""
    text = config.get("text_config")  # of a model of texts and images
    inner = text if isinstance(text, dict) else {}
    flat = {**inner, **{key: value for key, value in config.items() if key != "text_config" or not inner}}
    gaps = {architecture.name: architecture.gaps(Settings(dict(flat))) for architecture in architectures}
    nearest = min(gaps, key=lambda known: len(gaps[known]) - _NAMESAKE * SequenceMatcher(None, name, known).ratio())
    return nearest, gaps[nearest]
