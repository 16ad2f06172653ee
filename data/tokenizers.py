"""Tokenizers behind one small interface: Hugging Face, SentencePiece, and bytes.

``load_tokenizer`` takes what the user has: a folder or ``tokenizer.json`` of the ``tokenizers`` library, a
SentencePiece ``.model``, a tiktoken file, or the word ``bytes``. Nothing here is downloaded and no code of a
tokenizer folder runs.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from megatron_ds.data.fast_bpe import FastEncoder, Unsuitable, byte_characters
from megatron_ds.data.sentencepiece_export import to_tokenizers
from megatron_ds.data.tiktoken_files import TiktokenTokenizer, is_tiktoken_file
from megatron_ds.errors import DataError

Ids = Sequence[int] | npt.NDArray
EOD_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eod|>", "<eod>", "[SEP]")
MASK_NAMES = ("[MASK]", "<mask>")
BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "[CLS]")


class Tokenizer(Protocol):
    """Text to ids and back.

    Attributes:
        vocab_size: the largest id + 1, special tokens included: what a model's embedding must cover.
        eod_id: ends a document; None if the tokenizer has no such token.
        bos_id: begins a document; None if it has none.
        mask_id: stands for a masked token; None if it has none.
        fingerprint: changes when the tokenizer's file does.
        encoder: which library encodes, and why that one.
    """

    vocab_size: int
    eod_id: int | None
    bos_id: int | None
    mask_id: int | None
    fingerprint: str
    encoder: str

    def encode_batch(self, texts: list[str]) -> list[Ids]:
        """The ids of each text, without BOS or EOD added."""
        ...

    def decode(self, ids: Ids) -> str: ...

    def token_id(self, name: str) -> int | None:
        """The id of a token by its name, e.g. of a special one; None if there is no such token."""
        ...

    def save_hf(self, folder: str | Path) -> None:
        """Write what ``transformers.AutoTokenizer.from_pretrained(folder)`` loads."""
        ...


def load_tokenizer(path_or_spec: str | Path, proved: bool = False) -> Tokenizer:
    """The tokenizer at a path, or the one that a word names (``bytes``).

    ``proved``: this very file was loaded before, so a faster encoder need not be checked again.

    Raises:
        DataError: nothing is there, or it is not a tokenizer; the message says what is accepted.
    """
    spec = str(path_or_spec)
    if spec == "bytes":
        return ByteTokenizer()
    path = Path(spec)
    if path.is_dir():
        if (path / "tokenizer.json").is_file():
            return HFTokenizer(path / "tokenizer.json", proved=proved)
        if (path / "tokenizer.model").is_file():
            return load_tokenizer(path / "tokenizer.model")
        raise DataError(
            f"tokenizer={spec!r} is a folder without tokenizer.json or tokenizer.model; it has "
            f"{sorted(p.name for p in path.iterdir())[:8]}. Save it with the `tokenizers` library, or name a file"
        )
    if path.is_file():
        if path.suffix == ".tiktoken" or (path.suffix == ".model" and is_tiktoken_file(path)):
            return TiktokenTokenizer(path)
        return SentencePieceTokenizer(path) if path.suffix == ".model" else HFTokenizer(path, proved=proved)
    raise DataError(
        f"tokenizer={spec!r} does not exist. Give a folder or tokenizer.json of Hugging Face `tokenizers`, a "
        "SentencePiece .model, a .tiktoken file, or 'bytes'; tools/train_tokenizer.py trains one"
    )


class HFTokenizer:
    """A ``tokenizer.json``. EOD and BOS come from the ``tokenizer_config.json`` beside it, else from known names.

    Args:
        path: the file.
        fast: encode with tiktoken where that gives the very same ids (:mod:`megatron_ds.data.fast_bpe`).
        proved: see :func:`load_tokenizer`.

    Attributes:
        encoder: which library encodes, and why.
    """

    def __init__(self, path: str | Path, fast: bool = True, proved: bool = False):
        import tokenizers

        self.path = Path(path)
        try:
            self.backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust side raises bare Exception
            raise DataError(f"{path} is not a tokenizer.json of Hugging Face `tokenizers`: {error}") from None
        self.fingerprint = xxhash.xxh3_64_hexdigest(self.path.read_bytes())
        self.backend.no_padding()
        self.backend.no_truncation()  # a file may say to cut at the model's length; a corpus must not be cut
        self.config = _read_json(self.path.parent / "tokenizer_config.json")
        self.vocab_size = max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.eod_id = self._special("eos_token", EOD_NAMES)
        self.bos_id = self._special("bos_token", BOS_NAMES)
        self.mask_id = self._special("mask_token", MASK_NAMES)
        self._fast: FastEncoder | None = None
        self.encoder = "tokenizers (as told)"
        if fast:
            try:
                self._fast = FastEncoder(self.backend, self._encode, proved)
                self.encoder = "tiktoken (the same ids as tokenizers)"
            except Unsuitable as why:
                self.encoder = f"tokenizers ({why})"

    def _special(self, setting: str, names: Sequence[str]) -> int | None:
        configured = self.config.get(setting)
        if isinstance(configured, dict):  # an AddedToken written out
            configured = configured.get("content")
        for name in ([configured] if configured else []) + list(names):
            found: int | None = self.backend.token_to_id(name)
            if found is not None:
                return found
        return None

    def encode_batch(self, texts: list[str]) -> list[Ids]:
        if self._fast is not None:
            return [self._fast.encode(text) for text in texts]
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Ids) -> str:
        text: str = self.backend.decode([int(i) for i in ids], skip_special_tokens=False)
        return text

    def token_id(self, name: str) -> int | None:
        found: int | None = self.backend.token_to_id(name)
        return found

    def save_hf(self, folder: str | Path) -> None:
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(target / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self.config}
        for setting, special in (("eos_token", self.eod_id), ("bos_token", self.bos_id), ("mask_token", self.mask_id)):
            if special is not None:
                config.setdefault(setting, self.backend.id_to_token(special))
        (target / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


class SentencePieceTokenizer:
    """A SentencePiece ``.model``; EOD is its ``</s>`` and BOS its ``<s>``, where it has them."""

    encoder = "sentencepiece"

    def __init__(self, path: str | Path):
        import sentencepiece

        self.path = Path(path)
        self.backend = sentencepiece.SentencePieceProcessor()
        try:
            self.backend.Load(str(path))
        except Exception as error:
            raise DataError(f"{path} is not a SentencePiece model: {error}") from None
        self.fingerprint = xxhash.xxh3_64_hexdigest(self.path.read_bytes())
        self.vocab_size: int = self.backend.GetPieceSize()
        self.eod_id = _id_or_none(self.backend.eos_id())
        self.bos_id = _id_or_none(self.backend.bos_id())
        self.mask_id: int | None = None

    def encode_batch(self, texts: list[str]) -> list[Ids]:
        encoded: list[Ids] = self.backend.EncodeAsIds(texts, num_threads=1)
        return encoded

    def decode(self, ids: Ids) -> str:
        text: str = self.backend.DecodeIds([int(i) for i in ids])
        return text

    def token_id(self, name: str) -> int | None:
        found: int = self.backend.PieceToId(name)  # that of <unk> for a piece that is not there
        return found if self.backend.IdToPiece(found) == name else None

    def save_hf(self, folder: str | Path) -> None:
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        if self.path.resolve() != (target / "tokenizer.model").resolve():
            shutil.copyfile(self.path, target / "tokenizer.model")
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        try:
            to_tokenizers(self.backend).save(str(target / "tokenizer.json"))
        except DataError as error:
            warnings.warn(f"{target} gets tokenizer.model alone: {error}", stacklevel=2)
            config["tokenizer_class"] = "LlamaTokenizer"
        names = {"unk_token": self.backend.unk_id(), "bos_token": self.bos_id, "eos_token": self.eod_id}
        for name, special in names.items():
            if special is not None and special >= 0:
                config[name] = self.backend.IdToPiece(special)
        (target / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


class ByteTokenizer:
    """UTF-8 bytes as ids 0-255; 256 ends a document. Needs no file; for tests and byte-level models."""

    vocab_size = 257
    eod_id: int | None = 256
    bos_id: int | None = None
    mask_id: int | None = None
    fingerprint = "bytes"
    encoder = "this library (UTF-8)"

    def encode_batch(self, texts: list[str]) -> list[Ids]:
        return [np.frombuffer(text.encode("utf-8"), np.uint8) for text in texts]

    def decode(self, ids: Ids) -> str:
        return bytes(int(i) for i in ids if i < 256).decode("utf-8", errors="replace")

    def token_id(self, name: str) -> int | None:
        return self.eod_id if name == EOD_NAMES[0] else None

    def save_hf(self, folder: str | Path) -> None:
        """The same ids as a ``tokenizers`` BPE without merges."""
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
        backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        backend.save(str(target / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
        (target / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _id_or_none(token: int) -> int | None:
    return token if token >= 0 else None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} is not valid JSON: {error}") from None
    return value if isinstance(value, dict) else {}
