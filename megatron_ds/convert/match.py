"""Which tensors of a folder are which of a model's, and what is made of a second copy of a tied one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch

from megatron_ds.config import BaseModelConfig, ModelConfig
from megatron_ds.convert.architecture import Architecture, Rule
from megatron_ds.convert.folder import WeightFolder
from megatron_ds.errors import CheckpointError, listed
from megatron_ds.models.families import Shapes, global_shapes


class Matched:
    """The tensors of a folder that a model is made of, every one there and of the right shape.

    Args:
        kind: of model, for messages. known: names that the rules do not read and that may be there.
        names: the rules' names to the names in the files.

    Raises:
        CheckpointError: tensors are missing, of another shape, quantised, or of no known use.
    """

    def __init__(
        self,
        source: WeightFolder,
        kind: str,
        config: BaseModelConfig,
        rules: Sequence[Rule],
        shapes: Shapes,
        names: dict[str, str],
        known: Iterable[str] = (),
    ):
        self.source, self.rules, self.shapes, self.names = source, rules, shapes, names
        missing: list[str] = []
        wrong: list[str] = []
        used = set(known)
        for rule in rules:
            for name, part in zip(rule.theirs, rule.to_hf(config, torch.empty(shapes[rule.ours], device="meta"))):
                if name not in names:
                    missing.append(name)
                    continue
                used.add(name)
                source.check_dtype(names[name])
                shape = source.shapes[names[name]]
                if shape != tuple(part.shape):
                    wrong.append(f"{name}: {list(shape)} instead of {list(part.shape)}")
        problems = {
            "missing": missing,
            "unexpected": sorted(names[name] for name in names.keys() - used),
            "of another shape than config.json says": wrong,
        }
        if any(problems.values()):
            lines = [f"  {title}: {listed(found)}" for title, found in problems.items() if found]
            raise CheckpointError("\n".join([f"{source.path} does not hold the {kind} it describes:", *lines]))

    def read(self, rule: Rule) -> list[torch.Tensor]:
        return [self.source.read(self.names[name]) for name in rule.theirs]

    def dtype_of(self, rule: Rule) -> torch.dtype:
        """The one dtype of the tensors that a rule reads; a :class:`CheckpointError` where they have several."""
        dtypes = {self.source.dtypes[self.names[name]] for name in rule.theirs}
        if len(dtypes) > 1:
            found = ", ".join(sorted(map(str, dtypes)))
            raise CheckpointError(
                f"{self.source.path}: {', '.join(rule.theirs)} have dtypes {found}; choose one with --dtype"
            )
        return dtypes.pop()


class Match(Matched):
    """The same of an architecture of ``transformers``, whose files have names of several times.

    Attributes:
        config: the model's, with a head of its own where the file has one, whatever its configuration says.
        notes: what should be said of the choice.
    """

    def __init__(self, source: WeightFolder, architecture: Architecture, config: ModelConfig):
        self.source, self.architecture = source, architecture
        self.notes: list[str] = []
        self.names = self._full_names()
        self._used = {name for name in self.names if self._known(name, architecture.ignored)}
        dropped = [name for name in self.names if self._known(name, architecture.dropped)]
        if dropped:
            self.notes.append(f"left out, for the model here has no use for them: {listed(dropped)}")
            self._used.update(dropped)
        self.config = self._with_copies(config)
        rules, shapes = architecture.expanded(self.config), global_shapes(self.config)
        super().__init__(source, architecture.name, self.config, rules, shapes, self.names, self._used)

    def _full_names(self) -> dict[str, str]:
        """Names as this version of ``transformers`` gives them: with the prefix, without those of earlier times."""
        prefix = self.architecture.prefix
        bare = not any(name.startswith(prefix) for name in self.source.shapes)
        heads = {name.split(".")[0] for name in self.architecture.copies} if bare else set()
        found: dict[str, str] = {}
        for name in self.source.shapes:
            full = prefix + name if bare and name.split(".")[0] not in heads else name
            for pattern, replacement in self.architecture.renamed:
                full = re.sub(pattern, replacement, full)
            if full in found:
                raise CheckpointError(f"{self.source.path}: {found[full]} and {name} are one tensor under two names")
            found[full] = name
        return found

    def _with_copies(self, config: ModelConfig) -> ModelConfig:
        """Where a tied tensor is there twice and differs, the model computes with the copy, as in ``transformers``."""
        tied, untied = config.tied_embeddings, config.model_copy(update={"tied_embeddings": False})
        head = [rule.theirs[0] for rule in self.architecture.rules(untied) if rule.ours == "head.weight"]
        for copy, original in self.architecture.copies.items():
            needed = any(copy in rule.theirs for rule in self.architecture.rules(config))
            if copy not in self.names or needed:
                if needed and tied and original in self.names:
                    self.names.setdefault(copy, self.names[original])
                continue
            if original not in self.names:
                self.names[original] = self.names[copy]
            elif not self._equal(copy, original):
                if copy in head:
                    config = untied
                    self.notes.append(
                        f"{copy} differs from {original}: the model gets a head of its own, although "
                        "tie_word_embeddings says otherwise"
                    )
                    continue
                self.notes.append(f"{copy} differs from {original}: it is what the model computes with")
                self.names[original], self.names[copy] = self.names[copy], self.names[original]
            self._used.add(copy)
        return config

    def _equal(self, one: str, two: str) -> bool:
        shapes = [self.source.shapes[self.names[name]] for name in (one, two)]
        return shapes[0] == shapes[1] and torch.equal(
            self.source.read(self.names[one]), self.source.read(self.names[two])
        )

    def _known(self, name: str, patterns: Sequence[str]) -> bool:
        prefix = re.escape(self.architecture.prefix)
        return any(re.fullmatch(f"({prefix})?{pattern}", name) for pattern in patterns)
