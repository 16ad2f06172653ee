"""The ids that conversations train on are those of ``transformers``' ``apply_chat_template``, prompts included."""

from __future__ import annotations

import gc
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from preprocess_helpers import REPOSITORY

from megatron_ds.data import template_sandbox
from megatron_ds.data.chat import CHATML, ChatTemplate, encode, load_template, split_markers
from megatron_ds.data.chat_records import BadConversation
from megatron_ds.data.gpt_sources import SampleOptions, open_sources
from megatron_ds.data.indexed import IndexedDataset
from megatron_ds.data.parts import PreprocessOptions
from megatron_ds.data.preprocess import preprocess
from megatron_ds.data.source_text import SourceOptions
from megatron_ds.data.tokenizers import load_tokenizer
from megatron_ds.errors import DataError

CORPUS = ["Hello world, how are you? [INST] hi [/INST] fine é🙂 thanks <r> why </r> 1 2 3\n"] * 40
INST = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
LAST_REASONING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and not loop.last %}"
    "{{ m.content.split('</r>')[-1] }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATS = [
    [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "<r> é🙂 </r>Hello world"},
        {"role": "user", "content": "how are you?"},
        {"role": "assistant", "content": "<r>why</r> fine é"},
        {"role": "user", "content": "thanks"},
    ],
    [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}],
]


def bpe_folder(folder: Path, template: str) -> Path:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<|im_start|>", "<|im_end|>")])
    folder.mkdir(parents=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def sentencepiece_model(folder: Path, kind: str = "unigram") -> Path:
    import sentencepiece

    folder.mkdir(parents=True)
    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(CORPUS), model_writer=file, vocab_size=330, model_type=kind,
            byte_fallback=True, hard_vocab_limit=False, normalization_rule_name="identity", minloglevel=2,
            remove_extra_whitespaces=False, add_dummy_prefix=True,
        )  # fmt: skip
    return folder


def sentencepiece_folder(folder: Path, template: str, with_json: bool) -> Path:
    """A model file alone, or with the ``tokenizer.json`` that the model's conversion gives."""
    sentencepiece_model(folder)
    if with_json:
        load_tokenizer(folder).save_hf(folder)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    else:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def theirs(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


def expected_document(
    reference: Any, messages: list[dict[str, str]], answers: list[int]
) -> tuple[list[int], list[int]]:
    """Ids of the whole conversation by ``transformers``; learnt: what follows a prompt's ids, to where the text of the
    conversation with its answer ends."""
    text = reference.apply_chat_template(messages, tokenize=False)
    encoded = reference(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = reference.apply_chat_template(messages, tokenize=True)["input_ids"]
    assert ids == encoded["input_ids"]
    mask = [0] * len(ids)
    for i in answers:
        prompt = reference.apply_chat_template(messages[:i], tokenize=True, add_generation_prompt=True)["input_ids"]
        assert ids[: len(prompt)] == prompt
        end = len(reference.apply_chat_template(messages[: i + 1], tokenize=False))
        for place in range(len(prompt), len(ids)):
            mask[place] |= encoded["offset_mapping"][place][0] < end
    return ids, mask


def documents(folder: Path, chats: list[Any], **options: Any) -> list[tuple[list[int], list[int]]]:
    """Preprocess, and read back (ids, mask) of each document."""
    source, prefix = folder / "chats.jsonl", folder / "out"
    source.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    conversations = SourceOptions("messages", conversations=True)
    preprocess([str(source)], prefix, PreprocessOptions(str(folder), source=conversations, **options), 0)
    dataset = IndexedDataset(prefix)
    mask = np.fromfile(f"{prefix}.loss_mask", np.uint8)
    found = []
    for i in range(dataset.num_documents):
        place = slice(dataset.document_start(i), dataset.document_start(i + 1))
        found.append((dataset.tokens[place].tolist(), mask[place].tolist()))
    return found


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece json", "sentencepiece model"])
def test_ids_and_answers_are_those_of_transformers(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "tokenizer"
    if kind == "bpe":
        reference = theirs(bpe_folder(folder, CHATML))
    else:
        sentencepiece_folder(folder, INST, kind == "sentencepiece json")
        reference = theirs(sentencepiece_folder(tmp_path / "reference", INST, True))
    found = documents(folder, CHATS)
    expected = [expected_document(reference, CHATS[0], [1, 3]), expected_document(reference, CHATS[1], [1])]
    assert found == expected
    eos = load_tokenizer(folder).eod_id
    assert [ids.count(eos) for ids, _ in found] == ([5, 2] if kind == "bpe" else [2, 1])
    if kind != "bpe":
        # The dummy prefix: one "▁" after [/INST], where a piece encoded alone would have two.
        tokens = reference.convert_ids_to_tokens(found[1][0])
        assert tokens[-5:] == ["]", "▁", "2", "▁", "</s>"] and found[1][1][-5:] == [0, 1, 1, 1, 1]


def test_an_answer_that_later_messages_change_is_learnt_as_generation_shows_it(tmp_path: Path) -> None:
    """Reasoning that a template removes from older answers: each answer once, after its own prompt."""
    folder = bpe_folder(tmp_path / "tokenizer", LAST_REASONING)
    reference = theirs(folder)
    found = documents(folder, [CHATS[0]])
    # With the last user message the second answer is no longer the last: it is learnt from the text up to it.
    assert found == [expected_document(reference, CHATS[0][:2], [1]), expected_document(reference, CHATS[0][:4], [3])]
    shown = [reference.decode([i for i, learnt in zip(*document) if learnt]) for document in found]
    assert shown == [f"{CHATS[0][i]['content']}<|im_end|>\n" for i in (1, 3)]


def test_a_template_that_ends_texts_itself_gets_no_second_token(tmp_path: Path) -> None:
    folder = sentencepiece_folder(tmp_path / "tokenizer", INST, True)
    added = {"prepend_bos": True, "append_eod": True}
    assert documents(folder, CHATS[1:], **added) == documents(folder, CHATS[1:])
    ((ids, mask),) = documents(folder, [CHATS[0]], **added)  # its last message is the user's: no end stands there
    tokenizer = load_tokenizer(folder)
    assert (ids.count(tokenizer.bos_id), ids[-1], mask[-1]) == (3, tokenizer.eod_id, 0)
    chatml = bpe_folder(tmp_path / "chatml", CHATML)  # <|im_end|> and a line end
    assert documents(chatml, CHATS[1:], append_eod=True) == documents(chatml, CHATS[1:])


def test_a_prompt_whose_tokens_the_answer_changes_is_left_out_and_said(tmp_path: Path) -> None:
    folder = bpe_folder(tmp_path / "tokenizer", "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
                        "{% if add_generation_prompt %}assistant: {% endif %}")  # fmt: skip
    tokenizer = load_tokenizer(folder)
    (rendering,) = load_template(None, str(folder)).renderings(
        [{"role": "user", "content": "1"}, {"role": "assistant", "content": "world"}]
    )
    with pytest.raises(
        BadConversation, match=r"tokens of the prompt '.*assistant: ' are others when the answer 'world'"
    ):
        encode(tokenizer, rendering)
    with pytest.raises(DataError, match=r"no document with text .*: 1 records were bad \(1 x bad conversation"):
        documents(folder, [[{"role": "user", "content": "1"}, {"role": "assistant", "content": "world"}]])


@pytest.mark.parametrize("place", ["special_tokens_map", "added_tokens", "added_tokens_decoder", "model"])
def test_the_end_token_is_found_wherever_the_folder_names_it(tmp_path: Path, place: str) -> None:
    """In each of them beside a `<|endoftext|>` that a list of known names would take."""
    folder = tmp_path / "t"
    if place == "model":
        sentencepiece_model(folder)
        end, eos = load_tokenizer(folder).vocab_size, "<|end_of_turn|>"
    else:
        bpe_folder(folder, CHATML)
        from tokenizers import Tokenizer

        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
        backend.add_special_tokens(["<|endoftext|>"])
        backend.save(str(folder / "tokenizer.json"))
        end, eos = backend.get_vocab_size(), "<|end_of_turn|>"
        if place == "special_tokens_map":
            end, eos = backend.token_to_id("<|im_end|>"), "<|im_end|>"
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos}
    if place == "special_tokens_map":
        config["eos_token"] = "<|im_start|>"  # transformers goes by the older file
        (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": eos}}))
    elif place in ("added_tokens", "model"):
        (folder / "added_tokens.json").write_text(json.dumps({eos: end}))
    else:
        config["added_tokens_decoder"] = {str(end): {"content": eos, "special": True, "normalized": False}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.eod_id, tokenizer.special["eos_token"], tokenizer.token_id(eos)) == (end, eos, end)
    assert (
        tokenizer.eod_origin == f"{'special_tokens_map' if place == 'special_tokens_map' else 'tokenizer_config'}.json"
    )
    assert tokenizer.vocab_size == end + (2 if place == "special_tokens_map" else 1)
    ids, starts = tokenizer.encode_marked(f"Hello{eos}")
    assert ids[-1] == end and starts[-1] == 5 and end not in ids[:-1]
    assert tokenizer.decode(ids.tolist()) == f"Hello{eos}"
    if place != "model":
        assert theirs(folder).eos_token_id == end and theirs(folder)(f"Hello{eos}")["input_ids"] == ids.tolist()
    tokenizer.save_hf(tmp_path / "export")
    assert theirs(tmp_path / "export").eos_token_id == end


MARK = {"content": "<r>", "lstrip": True, "rstrip": True, "normalized": False, "single_word": False, "special": True}


@pytest.mark.parametrize("listed", [
    {"additional_special_tokens": ["Ġthanks", "<new>"]},
    {"extra_special_tokens": {"a": "<new>", "b": "world"}},
    {"special_tokens_map": {"additional_special_tokens": [{"__type": "AddedToken", **MARK}, "<new>"]}},
    {"added_tokens_decoder": {"400": {**MARK, "content": "<|im_start|>"}}},
    {"split_special_tokens": True},
    {"pad_token": "<pad>", "sep_token": {"__type": "AddedToken", **MARK}, "additional_special_tokens": ["<new>"]},
])  # fmt: skip
def test_special_tokens_that_a_folder_lists_are_those_of_transformers(tmp_path: Path, listed: dict[str, Any]) -> None:
    """Those that the vocabulary has among its other tokens, those that it lacks, and the space that belongs to one."""
    folder = bpe_folder(tmp_path / "t", CHATML)
    number = load_tokenizer(folder).token_id("<|im_start|>")
    if "added_tokens_decoder" in listed:
        listed = {"added_tokens_decoder": {str(number): listed["added_tokens_decoder"]["400"]}}
    if older := listed.get("special_tokens_map"):
        (folder / "special_tokens_map.json").write_text(json.dumps(older))
    else:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **listed}))
    ours, reference = load_tokenizer(folder), theirs(folder)
    text = "Hello world <r> thanks <new> Ġthanks <|im_start|> fine<|im_end|> é<pad>"
    expected = reference.encode(text, add_special_tokens=False)
    assert list(ours.encode_batch([text])[0]) == ours.encode_marked(text)[0].tolist() == expected
    assert ours.vocab_size == len(reference)


def test_tokens_added_to_a_sentencepiece_model_are_tokens_in_texts_too(tmp_path: Path) -> None:
    """As of conversations that were rendered into texts before; the ids are those of ``transformers``."""
    folder = sentencepiece_model(tmp_path / "t")
    size = load_tokenizer(folder).vocab_size
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_start|>": size, "<|im_end|>": size + 1}))
    ours = load_tokenizer(folder)
    ours.save_hf(tmp_path / "converted")
    reference = theirs(tmp_path / "converted")
    texts = ["<|im_start|>user\nHello world<|im_end|>\n<|im_end|>", "Hello <|im_end|> world", "Hello", ""]
    expected = [reference.encode(text, add_special_tokens=False) for text in texts]
    assert [list(ids) for ids in ours.encode_batch(texts)] == expected
    assert size in expected[0] and size + 1 in expected[1]


@pytest.mark.parametrize("settings", [{"legacy": False}, {"legacy": False, "add_prefix_space": False}])
def test_the_space_before_a_sentencepiece_text_is_that_of_transformers(
    tmp_path: Path, settings: dict[str, bool]
) -> None:
    """At its start alone or nowhere; special tokens without an id come behind the pieces. What is saved says so too."""
    from transformers import AutoTokenizer

    folder = sentencepiece_model(tmp_path / "t", "bpe")
    config = {"tokenizer_class": "LlamaTokenizer", "pad_token": "<pad>", "additional_special_tokens": ["<|im_end|>"]}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **settings}))
    ours = load_tokenizer(folder)
    assert ours.fingerprint != load_tokenizer(sentencepiece_model(tmp_path / "plain", "bpe")).fingerprint
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no tokenizer.json
        ours.save_hf(tmp_path / "export")
    again = load_tokenizer(tmp_path / "export")
    for text in ("Hello world", "<s>Hello</s> world<pad>", "Hello<|im_end|>world<|im_end|> fine é", ""):
        ids = ours.encode_marked(text)[0].tolist()
        for reference in (AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(tmp_path / "export")):
            assert ids == reference.encode(text, add_special_tokens=False)
            assert len(reference) == ours.vocab_size == again.vocab_size
        assert again.encode_marked(text)[0].tolist() == ids
        assert ours.decode(ids) == text.replace("<s>", "").replace("</s>", "")


def test_an_end_token_that_is_nowhere_is_an_error(tmp_path: Path) -> None:
    folder = bpe_folder(tmp_path / "t", CHATML)
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": "<|gone|>"}))
    with pytest.raises(DataError, match=r"tokenizer_config.json says eos_token='<\|gone\|>', but the tokenizer has no"):
        load_tokenizer(folder)
    config.write_text(json.dumps({"added_tokens_decoder": {"9000": {"content": "<|far|>"}}}))
    with pytest.raises(DataError, match=r"give the token '<\|far\|>' the id 9000, but the vocabulary goes on at 304"):
        load_tokenizer(folder)
    config.write_text(json.dumps({"added_tokens_decoder": {"x": 1}}))
    with pytest.raises(DataError, match="are not ids and tokens"):
        load_tokenizer(folder)
    model = sentencepiece_model(tmp_path / "sp")
    (model / "added_tokens.json").write_text(json.dumps({"<|x|>": 5}))
    with pytest.raises(DataError, match=r"give the token '<\|x\|>' the id 5, but that is the piece"):
        load_tokenizer(model)


def test_tiktoken_and_bytes_mark_special_tokens(tmp_path: Path) -> None:
    pytest.importorskip("tiktoken", reason="tiktoken files need tiktoken")
    import base64

    path = tmp_path / "r50k_base.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256)))
    text = "é<|endoftext|>a"
    for tokenizer, end in ((load_tokenizer(path), 50_256), (load_tokenizer("bytes"), 256)):
        ids, starts = tokenizer.encode_marked(text)
        assert ids.tolist() == [*"é".encode(), end, ord("a")] and starts.tolist() == [0, 0, 1, 14]
        assert tokenizer.special == {"eos_token": "<|endoftext|>"}


def test_markers_that_are_no_tokens_are_named(tmp_path: Path) -> None:
    folder = bpe_folder(tmp_path / "t", CHATML)
    assert split_markers(ChatTemplate(CHATML), load_tokenizer(folder)) == []
    assert split_markers(ChatTemplate(CHATML), load_tokenizer("bytes")) == ["<|im_start|>", "<|im_end|>"]
    with_tools = ChatTemplate(CHATML, tool_use=CHATML + "<|tool|>")
    assert split_markers(with_tools, load_tokenizer(folder)) == ["<|tool|>"]


def test_conversations_that_a_row_cuts_are_counted_and_said(tmp_path: Path) -> None:
    folder = bpe_folder(tmp_path / "t", CHATML)
    documents(folder, [*CHATS, *CHATS[1:] * 2])
    length = min(len(ids) for ids, _ in documents(folder, [*CHATS, *CHATS[1:] * 2]))
    common: dict[str, Any] = {"split": "1", "vocab_size": 320, "seed": 0, "options": SampleOptions(conversations=True)}
    enough, short = (open_sources(str(folder / "out"), sequence_length=s, **common) for s in (200, length - 2))
    assert enough.notes == ()
    (note,) = short.notes
    assert (
        note == f"{folder}/out: of 4 conversations 4 are longer than sequence_length={length - 2} and cut at their end"
    )


def test_the_tool_says_its_end_token_and_the_markers_that_it_cuts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))
    from preprocess_data import PreprocessData, main  # type: ignore[import-not-found]

    (tmp_path / "in.jsonl").write_text(json.dumps({"messages": CHATS[1]}))
    source = SourceOptions(key="messages", conversations=True)
    making = PreprocessOptions(tokenizer="bytes", append_eod=True, chat_template="chatml", source=source)
    main(PreprocessData([str(tmp_path / "in.jsonl")], tmp_path / "out", making, workers=0, quiet=True))
    said = capsys.readouterr()
    assert "end of document: '<|endoftext|>', id 256 (the byte tokenizer itself)" in said.out
    assert "warning: <|im_start|>, <|im_end|> of the chat template are no tokens of this tokenizer" in said.err


# --- records and templates that must not stop a run -------------------------------------------------------------

BAD_TEMPLATES = {
    "division by zero": "{{ 1 / 0 }}",
    "maximum recursion depth": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "repetitions of 1 elements": "{{ 'a' * 10000000000 }}",
    "MemoryError": "{{ ('a' * 60000000) | center(4000000000) }}",
    "a power of more than": "{{ messages | length ** (10 ** 9) }}",
    "a product of more than": "{% set n = namespace(x=9) %}{% for i in range(99) %}{% set n.x = n.x*n.x %}{% endfor %}",
    "it takes more than 0.3 s": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "surrogates not allowed": "{{ '\ud800' }}",
    "has no element 5": "{{ [1][5].x }}",
    "it makes a text of 67108866 characters": "{{ 'aa' * 33554432 }}aa",
}  # fmt: skip


@pytest.mark.parametrize("message", BAD_TEMPLATES)
def test_whatever_a_template_does_it_ends(message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "CPU_SECONDS", 0.3)
    template = ChatTemplate(BAD_TEMPLATES[message])
    gc.disable()  # garbage of other tests, collected at the depth of a recursion, may fail there
    try:
        with pytest.raises(BadConversation, match=message):
            template.render(CHATS[1])
    finally:
        gc.enable()
    assert ChatTemplate("{% generation %}{{ 2 * 3 }}{% endgeneration %}").render([]) == "6"  # the bounds are gone


def test_a_run_goes_on_after_each_bad_record(tmp_path: Path) -> None:
    template = "{% for m in messages %}{% if m.content == 'zero' %}{{ 1 / 0 }}{% endif %}{{ m.content }}{% endfor %}"
    folder = bpe_folder(tmp_path / "t", template)
    good = {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "<|im_end|>"}]}
    zero = {"messages": [{"role": "user", "content": "zero"}, {"role": "assistant", "content": "2"}]}
    nothing = {"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]}
    lone = {"messages": [{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "2"}]}
    deep = (
        '{"messages": [{"role": "user", "content": "1", "x": '
        + "[" * 900
        + "]" * 900
        + '}, {"role": "assistant", "content": "2"}]}'
    )
    lines = [json.dumps(good), '{"messages": ' + "9" * 5000 + "}", json.dumps(zero), json.dumps(nothing)]
    lines += [json.dumps(lone), "[" * 100_000, deep, json.dumps(good)]
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(lines))
    options = PreprocessOptions(str(folder), source=SourceOptions("messages", conversations=True))
    counts = preprocess([str(source)], tmp_path / "out", options, 0)
    listed = {record["line"]: record["reason"] for record in map(json.loads, (tmp_path / "out.bad.jsonl").open())}
    deep_is_bad = 7 in listed  # how deep JSON may go is the interpreter's affair
    assert counts.documents == 2 + (not deep_is_bad)
    assert {n: listed[n] for n in (2, 3, 4, 5, 6)} == {
        2: "invalid JSON", 3: "bad conversation", 4: "empty", 5: "invalid UTF-8", 6: "invalid JSON",
    }  # fmt: skip
    for line, reason in ((lines[1], "invalid JSON"), (lines[2], "bad conversation: the chat template refuses it")):
        source.write_text(line)
        fatal = PreprocessOptions(str(folder), on_error="fatal", source=options.source)
        with pytest.raises(DataError, match=f"in.jsonl, line 1: {reason}"):
            preprocess([str(source)], tmp_path / reason[:3], fatal, 0)


def test_a_text_that_the_tokenizer_cannot_take_is_left_out(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"a": 0}, unk_token="gone"))  # fails on every other word
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "in.jsonl").write_text('{"text": "a a"}\n{"text": "b"}\n{"text": "a"}\n')
    counts = preprocess([str(tmp_path / "in.jsonl")], tmp_path / "out", PreprocessOptions(str(tmp_path)), 0)
    assert (counts.documents, counts.tokens, counts.problems) == (2, 3, {"not encodable": 1})
