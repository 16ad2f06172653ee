"""A small model guesses tokens, of which one step of the large one checks several (Leviathan et al. 2023, speculative
decoding).

A guess is taken only where it is the token that is drawn anyway, so answers do not depend on it. The small model runs
whole on the first rank, which tells the others what it guesses.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path

import torch

from megatron_ds.config import ModelConfig
from megatron_ds.errors import ConfigError
from megatron_ds.inference import served_model
from megatron_ds.inference.batching import Plan, Span
from megatron_ds.inference.block_pool import BlockPool
from megatron_ds.inference.model_runner import CacheSize, ModelRunner, bytes_of_token
from megatron_ds.inference.sequence import Sequence
from megatron_ds.mesh import Mesh

Guess = tuple[str, int, list[int]]
"""Of a request's sample the tokens that may follow."""


class DraftModel:
    """A small model beside a cache of its own.

    Args:
        source: of the model; dtype: that it computes in. budget: tokens of a step at most.
        most: tokens that are guessed of a sample.
    """

    def __init__(self, source: served_model.Source, dtype: torch.dtype, device: torch.device, budget: int, most: int):
        self.source, self._dtype, self._budget, self._most = source, dtype, budget, most
        self._mesh = Mesh.single(device)
        self._stage = served_model.build(source, self._mesh, dtype)
        self._followed: dict[tuple[str, int], Sequence] = {}  # samples as this model knows them, with blocks of its own

    @staticmethod
    def find(path: str | Path, of: ModelConfig) -> served_model.Source:
        """Raises :class:`ConfigError` where the model at ``path`` cannot guess tokens of the model ``of``."""
        source = served_model.find(path)
        if source.config.vocab_size != of.vocab_size:
            raise ConfigError(
                f"speculative_model={str(path)!r} has a vocabulary of {source.config.vocab_size} tokens and the model "
                f"one of {of.vocab_size}; it has to guess the same tokens"
            )
        return source

    def bytes_of_token(self) -> int:
        """Of its key/value cache."""
        return bytes_of_token(self._stage, self._dtype)

    def open(self, blocks: int, size: int) -> None:
        """Take memory for as many tokens as the model's own cache has."""
        self._pool = BlockPool(blocks, size, share=False)
        self._runner = ModelRunner(self._stage, self._mesh, CacheSize(blocks, size, self._dtype))

    @property
    def free(self) -> int:
        """Blocks of its cache that nobody holds."""
        return self._pool.free

    def guess(self, running: Iterable[Sequence]) -> list[Guess]:
        """What may follow in each of these samples, where they are about to get a token."""
        now = [sequence for sequence in running if sequence.pending == 1 and sequence.room > 1]
        self._forget({(sequence.request.id, sequence.index) for sequence in now})
        followed = [(of, sequence) for sequence in now if (of := self._follow(sequence)) is not None]
        guessed: list[tuple[Sequence, Sequence]] = []
        left = self._budget
        for of, sequence in followed:  # what is left of the budget goes to texts that it does not know yet, in parts
            count = min(of.pending, left)
            left -= count
            if count and count == of.pending:
                guessed.append((of, sequence))
            elif count:
                self._compute([of], count)
        own = [of for of, _ in guessed]
        for _ in range(self._most):
            for of, token in zip(own, self._compute(own, None)):
                of.tokens.append(token)
        return [
            (sequence.request.id, sequence.index, of.tokens[len(sequence.tokens) :][: sequence.room - 1])
            for of, sequence in guessed
        ]

    def _follow(self, sequence: Sequence) -> Sequence | None:
        """What is known of a sample, up to where it went another way; None: there is no memory for it."""
        key = (sequence.request.id, sequence.index)
        of = self._followed.setdefault(key, Sequence(sequence.request, sequence.index, []))
        same = max(0, min(of.computed, len(sequence.tokens)) - self._most - 1)
        end = min(of.computed, len(sequence.tokens) - 1)
        while same < end and of.tokens[same] == sequence.tokens[same]:
            same += 1
        of.tokens, of.computed = list(sequence.tokens), min(same, end)
        longest = self.source.longest
        if longest is not None and len(of.tokens) + self._most > longest:
            return None
        missing = self._pool.needed(len(of.tokens) + self._most) - len(of.blocks)
        blocks = self._pool.allocate(max(0, missing))
        if blocks is None:
            return None
        of.blocks += blocks
        return of

    def _forget(self, present: set[tuple[str, int]]) -> None:
        for key in [key for key in self._followed if key not in present]:
            self._pool.release(self._followed.pop(key).blocks)

    def _compute(self, several: list[Sequence], count: int | None) -> list[int]:
        """The next ``count`` tokens of each (None: all it has), and the likeliest that follows."""
        if not several:
            return []
        spans = [Span(of, of.computed, count or of.pending) for of in several]
        rows = [end - 1 for end in accumulate(span.count for span in spans)]
        logits = self._runner.run(Plan(spans), rows)
        assert logits is not None
        for span in spans:
            span.sequence.computed += span.count
        best: list[int] = logits[:, : self.source.config.vocab_size].argmax(1).tolist()
        return best
