"""Requests in, tokens out: the loop around the batcher, the model and the sampler.

All ranks of the mesh run this engine alike: the first one tells the others which requests have come and gone, in one
message a step, and everything else follows on each rank by itself.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Many
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_ds.comm.together import exchange
from megatron_ds.errors import ConfigError
from megatron_ds.inference.batching import Batcher, Plan, Span
from megatron_ds.inference.counters import Counters
from megatron_ds.inference.detokenizer import Decoder, Detokenizer, TextEnds
from megatron_ds.inference.draft_model import DraftModel
from megatron_ds.inference.model_runner import ModelRunner
from megatron_ds.inference.outputs import RequestOutput
from megatron_ds.inference.ranks import from_first, from_last
from megatron_ds.inference.sampler import Row, Sampler
from megatron_ds.inference.sampling_params import SamplingParams
from megatron_ds.inference.sequence import Request, Sequence, Status
from megatron_ds.inference.structured import Structures
from megatron_ds.mesh import Mesh


class PromptTooLongError(ConfigError):
    """A prompt that leaves no room for an answer."""


class _Rows(NamedTuple):
    """Rows of a step whose logits are wanted.

    Attributes:
        of_step: their numbers in the step.
        ends: places in ``of_step`` from which a next token follows, those of the spans in ``last``.
        asked: spans of whose prompt log-probabilities are wanted, and where in ``of_step`` they begin.
    """

    of_step: list[int]
    ends: list[int]
    last: list[Span]
    asked: list[tuple[Span, int]]


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
        self._live: dict[str, Request] = {}
        self._whole: set[str] = set()
        self._added: set[str] = set()  # in the events of the next step
        self._events: list[list[Any]] = []

    # Requests

    @property
    def has_work(self) -> bool:
        return bool(self._live or self._events)

    def add(
        self,
        request_id: str,
        tokens: Many[int],
        params: SamplingParams,
        prompt: str | None = None,
        whole: bool = False,
    ) -> None:
        """A request, from the next step on. ``whole``: its output is wanted when it has ended, and not before.

        Raises:
            ConfigError: it can never be served: the message says why, and what could be.
        """
        self.check(request_id, tokens, params)
        seed = secrets.randbits(62) if params.seed is None else params.seed
        said = params if self.mesh.world.size == 1 else params.to_json()
        self._events.append(["add", request_id, list(tokens), said, seed, prompt])
        self._added.add(request_id)
        if whole:
            self._whole.add(request_id)

    def check(self, request_id: str, tokens: Many[int], params: SamplingParams) -> None:
        """Raises :class:`ConfigError` where :meth:`add` would."""
        if request_id in self._live or request_id in self._added:
            raise ConfigError(f"request {request_id!r} is being served already; give each an id of its own")
        if not tokens:
            raise ConfigError("the prompt is empty; give one token at least, for example the one that begins a text")
        if len(tokens) >= self.max_model_len:
            raise PromptTooLongError(  # "maximum context length": clients look for these words
                f"the prompt has {len(tokens)} tokens, and this model's maximum context length is {self.max_model_len} "
                "tokens, of prompt and answer together: shorten it, or serve with a longer max_model_len or more "
                "memory for the cache"
            )
        allowed = params.allowed_token_ids or ()
        named = (*tokens, *params.stop_token_ids, *params.logit_bias, *allowed)
        if outside := [token for token in named if not 0 <= token < self.vocab_size]:
            raise ConfigError(f"token {outside[0]} is none of the model's, 0 to {self.vocab_size - 1}")
        if params.stop and self.tokenizer is None:
            raise ConfigError("stop needs a tokenizer; use stop_token_ids")
        if params.min_tokens and allowed and {*self.ends.eos, *params.stop_token_ids}.issuperset(allowed):
            raise ConfigError("allowed_token_ids has none but tokens that end an answer, which min_tokens forbids")
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
        self._added.clear()
        if self._draft_model is not None:
            waits = bool(self.batcher.waiting) or any(event[0] == "add" for event in events)  # nobody is guessed for
            events.append(["guess", [] if waits else self._draft_model.guess(self.batcher.running)])
        changed = self._step(from_first(self.mesh.world, events))
        outputs = [RequestOutput.of(one) for one in changed if one.id not in self._live or one.id not in self._whole]
        for output in outputs:
            self._whole.discard(output.request_id)
        self.counters.step_seconds += self._clock() - begun
        return outputs

    def follow(self) -> None:
        """On the other ranks: take part in every step, until the first rank says :meth:`stop`."""
        while (events := from_first(self.mesh.world, None)) != "stop":
            if events == "beat":
                self._answer()
            else:
                self._step(events)

    def stop(self) -> None:
        """On the first rank: the others need not wait for steps any more."""
        from_first(self.mesh.world, "stop")

    def beat(self) -> None:
        """On the first rank, between steps: every rank is there, and knows that this one is."""
        from_first(self.mesh.world, "beat")
        self._answer()

    def _answer(self) -> None:
        exchange(self.mesh.world, "")

    def _step(self, events: Iterable[list[Any]]) -> list[Request]:
        """Returns the requests that have got tokens, or have ended."""
        ended = [self._take(event) for event in events]
        plan = self.batcher.plan()
        changed = dict.fromkeys(request for request in ended if request is not None)
        if plan.spans:
            self.counters.steps += 1
            rows = self._rows(plan)
            logits = self._timed(self.runner.run, plan, rows.of_step)
            for span in plan.admitted:
                sequence = span.sequence
                if span.start == sequence.cached and not sequence.answered:
                    self.counters.cached_tokens += sequence.cached
                    sequence.request.cached = sequence.cached
            self.batcher.computed(plan.spans)
            self._sample(rows, logits)
            changed |= dict.fromkeys([span.sequence.request for span in rows.last])
        return list(changed)

    def _timed(self, compute: Callable[..., Any], *arguments: Any) -> Any:
        begun = self._clock()
        found = compute(*arguments)
        self.counters.compute_seconds += self._clock() - begun
        return found

    def _take(self, event: list[Any]) -> Request | None:
        """Returns the request that has ended by it."""
        kind, name, *rest = event
        if kind == "guess":
            self.batcher.guesses = {(request, index): tokens for request, index, tokens in name}
            return None
        if kind == "add":
            tokens, params, seed, prompt = rest
            if not isinstance(params, SamplingParams):  # of several ranks the first one has told the others
                params["logit_bias"] = {int(token): bias for token, bias in params["logit_bias"].items()}
                params = SamplingParams(**params)
            request = Request(name, tokens, params, seed, self._clock(), prompt)
            self._live[name] = request
            self.counters.prompt_tokens += len(tokens)
            self.batcher.add(self._sequence(request, 0))
            return None
        aborted = self._live.get(name)
        for sequence in aborted.samples if aborted is not None else ():
            if sequence.status is not Status.FINISHED:
                self._finish(sequence, "abort")
        return aborted

    def _sequence(self, request: Request, index: int) -> Sequence:
        params = request.params
        matcher = self._structures.matcher(params.structured_outputs, params.allowed_token_ids)
        text = Detokenizer(
            self.tokenizer if params.detokenize else None,
            request.tokens,
            params.stop,
            params.include_stop_str_in_output,
            self.ends.hidden if params.skip_special_tokens else (),
        )
        sequence = Sequence(
            request,
            index,
            list(request.tokens),
            limit=min(self.max_model_len, len(request.tokens) + (params.max_tokens or self.max_model_len)),
            matcher=matcher,
            text=text,
            plain=params.plain and matcher is None,
            ends=frozenset((*params.stop_token_ids, *(() if params.ignore_eos else self.ends.eos))),
        )
        request.samples.append(sequence)
        return sequence

    def _rows(self, plan: Plan) -> _Rows:
        if plan.decodes and all(span.sequence.plain for span in plan.spans):
            numbers = list(range(len(plan.spans)))
            return _Rows(numbers, numbers, plan.spans, [])
        rows = _Rows([], [], [], [])
        first = 0
        for span in plan.spans:
            stop = first + span.count
            count = 0
            if span.is_last:
                count = 1 + len(span.draft)
                rows.last.append(span)
            of_prompt = not span.sequence.index and not span.sequence.answered  # the first sample, before its answer
            if of_prompt and span.sequence.request.params.prompt_logprobs is not None:
                rows.asked.append((span, len(rows.of_step)))
                rows.of_step.extend(range(first, stop))
            else:
                rows.of_step.extend(range(stop - count, stop))
            rows.ends.extend(range(len(rows.of_step) - count, len(rows.of_step)))
            first = stop
        return rows

    def _sample(self, rows: _Rows, logits: Tensor | None) -> None:
        """Choose the next token of every sequence that is at its end, and follow it there."""
        found = None if logits is None else self._timed(self._chosen, rows, logits)
        of_prompts, tokens, *probabilities = from_last(self.mesh.pp, found)
        for (span, _), said in zip(rows.asked, of_prompts):
            of_prompt = span.sequence.request.prompt_logprobs
            of_prompt += [None] * (not of_prompt)  # of the first token there is nothing to say
            of_prompt += (None if pairs is None else _as_logprobs(pairs) for pairs in said)
        if not probabilities and len(tokens) == len(rows.last):  # and no drafts
            for span, token in zip(rows.last, tokens):
                self._append(span.sequence, token)
            return
        answers = zip(tokens, *(probabilities or ([None] * len(tokens),) * 2))
        for span in rows.last:
            if span.draft:
                self._follow(span, list(islice(answers, 1 + len(span.draft))))
            else:
                self._append(span.sequence, *next(answers))

    @torch.inference_mode()
    def _chosen(self, rows: _Rows, logits: Tensor) -> list[Any]:
        """What is asked of each prompt; of each row the next token, and its log-probabilities of either kind, which
        are left out where nobody asks for any."""
        logits = self.sampler.mask_padding(logits)
        of_prompts = [self._of_prompt(*asked, logits) for asked in rows.asked]
        if not rows.last:
            return [of_prompts, []]
        logits = logits if len(rows.ends) == len(logits) else logits[rows.ends]
        if all(span.sequence.plain for span in rows.last):
            return [of_prompts, self.sampler.most_probable(logits)]
        of_rows = [self._row(span, place) for span in rows.last for place in range(1 + len(span.draft))]
        sampled = self.sampler.sample(logits, of_rows)
        return [of_prompts, sampled.tokens, _listed(sampled.logprobs), _listed(sampled.processed)]

    def _follow(self, span: Span, rows: Many[Any]) -> None:
        """Take the token of each row as long as the draft has guessed the one before: the others saw a wrong text."""
        sequence = span.sequence
        for place, (token, own, processed) in enumerate(rows):
            self._append(sequence, token, own, processed)
            if sequence.status is Status.FINISHED or span.draft[place : place + 1] != (token,):
                return
            self.batcher.guessed(sequence)
            self.counters.drafted_tokens += 1

    def _of_prompt(self, span: Span, row: int, logits: Tensor) -> list[Any]:
        """Log-probabilities of the prompt's tokens that follow from a span, whose logits begin at ``row``."""
        request = span.sequence.request
        known = max(1, len(request.prompt_logprobs))  # more than the start, where it is computed again
        tokens = request.tokens[known : span.start + 1 + span.count]
        first = row + known - span.start - 1
        own = logits[first : first + len(tokens)]
        asked = [request.params.prompt_logprobs] * len(tokens)
        return _listed(self.sampler.logprobs(own, torch.tensor(tokens, dtype=torch.int64), asked))

    def _row(self, span: Span, place: int) -> Row:
        """Of the token that follows ``place`` tokens of the span's draft."""
        request, sequence = span.sequence.request, span.sequence
        params, prompt = request.params, len(request.tokens)
        tokens = [*sequence.tokens, *span.draft[:place]] if place else sequence.tokens
        banned: tuple[int, ...] = ()
        if len(tokens) - prompt < params.min_tokens:
            banned = (*self.ends.eos, *params.stop_token_ids)
        allowed = None if sequence.matcher is None else sequence.matcher.allowed(span.draft[:place])
        return Row(params, request.seed, sequence.index, tokens, prompt, banned, allowed)

    def _append(self, sequence: Sequence, token: int, own: Any = None, processed: Any = None) -> None:
        params, text = sequence.request.params, sequence.text
        sequence.tokens.append(token)
        answered = sequence.answered
        if answered == 1:
            self._begin(sequence)
        self.counters.answer_tokens += 1
        if own is not None:
            sequence.logprobs.append(_as_logprobs(own))
            sequence.cumulative += sequence.logprobs[-1][token]
        if processed is not None:
            sequence.processed_logprobs.append(_as_logprobs(processed))
        if token in sequence.ends and answered > params.min_tokens:
            sequence.stop = token if token in params.stop_token_ids else None
            if params.include_stop_str_in_output:
                text.add(token)
            self._finish(sequence, "stop")
            return
        text.add(token, answered > params.min_tokens)
        if sequence.matcher is not None:
            sequence.matcher.take(token)
        if text.stopped is not None:
            sequence.stop = text.stopped
            self._finish(sequence, "stop")
        elif sequence.matcher is not None and (why := sequence.matcher.ended):
            self._finish(sequence, why)
        elif len(sequence.tokens) >= sequence.limit:
            self._finish(sequence, "length")

    def _begin(self, sequence: Sequence) -> None:
        """Its first token has come: the prompt is computed, and its other samples begin."""
        sequence.began = self._clock()
        self.counters.first_tokens.add(sequence.began - sequence.request.arrived)
        if sequence.index == 0:
            for sample in range(1, sequence.request.params.n):
                self.batcher.fork(sequence, self._sequence(sequence.request, sample))

    def _finish(self, sequence: Sequence, reason: str) -> None:
        sequence.text.finish()
        if sequence.answered > 1 and reason != "abort":
            self.counters.token_times.add((self._clock() - sequence.began) / (sequence.answered - 1))
        self.batcher.finish(sequence, reason)
        if sequence.request.finished:
            del self._live[sequence.request.id]
        self.counters.finished[reason] = self.counters.finished.get(reason, 0) + 1


def _listed(found: Iterable[dict[int, float] | None]) -> list[list[tuple[int, float]] | None]:
    """As JSON keeps it: keys of an object would become texts."""
    return [None if of_row is None else list(of_row.items()) for of_row in found]


def _as_logprobs(pairs: Iterable[tuple[int, float]]) -> dict[int, float]:
    return {int(token): float(value) for token, value in pairs}
