"""Text inputs: lines and paragraphs of plain files by byte range, and compressed files as they come."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from megatron_ds.data.source_types import Block, Input, Problem, Record, Slice, SourceOptions, check_record
from megatron_ds.errors import DataError

STREAM_BLOCK = 8 << 20
MAX_FILE_DOCUMENT = 256 << 20


BOM = b"\xef\xbb\xbf"
"""The byte order mark that some editors put in front of UTF-8: no part of the text."""


def lines(item: Input, part: Slice, data: bytes | None) -> Iterator[tuple[int, float, bytes]]:
    """The lines that start inside the slice, with their number in it and the share read so far."""
    length = max(part.stop - part.start, 1)
    if data is not None:
        at = number = 0
        while at < len(data):
            end = data.find(b"\n", at) + 1 or len(data)
            line = data[at:end]
            yield number, end / len(data), line.removeprefix(BOM) if part.start == at == 0 else line
            at, number = end, number + 1
        return
    with open(item.path, "rb", buffering=1 << 20) as file:
        if part.start:
            file.seek(part.start - 1)
            file.readline()  # the line that began before
        at, number = file.tell(), 0
        while at < part.stop:
            line = file.readline(MAX_FILE_DOCUMENT + 1)
            if len(line) > MAX_FILE_DOCUMENT:
                raise DataError(f"{item.path} has a line of more than {MAX_FILE_DOCUMENT >> 20} MB: is it a text?")
            if not line:
                raise DataError(f"{item.path} became shorter while it was read: expected {part.stop} bytes, found {at}")
            line_at, at = at, at + len(line)
            line = line if line_at else line.removeprefix(BOM)
            yield number, min((at - part.start) / length, 1.0), line
            number += 1


def parse_line(line: bytes) -> str | Problem:
    try:
        text = line.rstrip(b"\r\n").decode("utf-8")
    except UnicodeDecodeError as error:
        return Problem("invalid UTF-8", str(error))
    return text or Problem("empty")


def json_parser(options: SourceOptions) -> Callable[[bytes], str | Problem]:
    def parse(line: bytes) -> str | Problem:
        try:
            record = json.loads(line)
        except UnicodeDecodeError as error:
            return Problem("invalid UTF-8", str(error))
        except (
            ValueError,
            RecursionError,
            MemoryError,
        ) as error:  # an integer of over 4,300 digits: a plain ValueError
            return Problem("invalid JSON", str(error)) if line.strip() else Problem("empty", "blank line")
        if not isinstance(record, dict):
            return Problem("missing key", f"the line is a {type(record).__name__}, not an object")
        return check_record(record, options)

    return parse


def read_txt(item: Input, part: Slice, options: SourceOptions, data: bytes | None) -> Iterator[Record]:
    """Documents of a `.txt`: the file, or paragraphs separated by blank lines (owned by the slice they start in)."""
    if options.txt_documents == "file":
        content = data if data is not None else Path(item.path).read_bytes()
        yield 0, 1.0, parse_line(content.removeprefix(BOM))
        return
    paragraph: list[bytes] = []
    first, share = 0, 0.0
    # The paragraph that runs over the end of the slice belongs to it; the one that runs over its start does not.
    skipping = data is None and part.start > 0 and not _after_blank_line(item.path, part.start)
    number = -1
    for number, share, line in lines(item, part, data):
        blank = not line.strip()
        if skipping:
            skipping = not blank
        elif not blank:
            first = first if paragraph else number
            paragraph.append(line)
        elif paragraph:
            yield first, share, parse_line(b"".join(paragraph))
            paragraph = []
    if paragraph:
        if data is None:
            paragraph += _rest_of_paragraph(item.path, part.stop)
        yield first, share, parse_line(b"".join(paragraph))


def _after_blank_line(path: str, start: int) -> bool:
    """Whether the first line that starts at or after ``start`` follows a blank one."""
    with open(path, "rb") as file:
        back = max(0, start - (1 << 16))
        file.seek(back)
        before = file.read(start - 1 - back) + file.readline()
    return not before.splitlines()[-1].strip() if before else True


def _rest_of_paragraph(path: str, stop: int) -> Iterator[bytes]:
    with open(path, "rb") as file:
        file.seek(stop - 1)
        file.readline()
        for line in file:
            if not line.strip():
                return
            yield line


def open_compressed(item: Input, raw: IO[bytes]) -> IO[bytes]:
    """The text of a compressed file. Unlike zstandard's reader, this one says where a file was cut off."""
    import pyarrow

    stream: IO[bytes] = pyarrow.CompressedInputStream(raw, {".gz": "gzip", ".zst": "zstd"}[item.compression])
    return stream


def stream_blocks(
    number: int, item: Input, options: SourceOptions, is_done: Callable[[int, int], bool]
) -> Iterator[Block]:
    """The blocks of a compressed file, cut at line ends (or paragraphs, or not at all); empty where ``is_done``."""
    whole = item.kind == "txt" and options.txt_documents == "file"
    limit = MAX_FILE_DOCUMENT if whole else STREAM_BLOCK
    separator = b"\n\n" if item.kind == "txt" and options.txt_documents == "paragraph" else b"\n"
    rest = b""
    at = block = consumed = lines = 0
    with open(item.path, "rb") as raw:
        stream = open_compressed(item, raw)
        while True:
            try:
                chunk = stream.read(limit)
            except Exception as error:
                raise DataError(f"{item.path} is damaged or truncated: {error}") from None
            data = rest + chunk
            if whole and len(data) > MAX_FILE_DOCUMENT:
                raise DataError(huge_document(item, len(data)))
            end = len(data) if not chunk else 0 if whole else data.rfind(separator) + 1
            if end:
                weight = raw.tell() - consumed
                consumed = raw.tell()
                kept = b"" if is_done(number, block) else data[:end]
                yield Block(number, block, (Slice(number, at, at + end, lines),), weight, kept)
                at, block, lines = at + end, block + 1, lines + data.count(b"\n", 0, end)
            rest = data[end:]
            if not chunk:
                return


def huge_document(item: Input, size: int) -> str:
    return (
        f"{item.path} is one document of more than {size >> 20} MB; say txt-documents=line or paragraph to cut it "
        "into documents"
    )
