"""The growing text: what it says at last is the whole text decoded at once, and it takes nothing back."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers

from megatron_ds.data.tokenizer_base import Tokenizer as Base
from megatron_ds.data.tokenizers import ByteTokenizer
from megatron_ds.inference.detokenizer import Detokenizer

TEXTS = st.text(alphabet="aä中🙂 \nx", max_size=30)


def grown(ids: Sequence[int], stops: Sequence[str] = (), keep: bool = False) -> tuple[list[str], Detokenizer]:
    detokenizer = Detokenizer(ByteTokenizer(), list(b"prompt \xf0"), stops, keep)
    seen = []
    for token in ids:
        detokenizer.add(token)
        seen.append(detokenizer.text)
    detokenizer.finish()
    return [*seen, detokenizer.text], detokenizer


@given(text=TEXTS)
def test_the_text_grows_by_whole_characters(text: str) -> None:
    detokenizer = Detokenizer(ByteTokenizer(), [])
    for token in text.encode():
        before = detokenizer.text
        detokenizer.add(token)
        assert detokenizer.text.startswith(before) and text.startswith(detokenizer.text)
    detokenizer.finish()
    assert detokenizer.text == text


@given(text=TEXTS, cut=st.integers(0, 60))
def test_an_answer_ends_the_character_that_its_prompt_began(text: str, cut: int) -> None:
    """Clients go on from tokens that they got, which may end within a character: it is lost nowhere."""
    data = text.encode()
    detokenizer = Detokenizer(ByteTokenizer(), list(data[:cut]))
    for token in data[cut:]:
        detokenizer.add(token)
    detokenizer.finish()
    assert data[:cut].decode(errors="ignore") + detokenizer.text == text or cut > len(data)


class _Pieces:
    """A tokenizer of SentencePiece's kind, of which most characters are bytes, as the `tokenizers` library decodes."""

    def __init__(self) -> None:
        names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "x"]
        vocabulary = {name: number for number, name in enumerate(names)}
        self.backend = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
        self.backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        self.backend.decoder = decoders.Sequence(steps)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.backend.decode(list(ids)))

    def _name_of(self, token: int) -> str:
        return str(self.backend.id_to_token(token))

    token_bytes: Any = Base.token_bytes
    _find_bytes = Base._find_bytes


@given(text=TEXTS, answer=TEXTS)
def test_rows_of_bytes_read_as_in_the_whole_text(text: str, answer: str) -> None:
    tokenizer = _Pieces()
    ids = tokenizer.backend.encode(text + answer).ids
    prompt = tokenizer.backend.encode(text).ids if text else []
    detokenizer = Detokenizer(tokenizer, prompt)
    for token in ids[len(prompt) :]:
        detokenizer.add(token)
        assert answer.startswith(detokenizer.text)
    assert detokenizer.text == answer == tokenizer.decode(ids)[len(text) :]
    detokenizer.add(1 + 0xF0)
    detokenizer.finish()
    assert detokenizer.text == answer + "\N{REPLACEMENT CHARACTER}"


@given(text=TEXTS, stops=st.lists(st.text(alphabet="aä中 x", min_size=1, max_size=3), max_size=3), keep=st.booleans())
def test_it_ends_before_the_first_stop_text(text: str, stops: list[str], keep: bool) -> None:
    detokenizer = Detokenizer(ByteTokenizer(), [], stops, keep)
    for token in text.encode():
        detokenizer.add(token)
        assert text.startswith(detokenizer.text), "a part of a stop text was shown"
        if detokenizer.stopped is not None:
            break
    detokenizer.finish()
    # The slow way: after each character, whether a stop text is there.
    want = text
    for end in range(1, len(text) + 1):
        found = [(text[:end].find(stop), stop) for stop in stops if stop in text[:end]]
        if found:
            place, stop = min(found)
            want = text[: place + len(stop) if keep else place]
            break
    assert detokenizer.text == want


def test_a_stop_text_that_comes_too_early_is_text() -> None:
    """vLLM's `min_tokens`: only what a later token completes is one."""
    detokenizer = Detokenizer(ByteTokenizer(), [], ["ab"])
    for place, token in enumerate(b"abxabc"):
        detokenizer.add(token, may_stop=place > 1)
    assert (detokenizer.text, detokenizer.stopped) == ("abx", "ab")
    overlapping = Detokenizer(ByteTokenizer(), [], ["aab"])
    for place, token in enumerate(b"aabaab"):
        overlapping.add(token, may_stop=place > 4)
    assert (overlapping.text, overlapping.stopped) == ("aab", "aab")


@pytest.mark.parametrize("ids", [[0xF0, 0x9F], [0xFF] * 20, [0xE4, 0x61]])
def test_bytes_that_are_no_text_are_marked_in_the_end(ids: list[int]) -> None:
    seen, detokenizer = grown(ids)
    assert "\N{REPLACEMENT CHARACTER}" in detokenizer.text
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(seen))
