"""Records of conversations: what stands in and beside their messages is shown, marked or refused, and never lost."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conversation_examples import CHATS, OPTIONS

from megatron_ds.data.chat import CHATML, ChatTemplate
from megatron_ds.data.chat_records import BadConversation, parse_messages
from megatron_ds.data.indexed import IndexedDataset
from megatron_ds.data.preprocess import preprocess
from megatron_ds.data.tokenizers import load_tokenizer

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
WITH_TOOLS = (
    "{% if tools %}[{{ tools | tojson }}]{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.arguments | tojson }}{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_a_developers_message_is_a_systems_to_a_template_that_does_not_know_it() -> None:
    """In training as when it is served."""
    template, chat = ChatTemplate(CHATML), CHATS[0]
    newer = [{**chat[0], "role": "developer"}, *chat[1:]]
    assert template.renderings(parse_messages(newer)) == template.renderings(parse_messages(chat))


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "datasets"])
def test_tools_beside_messages_are_shown(tmp_path: Path, kind: str) -> None:
    """As transformers shows them; in a table as JSON, or null where there are none."""
    import datasets
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    (tmp_path / "t.jinja").write_text(WITH_TOOLS)
    theirs = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), chat_template=WITH_TOOLS)
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    sent = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    asked = {"role": "user", "content": "1+1"}
    messages = [asked, {"role": "assistant", "content": None, "tool_calls": [sent]}]
    shown = [asked, {"role": "assistant", "content": "", "tool_calls": [call]}]
    records: list[dict[str, Any]] = [{"messages": messages, "tools": [TOOL]}, {"messages": CHATS[0], "tools": None}]
    source = tmp_path / f"in.{kind}"
    if kind == "jsonl":
        source.write_text("\n".join(map(json.dumps, [*records, {"messages": messages, "tools": 3}])))
    else:
        records[0]["tools"] = json.dumps([TOOL])
        table = datasets.Dataset.from_list(records)
        table.to_parquet(source) if kind == "parquet" else table.save_to_disk(source)
    options = replace(OPTIONS, chat_template=str(tmp_path / "t.jinja"))
    counts = preprocess([str(source)], tmp_path / "out", options, 0)
    assert counts.problems == ({"bad conversation": 1} if kind == "jsonl" else {})
    expected = [theirs.apply_chat_template(m, tools=t, tokenize=False) for m, t in ((shown, [TOOL]), (CHATS[0], None))]
    dataset, tokenizer = IndexedDataset(tmp_path / "out"), load_tokenizer("bytes")
    assert [tokenizer.decode(dataset.document(number)) for number in range(2)] == expected
    hidden = preprocess([str(source)], tmp_path / "none", replace(options, chat_template="chatml"), 0)
    assert hidden.documents == 1 and hidden.problems["bad conversation"] == (2 if kind == "jsonl" else 1)


@pytest.mark.parametrize("flag", [{"weight": 0}, {"train": False}, {"training": False}])
def test_an_answer_that_is_marked_so_is_context(tmp_path: Path, flag: dict[str, Any]) -> None:
    """The text is that of the conversation without marks; of the answers, the other one alone is learnt."""
    marked: list[dict[str, Any]] = [dict(message) for message in CHATS[1]]
    marked[1] |= flag
    marked[3] |= {"weight": 1, "train": None}
    none = [*CHATS[1][:1], marked[1]]
    odd = [*CHATS[1][:1], {**CHATS[1][1], "weight": 0.5}]
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in (marked, none, odd)))
    counts = preprocess([str(tmp_path / "in.jsonl")], tmp_path / "out", OPTIONS, 0)
    assert counts.documents == 1
    reasons = (tmp_path / "out.bad.jsonl").read_text()
    assert "no message is the assistant's and to be learnt" in reasons and "message 1 has weight=0.5" in reasons
    ids, tokenizer = IndexedDataset(tmp_path / "out").document(0), load_tokenizer("bytes")
    mask = np.fromfile(tmp_path / "out.loss_mask", np.uint8).astype(bool)
    assert tokenizer.decode(ids) == ChatTemplate(CHATML).render(parse_messages(CHATS[1]))
    assert tokenizer.decode(ids[mask]) == "3<|im_end|>\n"


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_system_message_beside_the_others_leads_them(tmp_path: Path, kind: str) -> None:
    """As the same message among them does."""
    import datasets

    source, system = tmp_path / f"in.{kind}", CHATS[0][0]["content"]
    records: list[dict[str, Any]] = [
        {"system": system, "messages": CHATS[0][1:]},
        {"system": system, "messages": CHATS[0]},
        {"system": None, "messages": CHATS[0][1:]},
        {"system": "Be long.", "messages": CHATS[0]},
    ]
    if kind == "jsonl":
        source.write_text("\n".join(map(json.dumps, [*records, {"system": 1, "messages": CHATS[0]}])))
    else:
        datasets.Dataset.from_list(records).to_parquet(source)
    counts = preprocess([str(source)], tmp_path / "out", OPTIONS, 0)
    assert counts.problems == {"bad conversation": 2 if kind == "jsonl" else 1}
    assert "begin with another system message" in (tmp_path / "out.bad.jsonl").read_text()
    dataset, tokenizer, template = IndexedDataset(tmp_path / "out"), load_tokenizer("bytes"), ChatTemplate(CHATML)
    expected = [template.render(chat) for chat in (CHATS[0], CHATS[0], CHATS[0][1:])]
    assert [tokenizer.decode(dataset.document(number)) for number in range(3)] == expected


KNOWN_ROLES = (  # as of Qwen: other roles are passed over
    "{% for m in messages %}{% if m.role in ['system', 'user'] %}<{{ m.role }}>{{ m.content | trim }}</s>"
    "{% elif m.role == 'assistant' %}<assistant>{{ m.content }}</s>"
    "{% elif m.role == 'tool' %}<user>{{ m.content | urlencode }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_json_is_written_with_the_options_that_transformers_knows() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    options = "", "ensure_ascii=false", "true", "ensure_ascii=True, indent=2", "separators=(',', ':'), sort_keys=true"
    source = "".join(f"{{{{ messages[0] | tojson({given}) }}}}\n" for given in options)
    theirs = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), chat_template=source)
    messages = [{"role": "user", "content": "é<'\n"}]
    assert ChatTemplate(source).render(messages) == theirs.apply_chat_template(messages, tokenize=False)


def test_what_a_template_passes_over_is_no_ground_for_an_answer() -> None:
    template, user, answer = ChatTemplate(KNOWN_ROLES), CHATS[0][1], CHATS[0][2]
    for role, text in (("system", "Hé!"), ("tool", "3"), ("tool", " ")):
        (rendering,) = template.renderings(parse_messages([{"role": role, "content": text}, user, answer]))
        assert len(rendering.answers) == 1
    seen = parse_messages([user, {"from": "ipython", "value": "Hé!"}, answer])  # its text is there, of the answer
    with pytest.raises(BadConversation, match="does not show the role 'ipython' of message 1"):
        template.renderings(seen)
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    for source in (KNOWN_ROLES, CHATML):
        with pytest.raises(BadConversation, match="does not show the tool_calls of message 1"):
            ChatTemplate(source).renderings(parse_messages([user, call, user, answer]))


def test_nulls_that_a_table_fills_in_are_not_learnt(tmp_path: Path) -> None:
    """Calls of functions with other arguments, and messages without calls: the tokens of a table are those of JSON."""
    import datasets

    shown = "{% if 'tool_calls' in m %}{{ m.tool_calls | tojson }}{% endif %}"
    (tmp_path / "t.jinja").write_text(WITH_TOOLS.replace("{% for call", shown + "{% for call"))
    calls = [{"function": {"name": "f", "arguments": {"a": [1]}}}, {"function": {"name": "g", "arguments": {"b": 2}}}]
    tools = [{"name": "f", "parameters": {"a": {"type": "array"}}}, {"name": "g", "parameters": {"b": {"type": "x"}}}]
    record = {
        "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": calls}],
        "tools": tools,
    }
    (tmp_path / "in.jsonl").write_text(json.dumps(record))
    table = datasets.Dataset.from_list([record])
    table.to_parquet(tmp_path / "in.parquet")
    table.save_to_disk(tmp_path / "in.saved")
    found = []
    for kind in ("jsonl", "parquet", "saved"):
        options = replace(OPTIONS, chat_template=str(tmp_path / "t.jinja"))
        assert preprocess([str(tmp_path / f"in.{kind}")], tmp_path / kind, options, 0).documents == 1
        found.append(load_tokenizer("bytes").decode(IndexedDataset(tmp_path / kind).document(0)))
    assert found[0] == found[1] == found[2] and "null" not in found[0]


def test_every_name_of_the_assistant_is_learnt_or_refused() -> None:
    template = ChatTemplate(CHATML)
    for name in ("gpt", "chatgpt", "bing", "bard", "bot", "model", "assistant"):
        other = [CHATS[1][0], {"from": name, "value": CHATS[1][1]["value"]}, *CHATS[1][2:]]
        assert template.renderings(parse_messages(other)) == template.renderings(parse_messages(CHATS[1]))
    assert parse_messages([{"from": "observation", "value": "3"}, CHATS[0][2]])[0]["role"] == "tool"
    call = {"name": "f", "arguments": "{}"}
    for message, reason in (
        ({"from": "function_call", "value": json.dumps(call)}, "message 0 has a function_call"),
        ({"role": "assistant", "content": "", "function_call": call}, "message 0 has a function_call"),
        ({"role": "Assistant", "content": "no"}, "message 0 has the role 'Assistant', which is not learnt"),
    ):
        with pytest.raises(BadConversation, match=reason):
            parse_messages([message, CHATS[0][2]])


def test_parts_of_text_are_joined() -> None:
    """As the server joins them, and a template of transformers that writes each; images are refused."""
    from transformers.utils.chat_template_utils import render_jinja_template

    parts = [{"type": "text", "text": "1"}, {"type": "text", "text": "+1"}]
    listed = [{"role": "user", "content": parts}, {"role": "assistant", "content": parts[:1]}]
    each = CHATML.replace("{{ message['content'] }}", "{% for p in message['content'] %}{{ p['text'] }}{% endfor %}")
    (expected,), _ = render_jinja_template([listed], chat_template=each)
    assert ChatTemplate(CHATML).render(parse_messages(listed)) == expected
    with pytest.raises(BadConversation, match="message 0 has a part that is no text"):
        parse_messages([{"role": "user", "content": [*parts, {"type": "image"}]}, listed[1]])
