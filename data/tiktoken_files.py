"""Tokenizers in tiktoken's format: a file of ``base64(token) rank`` lines.

The file holds neither the regular expression that cuts words nor the special tokens. They come from a JSON file
beside it, ``NAME.json`` for ``NAME.tiktoken``, with keys ``pattern`` and ``special_tokens`` (name -> id), or from the
file's name where that is one of :data:`KNOWN`; the special tokens then from the list of added tokens in
``tokenizer_config.json``, if there is one. (Llama 3's original ``tokenizer.model`` is such a file too.)
"""

from __future__ import annotations

import base64
import binascii
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ds.data.fast_bpe import Unsuitable, byte_characters, for_tokenizers, gives_up
from megatron_ds.data.tokenizer_base import (
    Ids,
    Marked,
    SpecialTokens,
    Tokenizer,
    merges_of,
    read_special_tokens,
    write_hf,
)
from megatron_ds.errors import DataError, RaisedAs
from megatron_ds.files import checksum, read_json

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K = "|".join(
    [
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?",
        r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ]
)


def _llama3_special() -> dict[str, int]:
    names = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{i}|>" for i in range(4))]
    names += ["<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>"]
    names += [f"<|reserved_special_token_{i}|>" for i in range(5, 251)]
    return {name: 128_000 + number for number, name in enumerate(names)}


KNOWN: dict[str, tuple[str, dict[str, int]]] = {
    "r50k_base": (_GPT2, {"<|endoftext|>": 50_256}),
    "p50k_base": (_GPT2, {"<|endoftext|>": 50_256}),
    "cl100k_base": (
        _CL100K,
        {"<|endoftext|>": 100_257, "<|fim_prefix|>": 100_258, "<|fim_middle|>": 100_259, "<|fim_suffix|>": 100_260,
         "<|endofprompt|>": 100_276},
    ),
    "o200k_base": (_O200K, {"<|endoftext|>": 199_999, "<|endofprompt|>": 200_018}),
    "tokenizer": (_CL100K, _llama3_special()),
}  # fmt: skip
"""By the stem of the file's name: (regular expression of words, special tokens). ``tokenizer`` is Llama 3's."""
_PROBE = "aZ é漢1٣ \t\r\n.,_-'<|> 🙂\u0301 \u200b\u3000"
"""Signs of all kinds, none of which a regular expression of words may leave out."""


def is_tiktoken_file(path: Path) -> bool:
    """Whether a file's first line is that of tiktoken's format."""
    with path.open("rb") as file:
        first = file.readline(4096).split()
    if len(first) != 2 or not first[1].isdigit():
        return False
    try:
        base64.b64decode(first[0], validate=True)
    except binascii.Error:
        return False
    return True


def _id(written: Any) -> int:
    """Of a token; a ``ValueError`` where it is none that tiktoken has."""
    number = int(written)
    if not 0 <= number < 1 << 31:
        raise ValueError(f"{number} is no id")
    return number


class TiktokenTokenizer(Tokenizer):
    """A tiktoken file. Special tokens in a text are encoded as such."""

    encoder = "tiktoken"

    def __init__(self, path: str | Path):
        try:
            import tiktoken
        except ImportError:
            raise DataError(f"{path} is a tiktoken file: `pip install tiktoken` to read it") from None
        self.path = Path(path)
        content = self.path.read_bytes()
        self.ranks = self._read(content)
        found = read_special_tokens(self.path.parent)
        self.pattern, self._special_ids = self._settings(found)
        taken = {rank for rank in self.ranks.values() if rank in self._special_ids.values()}
        if taken:
            raise DataError(f"{path}: the ids {sorted(taken)[:5]} belong to special tokens and to others")
        if "" in self._special_ids or len(set(self._special_ids.values())) < len(self._special_ids):
            raise DataError(f"{path}: one of the special tokens has no name, or two have one id: {self._special_ids}")
        try:
            self.backend = tiktoken.Encoding(
                self.path.stem, pat_str=self.pattern, mergeable_ranks=self.ranks, special_tokens=self._special_ids
            )
            kept = self.backend.decode(self.backend.encode_ordinary(_PROBE))
        except BaseException as error:
            if not gives_up(error):
                raise
            raise DataError(f"{path}: tiktoken does not take its pattern {self.pattern!r}: {error}") from None
        if kept != _PROBE:
            lost = sorted(set(_PROBE) - set(kept))
            raise DataError(
                f"{path}: its pattern {self.pattern!r} does not match all of a text, and what it leaves out would be "
                f"lost, such as {''.join(lost)!r}; let it end in |.|\\s"
            )
        self._known = frozenset(self._special_ids)
        self.fingerprint = checksum(content + json.dumps([self.pattern, self._special_ids], sort_keys=True).encode())
        self._ids = frozenset((*self.ranks.values(), *self._special_ids.values()))
        self.vocab_size = max(self._ids) + 1
        self._take_special(found, self._special_ids)

    def _read(self, content: bytes) -> dict[bytes, int]:
        ranks: dict[bytes, int] = {}
        tokens: dict[int, bytes] = {}
        for number, line in enumerate(content.splitlines(), 1):
            try:
                written, digits = line.split()
                token, rank = base64.b64decode(written, validate=True), _id(digits)
            except ValueError:  # binascii.Error is one
                raise DataError(f"{self.path}, line {number}: not `base64 rank` but {line[:60]!r}") from None
            if ranks.setdefault(token, rank) != rank or tokens.setdefault(rank, token) != token:
                raise DataError(f"{self.path}, line {number}: {line[:60]!r} has the token or the rank of a line before")
        missing = sum(bytes([byte]) not in ranks for byte in range(256))
        if missing:
            raise DataError(f"{self.path} has no token for {missing} of the 256 bytes: truncated?")
        return ranks

    def _settings(self, found: SpecialTokens) -> tuple[str, dict[str, int]]:
        beside = self.path.with_suffix(".json")
        if beside.is_file():
            try:
                settings = read_json(beside)
                return str(settings["pattern"]), {str(k): _id(v) for k, v in settings["special_tokens"].items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(
                    f"{beside} must hold `pattern` and `special_tokens` (name -> id) for {self.path.name}: {error!r}"
                ) from None
        if self.path.stem in KNOWN:
            pattern, special = KNOWN[self.path.stem]
            return pattern, {token["content"]: number for number, token in found.added.items()} or special
        raise DataError(
            f"{self.path} does not say how words are cut; name it like one of {sorted(KNOWN)}, or put {beside.name} "
            'beside it with {"pattern": ..., "special_tokens": {...}}'
        )

    def encode_batch(self, texts: list[str]) -> list[Ids]:
        return [self._encode(text) for text in texts]

    def encode_marked(self, text: str) -> Marked:
        ids = self._encode(text)
        _, starts = self.backend.decode_with_offsets(ids.tolist())
        return ids.astype(np.int64), np.array(starts, np.int64)

    def _encode(self, text: str) -> npt.NDArray[np.uint32]:
        try:
            ids = self.backend.encode(text, allowed_special=self._known, disallowed_special=())
        except BaseException as error:
            if not gives_up(error):
                raise
            raise DataError(
                f"tiktoken gave up on a text of {len(text)} characters that starts with {text[:60]!r}; its regex "
                "cannot take about a million white-space characters in a row"
            ) from None
        return np.array(ids, np.uint32)

    def decode(self, ids: Ids) -> str:
        return self.backend.decode([int(i) for i in ids if int(i) in self._ids])

    def token_bytes(self, token: int) -> bytes:
        return self.backend.decode_single_token_bytes(token) if token in self._ids else b""

    def token_id(self, name: str) -> int | None:
        return self._special_ids.get(name)

    def save_hf(self, folder: str | Path) -> None:
        """The same ids as a ``tokenizers`` BPE."""
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

        character = byte_characters()

        def written(token: bytes) -> str:
            return "".join(character[byte] for byte in token)

        merges = [(written(a), written(b)) for a, b in merges_of(self.ranks, self.ranks.__getitem__)]
        vocabulary = {written(token): rank for token, rank in self.ranks.items()}
        with RaisedAs(DataError, f"{self.path}: how it cuts words cannot be written as tokenizer.json", Unsuitable):
            words = Regex(for_tokenizers(self.pattern))
        backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(words, "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        for name, token_id in sorted(self._special_ids.items(), key=lambda item: item[1]):
            # `tokenizers` numbers added tokens from the size of the vocabulary on and leaves no gap.
            while backend.get_vocab_size() < token_id:
                backend.add_special_tokens([AddedToken(f"<|unused_{backend.get_vocab_size()}|>", special=True)])
            backend.add_special_tokens([AddedToken(name, special=True, normalized=False)])
            if backend.token_to_id(name) != token_id:
                raise DataError(f"{self.path}: special token {name!r} = {token_id} cannot be written as tokenizer.json")
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        write_hf(folder, {**config, **self.special}, backend)
