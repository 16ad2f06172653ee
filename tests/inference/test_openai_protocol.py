"""What requests mean, without a server: conversations as the model's template gets them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from megatron_ds.data.chat import ChatTemplate
from megatron_ds.inference.openai_protocol import BadRequest, read_call

CALLS = (
    "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
)


class Texts:
    """Of a template, and bytes as tokens."""

    template = ChatTemplate(CALLS)

    def tokenize(self, prompt: str | Sequence[int]) -> list[int]:
        return list(prompt.encode() if isinstance(prompt, str) else prompt)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], tools: list[Any] | None = None) -> list[int]:
        return self.tokenize(self.template.render([dict(message) for message in messages], True, tools))

    def token_bytes(self, token: int) -> bytes:
        return bytes([token])


def asked(arguments: Any) -> str:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    return bytes(read_call({"messages": messages}, True, "m", Texts()).prompts[0]).decode()


def test_templates_get_the_arguments_of_tool_calls_as_objects() -> None:
    """Clients send them as JSON, which a template would quote once more; as `transformers`' own calls have it."""
    assert asked('{"city": "Zürich"}') == asked({"city": "Zürich"}) == 'af{"city": "Zürich"}'
    assert asked("") == "af{}"


@pytest.mark.parametrize("arguments", ["{", "[1]", 3, None])
def test_arguments_that_are_no_object_are_refused(arguments: Any) -> None:
    with pytest.raises(BadRequest, match=r"message 1 has tool_calls without a function whose arguments are a JSON"):
        asked(arguments)
    broken = [{"role": "assistant", "tool_calls": arguments if arguments is not None else [1]}]
    with pytest.raises(BadRequest, match="message 0 has tool_calls"):
        read_call({"messages": broken}, True, "m", Texts())


@pytest.mark.parametrize(("fields", "most"), [({"max_completion_tokens": 2}, 2), ({}, 4)])
def test_the_newer_name_of_the_most_tokens_wins(fields: dict[str, int], most: int) -> None:
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 4, **fields}
    assert read_call(body, True, "m", Texts()).params.max_tokens == most
