"""tiktoken in place of `tokenizers`: the same ids for every text, or not at all."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from megatron_ds.data import fast_bpe
from megatron_ds.data.fast_bpe import FastEncoder, Unsuitable, byte_characters
from megatron_ds.data.indexed import IndexedDataset
from megatron_ds.data.parts import PreprocessOptions
from megatron_ds.data.preprocess import preprocess
from megatron_ds.data.source_text import SourceOptions
from megatron_ds.data.tokenizers import HFTokenizer

tiktoken = pytest.importorskip("tiktoken", reason="the fast encoder needs tiktoken")

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
LLAMA3 += r"|\s*[\r\n]+|\s+(?!\S)|\s+"
CORPUS = [
    "the cat's hat isn't what they'd say we'll see; I'M SURE, that's all. 12345 67 ab12cd",
    "    def f(x):\n        return x  # naïve café\n\n\n\tEnd...!!! ==> (((a, b)))\r\n",
    "Ελληνικά και русский язык, 日本語のテキスト 한국어 🙂🙂🏽 ½ ⅷ ٣٤٥ e\u0301e\u0301",
    "aaaa aaaaaaa abababab abcabcabc baba cabbage bacaba",
]


def train(words: str, vocab_size: int = 420) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    if words == "gpt2":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS * 3, trainer)
    return backend


def slow(backend: Tokenizer) -> Any:
    return lambda text: backend.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module", params=["gpt2", "llama3"])
def backend(request: pytest.FixtureRequest) -> Tokenizer:
    return train(request.param)


TEXT = st.text(
    st.one_of(
        st.sampled_from("abct'sSmMreEvlLdD 01   \n\r\t!(."),
        st.sampled_from("éſΕл日한🙂½ⅷ٣\u0301\u00a0\u0085\u2028\u200b\u3000\ufeff\u180e"),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=60,
)


@pytest.fixture(scope="module")
def encoder(backend: Tokenizer) -> FastEncoder:
    return FastEncoder(backend)


@given(texts=st.lists(TEXT, min_size=1, max_size=5))
@settings(max_examples=300, deadline=None)
def test_the_same_ids_for_any_text(backend: Tokenizer, encoder: FastEncoder, texts: list[str]) -> None:
    encoder._until_check = 10**9  # nothing may depend on the sampled check
    encoder._known, encoder._distrusted = set(map(chr, range(128))), set()  # as it was made: it has met no character
    for text in [*texts, *CORPUS]:
        assert encoder.encode(text).tolist() == slow(backend)(text)


def test_most_texts_take_the_fast_way(backend: Tokenizer) -> None:
    slow_calls = []
    encoder = FastEncoder(backend)
    encoder._slow = lambda text: slow_calls.append(text) or slow(backend)(text)
    encoder._until_check = 10**9
    for text in CORPUS:
        encoder.encode(text)
        slow_calls.clear()  # the trials of new characters
        encoder.encode(text)
        assert slow_calls == []


def test_added_tokens_and_long_white_space_take_the_slow_way(backend: Tokenizer) -> None:
    calls: list[str] = []
    encoder = FastEncoder(backend)
    encoder._slow = lambda text: calls.append(text) or slow(backend)(text)
    encoder._until_check = 10**9
    calls.clear()
    for text in ("a <|end|> b", "x" + " \n" * 600_000 + "y"):
        ids = encoder.encode(text).tolist()
        assert calls == [text] and ids == slow(backend)(text)
        calls.clear()
    assert encoder.encode("a" * 60_000).tolist() == slow(backend)("a" * 60_000)


def test_a_character_of_another_class_is_found(backend: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if tiktoken's regex took é for no letter: é is tried, distrusted, and encoded by tokenizers."""
    encoder = FastEncoder(backend)
    encoder._until_check = 10**9
    real = encoder._fast

    encoder._fast = lambda text: real(text.replace("é", "-"))
    assert encoder.encode("café").tolist() == slow(backend)("café") != encoder._fast("café")
    assert encoder._distrusted == {"é"}


def test_a_difference_that_was_not_foreseen_is_an_error(backend: Tokenizer) -> None:
    encoder = FastEncoder(backend)
    encoder._fast = lambda text: [0]
    with pytest.raises(RuntimeError, match="tiktoken and tokenizers disagree on a text that starts with 'plain'"):
        encoder.encode("plain")


def random_bpe(draw: random.Random, merges: int) -> tuple[Tokenizer, dict[bytes, int]]:
    """A BPE over a, b, c with random merges, most of which training would never make."""
    characters = byte_characters()
    vocabulary = {character: i for i, character in enumerate(characters)}
    tokens, pairs = list("abc"), []
    for _ in range(merges):
        left, right = draw.choice(tokens), draw.choice(tokens)
        if left + right in vocabulary or len(left + right) > 8:
            continue
        vocabulary[left + right] = len(vocabulary)
        pairs.append((left, right))
        tokens.append(left + right)
    backend = Tokenizer(models.BPE(vocabulary, pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    ranks = {bytes([i]): i for i in range(256)} | {t.encode(): vocabulary[t] for t in tokens if len(t) > 1}
    return backend, ranks


def test_random_merges_are_refused_wherever_the_ids_would_differ() -> None:
    """The condition on the merges is right (no accepted vocabulary differs anywhere) and needed (some refused do)."""
    draw = random.Random(0)
    accepted = refused_and_different = 0
    for _ in range(200):
        backend, ranks = random_bpe(draw, draw.randrange(2, 9))
        plain = tiktoken.Encoding("t", pat_str=fast_bpe.GPT2_WORDS, mergeable_ranks=ranks, special_tokens={})
        words = ["".join(draw.choices("abc", k=draw.randrange(1, 14))) for _ in range(40)]
        differ = any(plain.encode_ordinary(word) != slow(backend)(word) for word in words)
        try:
            FastEncoder(backend)
        except Unsuitable as why:
            assert "is not what its merges make of it" in str(why)
            refused_and_different += differ
        else:
            assert not differ
            accepted += 1
    assert accepted > 25 and refused_and_different > 3


def test_a_run_encodes_as_the_check_says(tmp_path: Path) -> None:
    """Its workers do not check again: they must not take for passed what was refused."""
    vocabulary = {character: i for i, character in enumerate(byte_characters())} | {"bc": 256, "ab": 257, "abc": 258}
    backend = Tokenizer(models.BPE(vocabulary, [("b", "c"), ("a", "b"), ("ab", "c")]))  # "abc" becomes "a", "bc"
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "in.txt").write_text("x\nabc\n")
    options = PreprocessOptions(str(tmp_path), source=SourceOptions(txt_documents="line"))
    preprocess([str(tmp_path / "in.txt")], tmp_path / "out", options, workers=0)
    assert IndexedDataset(tmp_path / "out").document(1).tolist() == backend.encode("abc").ids


def changed(backend: Tokenizer, **model: Any) -> Tokenizer:
    description = json.loads(backend.to_str())
    description["model"].update(model)
    return Tokenizer.from_str(json.dumps(description))


def refused(backend: Tokenizer, message: str) -> None:
    with pytest.raises(Unsuitable, match=message):
        FastEncoder(backend)


def test_what_is_refused() -> None:
    backend = train("gpt2")
    description = json.loads(backend.to_str())
    refused(changed(backend, byte_fallback=True), "it has byte_fallback")
    refused(changed(backend, merges=description["model"]["merges"][::-1]), "ascending id|not what its merges")
    fewer = {token: i for token, i in description["model"]["vocab"].items() if token != "Ġ"}
    kept = [pair for pair in description["model"]["merges"] if "Ġ" not in "".join(pair)]
    refused(changed(backend, vocab=fewer, merges=kept), "1 bytes have no token")
    whole = description["model"]["vocab"] | {"zqj": len(description["model"]["vocab"])}
    refused(changed(backend, vocab=whole, ignore_merges=True), "whole words that no merge makes")
    backend.normalizer = normalizers.NFC()
    refused(backend, r"it normalises text \(NFC\)")
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    refused(backend, "get a space in front")
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel()])
    refused(backend, "^its words are (not cut into bytes|cut by)")
    gaps = pre_tokenizers.Split(Regex(r"[a-z]+"), "isolated")  # tiktoken drops what the expression does not match
    backend.pre_tokenizer = pre_tokenizers.Sequence([gaps, pre_tokenizers.ByteLevel(False, use_regex=False)])
    refused(backend, "means something else to tiktoken")
    for pattern, part in (
        (r"\s+$|.|\s", "$"),
        (r"^\s+|.|\s", "^"),
        (r"\p{L}{1,3}+|[^\]$]+", "{1,3}+"),
        (r".|\bx|\s", "\\b"),
    ):
        differs = pre_tokenizers.Split(Regex(pattern), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([differs, pre_tokenizers.ByteLevel(False, use_regex=False)])
        refused(backend, re.escape(f"cut by a regex with {part!r}, which may mean another thing to tiktoken"))
    empty = pre_tokenizers.Split(Regex(r"a*"), "isolated")  # tiktoken panics at a word without a letter
    backend.pre_tokenizer = pre_tokenizers.Sequence([empty, pre_tokenizers.ByteLevel(False, use_regex=False)])
    refused(backend, "means something else to tiktoken")
    refused(Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), "WordLevel, not BPE")


def test_the_tokenizer_says_which_encoder_it_uses(tmp_path: Path) -> None:
    backend = train("gpt2")
    backend.add_tokens([AddedToken("cabbage")])
    backend.save(str(tmp_path / "tokenizer.json"))
    fast = HFTokenizer(tmp_path / "tokenizer.json")
    plain = HFTokenizer(tmp_path / "tokenizer.json", fast=False)
    assert fast.encoder == "tiktoken (the same ids as tokenizers)"
    assert plain.encoder == "tokenizers (as told)"
    texts = [*CORPUS, "<|end|>cabbages"]
    assert [list(ids) for ids in fast.encode_batch(texts)] == [list(ids) for ids in plain.encode_batch(texts)]
    backend.normalizer = normalizers.NFC()
    backend.save(str(tmp_path / "tokenizer.json"))
    assert HFTokenizer(tmp_path / "tokenizer.json").encoder == "tokenizers (it normalises text (NFC))"
