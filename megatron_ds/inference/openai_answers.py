"""Bodies of OpenAI's answers, whole or in pieces as they come."""

from __future__ import annotations

import codecs
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from megatron_ds.inference.openai_protocol import Call
from megatron_ds.inference.outputs import CompletionOutput, RequestOutput
from megatron_ds.inference.sequence import Logprobs
from megatron_ds.inference.texts import Texts


class _Places:
    """Where tokens begin in a text that grows. ``before``: bytes that may be part of a character that they end."""

    def __init__(self, place: int, before: bytes = b""):
        self._place = place
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._characters.decode(before)

    def of(self, pieces: Iterable[bytes]) -> list[int]:
        """Of the tokens with these bytes, which come next."""
        found = []
        for piece in pieces:
            starts_one = piece[:1] != b"" and piece[0] & 0xC0 != 0x80  # and what there is of another stays as it is
            at = self._place + (starts_one and self._characters.getstate()[0] != b"")
            found.append(max(0, at))  # what begins a text comes before its places
            self._place += len(self._characters.decode(piece))
        return found


@dataclass
class _Sent:
    """What of a sample has gone to the client: characters of its text, and tokens, with their log-probabilities."""

    places: _Places
    characters: int = 0
    tokens: int = 0
    begun: bool = False
    ended: bool = False


class _New(NamedTuple):
    """Of a sample, what was not sent before. ``beside``: what is said of a conversation beside its choices."""

    sample: CompletionOutput
    choice: dict[str, Any]
    beside: dict[str, Any]


class Answers:
    """The bodies of the answers to one call, whole or in pieces as they come."""

    def __init__(self, call: Call, texts: Texts):
        self.call, self.texts = call, texts
        self.name = ("chatcmpl-" if call.chat else "cmpl-") + call.name
        self.created = int(time.time())
        self._sent: dict[tuple[int, int], _Sent] = {}
        self._latest: dict[int, RequestOutput] = {}

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        news = [new for prompt, output in enumerate(outputs) for new in self._news(prompt, output)]
        return {**self._body([new.choice for new in news]), "usage": _usage(self._latest.values()), **news[0].beside}

    def pieces(self, prompt: int, output: RequestOutput) -> list[dict[str, Any]]:
        """What has come since the last call, a body for each sample."""
        found = []
        for new in self._news(prompt, output):
            piece = {**self._body([new.choice]), **new.beside}
            if self.call.usage_in_all:
                piece["usage"] = _usage([replace(self._latest[prompt], outputs=[new.sample])])
            found.append(piece)
        return found

    def last_pieces(self) -> list[dict[str, Any]]:
        """How many tokens there were, where that was asked for."""
        return [{**self._body([]), "usage": _usage(self._latest.values())}] if self.call.usage else []

    def _news(self, prompt: int, output: RequestOutput) -> Iterator[_New]:
        """What was not sent before."""
        if self.call.prompt_alone:  # there is a token behind it
            output = replace(output, outputs=[_without_answer(sample) for sample in output.outputs])
        self._latest[prompt] = output
        for sample in output.outputs:
            key = prompt, sample.index
            sent = self._sent[key] = self._sent.get(key) or self._unsent(prompt)
            is_new = len(sample.text) != sent.characters or sample.finish_reason is not None
            if sent.ended or (sent.begun and not is_new):
                continue
            of_prompt = {} if sent.begun else self._of_prompt(output)
            choice = self._choice(prompt, output, sample, sent)
            yield _New(sample, choice, of_prompt) if self.call.chat else _New(sample, {**choice, **of_prompt}, {})

    def _body(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "text_completion"
        if self.call.chat:
            kind = "chat.completion.chunk" if self.call.stream else "chat.completion"
        nothing = {"usage": None} if self.call.usage else {}  # of every piece but the last, as OpenAI has it
        head = {"id": self.name, "object": kind, "created": self.created, "model": self.call.model}
        return {**head, "choices": choices, **nothing}

    def _unsent(self, prompt: int) -> _Sent:
        place = len(self.call.echoed[prompt]) if self.call.echoed else 0
        return _Sent(_Places(place, b"".join(map(self.texts.token_bytes, self.call.prompts[prompt][-3:]))))

    def _choice(self, prompt: int, output: RequestOutput, sample: CompletionOutput, sent: _Sent) -> dict[str, Any]:
        """What was not sent before."""
        text, ids = sample.text[sent.characters :], sample.token_ids[sent.tokens :]
        own, processed = (of and of[sent.tokens :] for of in (sample.logprobs, sample.processed_logprobs))
        is_first, most = not sent.begun, self.call.params.logprobs or 0
        sent.begun, sent.ended = True, sample.finish_reason is not None
        sent.characters, sent.tokens = len(sample.text), len(sample.token_ids)
        places = [] if own is None and processed is None else sent.places.of(map(self.texts.token_bytes, ids))
        common: dict[str, Any] = {
            "index": prompt * self.call.params.n + sample.index,
            "finish_reason": sample.finish_reason,
            "stop_reason": sample.stop_reason,
        }
        if self.call.token_ids:
            common["token_ids"] = ids
        if processed is not None:
            common["processed_logprobs"] = self._completion_logprobs(ids, processed, places)
        if self.call.chat:
            shown = None if own is None else {"content": self._chat_logprobs(ids, own, most), "refusal": None}
            message = self._message(sample.index, text, is_first)
            return {**common, "delta" if self.call.stream else "message": message, "logprobs": shown}
        known: Sequence[Logprobs | None] | None = own
        if is_first and self.call.echoed:
            text = self.call.echoed[prompt] + text
            if own is not None:
                before = output.prompt_token_ids
                start = _Places(len(self.call.echoed[prompt]) - len(self.texts.text(before)))
                places = [*start.of(map(self.texts.token_bytes, before)), *places]
                known = [*(of and _cut(of, most) for of in output.prompt_logprobs or []), *own]
                ids = [*before, *ids]
        of_tokens = None if known is None else self._completion_logprobs(ids, known, places)
        return {**common, "text": text, "logprobs": of_tokens}

    def _message(self, index: int, text: str, is_first: bool) -> dict[str, Any]:
        """A conversation's answer, or what comes next of it: words, or the arguments of a call."""
        message: dict[str, Any] = {"content": text}
        if self.call.function is not None:
            made: dict[str, Any] = {"function": {"arguments": text}}
            if is_first:
                named = {"name": self.call.function, "arguments": text}
                made = {"id": f"call_{self.call.name}_{index}", "type": "function", "function": named}
            message = {"content": None, "tool_calls": [{"index": 0, **made} if self.call.stream else made]}
        role = {"role": "assistant"} if is_first else {}
        return {**role, **message, **({} if self.call.stream else {"refusal": None})}

    def _of_prompt(self, output: RequestOutput) -> dict[str, Any]:
        """The prompt's tokens, and their log-probabilities by id, as vLLM's server has them, where they were asked for.

        In a conversation's answer they stand beside the choices, else in each.
        """
        found: dict[str, Any] = {"prompt_token_ids": output.prompt_token_ids} if self.call.token_ids else {}
        if output.prompt_logprobs is None:
            return found
        said: list[dict[str, Any] | None] = []
        for of_token in output.prompt_logprobs:
            entries = of_token or {}
            shown = {str(t): {"logprob": v, "decoded_token": self.texts.text([t])} for t, v in entries.items()}
            said.append(None if of_token is None else shown)
        return {**found, "prompt_logprobs": said}

    def _word(self, token: int) -> str:
        return f"token_id:{token}" if self.call.ids_for_tokens else self.texts.text([token])

    def _completion_logprobs(
        self, ids: Sequence[int], logprobs: Sequence[Logprobs | None], places: Sequence[int]
    ) -> dict[str, Any]:
        """A text's first token has no values."""
        # Halves of characters have one text: of those the most probable one is shown, which comes last here.
        ordered = [sorted((of_token or {}).items(), key=lambda pair: pair[1]) for of_token in logprobs]
        tops = [{self._word(token): value for token, value in pairs} or None for pairs in ordered]
        values = [None if of_token is None else of_token[token] for token, of_token in zip(ids, logprobs)]
        words = [self._word(token) for token in ids]
        return {"tokens": words, "token_logprobs": values, "top_logprobs": tops, "text_offset": places}

    def _chat_logprobs(self, ids: Sequence[int], logprobs: Sequence[Logprobs], most: int) -> list[dict[str, Any]]:
        def entry(token: int, value: float) -> dict[str, Any]:
            piece = self.texts.token_bytes(token)
            return {"token": self._word(token), "logprob": max(value, -9999.0), "bytes": list(piece)}

        return [
            {**entry(token, of_token[token]), "top_logprobs": [entry(*pair) for pair in _top(of_token, most)]}
            for token, of_token in zip(ids, logprobs)
        ]


def _without_answer(sample: CompletionOutput) -> CompletionOutput:
    return replace(
        sample,
        text="",
        token_ids=[],
        logprobs=None if sample.logprobs is None else [],
        processed_logprobs=None if sample.processed_logprobs is None else [],
        finish_reason=sample.finish_reason and "length",
        stop_reason=None,
    )


def _cut(of_token: Logprobs, count: int) -> Logprobs:
    """Of the token itself, which comes first, and of so many most probable ones."""
    return dict([next(iter(of_token.items())), *_top(of_token, count)])


def _top(of_token: Logprobs, count: int) -> list[tuple[int, float]]:
    return sorted(of_token.items(), key=lambda pair: -pair[1])[:count]


def _usage(outputs: Collection[RequestOutput]) -> dict[str, Any]:
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    answer = sum(len(sample.token_ids) for output in outputs for sample in output.outputs)
    cached = {"cached_tokens": sum(output.cached for output in outputs)}
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": cached,
    }
