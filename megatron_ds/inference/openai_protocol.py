"""OpenAI's HTTP interface: what its requests mean here.

Of the Completions and Chat Completions API as the ``openai`` client 3 speaks it. Further settings of vLLM's server are
taken beside them (``top_k``, ``min_p``, ``repetition_penalty``, ...). A field that is not known is refused: it might
have meant something. One that is null is as if it were not there.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron_ds.errors import ConfigError
from megatron_ds.inference.sampling_params import SamplingParams
from megatron_ds.inference.texts import Texts

_SAMPLING = {field.name for field in dataclasses.fields(SamplingParams)} - {"max_tokens", "logprobs", "detokenize"}
"""Fields that mean what they mean there."""
_NOTHING = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"})
"""Fields that say something to OpenAI, and nothing to a server of one's own."""
_USUAL: Mapping[str, Any] = {
    "echo": False, "suffix": "", "use_beam_search": False, "length_penalty": 1.0, "bad_words": [], "priority": 0,
    "spaces_between_special_tokens": True, "parallel_tool_calls": True, "modalities": ["text"],
    "include_reasoning": True,
}  # fmt: skip
"""Settings that are not served, with the value at which they change nothing: clients that write out all have these."""
_VARIABLES = "documents", "reasoning_effort"
"""Fields that a chat template may show."""
_MOST_PROMPTS, _MOST_MESSAGES, _MOST_CHAT_LOGPROBS = 256, 4096, 20


class BadRequest(Exception):
    """A request that cannot be served.

    Args:
        parameter: the field that is wrong. status: of the HTTP answer. code: OpenAI's word for it, where clients ask.
    """

    def __init__(self, message: str, parameter: str | None = None, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.parameter, self.status, self.code = parameter, status, code

    def body(self) -> dict[str, Any]:
        kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return {"error": {"message": str(self), "type": kind, "param": self.parameter, "code": self.code}}


@dataclass(frozen=True)
class Call:
    """A request of a client: its prompts as tokens, and how it wants the answer.

    Attributes:
        name: its id. stream: whether the answer comes in pieces.
        usage, usage_in_all: of a stream, whether its end says how many tokens there were, and whether every piece does.
        token_ids, ids_for_tokens: whether tokens are shown by their ids, beside the text and in its place.
        echoed: the prompts' texts, where the answers are to begin with them.
        prompt_alone: they are all that is wanted; the engine computes one token more, which is not shown.
        function: the tool whose arguments the answer is.
    """

    chat: bool
    model: str
    prompts: tuple[tuple[int, ...], ...]
    params: SamplingParams
    name: str = "0"
    stream: bool = False
    usage: bool = False
    usage_in_all: bool = False
    token_ids: bool = False
    ids_for_tokens: bool = False
    echoed: tuple[str, ...] = ()
    prompt_alone: bool = False
    function: str | None = None


def read_call(body: Any, chat: bool, model: str, texts: Texts, suggested: Mapping[str, Any] | None = None) -> Call:
    """What a client's JSON asks for; ``suggested``: settings of the model, where it says nothing.

    Raises:
        BadRequest: something in it is not as it must be, or not served here.
    """
    if not isinstance(body, dict):
        raise BadRequest("the body must be a JSON object")
    fields = {name: value for name, value in body.items() if value is not None and name not in _NOTHING}
    asked = fields.pop("model", model)
    if asked != model:
        raise BadRequest(f"the model {asked!r} is not served here; use {model!r}", "model", 404, "model_not_found")
    name = fields.pop("request_id", None) or secrets.token_hex(12)
    if not isinstance(name, str) or len(name) > 256:
        raise BadRequest("request_id must be a text of at most 256 characters", "request_id")
    stream = _flag(fields, "stream")
    usage, in_all = _read_stream_options(fields, stream)
    ids, for_tokens = _flag(fields, "return_token_ids"), _flag(fields, "return_tokens_as_token_ids")
    settings = {**(suggested or {}), **{name: fields.pop(name) for name in _SAMPLING & fields.keys()}}
    limit = fields.pop("max_tokens", None if chat else 16)
    settings["max_tokens"] = fields.pop("max_completion_tokens", limit) if chat else limit
    _read_form(fields, settings)
    echoed: tuple[str, ...] = ()
    function = None
    if chat:
        _read_chat_logprobs(fields, settings)
        tools, function = _read_tools(fields, settings)
        prompts = [_read_messages(fields, texts, tools)]
    else:
        settings["logprobs"] = fields.pop("logprobs", None)
        several, special = _read_prompts(fields), _flag(fields, "add_special_tokens", True)
        prompts = [_tokens(partial(texts.tokenize, each, special), "prompt") for each in several]
        if _flag(fields, "echo"):
            settings.setdefault("prompt_logprobs", settings["logprobs"])
            echoed = tuple(each if isinstance(each, str) else texts.text(each) for each in several)
    _refuse_others(fields, settings.get("n", 1))
    alone = bool(echoed) and type(settings["max_tokens"]) is int and settings["max_tokens"] == 0
    settings["max_tokens"] = 1 if alone else settings["max_tokens"]
    try:
        params = SamplingParams(**settings)
    except ConfigError as error:
        raise BadRequest(str(error), str(error).partition("=")[0]) from None
    tokens = tuple(tuple(prompt) for prompt in prompts)
    return Call(chat, model, tokens, params, name, stream, usage, in_all, ids, for_tokens, echoed, alone, function)


def _flag(fields: dict[str, Any], name: str, usual: bool = False) -> bool:
    value = fields.pop(name, usual)
    if value not in (True, False):
        raise BadRequest(f"{name} must be true or false", name)
    return bool(value)


def _read_stream_options(fields: dict[str, Any], stream: bool) -> tuple[bool, bool]:
    """Whether the end of a stream says how many tokens there were, and whether every piece does."""
    options = fields.pop("stream_options", {})
    if not isinstance(options, dict) or (options and not stream):
        raise BadRequest("stream_options are settings of a stream", "stream_options")
    options = {name: value for name, value in options.items() if value is not None}
    usage, in_all = _flag(options, "include_usage"), _flag(options, "continuous_usage_stats")
    if _flag(options, "include_obfuscation") or options:
        raise BadRequest("stream_options takes include_usage and continuous_usage_stats", "stream_options")
    return usage, usage and in_all


def _read_form(fields: dict[str, Any], settings: dict[str, Any]) -> None:
    if isinstance(form := settings.get("structured_outputs"), dict):
        settings["structured_outputs"] = {kind: value for kind, value in form.items() if value is not None}
    match fields.pop("response_format", None):
        case None | {"type": "text"}:
            pass
        case {"type": "json_object"}:
            _set_form(settings, {"json_object": True}, "response_format")
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            _set_form(settings, {"json": schema}, "response_format")
        case _:
            raise BadRequest(
                "response_format takes {'type': 'text'}, {'type': 'json_object'} or {'type': 'json_schema', "
                "'json_schema': {'schema': {...}}}",
                "response_format",
            )


def _set_form(settings: dict[str, Any], form: Mapping[str, Any], parameter: str) -> None:
    if "structured_outputs" in settings:
        raise BadRequest(f"{parameter} and another field give the answer a form; give one", parameter)
    settings["structured_outputs"] = form


def _read_chat_logprobs(fields: dict[str, Any], settings: dict[str, Any]) -> None:
    top = fields.pop("top_logprobs", 0)
    if isinstance(top, int) and top > _MOST_CHAT_LOGPROBS:
        raise BadRequest(f"top_logprobs={top} is more than {_MOST_CHAT_LOGPROBS}", "top_logprobs")
    if _flag(fields, "logprobs"):
        settings["logprobs"] = top
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


def _read_tools(fields: dict[str, Any], settings: dict[str, Any]) -> tuple[list[Any] | None, str | None]:
    """The tools that the model is shown, and the name of the one that it must call: its arguments are the answer."""
    tools, choice = fields.pop("tools", None), fields.pop("tool_choice", "auto")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise BadRequest("tools must be a list of objects", "tools")
    if choice in ("none", "auto"):
        return (tools if choice == "auto" else None), None
    functions = [function for tool in tools or [] if isinstance(function := tool.get("function"), dict)]
    match choice:
        case {"type": "function", "function": {"name": name}, **others} if not others:
            functions = [function for function in functions if function.get("name") == name]
        case _ if choice != "required":
            functions = []
    if len(functions) != 1:
        raise BadRequest(
            "tool_choice takes 'none', 'auto' and the name of one of the tools; 'required' where there is one alone: "
            "answers are not searched for calls of others",
            "tool_choice",
        )
    fields.pop("parallel_tool_calls", None)  # of one there is nothing parallel
    _set_form(settings, {"json": functions[0].get("parameters") or {"type": "object"}}, "tool_choice")
    return tools, str(functions[0].get("name"))


def _read_messages(fields: dict[str, Any], texts: Texts, tools: list[Any] | None) -> list[int]:
    messages = fields.pop("messages", None)
    if not isinstance(messages, list) or not 0 < len(messages) <= _MOST_MESSAGES:
        raise BadRequest(f"messages must be a list of 1 to {_MOST_MESSAGES} messages", "messages")
    usual = {"add_generation_prompt": True, "continue_final_message": False, "add_special_tokens": False}
    how = {name: _flag(fields, name, value) for name, value in usual.items()}
    variables = fields.pop("chat_template_kwargs", {})
    if not isinstance(variables, dict):
        raise BadRequest("chat_template_kwargs must be an object", "chat_template_kwargs")
    variables = {**{name: fields.pop(name) for name in _VARIABLES if name in fields}, **variables}
    return _tokens(partial(texts.render_chat, messages, tools, variables=variables, **how), "messages")


def _tokens(make: Callable[[], list[int]], parameter: str) -> list[int]:
    try:
        return make()
    except (ConfigError, UnicodeError) as error:
        raise BadRequest(str(error), parameter) from None


def _refuse_others(fields: Mapping[str, Any], samples: Any) -> None:
    """Refuse what is left of a request's fields, but for settings that change nothing."""
    usual = {**_USUAL, "best_of": samples}
    for name, value in fields.items():
        if name not in usual:
            way_out = "; use response_format or structured_outputs" if name.startswith("guided_") else ""
            raise BadRequest(f"{name!r} is no field that is served here{way_out}", name)
        if value != usual[name]:
            raise BadRequest(f"{name} can only be {usual[name]!r} here; leave it out", name)


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 31  # no tokenizer has others, and some fail at them
