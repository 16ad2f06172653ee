"""A request and its samples, as the engine follows them from the prompt to the end of the answer."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from megatron_ds.inference.detokenizer import Detokenizer
from megatron_ds.inference.sampling_params import SamplingParams
from megatron_ds.inference.structured import Matcher

Logprobs = dict[int, float]
"""Log-probabilities by token id, the chosen token's first."""


class Status(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Request:
    """What a user has asked for, and what comes of it.

    Attributes:
        tokens: of the prompt. cached: how many of them were found in the cache.
        samples: the first one, and the others from when the prompt is computed.
    """

    id: str
    tokens: list[int]
    params: SamplingParams
    seed: int
    arrived: float = 0.0
    prompt: str | None = None
    prompt_logprobs: list[Logprobs | None] = field(default_factory=list)
    samples: list[Sequence] = field(default_factory=list)
    cached: int = 0

    @property
    def finished(self) -> bool:
        return all(sample.status is Status.FINISHED for sample in self.samples)


@dataclass(eq=False, slots=True)
class Sequence:
    """One sample of a request.

    Attributes:
        tokens: of the prompt and of the answer so far.
        computed: how many of them have their keys and values in ``blocks``.
        digests: of the full blocks so far.
        reason: why it has finished: ``stop``, ``length`` or ``abort``.
        stop: the text or token at which it has.
        limit: tokens that it may have. began: when its first answer token came.
        matcher: of the form that the answer must have, if it must. text: of the answer.
        plain: its tokens are the most probable ones, and nothing is asked of their probabilities.
        ends: tokens that end the answer, once it is long enough.
    """

    request: Request
    index: int
    tokens: list[int]
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    status: Status = Status.WAITING
    reason: str | None = None
    stop: str | int | None = None
    logprobs: list[Logprobs] = field(default_factory=list)
    processed_logprobs: list[Logprobs] = field(default_factory=list)
    cumulative: float = 0.0
    cached: int = 0
    limit: int = 0
    matcher: Matcher | None = None
    began: float = 0.0
    text: Detokenizer = field(default_factory=lambda: Detokenizer(None, ()))
    plain: bool = False
    ends: frozenset[int] = frozenset()

    @property
    def answer(self) -> list[int]:
        return self.tokens[len(self.request.tokens) :]

    @property
    def answered(self) -> int:
        return len(self.tokens) - len(self.request.tokens)

    @property
    def room(self) -> int:
        """Tokens that it may still get."""
        return self.limit - len(self.tokens)

    @property
    def pending(self) -> int:
        """Tokens without keys and values; the last one's logits give the next token."""
        return len(self.tokens) - self.computed
