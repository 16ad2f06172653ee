"""What every tokenizer is to the rest of the library, and what they have in common."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ds.data.special_tokens import KNOWN_NAMES, SpecialTokens, choose, cut_at_tokens

Ids = Sequence[int] | npt.NDArray
Marked = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
"""Ids of a text, and the character of it in which each token starts."""


class Tokenizer(ABC):
    """Text to ids and back.

    Attributes:
        vocab_size: the largest id + 1, special tokens included: what a model's embedding must cover.
        eod_id: ends a document; None if the tokenizer has no such token.
        bos_id: begins a document; None if it has none.
        mask_id: stands for a masked token; None if it has none.
        eod_origin: where the choice of ``eod_id`` comes from: a file, or "a known name".
        special: texts of the special tokens by their setting (``eos_token``, ...), as chat templates use them.
        fingerprint: changes when the tokenizer's file does.
        encoder: which library encodes, and why that one.
    """

    vocab_size: int
    eod_id: int | None = None
    bos_id: int | None = None
    mask_id: int | None = None
    eod_origin: str = ""
    special: dict[str, str]
    fingerprint: str
    encoder: str

    @abstractmethod
    def encode_batch(self, texts: list[str]) -> list[Ids]:
        """The ids of each text, without BOS or EOD added."""

    @abstractmethod
    def encode_marked(self, text: str) -> Marked:
        """The ids of a text in which the names of special tokens stand for these, as in a rendered conversation."""

    @abstractmethod
    def decode(self, ids: Ids) -> str: ...

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
    (target / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def encode_between(text: str, special: Mapping[str, int], encode: Callable[[str], tuple[Ids, Ids]]) -> Marked:
    """Encode what stands between special tokens by ``encode``: ids, and the byte in which each token starts."""
    ids, starts = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for start, piece, token in cut_at_tokens(text, special):
        found, begins = encode(piece) if token is None else ([token], [0])
        ids.append(np.asarray(found, np.int64))
        starts.append(start + character_of_byte(piece)[np.asarray(begins, np.int64)])
    return np.concatenate(ids), np.concatenate(starts)


def character_of_byte(text: str) -> npt.NDArray[np.int64]:
    """For each byte of a text in UTF-8, and for its end, which character it belongs to: int64 [bytes + 1]."""
    raw = np.frombuffer(text.encode("utf-8"), np.uint8)
    begins = np.append((raw & 0xC0) != 0x80, True)
    found: npt.NDArray[np.int64] = np.cumsum(begins, dtype=np.int64) - 1
    return found
