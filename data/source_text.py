"""Text inputs: lines, paragraphs or whole files, by ranges of bytes that end where a record ends."""

from __future__ import annotations

import functools
import io
import itertools
import json
from collections.abc import Iterable, Iterator
from typing import IO

from megatron_ds.data.source_types import Block, Input, IsDone, Problem, Record, Slice, SourceOptions, check_record
from megatron_ds.errors import DataError

STREAM_BLOCK = 8 << 20
MAX_FILE_DOCUMENT = 256 << 20
BOM = b"\xef\xbb\xbf"
"""The byte order mark that some editors put in front of UTF-8: no part of the text."""


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
    if len(line) > MAX_FILE_DOCUMENT:
        raise DataError(f"{item.path} has a line of more than {MAX_FILE_DOCUMENT >> 20} MB: is it a text?")
    return line


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
            try:
                chunk = stream.read(MAX_FILE_DOCUMENT if item.kind == "file" else STREAM_BLOCK)
            except Exception as error:
                raise DataError(f"{item.path} is damaged or truncated: {error}") from None
            if not chunk:
                return
            yield chunk, raw.tell() - before
            before = raw.tell()


def stream_blocks(number: int, item: Input, chunks: Iterable[tuple[bytes, int]], is_done: IsDone) -> Iterator[Block]:
    """The blocks of a text that cannot be entered in the middle: they carry it, but where ``is_done``.

    Args:
        chunks: of the text, with their weights; cut at line ends (or paragraphs, or not at all).
    """
    whole, separator = item.kind == "file", b"\n\n" if item.kind == "paragraph" else b"\n"
    rest = b""
    at = block = lines = weight = 0

    def made(data: bytes) -> Block:
        content = b"" if is_done(number, block) else data
        return Block(number, block, (Slice(number, at, at + len(data), lines),), weight, content)

    for chunk, more in chunks:
        rest, weight = rest + chunk, weight + more
        if whole and len(rest) > MAX_FILE_DOCUMENT:
            raise DataError(huge_document(item, len(rest)))
        if end := 0 if whole else rest.rfind(separator) + 1:
            yield made(rest[:end])
            at, block, lines = at + end, block + 1, lines + rest.count(b"\n", 0, end)
            rest, weight = rest[end:], 0
    if rest:
        yield made(rest)


def huge_document(item: Input, size: int) -> str:
    return (
        f"{item.path} is one document of more than {size >> 20} MB; say txt-documents=line or paragraph to cut it "
        "into documents"
    )
