"""Records of conversations: their messages, tools and marks, under the names that datasets and clients give them.

Each function raises :class:`BadConversation` for what it cannot take; ``number`` is that of the message at hand.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

_ASSISTANTS = ("gpt", "chatgpt", "bing", "bard", "bot", "model")
ROLES = {"human": "user", "observation": "tool", **dict.fromkeys(_ASSISTANTS, "assistant")}
"""Other names of roles, as in ShareGPT's files (``{"from": "human", "value": ...}``)."""


class BadConversation(Exception):
    """Why a record is no conversation that the template can show."""


def parse_messages(value: Any) -> list[dict[str, Any]]:
    """A list of ``{"role": ..., "content": ...}`` from a record's value, or of ShareGPT's ``from`` and ``value``. At
    least one message is the assistant's and learnt."""
    if not isinstance(value, list) or not value:
        raise BadConversation(f"not a list of messages but {type(value).__name__}")
    messages = []
    for number, message in enumerate(value):
        if not isinstance(message, dict):
            raise BadConversation(f"message {number} is a {type(message).__name__}, not an object")
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        _refuse_function_call(message, number, role)
        if isinstance(role, str) and role != "assistant" and role.strip().lower() == "assistant":
            raise BadConversation(f"message {number} has the role {role!r}, which is not learnt; write 'assistant'")
        content = join_parts(content, number)
        calls = content is None and bool(message.get("tool_calls"))  # instead of an answer in words
        if not isinstance(role, str) or not (isinstance(content, str) or calls):
            raise BadConversation(f"message {number} has no role and content that are strings, but {sorted(message)}")
        shown = {"role": ROLES.get(role, role), "content": content}
        messages.append({**_given(message), **shown, **parse_tool_calls(message, number)})
    answers = [is_learnt(message, i) for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not any(answers):
        raise BadConversation("no message is the assistant's" + (" and to be learnt" if answers else ""))
    return messages


def request_messages(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """The messages of a request, as OpenAI's clients send them, in the form that a template takes.

    Texts of several parts are joined with nothing between them: what is to stand there, the parts themselves have.

    Raises:
        BadConversation: one has no role or no text, or calls that are none.
    """
    read = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise BadConversation(f"message {number} has no role")
        _refuse_function_call(message, number, message["role"])
        content, calls = join_parts(message.get("content"), number), parse_tool_calls(message, number)
        if not isinstance(content, str) and not (content is None and calls):
            raise BadConversation(f"message {number} has no content")
        read.append({**_given(message), "content": content, **calls})
    return read


def _given(message: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is null, and without a list of no calls: templates ask whether a key is there."""
    return {name: value for name, value in message.items() if value is not None and (name != "tool_calls" or value)}


def _refuse_function_call(message: Mapping[str, Any], number: int, role: Any) -> None:
    if role == "function_call" or message.get("function_call"):
        raise BadConversation(
            f"message {number} has a function_call, which templates do not show; write it as the assistant's tool_calls"
        )


def is_learnt(message: Mapping[str, Any], number: int) -> bool:
    """Whether an answer is learnt: not with OpenAI's ``weight`` of 0, or axolotl's ``train`` or ``training`` false."""
    for name in ("weight", "train", "training"):
        value = message.get(name)
        if value not in (None, 0, 1):
            raise BadConversation(
                f"message {number} has {name}={value!r}; write 1 for an answer that is learnt and 0 for one that is not"
            )
        if value == 0:
            return False
    return True


def join_parts(content: Any, number: int) -> Any:
    """A message's text, from a list of parts such as ``{"type": "text", "text": ...}``; what is no list as it is."""
    if not isinstance(content, list):
        return content
    parts = [part.get("text") if isinstance(part, dict) else None for part in content]
    texts = [part for part in parts if isinstance(part, str)]
    if len(texts) != len(parts):
        raise BadConversation(f"message {number} has a part that is no text")
    return "".join(texts)


def parse_tool_calls(message: Mapping[str, Any], number: int) -> dict[str, Any]:
    """``{"tool_calls": ...}`` with the arguments as objects, as templates take them; records and clients have JSON."""
    calls = message.get("tool_calls")
    if not calls:
        return {}
    read = []
    try:
        for call in calls:
            arguments = call["function"]["arguments"]
            if isinstance(arguments, str):
                arguments = json.loads(arguments or "{}")
            if not isinstance(arguments, dict):
                raise ValueError(arguments)
            read.append({**call, "function": {**call["function"], "arguments": arguments}})
    except (TypeError, KeyError, ValueError, RecursionError):
        raise BadConversation(
            f"message {number} has tool_calls without a function whose arguments are a JSON object"
        ) from None
    return {"tool_calls": read}


def parse_tools(value: Any) -> list[Any] | None:
    """What messages may call, from a record's value: a list, or JSON of one, as tables need it; None: nothing."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise BadConversation(f"'tools' is no JSON: {error}") from None
    if value is not None and not isinstance(value, list):
        raise BadConversation(f"'tools' is not a list but {type(value).__name__}")
    return value


def with_system(messages: list[dict[str, Any]], value: Any) -> list[dict[str, Any]]:
    """The messages behind a record's system message, from the key ``system`` as in ShareGPT's files; None: without."""
    if value is None or value == "":
        return messages
    if not isinstance(value, str):
        raise BadConversation(f"'system' is not a text but {type(value).__name__}")
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": value}, *messages]
    if messages[0]["content"] != value:
        raise BadConversation("the messages begin with another system message than that of the key 'system'; keep one")
    return messages
