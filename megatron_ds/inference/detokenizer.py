"""The text of an answer while it grows: never half a character, never a part of a text at which it stops."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Protocol

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class TextEnds:
    """What the tokenizer and the model say of texts: tokens that end an answer, tokens that are no text."""

    eos: tuple[int, ...] = ()
    hidden: Container[int] = frozenset()


class Decoder(Protocol):
    """What is needed of a tokenizer."""

    def decode(self, ids: Sequence[int]) -> str: ...


class Detokenizer:
    """Of one answer.

    Args:
        tokenizer: None: there is no text.
        prompt: the tokens before the answer, whose last ones decide how its first ones read.
        stops: texts at which the answer ends; ``keep_stop``: they are part of it.
        hidden: tokens that are not part of the text.

    Attributes:
        text: what is certain so far. stopped: the stop text that was found.
    """

    CONTEXT = 6
    """Tokens before that are decoded with new ones, at least. They begin where a character does: decoders of bytes as
    SentencePiece has them make a mark of every byte of a row that holds a part of a character."""

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
        self._context = self._begin([token for token in prompt if token not in hidden])
        self._pieces = [len(self._context)]  # tokens of whole characters, of which the context consists
        self._new: list[int] = []

    def _begin(self, prompt: list[int]) -> list[int]:
        """The end of the prompt, from a token on that begins a character: three bytes at most come before."""
        last = [prompt[-size:] for size in range(self.CONTEXT, self.CONTEXT + 4)]
        if self.tokenizer is None:
            return last[0]
        return next((ids for ids in last if not self.tokenizer.decode(ids).startswith(_UNFINISHED)), last[0])

    def add(self, token: int, may_stop: bool = True) -> None:
        """``may_stop``: whether the answer is long enough to end at a stop text that the token completes."""
        if self.tokenizer is None or token in self.hidden or self.stopped is not None:
            return
        self._new.append(token)
        before = self.tokenizer.decode(self._context)
        now = self.tokenizer.decode([*self._context, *self._new])
        if (now.endswith(_UNFINISHED) and len(self._new) < 16) or len(now) < len(before):
            return  # the bytes of a character that is not complete
        self._append(self._behind(before, now), may_stop)
        self._context += self._new
        self._pieces.append(len(self._new))
        while len(self._context) - self._pieces[0] >= self.CONTEXT:
            del self._context[: self._pieces.pop(0)]
        self._new = []

    def _behind(self, before: str, now: str) -> str:
        """The text that the new tokens add: what ``now``, decoded with them, has more than ``before``.

        Where decoding them with the context spoils its characters, the new tokens form none, and are decoded alone.
        """
        assert self.tokenizer is not None
        spoilt = now[: len(before)].count(_UNFINISHED) > before.count(_UNFINISHED)
        return self.tokenizer.decode(self._new) if spoilt else now[len(before) :]

    def finish(self) -> None:
        """No more tokens come: what was held back is text, with a mark for each character that never was complete."""
        if self.tokenizer is not None and self.stopped is None:
            if self._new:
                before = self.tokenizer.decode(self._context)
                self._held += self._behind(before, self.tokenizer.decode([*self._context, *self._new]))
                self._new = []
            self.text, self._held = self.text + self._held, ""

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
