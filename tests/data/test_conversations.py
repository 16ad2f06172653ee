"""Conversations: what is learnt of them, how they are packed, and that nothing leaks from one to the other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conversation_examples import CHATS, OPTIONS
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ds.data import conversation_dataset
from megatron_ds.data.chat import CHATML, ChatTemplate, load_template
from megatron_ds.data.chat_records import BadConversation, parse_messages
from megatron_ds.data.conversation_dataset import ConversationDataset, best_fit_decreasing
from megatron_ds.data.gpt_sources import SampleOptions, open_sources
from megatron_ds.data.indexed import IndexedDataset
from megatron_ds.data.indexed_writer import IndexedDatasetWriter
from megatron_ds.data.preprocess import preprocess
from megatron_ds.data.tokenizers import load_tokenizer
from megatron_ds.data.verify import verify
from megatron_ds.errors import DataError


def test_a_conversation_is_one_text_and_its_answers_are_learnt() -> None:
    template, messages = ChatTemplate(CHATML), parse_messages(CHATS[1])
    (rendering,) = template.renderings(messages)
    assert rendering.text == template.render(messages)
    assert [rendering.text[a:b] for a, b in rendering.answers] == ["2<|im_end|>\n", "3<|im_end|>\n"]


def test_templates_equal_those_of_transformers() -> None:
    """The same Jinja settings: compare with transformers' own rendering of a template that needs them."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    source = (
        "{{ bos_token }}\n{% for message in messages %}\n    {% if message.role == 'skip' %}{% continue %}{% endif %}\n"
        "[{{ message['role'] | upper }}] {{ message['content'] | trim }} {{ message | tojson }}\n"
        "{% endfor %}{% if add_generation_prompt %}[ASSISTANT] {{ documents is defined }}{% endif %}"
    )
    theirs = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), bos_token="<s>", chat_template=source)
    messages = [{"role": "user", "content": " é <b> "}, {"role": "skip", "content": "x"}]
    for prompt in (False, True):
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        assert ChatTemplate(source, {"bos_token": "<s>"}).render(messages, prompt) == expected


def test_the_sandbox_holds() -> None:
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(BadConversation, match="refuses it"):
        ChatTemplate(escape).render([])
    with pytest.raises(BadConversation, match="no system message"):
        ChatTemplate("{{ raise_exception('no system message') }}").render([])
    with pytest.raises(DataError, match="not valid Jinja"):
        ChatTemplate("{% if %}")


@pytest.mark.parametrize("value, message", [
    ("text", "not a list of messages but str"),
    ([], "not a list of messages"),
    ([1], "message 0 is a int"),
    ([{"role": "user"}], r"message 0 has no role and content that are strings, but \['role'\]"),
    ([{"role": "user", "content": "hi"}], "no message is the assistant's"),
])  # fmt: skip
def test_bad_messages(value: object, message: str) -> None:
    with pytest.raises(BadConversation, match=message):
        parse_messages(value)


def test_tools_are_shown_by_the_template_for_them(tmp_path: Path) -> None:
    """Of several named templates in a folder, in both forms that ``transformers`` writes."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    named = [
        {"name": "default", "template": "D{{ messages[0]['content'] }}"},
        {"name": "rag", "template": "R"},
        {"name": "tool_use", "template": "T{{ tools | length }}{{ messages[0]['content'] }}"},
    ]
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": named}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    PreTrainedTokenizerFast.from_pretrained(tmp_path).save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "additional_chat_templates" / "tool_use.jinja").is_file()
    messages = [{"role": "user", "content": "hi"}]
    for folder in (tmp_path, tmp_path / "saved"):
        template, reference = load_template(None, str(folder)), PreTrainedTokenizerFast.from_pretrained(folder)
        for tools in (None, [], [{"type": "function", "function": {"name": "f"}}]):
            expected = reference.apply_chat_template(messages, tools=tools, tokenize=False)
            assert template.render(messages, tools=tools) == expected, (folder, tools)
    one = ChatTemplate("{{ tools }}")
    assert one.render(messages, tools=[1]) == "[1]" and one.render(messages) == "None"


def test_where_templates_come_from(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "A{{ eos_token }}"}))
    assert load_template(None, str(tmp_path), {"eos_token": "E"}).render([]) == "AE"
    (tmp_path / "chat_template.jinja").write_text("B")
    assert load_template(None, str(tmp_path / "tokenizer.json")).render([]) == "B"
    assert load_template("chatml", str(tmp_path)).render([]) == ""
    (tmp_path / "mine.jinja").write_text("C")
    assert load_template(str(tmp_path / "mine.jinja"), "bytes").render([]) == "C"
    with pytest.raises(DataError, match="the tokenizer bytes has no chat template; give a Jinja file, or 'chatml'"):
        load_template(None, "bytes")
    with pytest.raises(DataError, match="chat template 'x' is not a file"):
        load_template("x", "bytes")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_preprocessed_conversations_and_their_masks(tmp_path: Path, kind: str) -> None:
    source = tmp_path / f"in.{kind}"
    if kind == "jsonl":
        lines = [json.dumps({"messages": chat}) for chat in CHATS] + ['{"messages": [{"role": "user"}]}']
        source.write_text("\n".join(lines))
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": CHATS[0]}, {"messages": CHATS[0]}]), source)
    prefix = tmp_path / "out"
    counts = preprocess([str(source)], prefix, OPTIONS, 0)
    assert counts.documents == 2 and counts.problems == ({"bad conversation": 1} if kind == "jsonl" else {})
    verify(IndexedDataset(prefix))
    dataset = IndexedDataset(prefix)
    mask = np.fromfile(tmp_path / "out.loss_mask", np.uint8).astype(bool)
    assert mask.size == dataset.num_tokens == counts.tokens == counts.text_bytes
    first = dataset.document(0)
    template, tokenizer = ChatTemplate(CHATML), load_tokenizer("bytes")
    assert tokenizer.decode(first) == template.render(parse_messages(CHATS[0]))
    assert tokenizer.decode(first[mask[: first.size]]) == "Hé!<|im_end|>\n"
    common: dict[str, Any] = {"split": "1", "sequence_length": 99, "seed": 0, "tokenizer": "bytes"}
    for wanted, size in ((False, 300), (True, 257)):
        options = SampleOptions(conversations=wanted)
        opened = open_sources(str(prefix), vocab_size=size, options=options, **common)
        for said in (
            "all tokens of which count alike, prompts too",
            "vocab_size=300, of which the tokenizer bytes has",
        ):
            assert any(said in note for note in opened.notes) == (not wanted)


def test_a_damaged_mask_is_named(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in CHATS))
    prefix = tmp_path / "out"
    preprocess([str(tmp_path / "in.jsonl")], prefix, OPTIONS, 0)
    path = tmp_path / "out.loss_mask"
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"out\.loss_mask is not the file that was written"):
        verify(IndexedDataset(prefix))
    path.write_bytes(content[:-1])
    with pytest.raises(DataError, match=r"out\.loss_mask has \d+ bytes, but there are \d+ tokens"):
        ConversationDataset(IndexedDataset(prefix), 32)
    path.unlink()
    with pytest.raises(DataError, match="holds texts, not conversations"):
        ConversationDataset(IndexedDataset(prefix), 32)
    with pytest.raises(DataError, match=r"out\.loss_mask is not the file that was written"):
        verify(IndexedDataset(prefix))


# --- packing ----------------------------------------------------------------------------------------------------


def build(folder: Path, conversations: list[list[tuple[int, int]]]) -> IndexedDataset:
    """From lists of (token, learnt)."""
    with IndexedDatasetWriter(folder / "set", "int32") as writer:
        for conversation in conversations:
            writer.add_document([token for token, _ in conversation])
    flat = [learnt for conversation in conversations for _, learnt in conversation]
    (folder / "set.loss_mask").write_bytes(bytes(flat))
    return IndexedDataset(folder / "set")


def slow_rows(conversations: list[list[tuple[int, int]]], s: int) -> list[list[list[tuple[int, int]]]]:
    """Rows as lists of conversations: the longest first, each into the fullest row that has room, by looking at all."""
    used = [c[: s + 1] for c in conversations if any(learnt for _, learnt in c[1 : s + 1])]
    rows: list[list[int]] = []
    touched: dict[int, int] = {}  # of rows with the same room the one that got it last
    for number in sorted(range(len(used)), key=lambda i: -len(used[i])):
        room = [s - sum(len(used[i]) - 1 for i in row) for row in rows]
        fitting = [i for i in range(len(rows)) if room[i] >= len(used[number]) - 1]
        if fitting:
            least = min(room[i] for i in fitting)
            row = max((i for i in fitting if room[i] == least), key=lambda i: touched[i])
        else:
            rows.append([])
            row = len(rows) - 1
        rows[row].append(number)
        touched[row] = max(touched.values(), default=0) + 1
    return [[used[i] for i in row] for row in sorted(sorted(row) for row in rows)]


CHAT = st.lists(st.tuples(st.integers(1, 99), st.integers(0, 1)), max_size=12)


@given(
    conversations=st.lists(CHAT, min_size=1, max_size=20),
    s=st.integers(1, 10),
    chunk=st.sampled_from([1, 7, 1 << 24]),
)
@settings(max_examples=120, deadline=None)
def test_rows_equal_the_slow_version(
    tmp_path_factory: pytest.TempPathFactory, conversations: list[list[tuple[int, int]]], s: int, chunk: int
) -> None:
    if not any(conversations):
        return
    indexed = build(tmp_path_factory.mktemp("sft"), conversations)
    expected = slow_rows(conversations, s)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversation_dataset, "CHUNK_TOKENS", chunk)
        if not expected:
            with pytest.raises(DataError, match="has nothing to learn"):
                ConversationDataset(indexed, s)
            return
        dataset = ConversationDataset(indexed, s)
    assert len(dataset) == len(expected)
    assert dataset.left_out == len(conversations) - sum(map(len, expected))
    assert dataset.truncated == sum(len(c) - 1 > s for c in conversations if any(learnt for _, learnt in c[1 : s + 1]))
    batch = dataset.rows(range(len(dataset)))
    for row, chats in enumerate(expected):
        tokens, labels, mask, positions, ids = [], [], [], [], []
        for number, chat in enumerate(chats):
            tokens += [token for token, _ in chat[:-1]]
            labels += [token for token, _ in chat[1:]]
            mask += [bool(learnt) for _, learnt in chat[1:]]
            positions += range(len(chat) - 1)
            ids += [number] * (len(chat) - 1)
        rest = s - len(tokens)
        assert batch["tokens"][row].tolist() == tokens + [0] * rest
        assert batch["labels"][row].tolist() == labels + [0] * rest
        assert batch["loss_mask"][row].tolist() == mask + [False] * rest
        assert batch["position_ids"][row].tolist() == positions + list(range(rest))
        assert batch["document_ids"][row].tolist() == ids + [len(chats)] * rest
        assert batch["loss_mask"][row].any()


def test_the_packing_is_kept_and_follows_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = []
    real = ConversationDataset._pack
    monkeypatch.setattr(ConversationDataset, "_pack", lambda self: packed.append(1) or real(self))
    chats = [[(1, 0), (2, 1), (3, 1)], [(4, 0), (5, 1)]]
    for _ in range(2):
        ConversationDataset(build_once(tmp_path, chats), 8)
    assert len(packed) == 1
    ConversationDataset(IndexedDataset(tmp_path / "set"), 9)
    assert len(packed) == 2
    build(tmp_path, chats[::-1])
    first = ConversationDataset(IndexedDataset(tmp_path / "set"), 8).rows([0])
    assert len(packed) == 3 and first["tokens"][0, :3].tolist() == [4, 1, 2]


def build_once(folder: Path, chats: list[list[tuple[int, int]]]) -> IndexedDataset:
    return IndexedDataset(folder / "set") if (folder / "set.idx").exists() else build(folder, chats)


def test_packing_wastes_little() -> None:
    """What is left of the rows, for lengths as conversations have them (log-normal) and rows of 2,048."""
    lengths = np.random.default_rng(0).lognormal(6.5, 0.9, 100_000).astype(np.int64).clip(1, 2048)
    items, starts = best_fit_decreasing(lengths, 2048)
    assert np.array_equal(np.sort(items), np.arange(lengths.size))
    sums = np.add.reduceat(lengths[items], starts[:-1])
    assert (sums <= 2048).all() and (np.diff(starts) > 0).all()
    assert 1 - lengths.sum() / (2048 * (starts.size - 1)) < 0.03
    again = best_fit_decreasing(lengths, 2048)
    assert np.array_equal(items, again[0]) and np.array_equal(starts, again[1])
