"""Requests in, tokens out: the loop around the batcher, the model and the sampler.

All ranks of the mesh run this engine alike: the first one tells the others which requests have come and gone, in one
message a step, and everything else follows on each rank by itself.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Container, Iterable
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_ds.errors import ConfigError
from megatron_ds.inference.batching import Batcher, Span
from megatron_ds.inference.counters import Counters
from megatron_ds.inference.detokenizer import Decoder, Detokenizer
from megatron_ds.inference.draft_model import DraftModel
from megatron_ds.inference.model_runner import ModelRunner
from megatron_ds.inference.outputs import CompletionOutput, RequestOutput
from megatron_ds.inference.ranks import from_first, from_last
from megatron_ds.inference.sampler import Row, Sampler
from megatron_ds.inference.sampling_params import SamplingParams
from megatron_ds.inference.sequence import Request, Sequence, Status
from megatron_ds.inference.structured import Structures
from megatron_ds.mesh import Mesh


@dataclass(frozen=True)
class TextEnds:
    """What the tokenizer and the model say of texts: tokens that end an answer, tokens that are no text."""

    eos: tuple[int, ...] = ()
    hidden: Container[int] = frozenset()


@dataclass
class _Live:
    """A request under way: its samples, their texts."""

    request: Request
    samples: list[Sequence]
    texts: list[Detokenizer]
    cached: int = 0


class ServingEngine:
    """Serves requests on a mesh.

    Args:
        runner: this rank's stage. batcher: the same on every rank.
        tokenizer: None: requests come as tokens, and answers have no text.
        max_model_len: tokens of prompt and answer together at most.
        draft_model: guesses what follows; on the first rank, where it does.
    """

    def __init__(
        self,
        runner: ModelRunner,
        batcher: Batcher,
        mesh: Mesh,
        max_model_len: int,
        tokenizer: Decoder | None = None,
        ends: TextEnds | None = None,
        draft_model: DraftModel | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.runner, self.batcher, self.mesh = runner, batcher, mesh
        self.tokenizer, self.ends = tokenizer, ends or TextEnds()
        self.max_model_len = min(max_model_len, batcher.pool.count * batcher.pool.size)
        self.counters = Counters()
        self._clock, self._draft_model = clock, draft_model
        config = runner.model.config
        width = config.padded_vocab // mesh.tp.size
        self.vocab_size = config.vocab_size
        self._structures = Structures(tokenizer, self.ends.eos, config.vocab_size)
        self.sampler = Sampler(mesh.tp, mesh.tp.rank * width, config.vocab_size)
        self._live: dict[str, _Live] = {}
        self._events: list[list[Any]] = []

    # Requests

    @property
    def has_work(self) -> bool:
        return bool(self._live or self._events)

    def add(self, request_id: str, tokens: Many[int], params: SamplingParams, prompt: str | None = None) -> None:
        """A request, from the next step on.

        Raises:
            ConfigError: it can never be served: the message says why, and what could be.
        """
        self.check(request_id, tokens, params)
        seed = secrets.randbits(62) if params.seed is None else params.seed
        self._events.append(["add", request_id, list(tokens), params.to_json(), seed, prompt])

    def check(self, request_id: str, tokens: Many[int], params: SamplingParams) -> None:
        """Raises :class:`ConfigError` where :meth:`add` would."""
        if request_id in self._live or any(event[:2] == ["add", request_id] for event in self._events):
            raise ConfigError(f"request {request_id!r} is being served already; give each an id of its own")
        if not tokens:
            raise ConfigError("the prompt is empty; give one token at least, for example the one that begins a text")
        if len(tokens) >= self.max_model_len:
            raise ConfigError(
                f"the prompt has {len(tokens)} tokens, and prompt and answer may have {self.max_model_len} together: "
                "shorten it, or serve with a longer max_model_len or more memory for the cache"
            )
        named = (*tokens, *params.stop_token_ids, *params.logit_bias)
        if outside := [token for token in named if not 0 <= token < self.vocab_size]:
            raise ConfigError(f"token {outside[0]} is none of the model's, 0 to {self.vocab_size - 1}")
        if params.stop and self.tokenizer is None:
            raise ConfigError("stop needs a tokenizer; use stop_token_ids")
        if params.structured_outputs is not None:
            self._structures.check(params.structured_outputs)

    def abort(self, request_id: str) -> None:
        """Stop serving a request, if it is being served."""
        self._events.append(["abort", request_id])

    # Steps

    def step(self) -> list[RequestOutput]:
        """Compute one batch; on the first rank. Returns the requests that have got tokens, or have ended."""
        begun = self._clock()
        events, self._events = self._events, []
        if self._draft_model is not None:
            waits = bool(self.batcher.waiting) or any(event[0] == "add" for event in events)  # nobody is guessed for
            events.append(["guess", [] if waits else self._draft_model.guess(self.batcher.running)])
        outputs = self._step(from_first(self.mesh.world, events))
        self.counters.step_seconds += self._clock() - begun
        return outputs

    def follow(self) -> None:
        """On the other ranks: take part in every step, until the first rank says :meth:`stop`."""
        while ["stop"] not in (events := from_first(self.mesh.world, None)):
            self._step(events)

    def stop(self) -> None:
        """On the first rank: the others need not wait for steps any more."""
        if self.mesh.world.size > 1:
            from_first(self.mesh.world, [["stop"]])

    def _step(self, events: Iterable[list[Any]]) -> list[RequestOutput]:
        ended = [self._take(event) for event in events]
        plan = self.batcher.plan()
        changed: dict[str, None] = dict.fromkeys(name for name in ended if name is not None)
        if plan.spans:
            self.counters.steps += 1
            for span in plan.spans:
                if span.start == span.sequence.cached and not span.sequence.answered:
                    self.counters.cached_tokens += span.sequence.cached
                    self._live[span.sequence.request.id].cached = span.sequence.cached
            last = [span.sequence.request.id for span in plan.spans if span.is_last]  # before they get more tokens
            rows, wanted = self._rows(plan.spans)
            logits = self._timed(self.runner.run, plan, rows)
            for span in plan.spans:
                self.batcher.computed(span.sequence, span.count - len(span.draft))
            with torch.inference_mode():
                self._sample(plan.spans, wanted, logits)
            changed.update(dict.fromkeys(last))
        return [self._output(name) for name in list(changed) if name in self._live]

    def _timed(self, compute: Callable[..., Any], *arguments: Any) -> Any:
        begun = self._clock()
        found = compute(*arguments)
        self.counters.compute_seconds += self._clock() - begun
        return found

    def _take(self, event: list[Any]) -> str | None:
        """Returns the id of a request that has ended by it."""
        kind, name, *rest = event
        if kind == "guess":
            self.batcher.guesses = {(request, index): tokens for request, index, tokens in name}
            return None
        if kind == "add":
            tokens, params, seed, prompt = rest
            params["logit_bias"] = {int(token): bias for token, bias in params["logit_bias"].items()}
            request = Request(name, tokens, SamplingParams(**params), seed, self._clock(), prompt)
            first = self._sequence(request, 0)
            self._live[name] = _Live(request, [first], [self._text(request)])
            self.counters.prompt_tokens += len(tokens)
            self.batcher.add(first)
            return None
        live = self._live.get(name)
        if live is None:
            return None
        for sequence in live.samples:
            if sequence.status is not Status.FINISHED:
                self._finish(sequence, "abort")
        return str(name)

    def _sequence(self, request: Request, index: int) -> Sequence:
        form = request.params.structured_outputs
        matcher = None if form is None else self._structures.matcher(form)
        return Sequence(request, index, list(request.tokens), matcher=matcher)

    def _text(self, request: Request) -> Detokenizer:
        params = request.params
        hidden = self.ends.hidden if params.skip_special_tokens else ()
        return Detokenizer(
            self.tokenizer if params.detokenize else None,
            request.tokens,
            params.stop,
            params.include_stop_str_in_output,
            hidden,
        )

    def _rows(self, spans: Many[Span]) -> tuple[list[int], list[tuple[Span, int]]]:
        """Rows of the step whose logits are wanted: of each span its last, or all; (span, how many) likewise."""
        rows: list[int] = []
        wanted = []
        first = 0
        for span in spans:
            asked = span.sequence.request.params.prompt_logprobs is not None and span.sequence.index == 0
            inside = span.start < len(span.sequence.request.tokens) and not span.sequence.answered
            if asked and inside:
                rows += range(first, first + span.count)
                wanted.append((span, span.count))
            elif span.is_last:
                count = 1 + len(span.draft)
                rows += range(first + span.count - count, first + span.count)
                wanted.append((span, count))
            first += span.count
        return rows, wanted

    def _sample(self, spans: Many[Span], wanted: list[tuple[Span, int]], logits: Tensor | None) -> None:
        """Choose the next token of every sequence that is at its end, and follow it there."""
        last = [span for span in spans if span.is_last]
        found: Any = None
        if logits is not None:
            logits = self._timed(self.sampler.mask_padding, logits)
            found = [self._of_prompts(wanted, logits), [], [], []]
            ends: list[int] = []
            row = 0
            for span, count in wanted:
                row += count
                if span.is_last:
                    ends += range(row - 1 - len(span.draft), row)
            if last:
                asked = [self._row(span, place) for span in last for place in range(1 + len(span.draft))]
                logits = logits if len(ends) == len(logits) else logits[ends]
                sampled = self._timed(self.sampler.sample, logits, asked)
                found[1:] = [sampled.tokens, _listed(sampled.logprobs), _listed(sampled.processed)]
        of_prompts, *of_answers = from_last(self.mesh.pp, found)
        for span, said in zip([span for span, _ in wanted if _asks_of_prompt(span)], of_prompts):
            of_prompt = span.sequence.request.prompt_logprobs
            of_prompt += [None] * (not of_prompt)  # of the first token there is nothing to say
            of_prompt += map(_as_logprobs, said)
        of_rows = zip(*of_answers)
        for span in last:
            self._follow(span, [next(of_rows) for _ in range(1 + len(span.draft))])

    def _follow(self, span: Span, rows: Many[Any]) -> None:
        """Take the token of each row as long as the draft has guessed the one before: the others saw a wrong text."""
        sequence = span.sequence
        for place, (token, own, processed) in enumerate(rows):
            self._append(sequence, token, _as_logprobs(own), _as_logprobs(processed))
            if sequence.status is Status.FINISHED:
                return
            if span.draft[place : place + 1] != (token,):
                break
            self.batcher.computed(sequence, 1)
            self.counters.drafted_tokens += 1
        most = sequence.request.params.max_tokens or self.max_model_len
        sequence.room = min(self.max_model_len, len(sequence.request.tokens) + most) - len(sequence.tokens)

    def _of_prompts(self, wanted: list[tuple[Span, int]], logits: Tensor) -> list[Any]:
        """Of each span in which they are asked for, log-probabilities of the prompt's tokens that follow from it."""
        found = []
        row = 0
        for span, count in wanted:
            if _asks_of_prompt(span):
                request = span.sequence.request
                known = max(1, len(request.prompt_logprobs))  # more than the start, where it is computed again
                tokens = request.tokens[known : span.start + 1 + count]
                first = row + known - span.start - 1
                own = logits[first : first + len(tokens)]
                asked = [request.params.prompt_logprobs] * len(tokens)
                found.append(_listed(self.sampler.logprobs(own, torch.tensor(tokens, dtype=torch.int64), asked)))
            row += count
        return found

    def _row(self, span: Span, place: int) -> Row:
        """Of the token that follows ``place`` tokens of the span's draft."""
        request, sequence = span.sequence.request, span.sequence
        answer = [*sequence.answer, *span.draft[:place]]
        banned: tuple[int, ...] = ()
        if len(answer) < request.params.min_tokens:
            banned = (*self.ends.eos, *request.params.stop_token_ids)
        allowed = None if sequence.matcher is None else sequence.matcher.allowed(span.draft[:place])
        return Row(request.params, request.seed, sequence.index, request.tokens, answer, banned, allowed)

    def _append(self, sequence: Sequence, token: int, own: Any, processed: Any) -> None:
        request, params = sequence.request, sequence.request.params
        live = self._live[request.id]
        text = live.texts[live.samples.index(sequence)]
        if not sequence.answered:
            self.counters.first_token(self._clock() - request.arrived)
            if sequence.index == 0:
                self._fork(live)
        sequence.tokens.append(token)
        self.counters.answer_tokens += 1
        if own is not None:
            sequence.logprobs.append(own)
            sequence.cumulative += own[token]
        if processed is not None:
            sequence.processed_logprobs.append(processed)
        ends = token in params.stop_token_ids or (token in self.ends.eos and not params.ignore_eos)
        if ends and sequence.answered > params.min_tokens:
            sequence.stop = token if token in params.stop_token_ids else None
            if params.include_stop_str_in_output:
                text.add(token)
            self._finish(sequence, "stop")
            return
        text.add(token, sequence.answered > params.min_tokens)
        if sequence.matcher is not None:
            sequence.matcher.take(token)
        if text.stopped is not None:
            sequence.stop = text.stopped
            self._finish(sequence, "stop")
        elif sequence.matcher is not None and (why := sequence.matcher.ended):
            self._finish(sequence, why)
        elif sequence.answered == params.max_tokens or len(sequence.tokens) == self.max_model_len:
            self._finish(sequence, "length")

    def _fork(self, live: _Live) -> None:
        """The other samples of the prompt, now that it is computed."""
        for index in range(1, live.request.params.n):
            sample = self._sequence(live.request, index)
            live.samples.append(sample)
            live.texts.append(self._text(live.request))
            self.batcher.fork(live.samples[0], sample)

    def _finish(self, sequence: Sequence, reason: str) -> None:
        live = self._live[sequence.request.id]
        live.texts[live.samples.index(sequence)].finish()
        self.batcher.finish(sequence, reason)
        self.counters.finished[reason] = self.counters.finished.get(reason, 0) + 1

    def _output(self, name: str) -> RequestOutput:
        live = self._live[name]
        request = live.request
        finished = all(sequence.status is Status.FINISHED for sequence in live.samples)
        if finished:
            del self._live[name]
        return RequestOutput(
            name,
            request.prompt,
            request.tokens,
            [_completion(sequence, text) for sequence, text in zip(live.samples, live.texts)],
            request.prompt_logprobs if request.params.prompt_logprobs is not None else None,
            finished,
            live.cached,
        )


def _asks_of_prompt(span: Span) -> bool:
    return span.sequence.request.params.prompt_logprobs is not None and not span.sequence.answered


def _completion(sequence: Sequence, text: Detokenizer) -> CompletionOutput:
    params = sequence.request.params
    return CompletionOutput(
        sequence.index,
        text.text,
        sequence.answer,
        list(sequence.logprobs) if params.logprobs is not None else None,
        list(sequence.processed_logprobs) if params.processed_logprobs is not None else None,
        sequence.cumulative if params.logprobs is not None else None,
        sequence.reason,
        sequence.stop,
    )


def _listed(found: Iterable[dict[int, float] | None]) -> list[list[tuple[int, float]] | None]:
    """As JSON keeps it: keys of an object would become texts."""
    return [None if of_row is None else list(of_row.items()) for of_row in found]


def _as_logprobs(pairs: Iterable[tuple[int, float]] | None) -> dict[int, float] | None:
    return None if pairs is None else {int(token): float(value) for token, value in pairs}
