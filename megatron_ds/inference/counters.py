"""What an engine has done so far."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import accumulate

_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, math.inf)
"""Seconds."""


@dataclass
class Histogram:
    """How many times there were up to each bound, and their sum."""

    counts: list[int] = field(default_factory=lambda: [0] * len(_BOUNDS))
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        self.counts[next(i for i, bound in enumerate(_BOUNDS) if seconds <= bound)] += 1
        self.seconds += seconds

    def buckets(self) -> list[tuple[str, int]]:
        """As Prometheus has them: those up to a bound."""
        names = ("+Inf" if math.isinf(bound) else str(bound) for bound in _BOUNDS)
        return list(zip(names, accumulate(self.counts)))


@dataclass
class Counters:
    """Since the start: tokens of prompts and answers; how many were in the cache, and how many were guessed.

    Attributes:
        first_tokens: times from a request's arrival to its first token. token_times: of an answer's later tokens, the
            mean of each answer that has ended by itself.
        step_seconds: of all steps. compute_seconds: of them, in the model and in the choice of tokens from logits;
            the rest is the scheduler's.
    """

    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    answer_tokens: int = 0
    drafted_tokens: int = 0
    finished: dict[str, int] = field(default_factory=dict)
    first_tokens: Histogram = field(default_factory=Histogram)
    token_times: Histogram = field(default_factory=Histogram)
    step_seconds: float = 0.0
    compute_seconds: float = 0.0
