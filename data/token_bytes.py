"""What one token adds to a text, as bytes: a token may be part of a character, and may begin with a space."""

from __future__ import annotations

import re

from megatron_ds.data.fast_bpe import byte_characters
from megatron_ds.data.tiktoken_files import TiktokenTokenizer
from megatron_ds.data.tokenizers import ByteTokenizer, HFTokenizer, SentencePieceTokenizer, Tokenizer

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """The bytes of a token in the middle of a text; those of special tokens are their names'."""
    if isinstance(tokenizer, ByteTokenizer):
        return bytes([token]) if token < 256 else b""
    if isinstance(tokenizer, TiktokenTokenizer):
        found: bytes = tokenizer.backend.decode_single_token_bytes(token)
        return found
    # Decoders of SentencePiece's kind take the space from the first token of a text, so the second one is asked.
    text = tokenizer.decode([token, token])[len(tokenizer.decode([token])) :]
    if "\N{REPLACEMENT CHARACTER}" not in text:
        return text.encode()
    name = _name(tokenizer, token)
    if byte := _BYTE.fullmatch(name):
        return bytes.fromhex(byte[1])
    byte_of = {character: byte for byte, character in enumerate(byte_characters())}
    return bytes(byte_of[character] for character in name) if byte_of.keys() >= set(name) else text.encode()


def _name(tokenizer: Tokenizer, token: int) -> str:
    """What the token is called in the vocabulary's file."""
    if isinstance(tokenizer, HFTokenizer):
        return tokenizer.backend.id_to_token(token) or ""
    return str(tokenizer.backend.IdToPiece(token)) if isinstance(tokenizer, SentencePieceTokenizer) else ""
