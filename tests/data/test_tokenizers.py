"""Tokenizers: what they are loaded from, what comes back, what `transformers` makes of the saved folder."""

from __future__ import annotations

import base64
import json
import re
import unicodedata
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from megatron_ds.data import tokenizer_training
from megatron_ds.data.tiktoken_files import KNOWN
from megatron_ds.data.tokenizer_training import Kind, train_tokenizer
from megatron_ds.data.tokenizers import Tokenizer, byte_characters, load_tokenizer
from megatron_ds.errors import DataError

TEXTS = [
    "def main() -> None:\n    print('hello, world')\n",
    "  two  spaces,\ttabs\r\nand 1234567 digits",
    "naïve café — Ελληνικά, 日本語, 🙂🏽, e\u0301",
    "\x00control\x7f\u2028\ufffd <0x41>",
    "x",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    words = [f"{a}{b} {b} {a} = {a} + {b} * 17\n" for a in ("alpha", "beta", "gamma") for b in ("one", "two", "éü")]
    lines = [" ".join(words[i:] + words[:i]) + f" number {i}" for i in range(len(words))] * 20 + TEXTS
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


def write_tiktoken_file(corpus: Path, path: Path) -> Path:
    """A small vocabulary in tiktoken's format: bytes first, then tokens as byte-level BPE learns them."""
    pytest.importorskip("tiktoken", reason="tiktoken files need tiktoken")
    trained = load_tokenizer(train_tokenizer([str(corpus)], path.parent / "hf", 400))
    byte_of = {character: byte for byte, character in enumerate(byte_characters())}
    vocabulary = json.loads((path.parent / "hf" / "tokenizer.json").read_text())["model"]["vocab"]
    tokens = [bytes(byte_of[c] for c in t) for t in sorted(vocabulary, key=vocabulary.__getitem__) if t[0] in byte_of]
    tokens = [token for token in tokens if token != b"<|endoftext|>"]
    assert len(tokens) == trained.vocab_size - 1
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    settings = {"pattern": KNOWN["cl100k_base"][0], "special_tokens": {"<|endoftext|>": len(tokens) + 3}}
    path.with_suffix(".json").write_text(json.dumps(settings))
    return path


@pytest.fixture(scope="module", params=["bpe", "unigram", "bytes", "tiktoken"])
def tokenizer(request: pytest.FixtureRequest, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    if request.param == "bytes":
        return load_tokenizer("bytes")
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "tiktoken":
        return load_tokenizer(write_tiktoken_file(corpus, folder / "cl100k_base.tiktoken"))
    return load_tokenizer(train_tokenizer([str(corpus)], folder, 320, request.param))


def test_text_comes_back_and_ids_are_in_range(tokenizer: Tokenizer) -> None:
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS)):
        assert tokenizer.decode(ids) == text == tokenizer.decode([*ids, tokenizer.vocab_size + 2])
        assert all(0 <= token < tokenizer.vocab_size for token in ids)
        assert tokenizer.eod_id is not None and tokenizer.eod_id not in ids
    names = [name for name in ("<|endoftext|>", "</s>") if tokenizer.token_id(name) is not None]
    assert [tokenizer.token_id(name) for name in names] == [tokenizer.eod_id]
    assert tokenizer.token_id("<|nothing of the kind|>") is None


def test_saved_folder_loads_in_transformers_with_the_same_ids(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer.save_hf(tmp_path / "export")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "export")
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS)):
        assert theirs(text, add_special_tokens=False)["input_ids"] == list(ids)
        assert theirs.decode(list(ids), clean_up_tokenization_spaces=False) == text
    assert theirs.eos_token_id == tokenizer.eod_id
    again = load_tokenizer(tmp_path / "export")
    assert [list(ids) for ids in again.encode_batch(TEXTS)] == [list(ids) for ids in tokenizer.encode_batch(TEXTS)]
    assert (again.vocab_size, again.eod_id, again.bos_id) == (
        tokenizer.vocab_size,
        tokenizer.eod_id,
        tokenizer.bos_id,
    )


def test_the_bytes_of_tokens_are_those_of_the_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Parts of characters and leading spaces included; of the folder for `transformers`, too."""
    tokenizer.save_hf(tmp_path / "export")
    for one in (tokenizer, load_tokenizer(tmp_path / "export")):
        for text, ids in zip(TEXTS, one.encode_batch(TEXTS)):
            found = b"".join(one.token_bytes(int(token)) for token in ids)
            assert found == text.encode() or found == b" " + text.encode()  # SentencePiece's first word has a space
        assert one.token_bytes(one.vocab_size + 2) == b""


def test_the_bytes_of_sentencepiece_in_a_tokenizer_json(tmp_path: Path) -> None:
    """Llama 2's: a space is a character of its own, what is not in the vocabulary comes as bytes."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers

    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "\u2581a"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    backend = Backend(models.BPE(vocabulary, [("\u2581", "a")], byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    strip = decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    (ids,) = tokenizer.encode_batch(["ab aé"])
    assert [tokenizer.token_bytes(int(token)) for token in ids] == [b" a", b"b", b" a", b"\xc3", b"\xa9"]


def test_bpe_vocabulary_size_and_determinism(corpus: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        train_tokenizer([str(corpus)], tmp_path / name, 300)
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()
    assert load_tokenizer(tmp_path / "a").vocab_size == 300


def test_wordpiece(corpus: Path, tmp_path: Path) -> None:
    trained = load_tokenizer(train_tokenizer([str(corpus)], tmp_path / "wp", 200, "wordpiece"))
    assert trained.decode(trained.encode_batch(["Alpha Beta"])[0]) == "alpha beta"
    assert trained.bos_id is not None and trained.eod_id is not None


@pytest.mark.parametrize("kind, size", [("bpe", 300), ("unigram", 330), ("wordpiece", 180)])
def test_special_tokens_of_the_users_own(corpus: Path, tmp_path: Path, kind: Kind, size: int) -> None:
    own = ["<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"]
    trained = load_tokenizer(train_tokenizer([str(corpus)], tmp_path / kind, size, kind, special_tokens=own))
    ids = [trained.token_id(name) for name in own]
    assert None not in ids and len(set(ids)) == 3 and trained.vocab_size == size
    assert trained.eod_id not in ids
    with pytest.raises(DataError, match=r"special_tokens=\['<a>', '<a>'\] must differ from each other"):
        train_tokenizer([str(corpus)], tmp_path / "twice", size, kind, special_tokens=["<a>", "<a>"])


def test_byte_characters_are_the_table_of_the_tokenizers_library() -> None:
    from tokenizers import pre_tokenizers

    assert sorted(byte_characters()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert byte_characters()[ord(" ")] == "Ġ" and byte_characters()[ord("\n")] == "Ċ"


def test_end_of_document_from_the_configuration_wins(corpus: Path, tmp_path: Path) -> None:
    folder = train_tokenizer([str(corpus)], tmp_path / "t", 300)
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": {"content": "a", "__type": "AddedToken"}, "bos_token": "b"}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eod_id == tokenizer.encode_batch(["a"])[0][0]
    assert tokenizer.bos_id == tokenizer.encode_batch(["b"])[0][0]
    config.write_text(json.dumps({"eos_token": None}))
    assert load_tokenizer(folder).eod_id is None and load_tokenizer(folder).special == {}


def test_truncation_and_padding_of_a_file_are_not_applied(corpus: Path, tmp_path: Path) -> None:
    import tokenizers

    path = train_tokenizer([str(corpus)], tmp_path / "t", 300) / "tokenizer.json"
    backend = tokenizers.Tokenizer.from_file(str(path))
    expected = backend.encode(TEXTS[0]).ids
    backend.enable_truncation(3)
    backend.enable_padding(length=100)
    backend.save(str(path))
    assert list(load_tokenizer(path).encode_batch([TEXTS[0]])[0]) == expected


def test_an_ordinary_entry_of_a_known_name_stays_one(corpus: Path, tmp_path: Path) -> None:
    """Also in what is saved: there its name in a text would become that token."""
    from tokenizers import Tokenizer as Backend
    from transformers import AutoTokenizer

    path = train_tokenizer([str(corpus)], tmp_path / "t", 300) / "tokenizer.json"
    description = json.loads(path.read_text())
    description["model"]["vocab"] |= {"<mask>": 300, "<s>": 301}
    Backend.from_str(json.dumps(description)).save(str(path))
    tokenizer = load_tokenizer(path.parent)
    assert (tokenizer.mask_id, tokenizer.bos_id) == (None, None)
    tokenizer.save_hf(tmp_path / "export")
    text = "a <mask> <s>b"
    theirs = AutoTokenizer.from_pretrained(tmp_path / "export").encode(text, add_special_tokens=False)
    assert theirs == list(tokenizer.encode_batch([text])[0])


def test_what_is_not_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer='nowhere' does not exist\. Give a folder"):
        load_tokenizer("nowhere")
    with pytest.raises(DataError, match=r"is a folder without tokenizer.json or tokenizer.model"):
        load_tokenizer(tmp_path)
    random = {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [], "dropout": 0.1}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(random))
    with pytest.raises(DataError, match=r"tokenizer.json has dropout=0.1.*: the same text would have other ids"):
        load_tokenizer(tmp_path)
    for name in ("tokenizer.json", "tokenizer.model"):
        (tmp_path / name).write_bytes(b"\x00\x01 not a tokenizer")
        with pytest.raises(DataError, match=f"{name} is not a"):
            load_tokenizer(tmp_path / name)


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_long_runs_are_cut_for_training_and_said(tmp_path: Path, kind: Kind) -> None:
    """Of letters, spaces and signs; what the trainer is given joins to the text, and a result comes of it."""
    letters = np.random.default_rng(0).choice(list("abcdefgh"), 30_000)
    text = "short words " + "".join(letters) + " " * 1000 + "é" * 256 + "!" * 257 + "\nlast"
    (tmp_path / "in.txt").write_text(text)
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "cut off\n{"text": "\xff"}\n{"Text": "another key"}\n')
    cutter = tokenizer_training._RunCutter()
    pieces = list(cutter(iter([text])))
    assert "".join(pieces) == text and (cutter.runs, cutter.longest) == (3, 30_000)
    assert all(len(run) <= 256 for piece in pieces for run in re.findall(r"\w+|\s+|[^\w\s]+", piece))
    said: list[str] = []
    inputs = [str(tmp_path / name) for name in ("in.txt", "bad.jsonl")]
    trained = train_tokenizer(inputs, tmp_path / "t", 400, kind, warn=said.append)
    assert load_tokenizer(trained).vocab_size == 400
    assert said == [
        "left out of training: 1 x invalid JSON, 1 x invalid UTF-8, 1 x missing key",
        "3 runs of more than 256 characters without a break (the longest 30,000) were cut into pieces of 256 for "
        "training: it takes time in the square of their length",
    ]


def test_what_sentencepiece_composes_is_composed_in_what_is_saved(corpus: Path, tmp_path: Path) -> None:
    """NFKC, as SentencePiece trains by default: `Precompiled` of `tokenizers` alone drops most of these marks."""
    import sentencepiece
    from tokenizers import Tokenizer as Backend

    sentencepiece.SentencePieceTrainer.Train(
        input=str(corpus), input_format="text", model_prefix=str(tmp_path / "tokenizer"), vocab_size=330,
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.save_hf(tmp_path / "export")
    theirs = Backend.from_file(str(tmp_path / "export" / "tokenizer.json"))
    rng = np.random.default_rng(0)
    for start, stop in ((0xAC00, 0xD7A4), (0xC0, 0x17F), (0x1EA0, 0x1EFA)):  # Hangul, Latin, Vietnamese
        text = unicodedata.normalize("NFD", "".join(map(chr, rng.integers(start, stop, 50))))
        assert theirs.encode(text, add_special_tokens=False).ids == list(tokenizer.encode_batch([text])[0])


def test_a_bpe_that_leaves_characters_out_is_known(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    letters = {"a": 0, "b": 1, "?": 2}
    named = letters | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    whole = {character: byte for byte, character in enumerate(byte_characters())}
    for vocabulary, options, in_bytes in (
        *((letters, {}, False), (letters, {"unk_token": "?"}, False), (letters, {}, True), (whole, {}, True)),
        *((named, {}, False), (named, {"byte_fallback": True}, False), (letters, {"byte_fallback": True}, False)),
    ):
        backend = Backend(models.BPE(vocabulary, [], **options))
        if in_bytes:
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.save(str(tmp_path / "t.json"))
        tokenizer = load_tokenizer(tmp_path / "t.json")
        assert tokenizer.drops == (len(tokenizer.encode_batch(["é"])[0]) == 0), (options, in_bytes)


def test_tokens_start_where_the_bytes_before_them_end(corpus: Path, tmp_path: Path) -> None:
    """Also where the file of a tokenizer takes spaces out of its offsets, as RoBERTa's and GPT-NeoX's do."""
    path = train_tokenizer([str(corpus)], tmp_path, 300) / "tokenizer.json"
    trimmed = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    path.write_text(json.dumps({**json.loads(path.read_text()), "post_processor": trimmed}))
    tokenizer = load_tokenizer(path)
    text = "  the  cat \n\n sat<|endoftext|>  on é🙂   "
    ids, starts = tokenizer.encode_marked(text)
    sizes = [len(tokenizer.token_bytes(token)) for token in ids.tolist()]
    ends = np.cumsum(sizes)
    assert starts.tolist() == [len(text.encode()[:at].decode(errors="ignore")) for at in ends - sizes]


@pytest.mark.parametrize("prefix", [False, True])
def test_symbols_of_a_sentencepiece_model_are_exported_with_the_same_ids_or_not_at_all(
    prefix: bool, corpus: Path, tmp_path: Path
) -> None:
    """``tokenizers`` puts the space in front of a text behind each symbol too, and strips what was there."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.Train(
        input=str(corpus), input_format="text", model_prefix=str(tmp_path / "tokenizer"), vocab_size=330,
        user_defined_symbols=["<u>"], add_dummy_prefix=prefix, remove_extra_whitespaces=False,
        normalization_rule_name="identity", hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    tokenizer = load_tokenizer(tmp_path)
    with pytest.warns(UserWarning, match="tokenizer.model alone: .* '1<u>a <u> b<u>'") if prefix else nullcontext():
        tokenizer.save_hf(tmp_path / "export")
    saved = load_tokenizer(tmp_path / "export")
    assert saved.encoder.startswith("sentencepiece" if prefix else "tokenizers")
    text = "of <u>the<u> word"
    assert list(saved.encode_batch([text])[0]) == list(tokenizer.encode_batch([text])[0])


def test_sentencepiece_is_given_long_lines_in_pieces() -> None:
    """It drops what is longer than its sentences without a word."""
    text = "word " * 10_000 + "\n" + "x\n" * 10
    pieces = list(tokenizer_training._pieces(iter([text])))
    assert "".join(pieces) == text and max(map(len, pieces)) <= tokenizer_training.PIECE_BYTES


def test_training_that_is_stopped_leaves_no_half_of_a_tokenizer(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("megatron_ds.data.tokenizer_base.json.dumps", stop)  # tokenizer.json is written by then
        with pytest.raises(KeyboardInterrupt):
            train_tokenizer([str(corpus)], tmp_path / "t", 300)
    assert [path.name for path in tmp_path.rglob("t*")] == ["t"]
    (tmp_path / "t.incomplete").mkdir()
    (tmp_path / "t.incomplete" / "left").touch()
    train_tokenizer([str(corpus)], tmp_path / "t", 300)
    assert sorted(path.name for path in (tmp_path / "t").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    assert not (tmp_path / "t.incomplete").exists()


def test_vocabulary_too_small(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="vocab_size=100 is too small for bpe: it needs at least 257"):
        train_tokenizer([str(corpus)], tmp_path, 100)
    with pytest.raises(DataError, match="SentencePiece could not train 9000 pieces"):
        train_tokenizer([str(corpus)], tmp_path, 9000, "unigram")


def test_tiktoken_files(corpus: Path, tmp_path: Path) -> None:
    path = write_tiktoken_file(corpus, tmp_path / "mine.tiktoken")
    tokenizer = load_tokenizer(path)
    assert tokenizer.eod_id == tokenizer.vocab_size - 1
    assert list(tokenizer.encode_batch(["a<|endoftext|>"])[0])[-1] == tokenizer.eod_id
    lines = path.read_bytes()
    (tmp_path / "llama" / "x").mkdir(parents=True)
    (tmp_path / "llama" / "tokenizer.model").write_bytes(lines)  # as Llama 3's: told from SentencePiece by its content
    assert load_tokenizer(tmp_path / "llama").bos_id == 128_000
    listed = {"added_tokens_decoder": {"128008": {"content": "<|eom_id|>"}}}  # Llama 3.1 has other names
    (tmp_path / "llama" / "tokenizer_config.json").write_text(json.dumps(listed))
    newer = load_tokenizer(tmp_path / "llama")
    assert newer.token_id("<|eom_id|>") == newer.encode_batch(["a<|eom_id|>"])[0][-1] == 128_008
    with pytest.raises(DataError, match="tiktoken gave up on a text of 3000001 characters that starts with '   "):
        tokenizer.encode_batch([" " * 3_000_000 + "x"])
    for pattern, special, said in (
        (r"\p{L}+|\s+", {}, r"does not match all of a text, and .* lost, such as \"',-\.1<>_"),
        ("(", {}, "tiktoken does not take its pattern"),
        (r".|\s", {"": 400}, "has no name, or two have one id"),
        (r".|\s", {"<a>": 400, "<b>": 400}, "has no name, or two have one id"),
        (r".|\s", {"<a>": -1}, "must hold `pattern` and `special_tokens`"),
    ):
        path.with_suffix(".json").write_text(json.dumps({"pattern": pattern, "special_tokens": special}))
        with pytest.raises(DataError, match=said):
            load_tokenizer(path)
    for line in (b"AAA= 9", b"Y2F0 9", b"Y2F0 -1", b"Y2F0 4294967296"):
        path.write_bytes(lines + line)
        with pytest.raises(DataError, match=f"line .*: .*{line.decode()}"):
            load_tokenizer(path)
    path.write_bytes(lines)
    path.with_suffix(".json").unlink()
    with pytest.raises(DataError, match=r"does not say how words are cut; name it like one of \['cl100k_base'"):
        load_tokenizer(path)
    path.with_suffix(".json").write_text('{"pattern": 1}')
    with pytest.raises(DataError, match="must hold `pattern` and `special_tokens`"):
        load_tokenizer(path)
    path.write_bytes(lines[:200])
    with pytest.raises(DataError, match=r"no token for .* of the 256 bytes: truncated|line .*: not `base64 rank`"):
        load_tokenizer(path)


@pytest.mark.parametrize("name", ["r50k_base", "cl100k_base", "o200k_base"])
def test_the_known_patterns_are_those_of_tiktoken(name: str, tmp_path: Path) -> None:
    """By their effect: the definitions in tiktoken are read, not its vocabularies, which it would download."""
    tiktoken = pytest.importorskip("tiktoken", reason="tiktoken files need tiktoken")
    import regex
    import tiktoken_ext.openai_public as public
    from tokenizers import Tokenizer as Backend

    assert tiktoken
    with pytest.MonkeyPatch.context() as patch:
        for loader in ("data_gym_to_mergeable_bpe_ranks", "load_tiktoken_bpe"):
            patch.setattr(public, loader, lambda *_, **__: {})
        definition = getattr(public, name)()
    text = "".join(TEXTS) * 2 + "I'LL don'T 'S CamelCaseWORDS http://a/b//\n\n  x\r\n 12345 \u01c5x ʰ"
    assert regex.findall(KNOWN[name][0], text) == regex.findall(definition["pat_str"], text)
    assert definition["special_tokens"] == KNOWN[name][1]
    # tiktoken's own, which is faster, means something else to `tokenizers` letter by letter.
    tokens = [bytes([byte]) for byte in range(256)] + [b"12", b"1234", b"123456", b"  ", b"\n ", b"\n  ", b"  \n"]
    path = tmp_path / "t.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    path.with_suffix(".json").write_text(json.dumps({"pattern": definition["pat_str"], "special_tokens": {}}))
    ours = load_tokenizer(path)
    ours.save_hf(tmp_path / "export")
    theirs = Backend.from_file(str(tmp_path / "export" / "tokenizer.json"))
    for each in (text, "a\n  b 123456 12345678 \n  \n", "x  \n  "):
        assert theirs.encode(each).ids == list(ours.encode_batch([each])[0])
    path.with_suffix(".json").write_text(json.dumps({"pattern": r"\bx|.|\s", "special_tokens": {}}))
    with pytest.raises(DataError, match=r"cuts words cannot be written as tokenizer.json: '\\\\b' in it may mean"):
        load_tokenizer(path).save_hf(tmp_path / "export")
