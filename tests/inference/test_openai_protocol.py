"""What requests mean, without a server: conversations as the model's template gets them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from megatron_ds.data.chat import ChatTemplate
from megatron_ds.data.chat_records import BadConversation, request_messages
from megatron_ds.data.tokenizers import ByteTokenizer
from megatron_ds.inference.openai_protocol import _USUAL, BadRequest, read_call
from megatron_ds.inference.texts import Texts

CALLS = (
    "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
)


TEXTS = Texts("m", ByteTokenizer(), ChatTemplate(CALLS))


def asked(arguments: Any) -> str:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    return bytes(read_call({"messages": messages}, True, "m", TEXTS).prompts[0]).decode()


def test_a_damaged_template_is_named_where_a_conversation_comes(tmp_path: Path) -> None:
    ByteTokenizer().save_hf(tmp_path)
    ask: Any = {"messages": [{"role": "user", "content": "a"}]}, True, "m"
    with pytest.raises(BadRequest, match="m: it has no chat template; put a chat_template"):
        read_call(*ask, Texts.load("m", tmp_path))
    (tmp_path / "chat_template.jinja").write_text("{% for %}")
    texts = Texts.load("m", tmp_path)
    assert texts.tokenize("a") == [97]
    with pytest.raises(BadRequest, match=r"m: the chat template is not valid Jinja: .*; put a chat_"):
        read_call(*ask, texts)


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
        read_call({"messages": broken}, True, "m", TEXTS)


KEYS = (  # as templates ask for them
    "{% for m in messages %}<{{ m.role }}>{% if 'tool_calls' in m %}{{ m.tool_calls[0].function.name }}{% endif %}"
    "{% if m.reasoning_content is defined %}({{ m.reasoning_content }}){% endif %}{{ m.content }}{% endfor %}"
)
REASONING = "reasoning", "reasoning_content", "thinking"
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def test_messages_with_nulls_are_shown_as_transformers_shows_them() -> None:
    """What a client's own classes write as null is not there; reasoning goes by three names."""
    theirs = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), chat_template=KEYS)
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "3"},
        *(
            {"role": "assistant", "content": "b", name: "why"}
            for name in ("reasoning", "reasoning_content", "thinking")
        ),
    ]
    nulls = dict.fromkeys(("refusal", "annotations", "audio", "function_call", "tool_calls", "reasoning_content"))
    sent = [{**nulls, **message} for message in messages]
    want = theirs.apply_chat_template(sent, tokenize=False, add_generation_prompt=True)
    assert ChatTemplate(KEYS).prompt(request_messages(sent)) == want
    assert ChatTemplate(KEYS).prompt(request_messages([{"tool_calls": [], **message} for message in messages])) == want
    assert want.count("why") == 3 and "<assistant>f<" in want


def test_calls_alone_are_shown_by_a_template_that_asks_whether_there_is_content() -> None:
    """As DeepSeek's do. Others would write the word None."""
    messages = request_messages([{"role": "assistant", "content": None, "tool_calls": [CALL]}])
    asking = KEYS.replace("'tool_calls' in m", "m['content'] is none").replace("{{ m.content }}", "")
    assert ChatTemplate(asking).prompt(messages) == ChatTemplate(KEYS).prompt(messages) == "<assistant>f"


@pytest.mark.parametrize(
    ("message", "what"),
    [
        ({"role": "critic", "content": "c"}, "does not show the role 'critic' of message 1"),
        ({"role": "assistant", "content": "c", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
         "does not show the tool_calls of message 1"),
        ({"role": "assistant", "content": "c", "function_call": {"name": "f"}}, "message 1 has a function_call"),
        ({"role": "assistant", "content": None}, "message 1 has no content"),
        ({"content": "c"}, "message 1 has no role"),
        ("c", "message 1 has no role"),
    ],
)  # fmt: skip
def test_what_the_model_would_not_see_is_refused(message: Any, what: str) -> None:
    known = "{% for m in messages if m.role in ['user', 'assistant'] %}{{ m.content }}{% endfor %}"
    with pytest.raises(BadConversation, match=what):
        ChatTemplate(known).prompt(request_messages([{"role": "user", "content": "a"}, message]))
    parts = "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
    with pytest.raises(BadConversation, match="does not show the role 'user' of message 0"):
        ChatTemplate(parts).prompt(request_messages([{"role": "user", "content": "a"}]))


ASIDE = (
    "{% if documents %}{{ documents | length }}{% endif %}{% if style is defined %}[{{ style }}]{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content PLACE }}<im_end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize("place", ["", "| trim"])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"add_generation_prompt": False},
        {"add_generation_prompt": False, "continue_final_message": True},
        {"chat_template_kwargs": {"style": "x"}, "documents": [{"title": "a", "text": "b"}]},
    ],
)
def test_a_conversation_is_begun_and_gone_on_with_as_transformers_has_it(how: dict[str, Any], place: str) -> None:
    template = ASIDE.replace("PLACE", place)
    theirs = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), chat_template=template)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": " im "}]
    named = {name: value for name, value in how.items() if name != "chat_template_kwargs"}
    settings: dict[str, Any] = {"add_generation_prompt": True, **named, **how.get("chat_template_kwargs", {})}
    want = theirs.apply_chat_template(messages, tokenize=False, **settings)
    texts = Texts("m", ByteTokenizer(), ChatTemplate(template))
    assert bytes(read_call({"messages": messages, **how}, True, "m", texts).prompts[0]).decode() == want


@pytest.mark.parametrize(
    ("how", "what"),
    [
        ({"continue_final_message": True}, "needs add_generation_prompt=False"),
        ({"chat_template_kwargs": {"color": 1}}, "no variable 'color'"),
        ({"chat_template_kwargs": {"messages": []}}, "no variable 'messages'"),
        ({"chat_template_kwargs": [1]}, "must be an object"),
        ({"reasoning_effort": "low"}, "no variable 'reasoning_effort'"),
        ({"tool_choice": "required"}, "the name of one of the tools"),
        ({"tool_choice": "required", "tools": [CALL, CALL]}, "'required' where there is one alone"),
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": [CALL]}, "the name of one"),
        ({"tool_choice": {"type": "function"}, "tools": [CALL]}, "the name of one"),
        ({"tool_choice": "required", "tools": [CALL], "response_format": {"type": "json_object"}}, "give one"),
    ],
)
def test_what_the_template_would_pass_over_is_refused(how: dict[str, Any], what: str) -> None:
    texts = Texts("m", ByteTokenizer(), ChatTemplate(ASIDE.replace("PLACE", "")))
    with pytest.raises(BadRequest, match=what):
        read_call({"messages": [{"role": "user", "content": "a"}], **how}, True, "m", texts)


@pytest.mark.parametrize("chat", [False, True])
def test_null_and_what_changes_nothing_are_as_if_not_there(chat: bool) -> None:
    """Clients whose classes write out every field must get what others get, and no other setting in silence."""
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}]} if chat else {"prompt": "a"}
    body |= {"request_id": "r", "temperature": 0.5}
    want = read_call(body, chat, "m", TEXTS)
    nulls = dict.fromkeys(("model", "stop", "n", "logit_bias", "max_tokens", "stream_options", "logprobs", "unknown"))
    assert read_call({**body, **nulls}, chat, "m", TEXTS) == want
    assert read_call({**body, **_USUAL, "best_of": 1, "user": "u"}, chat, "m", TEXTS) == want
    for name, other in (("priority", 1), ("best_of", 2), ("use_beam_search", True), ("foo", 0), ("echo", "no")):
        with pytest.raises(BadRequest, match=name):
            read_call({**body, name: other}, chat, "m", TEXTS)


@pytest.mark.parametrize(("fields", "most"), [({"max_completion_tokens": 2}, 2), ({}, 4)])
def test_the_newer_name_of_the_most_tokens_wins(fields: dict[str, int], most: int) -> None:
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 4, **fields}
    assert read_call(body, True, "m", TEXTS).params.max_tokens == most


@pytest.mark.parametrize(
    ("body", "parameter"),
    [
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "max_tokens": False, "echo": True}, "max_tokens"),
        ({"messages": [{"role": "user", "content": "a"}], "max_tokens": 0}, "max_tokens"),
        ({"messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"messages": [{"role": "critic"}]}, "messages"),
        ({"prompt": "a", "ignore_eos": "false"}, "ignore_eos"),
        ({"prompt": "a", "skip_special_tokens": 0}, "skip_special_tokens"),
        ({"prompt": "a", "stream": True, "stream_options": {"include_usage": "no"}}, "include_usage"),
        ({"prompt": "a", "logit_bias": {"1": 1, "01": -1}}, "logit_bias"),
        ({"prompt": "a", "stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options"),
        ({"prompt": "a", "allowed_token_ids": []}, "allowed_token_ids"),
        ({"prompt": "a", "request_id": 3}, "request_id"),
        ({"prompt": "a", "logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        ({"prompt": [-1], "echo": True}, "prompt"),
        ({"prompt": [[97, 1 << 70]], "echo": True}, "prompt"),
    ],
)
def test_what_openai_refuses_is_refused(body: dict[str, Any], parameter: str) -> None:
    with pytest.raises(BadRequest) as caught:
        read_call(body, "messages" in body, "m", TEXTS)
    assert str(caught.value.parameter).startswith(parameter) and caught.value.status == 400
