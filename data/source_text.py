"""What is read of raw text: inputs, slices of them, blocks of slices, and records that may be bad; and text inputs.

The records of a text are lines, paragraphs or whole files, in ranges of bytes that end where a record ends.
"""

from __future__ import annotations

import functools
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import IO, Any, Literal

from megatron_ds.data.chat_records import BadConversation, parse_messages, parse_tools, with_system
from megatron_ds.errors import DataError, RaisedAs, nearest

STREAM_BLOCK = 8 << 20
MAX_FILE_DOCUMENT = 256 << 20
BOM = b"\xef\xbb\xbf"
"""The byte order mark that some editors put in front of UTF-8: no part of the text."""
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


def describe_problems(problems: dict[str, int]) -> str:
    """How many there were of each reason."""
    return ", ".join(f"{count} x {reason}" for reason, count in sorted(problems.items()))


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
        way_out = "; --conversations takes messages" if isinstance(text, list) else ""
        return Problem("missing key", f"{key!r} is a {type(text).__name__}, not a string{way_out}")
    if not text:
        return Problem("empty")
    if not text.isascii():
        try:
            text.encode("utf-8")  # JSON can spell half of a surrogate pair, which no tokenizer takes
        except UnicodeEncodeError as error:
            return Problem("invalid UTF-8", str(error))
    return text


def cut_file(item: Input, size: int) -> Iterator[tuple[int, int]]:
    """Where slices of about ``size`` bytes start and stop."""
    start = 0
    with open(item.path, "rb") as file:
        while start < item.size:
            stop = start + size
            if stop < item.size:
                file.seek(stop - 1)
                _read_line(item, file)
                while item.kind == "paragraph" and _read_line(item, file).strip():
                    pass
                stop = file.tell()
            yield start, min(stop, item.size)
            start = stop


def read_text_slice(item: Input, part: Slice, options: SourceOptions, data: bytes | None) -> Iterator[Record]:
    """The records of a slice; ``data`` is its content where the file cannot be entered in the middle."""
    is_json = item.kind in ("jsonl", "hub")
    parse = functools.partial(parse_json_line, options=options) if is_json else parse_lines
    with open(item.path, "rb", buffering=1 << 20) if data is None else io.BytesIO(data) as file:
        if data is None:
            file.seek(part.start)
        if item.kind == "file":
            yield 0, parse_text(file.read().removeprefix(BOM))
            return
        lines = _lines(item, part, file)
        for number, piece in _paragraphs(lines) if item.kind == "paragraph" else lines:
            yield number, parse(piece)


def _lines(item: Input, part: Slice, file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """The lines of the slice, with their number in it."""
    at, number = part.start, 0
    while at < part.stop:
        line = _read_line(item, file)
        if not line:
            raise DataError(f"{item.path} became shorter while it was read: expected {part.stop} bytes, found {at}")
        at += len(line)
        yield number, line if number or part.start else line.removeprefix(BOM)
        number += 1


def _read_line(item: Input, file: IO[bytes]) -> bytes:
    line = file.readline(MAX_FILE_DOCUMENT + 1)
    _check_line(item, len(line))
    return line


def _check_line(item: Input, size: int, what: str = "line") -> None:
    if size > MAX_FILE_DOCUMENT:
        raise DataError(f"{item.path} has a {what} of more than {MAX_FILE_DOCUMENT >> 20} MB: is it a text?")


def _last_blank_line(text: bytes) -> int:
    """Where the last line begins that has nothing but white space; 0 where there is none."""
    end = text.rfind(b"\n")
    while (before := text.rfind(b"\n", 0, max(end, 0))) >= 0:
        if not text[before + 1 : end].strip():
            return before + 1
        end = before
    return 0


def _paragraphs(lines: Iterator[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    """What stands between blank lines, with the number of its first line."""
    for filled, group in itertools.groupby(lines, lambda numbered: bool(numbered[1].strip())):
        if filled:
            numbers, pieces = zip(*group)
            yield numbers[0], b"".join(pieces)


def parse_lines(lines: bytes) -> str | Problem:
    """Lines without the end of the last one."""
    return parse_text(lines.rstrip(b"\r\n"))


def parse_text(content: bytes) -> str | Problem:
    try:
        return content.decode("utf-8") or Problem("empty")
    except UnicodeDecodeError as error:
        return Problem("invalid UTF-8", str(error))


def parse_json_line(line: bytes, options: SourceOptions) -> str | Problem:
    try:
        record = json.loads(line.decode("utf-8-sig"))  # of bytes, json would guess UTF-16 too
    except UnicodeDecodeError as error:
        return Problem("invalid UTF-8", str(error))
    except (ValueError, RecursionError, MemoryError) as error:  # an integer of over 4,300 digits: a plain ValueError
        return Problem("invalid JSON", str(error)) if line.strip() else Problem("empty", "blank line")
    if not isinstance(record, dict):
        return Problem("missing key", f"the line is a {type(record).__name__}, not an object")
    return check_record(record, options)


def decompressed(item: Input) -> Iterator[tuple[bytes, int]]:
    """The text of a compressed file, some MB at a time, each with the bytes that were read for it."""
    import pyarrow

    with open(item.path, "rb") as raw:
        # Unlike zstandard's reader, this one says where a file was cut off.
        stream = pyarrow.CompressedInputStream(raw, {".gz": "gzip", ".zst": "zstd"}[item.compression])
        before = 0
        while True:
            with RaisedAs(DataError, f"{item.path} is damaged or truncated", Exception):
                chunk = stream.read(MAX_FILE_DOCUMENT if item.kind == "file" else STREAM_BLOCK)
            if not chunk:
                return
            yield chunk, raw.tell() - before
            before = raw.tell()


def stream_blocks(number: int, item: Input, chunks: Iterable[tuple[bytes, int]], is_done: IsDone) -> Iterator[Block]:
    """The blocks of a text that cannot be entered in the middle: they carry it, but where ``is_done``.

    Args:
        chunks: of the text, with their weights; cut at line ends (or paragraphs, or not at all).
    """
    whole, paragraphs = item.kind == "file", item.kind == "paragraph"
    rest = b""
    at = block = lines = weight = 0

    def made(data: bytes) -> Block:
        content = b"" if is_done(number, block) else data
        return Block(number, block, (Slice(number, at, at + len(data), lines),), weight, content)

    for chunk, more in chunks:
        rest, weight = rest + chunk, weight + more
        if whole and len(rest) > MAX_FILE_DOCUMENT:
            raise DataError(huge_document(item, len(rest)))
        if end := 0 if whole else _last_blank_line(rest) if paragraphs else rest.rfind(b"\n") + 1:
            yield made(rest[:end])
            at, block, lines = at + end, block + 1, lines + rest.count(b"\n", 0, end)
            rest, weight = rest[end:], 0
        if not whole:
            _check_line(item, len(rest), "paragraph" if paragraphs else "line")  # as it comes: memory may not hold all
    if rest:
        yield made(rest)


def huge_document(item: Input, size: int) -> str:
    return (
        f"{item.path} is one document of more than {size >> 20} MB; say txt-documents=line or paragraph to cut it "
        "into documents"
    )
