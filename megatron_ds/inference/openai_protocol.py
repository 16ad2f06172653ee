"""OpenAI's HTTP interface: what its requests mean here, and what its answers look like.

Of the Completions and Chat Completions API as the ``openai`` client 3 speaks it. Further settings of vLLM's server are
taken beside them (``top_k``, ``min_p``, ``repetition_penalty``, ...). A field that is not known is refused: it might
have meant something.
"""

from __future__ import annotations

import codecs
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from megatron_ds.errors import ConfigError
from megatron_ds.inference.outputs import CompletionOutput, RequestOutput
from megatron_ds.inference.sampling_params import SamplingParams
from megatron_ds.inference.sequence import Logprobs

_SAMPLING = (
    "n", "temperature", "top_p", "presence_penalty", "frequency_penalty", "seed", "top_k", "min_p",
    "repetition_penalty", "min_tokens", "stop_token_ids", "ignore_eos", "include_stop_str_in_output",
    "skip_special_tokens", "prompt_logprobs", "processed_logprobs", "structured_outputs",
)  # fmt: skip
_NOTHING = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"})
"""Fields that say something to OpenAI, and nothing to a server of one's own."""
_MOST_PROMPTS, _MOST_MESSAGES, _MOST_CHAT_LOGPROBS = 256, 4096, 20


class BadRequest(Exception):
    """A request that cannot be served. ``parameter``: the field that is wrong; ``status``: of the HTTP answer."""

    def __init__(self, message: str, parameter: str | None = None, status: int = 400):
        super().__init__(message)
        self.parameter, self.status = parameter, status

    def body(self) -> dict[str, Any]:
        kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return {"error": {"message": str(self), "type": kind, "param": self.parameter, "code": None}}


class Texts(Protocol):
    """What is needed of the model's tokenizer."""

    def tokenize(self, prompt: str | Sequence[int]) -> list[int]: ...

    def render_chat(self, messages: Sequence[Mapping[str, Any]], tools: list[Any] | None = None) -> list[int]: ...

    def token_bytes(self, token: int) -> bytes: ...


@dataclass(frozen=True)
class Call:
    """A request of a client: its prompts as tokens, and how it wants the answer.

    ``echoed``: the prompts' texts, where the answers are to begin with them. ``prompt_alone``: they are all that is
    wanted; the engine computes one token more, which is not shown.
    """

    chat: bool
    model: str
    prompts: tuple[tuple[int, ...], ...]
    params: SamplingParams
    stream: bool
    usage_in_stream: bool
    echoed: tuple[str, ...] = ()
    prompt_alone: bool = False


def read_call(body: Any, chat: bool, model: str, texts: Texts, suggested: Mapping[str, Any] | None = None) -> Call:
    """What a client's JSON asks for; ``suggested``: settings of the model, where it says nothing.

    Raises:
        BadRequest: something in it is not as it must be, or not served here.
    """
    if not isinstance(body, dict):
        raise BadRequest("the body must be a JSON object")
    fields = dict(body)
    for name in _NOTHING:
        fields.pop(name, None)
    asked = fields.pop("model", model)
    if asked != model:
        raise BadRequest(f"the model {asked!r} is not served here; use {model!r}", "model", 404)
    stream = _flag(fields, "stream")
    options = fields.pop("stream_options", None) or {}
    if not isinstance(options, dict) or set(options) - {"include_usage"} or (options and not stream):
        raise BadRequest("stream_options takes include_usage, of a stream", "stream_options")
    usage = _flag(dict(options), "include_usage")
    settings = {name: fields.pop(name) for name in _SAMPLING if name in fields}
    settings = {**(suggested or {}), **{name: value for name, value in settings.items() if value is not None}}
    stop = fields.pop("stop", None)
    settings["stop"] = () if stop is None else stop
    settings["logit_bias"] = fields.pop("logit_bias", None) or {}
    older, newer = fields.pop("max_tokens", None), fields.pop("max_completion_tokens", None) if chat else None
    limit = older if newer is None else newer
    settings["max_tokens"] = limit if limit is not None or chat else 16
    _read_response_format(fields, settings)
    echoed: tuple[str, ...] = ()
    if chat:
        _read_chat_logprobs(fields, settings)
        prompts: tuple[tuple[int, ...], ...] = (_read_messages(fields, texts),)
    else:
        settings["logprobs"] = fields.pop("logprobs", None)
        given = _read_prompts(fields)
        prompts = tuple(tuple(_tokens(lambda each=each: texts.tokenize(each), "prompt")) for each in given)
        if _flag(fields, "echo"):
            settings.setdefault("prompt_logprobs", settings["logprobs"])
            echoed = tuple(each if isinstance(each, str) else _text(_bytes(each, texts)) for each in given)
        if fields.pop("best_of", None) not in (None, 1, settings.get("n", 1)):
            raise BadRequest("best_of is not served; use n", "best_of")
    if unknown := [name for name, value in fields.items() if value is not None]:
        raise BadRequest(f"{unknown[0]!r} is no field that is served here", unknown[0])
    alone = bool(echoed) and type(settings["max_tokens"]) is int and settings["max_tokens"] == 0
    settings["max_tokens"] = 1 if alone else settings["max_tokens"]
    try:
        return Call(chat, model, prompts, SamplingParams(**settings), stream, usage, echoed, alone)
    except ConfigError as error:
        raise BadRequest(str(error), str(error).partition("=")[0]) from None


def _flag(fields: dict[str, Any], name: str) -> bool:
    value = fields.pop(name, None)
    if value not in (None, True, False):
        raise BadRequest(f"{name} must be true or false", name)
    return bool(value)


def _read_response_format(fields: dict[str, Any], settings: dict[str, Any]) -> None:
    asked = fields.pop("response_format", None)
    form = asked if isinstance(asked, dict) else {}
    kind, inner = form.get("type"), form.get("json_schema")
    if asked is None or kind == "text":
        return
    schema = inner.get("schema") if isinstance(inner, dict) else None
    if kind not in ("json_object", "json_schema") or (kind == "json_schema" and not isinstance(schema, dict)):
        raise BadRequest(
            "response_format takes {'type': 'text'}, {'type': 'json_object'} or {'type': 'json_schema', "
            "'json_schema': {'schema': {...}}}",
            "response_format",
        )
    if "structured_outputs" in settings:
        raise BadRequest("response_format and structured_outputs say the same thing twice", "response_format")
    settings["structured_outputs"] = {"json_object": True} if kind == "json_object" else {"json": schema}


def _read_chat_logprobs(fields: dict[str, Any], settings: dict[str, Any]) -> None:
    top = fields.pop("top_logprobs", None)
    if isinstance(top, int) and top > _MOST_CHAT_LOGPROBS:
        raise BadRequest(f"top_logprobs={top} is more than {_MOST_CHAT_LOGPROBS}", "top_logprobs")
    if _flag(fields, "logprobs"):
        settings["logprobs"] = 0 if top is None else top
    elif top:
        raise BadRequest("top_logprobs needs logprobs to be true", "top_logprobs")


def _read_prompts(fields: dict[str, Any]) -> list[str | list[int]]:
    prompt = fields.pop("prompt", None)
    one = isinstance(prompt, str) or (isinstance(prompt, list) and bool(prompt) and _is_id(prompt[0]))
    several = [prompt] if one else prompt
    if not isinstance(several, list) or not several:
        raise BadRequest("prompt must be a text, a list of texts, token ids, or a list of these", "prompt")
    if len(several) > _MOST_PROMPTS:
        raise BadRequest(f"{len(several)} prompts; {_MOST_PROMPTS} are the most", "prompt")
    for each in several:
        if not isinstance(each, str) and not (isinstance(each, list) and all(_is_id(token) for token in each)):
            raise BadRequest("a prompt is neither a text nor a list of token ids", "prompt")
    return several


def _read_messages(fields: dict[str, Any], texts: Texts) -> tuple[int, ...]:
    messages = fields.pop("messages", None)
    tools, choice = fields.pop("tools", None), fields.pop("tool_choice", None)
    if not isinstance(messages, list) or not 0 < len(messages) <= _MOST_MESSAGES:
        raise BadRequest(f"messages must be a list of 1 to {_MOST_MESSAGES} messages", "messages")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise BadRequest("tools must be a list of objects", "tools")
    if choice not in (None, "none", "auto"):
        raise BadRequest("tool_choice takes 'none' and 'auto': tools are shown to the model, not forced", "tool_choice")
    shown = None if choice == "none" else tools
    return tuple(_tokens(lambda: texts.render_chat(messages, shown), "messages"))


def _tokens(make: Any, parameter: str) -> list[int]:
    try:
        found: list[int] = make()
    except (ConfigError, UnicodeError) as error:
        raise BadRequest(str(error), parameter) from None
    return found


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# Answers


@dataclass(frozen=True)
class _Sent:
    """What of a sample has gone to the client.

    Attributes:
        characters: of its text; -1: all of it. tokens: with their log-probabilities.
        words: characters of the echoed text and of these tokens. tail: what there is of one more character.
        first: nothing has, not even that it begins.
    """

    characters: int = 0
    tokens: int = 0
    words: int = 0
    tail: bytes = b""
    first: bool = False


class Answers:
    """The bodies of the answers to one call, whole or in pieces as they come."""

    def __init__(self, call: Call, name: str, texts: Texts):
        self.call, self.name, self.texts = call, name, texts
        self.created = int(time.time())
        self._sent: dict[tuple[int, int], _Sent] = {}

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        outputs = [self._shown(output) for output in outputs]
        choices = [
            {**self._choice(prompt, output, sample, self._begin(prompt)), **self._of_prompt(output)}
            for prompt, output in enumerate(outputs)
            for sample in output.outputs
        ]
        kind = "chat.completion" if self.call.chat else "text_completion"
        return {**self._head(kind), "choices": choices, "usage": _usage(outputs)}

    def pieces(self, prompt: int, output: RequestOutput) -> list[dict[str, Any]]:
        """What has come since the last call, a body for each sample."""
        output, found = self._shown(output), []
        for sample in output.outputs:
            key = (prompt, sample.index)
            sent = self._sent.get(key, self._begin(prompt))
            is_new = sent.first or len(sample.text) != sent.characters or sample.finish_reason is not None
            if sent.characters < 0 or not is_new:
                continue
            choice = self._choice(prompt, output, sample, sent, of_stream=True)
            self._sent[key] = self._after(sample, sent)
            found.append(self._piece([{**choice, **self._of_prompt(output)} if sent.first else choice]))
        return found

    def last_piece(self, outputs: Sequence[RequestOutput]) -> dict[str, Any] | None:
        """How many tokens there were, where that was asked for."""
        if not self.call.usage_in_stream:
            return None
        return {**self._piece([]), "usage": _usage([self._shown(output) for output in outputs])}

    def _shown(self, output: RequestOutput) -> RequestOutput:
        """Without the token behind a prompt that is all that was asked for."""
        if not self.call.prompt_alone:
            return output
        return replace(output, outputs=[_without_answer(sample) for sample in output.outputs])

    def _piece(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.call.chat else "text_completion"
        return {**self._head(kind), "choices": choices}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.name, "object": kind, "created": self.created, "model": self.call.model}

    def _begin(self, prompt: int) -> _Sent:
        return _Sent(first=True, words=len(self.call.echoed[prompt]) if self.call.echoed else 0)

    def _after(self, sample: CompletionOutput, sent: _Sent) -> _Sent:
        """What has been sent when the rest of the sample so far has."""
        words, tail = sent.words, sent.tail
        if sample.logprobs is not None or sample.processed_logprobs is not None:
            count, tail = _decoded(sent.tail + _bytes(sample.token_ids[sent.tokens :], self.texts))
            words += count
        return _Sent(-1 if sample.finish_reason else len(sample.text), len(sample.token_ids), words, tail)

    def _choice(
        self, prompt: int, output: RequestOutput, sample: CompletionOutput, sent: _Sent, of_stream: bool = False
    ) -> dict[str, Any]:
        """What was not sent before."""
        text, ids = sample.text[sent.characters :], sample.token_ids[sent.tokens :]
        logprobs = None if sample.logprobs is None else sample.logprobs[sent.tokens :]
        common: dict[str, Any] = {
            "index": prompt * self.call.params.n + sample.index,
            "finish_reason": sample.finish_reason,
            "stop_reason": sample.stop_reason,
        }
        if sample.processed_logprobs is not None:
            processed = sample.processed_logprobs[sent.tokens :]
            common["processed_logprobs"] = self._completion_logprobs(ids, processed, sent.words, sent.tail)
        if self.call.chat:
            shown = None if logprobs is None else {"content": self._chat_logprobs(ids, logprobs), "refusal": None}
            message = {"role": "assistant", "content": text} if sent.first else {"content": text}
            return {**common, "delta" if of_stream else "message": message, "logprobs": shown}
        begun = sent.words
        of_text: Sequence[Logprobs | None] | None = logprobs
        if sent.first and self.call.echoed:
            text = self.call.echoed[prompt] + text
            if logprobs is not None:
                of_prompt = output.prompt_token_ids
                begun -= len(_text(_bytes(of_prompt, self.texts)))
                ids, of_text = [*of_prompt, *ids], [*(output.prompt_logprobs or []), *logprobs]
        of_tokens = None if of_text is None else self._completion_logprobs(ids, of_text, begun, sent.tail)
        return {**common, "text": text, "logprobs": of_tokens}

    def _of_prompt(self, output: RequestOutput) -> dict[str, Any]:
        """Log-probabilities of the prompt's tokens by id, as vLLM's server has them, where they were asked for."""
        if output.prompt_logprobs is None:
            return {}
        said: list[dict[str, Any] | None] = []
        for of_token in output.prompt_logprobs:
            entries = of_token or {}
            shown = {str(t): {"logprob": v, "decoded_token": self._text(t)} for t, v in entries.items()}
            said.append(None if of_token is None else shown)
        return {"prompt_logprobs": said}

    def _text(self, token: int) -> str:
        return _text(self.texts.token_bytes(token))

    def _completion_logprobs(
        self, ids: Sequence[int], logprobs: Sequence[Logprobs | None], begun: int, tail: bytes
    ) -> dict[str, Any]:
        """``begun``: characters before the first token; ``tail``: of one more. A text's first token has no values."""
        pieces, offsets = [self.texts.token_bytes(token) for token in ids], []
        for piece in pieces:
            starts_one = piece[:1] != b"" and piece[0] & 0xC0 != 0x80  # and what there is of another stays as it is
            offsets.append(max(0, begun + (starts_one and tail != b"")))  # what begins a text comes before its places
            count, tail = _decoded(tail + piece)
            begun += count
        # Halves of characters have one text: of those the most probable one is shown, which comes last here.
        ordered = [sorted((of_token or {}).items(), key=lambda pair: pair[1]) for of_token in logprobs]
        tops = [{self._text(token): value for token, value in pairs} or None for pairs in ordered]
        values = [None if of_token is None else of_token[token] for token, of_token in zip(ids, logprobs)]
        words = [_text(piece) for piece in pieces]
        return {"tokens": words, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}

    def _chat_logprobs(self, ids: Sequence[int], logprobs: Sequence[Logprobs]) -> list[dict[str, Any]]:
        def entry(token: int, value: float) -> dict[str, Any]:
            piece = self.texts.token_bytes(token)
            return {"token": _text(piece), "logprob": max(value, -9999.0), "bytes": list(piece)}

        most = self.call.params.logprobs or 0
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


def _bytes(ids: Sequence[int], texts: Texts) -> bytes:
    return b"".join(texts.token_bytes(token) for token in ids)


def _text(piece: bytes) -> str:
    return piece.decode("utf-8", "replace")


def _decoded(data: bytes) -> tuple[int, bytes]:
    """The number of characters in it, and what there is of one more."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return len(decoder.decode(data)), decoder.getstate()[0]


def _top(of_token: Logprobs, count: int) -> list[tuple[int, float]]:
    return sorted(of_token.items(), key=lambda pair: -pair[1])[:count]


def _usage(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    answer = sum(len(sample.token_ids) for output in outputs for sample in output.outputs)
    cached = {"cached_tokens": sum(output.cached for output in outputs)}
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": cached,
    }
