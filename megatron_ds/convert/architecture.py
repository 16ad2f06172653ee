"""What a table for one Hugging Face architecture consists of, and how one is chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_ds.config import ModelConfig
from megatron_ds.convert.settings import Settings
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
        rules: config to the rules of its tensors, ``{i}`` not yet replaced.
        shapes: config to our global shapes; the names must be those of the rules.
        to_config: config to what config.json says beyond ``architectures`` and the like.
        from_config: config.json to the fields of :class:`ModelConfig`; a :class:`ConfigError` that names the field
            where our model has no such thing.
        problems: config to what this class cannot express, each naming the field.
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
    rules: Callable[[ModelConfig], Sequence[Rule]]
    shapes: Callable[[ModelConfig], Shapes]
    to_config: Callable[[ModelConfig], dict[str, Any]]
    from_config: Callable[[Settings], dict[str, Any]]
    problems: Callable[[ModelConfig], list[str]]
    ignored: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    copies: Mapping[str, str] = field(default_factory=dict)
    renamed: tuple[tuple[str, str], ...] = ()
    harmless: tuple[str, ...] = ()

    def expanded(self, config: ModelConfig) -> list[Rule]:
        """The rules with every layer written out, layer by layer: the order in which published files hold them."""
        rules = self.rules(config)
        layered = [rule for rule in rules if "{i}" in rule.ours]
        first = rules.index(layered[0])
        before, after = rules[:first], [rule for rule in rules[first:] if rule not in layered]
        return [*before, *(rule.of_layer(i) for i in range(config.num_layers) for rule in layered), *after]


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
    problems, closest = min(found, key=lambda pair: (any("model.position" in text for text in pair[0]), len(pair[0])))
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
    raise ConfigError(
        f"architectures={names} (model_type={config.get('model_type')!r}) of config.json is not supported; "
        f"known: {known}"
    )


def needs(config: ModelConfig, **fields: Any) -> list[str]:
    """``field=value (is ...)`` for every field that is not what an architecture needs. A tuple lists choices."""
    problems = []
    for name, wanted in fields.items():
        choices = wanted if isinstance(wanted, tuple) else (wanted,)
        value = getattr(config, name)
        if value not in choices:
            problems.append(f"model.{name}={' or '.join(map(repr, choices))} (it is {value!r})")
    return problems
