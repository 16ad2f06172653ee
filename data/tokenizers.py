"""Tokenizers behind one small interface: Hugging Face, SentencePiece, and bytes.

``load_tokenizer`` takes what the user has: a folder or ``tokenizer.json`` of the ``tokenizers`` library, a
SentencePiece ``.model``, a tiktoken file, or the word ``bytes``. Nothing here is downloaded and no code of a
tokenizer folder runs.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ds.data.fast_bpe import FastEncoder, Unsuitable, byte_characters
from megatron_ds.data.sentencepiece_export import to_tokenizers
from megatron_ds.data.tiktoken_files import TiktokenTokenizer, is_tiktoken_file
from megatron_ds.data.tokenizer_base import (
    EOD_NAMES,
    KNOWN_NAMES,
    Ids,
    Marked,
    SpecialTokens,
    Tokenizer,
    encode_between,
    read_special_tokens,
    write_hf,
)
from megatron_ds.errors import DataError, RaisedAs
from megatron_ds.files import checksum


def load_tokenizer(path_or_spec: str | Path, fast: bool | None = None) -> Tokenizer:
    """The tokenizer at a path, or the one that a word names (``bytes``).

    ``fast``: what :attr:`Tokenizer.fast` was when this very file was loaded before, which spares the check.

    Raises:
        DataError: nothing is there, or it is not a tokenizer; the message says what is accepted.
    """
    spec = str(path_or_spec)
    if spec == "bytes":
        return ByteTokenizer()
    path = Path(spec)
    if path.is_dir():
        if (path / "tokenizer.json").is_file():
            return HFTokenizer(path / "tokenizer.json", fast)
        if (path / "tokenizer.model").is_file():
            return load_tokenizer(path / "tokenizer.model")
        raise DataError(
            f"tokenizer={spec!r} is a folder without tokenizer.json or tokenizer.model; it has "
            f"{sorted(p.name for p in path.iterdir())[:8]}. Write the former with `transformers` "
            "(AutoTokenizer.from_pretrained(folder).save_pretrained(folder)), or name a file"
        )
    if path.is_file():
        if path.suffix == ".tiktoken" or (path.suffix == ".model" and is_tiktoken_file(path)):
            return TiktokenTokenizer(path)
        return SentencePieceTokenizer(path) if path.suffix == ".model" else HFTokenizer(path, fast)
    raise DataError(
        f"tokenizer={spec!r} does not exist. Give a folder or tokenizer.json of Hugging Face `tokenizers`, a "
        "SentencePiece .model, a .tiktoken file, or 'bytes'; tools/train_tokenizer.py trains one"
    )


class HFTokenizer(Tokenizer):
    """A ``tokenizer.json``. EOD and BOS come from the ``tokenizer_config.json`` beside it, else from known names.

    Args:
        path: the file.
        fast: encode with tiktoken; None: if a check says that it gives the very same ids
            (:mod:`megatron_ds.data.fast_bpe`).

    Attributes:
        encoder: which library encodes, and why.
    """

    def __init__(self, path: str | Path, fast: bool | None = None):
        import tokenizers

        self.path = Path(path)
        # The Rust side raises bare Exception.
        with RaisedAs(DataError, f"{path} is not a tokenizer.json of Hugging Face `tokenizers`", Exception):
            self.backend = tokenizers.Tokenizer.from_file(str(path))
        if dropout := getattr(self.backend.model, "dropout", None):
            raise DataError(
                f"{path} has dropout={dropout}: the same text would have other ids each time. Set it to null there"
            )
        self.backend.no_padding()
        self.backend.no_truncation()  # a file may say to cut at the model's length; a corpus must not be cut
        found = read_special_tokens(self.path.parent)
        self.config = found.config
        added = self._add(found)
        # The names of special tokens in a text are letters then.
        split = self.backend.encode_special_tokens = found.config.get("split_special_tokens") is True
        settings = [value for value in (added, split) if value]
        content = self.path.read_bytes() + b"".join(json.dumps(v, sort_keys=True).encode() for v in settings)
        self.fingerprint = checksum(content)
        ids = self.backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values(), default=-1) + 1
        # One that is an ordinary entry of the vocabulary is no special token, whatever its name.
        special = {token.content: number for number, token in self.backend.get_added_tokens_decoder().items()}
        self._take_special(found, special)
        self._fast: FastEncoder | None = None
        self.encoder = "tokenizers (as told)"
        if fast is not False:
            try:
                self._fast = FastEncoder(self.backend, proved=bool(fast))
                self.fast = True
                self.encoder = "tiktoken (the same ids as tokenizers)"
            except Unsuitable as why:
                self.encoder = f"tokenizers ({why})"
        self.drops = self._fast is None and _drops(self.backend)

    def _add(self, found: SpecialTokens) -> dict[int, dict[str, Any]]:
        """Make special what the files beside it name as such, as ``transformers`` does; returns what was not yet."""
        from tokenizers import AddedToken

        have = {token.content: token for token in self.backend.get_added_tokens_decoder().values()}
        missing = {i: token for i, token in found.added.items() if found.differs(token, have.get(token["content"]))}
        # Of these an unknown one is refused, when they are chosen.
        chosen = {found.names.get(setting) for setting in KNOWN_NAMES}
        end = max([self.backend.get_vocab_size(), *(number + 1 for number in missing)])
        for token in found.unnumbered:  # read as letters, be they in the vocabulary or not
            text, number = token["content"], self.backend.token_to_id(token["content"])
            if text in have or any(text == other["content"] for other in missing.values()):
                continue
            if number is None and text not in chosen:
                number, end = end, end + 1
            if number is not None:
                missing[number] = token
        for number, token in sorted(missing.items()):
            add = self.backend.add_special_tokens if token.get("special") else self.backend.add_tokens
            add([AddedToken(**token)])
            if (given := self.backend.token_to_id(token["content"])) != number:
                raise DataError(
                    f"the files beside {self.path} give the token {token['content']!r} the id {number}, but the "
                    f"vocabulary goes on at {given}: they do not belong together, or an id in between has no token"
                )
        return missing

    def encode_batch(self, texts: list[str]) -> list[Ids]:
        if self._fast is not None:
            return [self._fast.encode(text) for text in texts]
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    @cached_property
    def _marking(self) -> Any:
        """The backend without a step that takes white space from where tokens start, and all of it from some."""
        description = json.loads(self.backend.to_str())
        if '"trim_offsets": true' not in json.dumps(description["post_processor"]):
            return self.backend
        marking = type(self.backend).from_str(json.dumps({**description, "post_processor": None}))
        marking.encode_special_tokens = self.backend.encode_special_tokens
        return marking

    def encode_marked(self, text: str) -> Marked:
        encoding = self._marking.encode(text, add_special_tokens=False)
        starts = np.array(encoding.offsets, np.int64).reshape(-1, 2)[:, 0]
        return np.array(encoding.ids, np.int64), starts

    def decode(self, ids: Ids) -> str:
        text: str = self.backend.decode([int(i) for i in ids], skip_special_tokens=False)
        return text

    def _name_of(self, token: int) -> str:
        return self.backend.id_to_token(token) or ""

    def token_id(self, name: str) -> int | None:
        found: int | None = self.backend.token_to_id(name)
        return found

    def save_hf(self, folder: str | Path) -> None:
        # The special tokens are those that count: an older file beside the configuration may have named others.
        write_hf(folder, {"tokenizer_class": "PreTrainedTokenizerFast", **self.config, **self.special}, self.backend)


def _drops(backend: Any) -> bool:
    """Whether it is a BPE with nothing to put in place of a character that its vocabulary lacks."""
    model = backend.model
    if type(model).__name__ != "BPE" or model.unk_token is not None:
        return False
    vocabulary = backend.get_vocab(with_added_tokens=False)
    if model.byte_fallback:
        return not all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    in_bytes = "ByteLevel" in f"{backend.pre_tokenizer}{backend.normalizer}"
    return not (in_bytes and all(character in vocabulary for character in byte_characters()))


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece ``.model``, with the tokens that the files beside it add.

    EOD is the configured ``eos_token``, else the model's ``</s>``; BOS likewise. Where the model puts a space in front
    of a text, it does so after each special token too, but for what ``tokenizer_config.json`` says: ``legacy: false``
    is at the start alone, and ``add_prefix_space: false`` nowhere.
    """

    encoder = "sentencepiece"

    def __init__(self, path: str | Path):
        import sentencepiece

        self.path = Path(path)
        self.backend = sentencepiece.SentencePieceProcessor()
        with RaisedAs(DataError, f"{path} is not a SentencePiece model", Exception):
            self.backend.Load(str(path))
        found = read_special_tokens(self.path.parent)
        self.begins = found.config.get("add_bos_token") is not False
        self.ends = found.config.get("add_eos_token") is True
        self._inner = self.backend  # encodes what stands behind a special token
        self._unprefixed = [setting for setting in ("legacy", "add_prefix_space") if found.config.get(setting) is False]
        if self._unprefixed:
            self._inner = _without_prefix(self.backend)
        if "add_prefix_space" in self._unprefixed:
            self.backend = self._inner
        pieces: int = self.backend.GetPieceSize()
        self._added = self._read_added(found)
        settings = [value for value in (self._added, self._unprefixed) if value]
        content = self.path.read_bytes() + b"".join(json.dumps(value).encode() for value in settings)
        self.fingerprint = checksum(content)
        self.vocab_size = max([pieces - 1, *self._added.values()]) + 1
        # Control pieces have no text of their own: the model itself writes "</s>" in letters.
        control = {self.backend.IdToPiece(i): i for i in range(pieces) if self.backend.IsControl(i)}
        self._names = {**control, **self._added}
        known = {**self._names, **{self.backend.IdToPiece(i): i for i in range(pieces)}}
        own = {"eos_token": self.backend.eos_id(), "bos_token": self.backend.bos_id()}
        for setting, token in own.items():
            if token >= 0 and setting not in found.names:
                found.names[setting], found.origins[setting] = self.backend.IdToPiece(token), self.path.name
        self._take_special(found, known, by_known_names=False)

    def _read_added(self, found: SpecialTokens) -> dict[str, int]:
        """Tokens beyond the pieces of the model."""
        pieces = self.backend.GetPieceSize()
        for number, token in found.added.items():
            if number < pieces and self.backend.IdToPiece(number) != token["content"]:
                raise DataError(
                    f"the files beside {self.path} give the token {token['content']!r} the id {number}, but that is "
                    f"the piece {self.backend.IdToPiece(number)!r}: they do not belong together"
                )
        added = {token["content"]: number for number, token in found.added.items() if number >= pieces}
        chosen = {found.names.get(setting) for setting in KNOWN_NAMES}  # of these an unknown one is refused
        for token in found.unnumbered:
            text = token["content"]
            if text not in {*chosen, *added} and self.backend.IdToPiece(self.backend.PieceToId(text)) != text:
                added[text] = max([pieces - 1, *added.values()]) + 1
        return added

    def encode_batch(self, texts: list[str]) -> list[Ids]:
        encoded: list[Ids] = self.backend.EncodeAsIds(texts, num_threads=1)
        for number, text in enumerate(texts if self._added else ()):
            if any(name in text for name in self._added):  # the model knows none of them
                encoded[number] = self._encode_between(text, self._added)[0]
        return encoded

    def encode_marked(self, text: str) -> Marked:
        return self._encode_between(text, self._names)

    def _encode_between(self, text: str, names: Mapping[str, int]) -> Marked:
        from sentencepiece import sentencepiece_pb2

        def encode(piece: str, start: int) -> tuple[Ids, Ids]:
            serialized = (self._inner if start else self.backend).Encode(piece, out_type="serialized_proto")
            found = sentencepiece_pb2.SentencePieceText.FromString(serialized).pieces
            return [token.id for token in found], [token.begin for token in found]

        return encode_between(text, names, encode)

    def decode(self, ids: Ids) -> str:
        names = {number: name for name, number in self._added.items()}
        known = (int(i) for i in ids if int(i) < self.backend.GetPieceSize() or int(i) in names)
        runs = itertools.groupby(known, names.get)
        return "".join(
            name * len(list(run)) if name else (self._inner if number else self.backend).DecodeIds(list(run))
            for number, (name, run) in enumerate(runs)
        )

    def _name_of(self, token: int) -> str:
        return str(self.backend.IdToPiece(token))

    def token_id(self, name: str) -> int | None:
        if name in self._added:
            return self._added[name]
        found: int = self.backend.PieceToId(name)  # that of <unk> for a piece that is not there
        return found if self.backend.IdToPiece(found) == name else None

    def save_hf(self, folder: str | Path) -> None:
        from tokenizers import AddedToken

        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        if os.path.realpath(self.path) != os.path.realpath(target / "tokenizer.model"):
            shutil.copyfile(self.path, target / "tokenizer.model")
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        tokens = {number: AddedToken(name, normalized=False, special=True) for name, number in self._added.items()}
        try:
            if self._inner is not self.backend:
                raise DataError("a space at the start of a text alone is more than tokenizer.json can say")
            backend = to_tokenizers(self.backend)
            backend.add_special_tokens(list(tokens.values()))
        except DataError as error:
            warnings.warn(f"{target} gets tokenizer.model alone: {error}", stacklevel=2)
            backend = None
            config |= {"tokenizer_class": "LlamaTokenizer", **dict.fromkeys(self._unprefixed, False)}
            config["added_tokens_decoder"] = {str(number): token.__getstate__() for number, token in tokens.items()}
        if (unknown := self.backend.unk_id()) >= 0:
            config["unk_token"] = self.backend.IdToPiece(unknown)
        write_hf(target, {**config, **self.special}, backend)


def _without_prefix(processor: Any) -> Any:
    """The same SentencePiece model without the space in front of a text."""
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(processor.serialized_model_proto())
    proto.normalizer_spec.add_dummy_prefix = False
    return SentencePieceProcessor(model_proto=proto.SerializeToString())


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as ids 0-255; 256 ends a document. Needs no file; for tests and byte-level models."""

    vocab_size = 257
    eod_id = 256
    eod_origin = "the byte tokenizer itself"
    fingerprint = "bytes"
    encoder = "this library (UTF-8)"

    def __init__(self) -> None:
        self.special = {"eos_token": EOD_NAMES[0]}

    def encode_batch(self, texts: list[str]) -> list[Ids]:
        return [np.frombuffer(text.encode("utf-8"), np.uint8) for text in texts]

    def encode_marked(self, text: str) -> Marked:
        def encode(piece: str, _: int) -> tuple[Ids, Ids]:
            ids = np.frombuffer(piece.encode("utf-8"), np.uint8)
            return ids, np.arange(ids.size)

        return encode_between(text, {EOD_NAMES[0]: 256}, encode)

    def decode(self, ids: Ids) -> str:
        return bytes(int(i) for i in ids if i < 256).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else b""

    def token_id(self, name: str) -> int | None:
        return self.eod_id if name == EOD_NAMES[0] else None

    def save_hf(self, folder: str | Path) -> None:
        """The same ids as a ``tokenizers`` BPE without merges."""
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
        backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken(EOD_NAMES[0], special=True)])
        write_hf(folder, {"tokenizer_class": "PreTrainedTokenizerFast", **self.special}, backend)
