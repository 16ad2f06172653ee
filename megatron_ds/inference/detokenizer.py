"""The text of an answer while it grows: never half a character, never a part of a text at which it stops."""

from __future__ import annotations

import codecs
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class TextEnds:
    """What the tokenizer and the model say of texts: tokens that end an answer, tokens that are no text."""

    eos: tuple[int, ...] = ()
    hidden: Container[int] = frozenset()


class Decoder(Protocol):
    """What is needed of a tokenizer."""

    def decode(self, ids: Sequence[int]) -> str: ...

    def token_bytes(self, token: int) -> bytes: ...


class Detokenizer:
    """Of one answer.

    Args:
        tokenizer: None: there is no text.
        prompt: the tokens before the answer, which may end within a character.
        stops: texts at which the answer ends; ``keep_stop``: they are part of it.
        hidden: tokens that are not part of the text.

    Attributes:
        text: what is certain so far. stopped: the stop text that was found.
    """

    def __init__(
        self,
        tokenizer: Decoder | None,
        prompt: Sequence[int],
        stops: Sequence[str] = (),
        keep_stop: bool = False,
        hidden: Container[int] = (),
    ):
        self.tokenizer, self.stops, self.keep_stop, self.hidden = tokenizer, tuple(stops), keep_stop, hidden
        self.text = ""
        self.stopped: str | None = None
        self._held = ""  # whole characters that may begin a stop text
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        before = [token for token in prompt if token not in hidden]
        self._begins = not before
        if tokenizer is not None:  # of a character that is not complete there are three bytes at most
            self._characters.decode(b"".join(map(tokenizer.token_bytes, before[-3:])))

    def add(self, token: int, may_stop: bool = True) -> None:
        """``may_stop``: whether the answer is long enough to end at a stop text that the token completes."""
        if self.tokenizer is None or token in self.hidden or self.stopped is not None:
            return
        added = self.tokenizer.token_bytes(token)
        if self._begins:  # decoders of SentencePiece's kind take the space from the first token of a text
            self._begins = False
            if not self.tokenizer.decode([token]).startswith(" "):
                added = added.removeprefix(b" ")
        if text := self._characters.decode(added):
            self._append(text, may_stop)

    def finish(self) -> None:
        """No more tokens come: what was held back is text, with a mark for a character that never was complete."""
        if self.tokenizer is not None and self.stopped is None:
            self.text += self._held + self._characters.decode(b"", True)
            self._held = ""

    def _append(self, text: str, may_stop: bool) -> None:
        pending = self._held + text
        places = [(pending.find(stop), stop) for stop in self.stops if may_stop and stop in pending]
        if places:
            place, stop = min(places)
            self.text += pending[: place + len(stop) if self.keep_stop else place]
            self.stopped, self._held = stop, ""
            return
        keep = max((_overlap(pending, stop) for stop in self.stops), default=0)
        self.text += pending[: len(pending) - keep]
        self._held = pending[len(pending) - keep :]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of ``text`` with which ``stop`` begins."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
