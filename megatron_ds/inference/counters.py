"""What an engine has done so far."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

FIRST_TOKEN_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, math.inf)
"""Seconds."""


@dataclass
class Counters:
    """Since the start: tokens of prompts and answers; how many were in the cache, and how many were guessed.

    Attributes:
        first_tokens: requests by the time to their first token, up to each of :data:`FIRST_TOKEN_BOUNDS`.
        step_seconds: of all steps. compute_seconds: of them, in the model and in the choice of tokens from logits;
            the rest is the scheduler's.
    """

    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    answer_tokens: int = 0
    drafted_tokens: int = 0
    finished: dict[str, int] = field(default_factory=dict)
    first_tokens: list[int] = field(default_factory=lambda: [0] * len(FIRST_TOKEN_BOUNDS))
    first_token_seconds: float = 0.0
    step_seconds: float = 0.0
    compute_seconds: float = 0.0

    def first_token(self, seconds: float) -> None:
        """A request has got its first token, so long after it came."""
        place = next(i for i, bound in enumerate(FIRST_TOKEN_BOUNDS) if seconds <= bound)
        self.first_tokens[place] += 1
        self.first_token_seconds += seconds
