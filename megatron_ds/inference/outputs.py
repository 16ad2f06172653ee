"""What a user gets back, under the names that the field uses."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_ds.inference.sequence import Logprobs, Request, Sequence


@dataclass
class CompletionOutput:
    """One sample.

    Attributes:
        logprobs: of the model's distribution, by token id for each token of the answer, where they were asked for.
        processed_logprobs: of the distribution that was drawn from, likewise.
        cumulative_logprob: of the whole answer, by the model; None where ``logprobs`` was not asked for.
        finish_reason: ``stop``, ``length``, ``abort``; None while it goes on. stop_reason: the text or token.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[Logprobs] | None = None
    processed_logprobs: list[Logprobs] | None = None
    cumulative_logprob: float | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    @classmethod
    def of(cls, sequence: Sequence) -> CompletionOutput:
        params = sequence.request.params
        return cls(
            sequence.index,
            sequence.text.text,
            sequence.answer,
            list(sequence.logprobs) if params.logprobs is not None else None,
            list(sequence.processed_logprobs) if params.processed_logprobs is not None else None,
            sequence.cumulative if params.logprobs is not None else None,
            sequence.reason,
            sequence.stop,
        )


@dataclass
class RequestOutput:
    """A request and its samples so far. ``cached``: tokens of the prompt that were found in the cache."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    prompt_logprobs: list[Logprobs | None] | None = None
    finished: bool = False
    cached: int = 0

    @classmethod
    def of(cls, request: Request) -> RequestOutput:
        return cls(
            request.id,
            request.prompt,
            request.tokens,
            [CompletionOutput.of(sample) for sample in request.samples],
            request.prompt_logprobs if request.params.prompt_logprobs is not None else None,
            request.finished,
            request.cached,
        )
