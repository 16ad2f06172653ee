"""The nouns of reading raw text: inputs, slices of them, blocks of slices, and records that may be bad."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_ds.data.chat_records import BadConversation, parse_messages, parse_tools, with_system
from megatron_ds.errors import DataError, nearest

TxtDocuments = Literal["file", "line", "paragraph"]
Kind = Literal["jsonl", "parquet", "arrow", "hub", TxtDocuments]
"""How an input is read; of a .txt, what one document is."""


class UnusableInput(DataError):
    """Inputs from which no dataset can be made as they are: what was made of them so far is of no further use."""


@dataclass(frozen=True)
class Input:
    """One input: a file, a saved dataset's folder, or ``hub:NAME``. ``size`` in bytes as stored (0 if unknown)."""

    path: str
    kind: Kind
    compression: str = ""
    size: int = 0


@dataclass(frozen=True)
class Slice:
    """``start`` to ``stop`` of input number ``input``: bytes of a text, row groups of parquet, rows of arrow.

    ``first``: how many lines or rows come before it, where that is known without reading (else None).
    """

    input: int
    start: int
    stop: int
    first: int | None = None


@dataclass(frozen=True)
class Block:
    """What one worker does at a time. ``weight``: its share of the inputs' bytes, for the progress bar.

    ``data`` holds the decompressed lines of a compressed input; ``(input, number)`` orders and names blocks.
    """

    input: int
    number: int
    slices: tuple[Slice, ...]
    weight: int
    data: bytes | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        return f"{self.input:06d}-{self.number:06d}"


@dataclass(frozen=True)
class Problem:
    """Why a record was left out: a short class of reason, counted, and the detail."""

    reason: Literal["invalid JSON", "missing key", "invalid UTF-8", "empty", "bad conversation", "not encodable"]
    detail: str = ""


TOOLS, SYSTEM = "tools", "system"
"""The keys of what a conversation's messages may call, and of its system message where that is not among them."""


@dataclass(frozen=True)
class SourceOptions:
    """How records become texts."""

    key: str = "text"
    """The key of the text in a JSON record, or the column of a table."""
    txt_documents: TxtDocuments = "file"
    """What one document of a .txt is: the file as it is, a line, or a paragraph (blank lines between)."""
    dataset_split: str = "train"
    """Which split of a saved or hub dataset."""
    conversations: bool = False
    """The key has messages (role and content), beside it maybe `tools` and `system`; the assistant's are learnt."""

    def columns(self, there: Iterable[str]) -> list[str]:
        """What is read of a table's columns."""
        beside = (TOOLS, SYSTEM) if self.conversations else ()
        return [self.key, *(name for name in there if name in beside and name != self.key)]


IsDone = Callable[[int, int], bool]
"""Whether the block of this (input, number) was made before."""
Record = tuple[int, "str | Problem"]
"""(number of the record or line within its slice, the text)."""


def check_record(record: dict[str, Any], options: SourceOptions) -> str | Problem:
    """The text of a record (of a conversation, its messages and tools as JSON), or what is wrong with it."""
    key = options.key
    text = record.get(key)
    if text is None:
        if key in record:
            return Problem("missing key", f"{key!r} is null")
        return Problem("missing key", f"no {key!r} among {sorted(record)[:8]}{nearest(key, record)}")
    if options.conversations:
        try:
            messages = with_system(parse_messages(text), record.get(SYSTEM))
            found = {"messages": messages, "tools": parse_tools(record.get(TOOLS))}
            text = json.dumps(found, ensure_ascii=False)
        except (BadConversation, TypeError, ValueError, RecursionError) as error:  # a table's values may be no JSON
            return Problem("bad conversation", str(error))
    if not isinstance(text, str):
        return Problem("missing key", f"{key!r} is a {type(text).__name__}, not a string")
    if not text:
        return Problem("empty")
    if not text.isascii():
        try:
            text.encode("utf-8")  # JSON can spell half of a surrogate pair, which no tokenizer takes
        except UnicodeEncodeError as error:
            return Problem("invalid UTF-8", str(error))
    return text
