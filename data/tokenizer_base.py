"""What every tokenizer is to the rest of the library, and what they have in common: first of all, special tokens.

Those that the files of a tokenizer's folder name are read as ``transformers`` reads them. Names (``eos_token``,
``bos_token``, ...) stand in ``tokenizer_config.json`` or, in older folders, in ``special_tokens_map.json``. Tokens that
the vocabulary's own file lacks stand in ``added_tokens_decoder`` of the former or, in older folders, in
``added_tokens.json``.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, AnyStr

import numpy as np
import numpy.typing as npt

from megatron_ds.data.fast_bpe import byte_characters
from megatron_ds.errors import DataError
from megatron_ds.files import read_object

Ids = Sequence[int] | npt.NDArray
Marked = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
"""Ids of a text, and the character of it in which each token starts."""
EOD_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eod|>", "<eod>", "[SEP]")
MASK_NAMES = ("[MASK]", "<mask>")
BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "[CLS]")
KNOWN_NAMES: dict[str, tuple[str, ...]] = {"eos_token": EOD_NAMES, "bos_token": BOS_NAMES, "mask_token": MASK_NAMES}
"""What a token is taken for where no file says so."""
SETTINGS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
KNOWN_NAME = "a known name"
"""Where such a token comes from."""
CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class Tokenizer(ABC):
    """Text to ids and back.

    Attributes:
        vocab_size: the largest id + 1, special tokens included: what a model's embedding must cover.
        eod_id: ends a document; None if the tokenizer has no such token.
        bos_id: begins a document; None if it has none.
        mask_id: stands for a masked token; None if it has none.
        begins, ends: whether BOS and EOD are put around a text that a model is to go on with, where the tokenizer's
            own file does not say it: ``add_bos_token`` and ``add_eos_token``.
        eod_origin: where the choice of ``eod_id`` comes from: a file, or "a known name".
        special: texts of the special tokens by their setting (``eos_token``, ...), as chat templates use them.
        fingerprint: changes when the tokenizer's file does.
        encoder: which library encodes, and why that one.
        fast: tiktoken stands in for the library that the tokenizer's file is of.
        drops: it leaves characters out for which it has no token, as `tokenizers` does unsaid.
    """

    vocab_size: int
    eod_id: int | None = None
    bos_id: int | None = None
    mask_id: int | None = None
    begins, ends = True, False
    eod_origin: str = ""
    special: dict[str, str]
    fingerprint: str
    encoder: str
    fast: bool = False
    drops: bool = False

    @abstractmethod
    def encode_batch(self, texts: list[str]) -> list[Ids]:
        """The ids of each text, without BOS or EOD added."""

    @abstractmethod
    def encode_marked(self, text: str) -> Marked:
        """The ids of a text in which the names of special tokens stand for these, as in a rendered conversation."""

    @abstractmethod
    def decode(self, ids: Ids) -> str:
        """The text of ids; those that are no token, as a model with a larger vocabulary may draw them, have none."""

    def token_bytes(self, token: int) -> bytes:
        """What a token adds to a text: perhaps part of a character. Special tokens are their names."""
        known: dict[int, bytes] = self.__dict__.setdefault("_known_bytes", {})
        if (found := known.get(token)) is None:
            found = known[token] = self._find_bytes(token)
        return found

    def _find_bytes(self, token: int) -> bytes:
        # Decoders of SentencePiece's kind take the space from the first token of a text, so the second one is asked.
        text = self.decode([token, token])[len(self.decode([token])) :]
        if "\N{REPLACEMENT CHARACTER}" not in text:
            return text.encode()
        name = self._name_of(token)
        if byte := _BYTE.fullmatch(name):
            return bytes.fromhex(byte[1])
        byte_of = {character: byte for byte, character in enumerate(byte_characters())}
        return bytes(byte_of[character] for character in name) if byte_of.keys() >= set(name) else text.encode()

    def _name_of(self, token: int) -> str:
        """What a token is called in the vocabulary's file."""
        return ""

    @abstractmethod
    def token_id(self, name: str) -> int | None:
        """The id of a token by its name, e.g. of a special one; None if there is no such token."""

    @abstractmethod
    def save_hf(self, folder: str | Path) -> None:
        """Write what ``transformers.AutoTokenizer.from_pretrained(folder)`` loads."""

    def _take_special(self, found: SpecialTokens, ids: Mapping[str, int], by_known_names: bool = True) -> None:
        """Choose the special tokens: those that a folder's files name, else by names that are known."""
        names = KNOWN_NAMES if by_known_names else dict.fromkeys(KNOWN_NAMES, ())
        chosen = {setting: choose(found, setting, known, ids) for setting, known in names.items()}
        self.eod_id, self.bos_id, self.mask_id = (
            None if name is None else ids[name] for name, _ in (chosen[setting] for setting in KNOWN_NAMES)
        )
        self.eod_origin = chosen["eos_token"][1]
        self.special = {**found.names, **{setting: name for setting, (name, _) in chosen.items() if name is not None}}


def write_hf(folder: str | Path, config: dict[str, Any], backend: Any = None) -> None:
    """Write ``tokenizer_config.json``, and a ``tokenizers.Tokenizer`` as ``tokenizer.json``."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    if backend is not None:
        backend.save(str(target / "tokenizer.json"))
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (target / "tokenizer_config.json").write_text(text, encoding="utf-8")


def merges_of(ids: Mapping[AnyStr, int], badness: Callable[[AnyStr], float]) -> list[tuple[AnyStr, AnyStr]]:
    """The merges with which a BPE of pairs does what one of whole tokens does: each token stands for every way of
    cutting it into two tokens, the best token first."""
    cuts = ((token[:cut], token[cut:], badness(token)) for token in ids for cut in range(1, len(token)))
    ranked = [(bad, ids[left], ids[right], left, right) for left, right, bad in cuts if left in ids and right in ids]
    return [(left, right) for *_, left, right in sorted(ranked)]


def encode_between(text: str, special: Mapping[str, int], encode: Callable[[str, int], tuple[Ids, Ids]]) -> Marked:
    """Encode what stands between special tokens by ``encode``: of a piece and its place in the text, the ids, and the
    byte of the piece in which each token starts."""
    ids, starts = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for start, piece, token in cut_at_tokens(text, special):
        found, begins = encode(piece, start) if token is None else ([token], [0])
        ids.append(np.asarray(found, np.int64))
        starts.append(start + character_of_byte(piece)[np.asarray(begins, np.int64)])
    return np.concatenate(ids), np.concatenate(starts)


def character_of_byte(text: str) -> npt.NDArray[np.int64]:
    """For each byte of a text in UTF-8, and for its end, which character it belongs to: int64 [bytes + 1]."""
    raw = np.frombuffer(text.encode("utf-8"), np.uint8)
    begins = np.append((raw & 0xC0) != 0x80, True)
    found: npt.NDArray[np.int64] = np.cumsum(begins, dtype=np.int64) - 1
    return found


@dataclass(frozen=True)
class SpecialTokens:
    """What a folder says.

    Attributes:
        config: the whole ``tokenizer_config.json``.
        names: ``eos_token`` and the other :data:`SETTINGS` -> the token's text.
        origins: the file that each of them was found in.
        added: id -> the arguments of a ``tokenizers.AddedToken``, in ascending order of ids.
        unnumbered: the same of the special tokens that are named without an id; one that the vocabulary lacks comes
            behind it.
    """

    config: dict[str, Any]
    names: dict[str, str]
    origins: dict[str, str]
    added: dict[int, dict[str, Any]]
    unnumbered: tuple[dict[str, Any], ...] = ()

    def differs(self, token: Mapping[str, Any], other: Any) -> bool:
        """Whether a token of ``added`` is another than this ``AddedToken`` of a tokenizer.json (None: it has none).

        Their flags say which white space around a token belongs to it; those of a list with ids are the newer ones.
        """
        listed = "added_tokens_decoder" in self.config
        return other is None or (listed and any(token[f] != getattr(other, f) for f in _FLAGS if f in token))


def read_special_tokens(folder: Path) -> SpecialTokens:
    """Read the four places; one that is missing is empty.

    Raises:
        DataError: a file that is not valid JSON or says something else than it should.
    """
    config = read_settings(folder / CONFIG)
    names: dict[str, str] = {}
    origins: dict[str, str] = {}
    unnumbered: list[dict[str, Any]] = []
    # As transformers does: the older file goes before the newer one, unless that lists all added tokens.
    listed = "added_tokens_decoder" in config
    sources = ((CONFIG, config),) if listed else ((MAP, read_settings(folder / MAP)), (CONFIG, config))
    for file, content in sources:
        for setting in SETTINGS:
            if (token := _token(content.get(setting), folder / file, setting)) and setting not in names:
                names[setting], origins[setting] = token["content"], file
                unnumbered.append(token)
    added: dict[int, dict[str, Any]] = {}
    try:
        for number, token in (config.get("added_tokens_decoder") or {}).items():
            added[int(number)] = {key: token[key] for key in ("content", *_FLAGS) if key in token}
            added[int(number)]["content"] = str(token["content"])
        if not listed:
            special = set(names.values())
            for text, number in read_settings(folder / ADDED).items():
                added[int(number)] = {"content": text, "special": text in special, "normalized": text not in special}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"the added tokens of {folder} (in {CONFIG} or {ADDED}) are not ids and tokens: {error!r}"
        ) from None
    unnumbered += (token for file, content in sources for token in _further_tokens(content, folder / file))
    return SpecialTokens(config, names, origins, dict(sorted(added.items())), tuple(unnumbered))


def _further_tokens(content: Mapping[str, Any], path: Path) -> Iterator[dict[str, Any]]:
    """Special tokens without a setting of their own; newer files may name them as a mapping."""
    for setting in ("extra_special_tokens", "additional_special_tokens"):
        tokens = content.get(setting) or []
        if not isinstance(tokens, list | dict):
            raise DataError(f"{path} says {setting}={str(tokens)[:80]}, which is no list of tokens")
        found = (_token(token, path, setting) for token in (tokens.values() if isinstance(tokens, dict) else tokens))
        yield from filter(None, found)


_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def _token(token: Any, path: Path, setting: str) -> dict[str, Any] | None:
    """A special token that a configuration gives as a string or as an AddedToken written out; None for none."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str | None):
        raise DataError(f"{path} says {setting}={str(token)[:80]}, which is no token's text")
    flags = {flag: token[flag] for flag in _FLAGS if flag in token} if isinstance(token, dict) else {}
    return {"normalized": False, **flags, "content": text, "special": True} if text else None


def read_settings(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty if there is no such file."""
    return read_object(path, DataError) if path.is_file() else {}


def choose(
    special: SpecialTokens, setting: str, known: Iterable[str], ids: Mapping[str, int]
) -> tuple[str | None, str]:
    """(name of a special token, where that comes from): the configured one, else the first of the known names.

    Args:
        ids: of all tokens by their text.

    Raises:
        DataError: one is configured, but the vocabulary lacks it; a known name must not take its place unsaid.
    """
    if name := special.names.get(setting):
        if name not in ids:
            raise DataError(
                f"{special.origins[setting]} says {setting}={name!r}, but the tokenizer has no such token; add it to "
                f"added_tokens_decoder in {CONFIG} with its id, or take {setting} out of {special.origins[setting]}"
            )
        return name, special.origins[setting]
    if special.config.get(setting, "") is None:  # said to be none, as Qwen says of its BOS
        return None, ""
    return next(((name, KNOWN_NAME) for name in known if name in ids), (None, ""))


def cut_at_tokens(text: str, ids: Mapping[str, int]) -> Iterator[tuple[int, str, int | None]]:
    """Cut a text at special tokens, of several that match the longest: (start, piece, id of a special one or None)."""
    names = sorted((name for name in ids if name), key=len, reverse=True)
    at = 0
    if names:
        for match in re.finditer("|".join(map(re.escape, names)), text):
            if match.start() > at:
                yield at, text[at : match.start()], None
            yield match.start(), match.group(), ids[match.group()]
            at = match.end()
    if at < len(text):
        yield at, text[at:], None
