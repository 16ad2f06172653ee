"""Where raw text comes from: input files cut into blocks that any worker can read alone.

The cut depends on the inputs alone, not on the number of workers, so that a run that was interrupted, or one with
other workers, makes the same blocks. A *block* is a list of *slices*; a slice of a line-based file is a byte range
that owns the lines starting in it, of a parquet file a range of row groups, of a saved ``datasets`` dataset a range
of rows. A compressed file cannot be entered in the middle: its blocks are cut while it is decompressed and carry
their bytes.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from megatron_ds.errors import DataError, nearest

Kind = Literal["jsonl", "txt", "parquet", "arrow", "hub"]
TxtDocuments = Literal["file", "line", "paragraph"]
SUFFIXES: dict[str, Kind] = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".txt": "txt", ".text": "txt", ".parquet": "parquet",
}  # fmt: skip
COMPRESSIONS = (".gz", ".zst")
MIN_BLOCK, MAX_BLOCK, STREAM_BLOCK = 1 << 20, 64 << 20, 8 << 20
MAX_FILE_DOCUMENT = 256 << 20


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

    reason: Literal["invalid JSON", "missing key", "invalid UTF-8", "empty"]
    detail: str = ""


@dataclass(frozen=True)
class SourceOptions:
    """How records become texts: ``key`` of the text in a record; what one document of a `.txt` is; which split of a
    ``datasets`` dataset."""

    key: str = "text"
    txt_documents: TxtDocuments = "file"
    dataset_split: str = "train"


Record = tuple[int, float, "str | Problem"]
"""(number of the record or line within its slice, share of the slice that was read, the text)."""


def find_inputs(specs: list[str]) -> list[Input]:
    """The inputs that paths name: files, folders (every known file in them, sorted), saved datasets, ``hub:NAME``.

    Raises:
        DataError: a path that does not exist, a suffix that is not known, a folder with nothing in it.
    """
    inputs: list[Input] = []
    for spec in specs:
        path = Path(spec)
        if spec.startswith("hub:"):
            inputs.append(Input(spec, "hub"))
        elif path.is_dir() and any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            size = sum(p.stat().st_size for p in path.rglob("*.arrow"))
            inputs.append(Input(spec, "arrow", size=size))
        elif path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.is_file() and _kind_of(p) is not None)
            if not files:
                raise DataError(f"{path} holds no input: expected {_known()} or a saved `datasets` dataset")
            inputs += [_file_input(p) for p in files]
        elif path.is_file():
            inputs.append(_file_input(path))
        else:
            raise DataError(f"input {spec!r} does not exist")
    if not inputs:
        raise DataError("no input was given")
    return inputs


def _kind_of(path: Path) -> tuple[Kind, str] | None:
    compression = path.suffix if path.suffix in COMPRESSIONS else ""
    kind = SUFFIXES.get(Path(path.stem).suffix if compression else path.suffix)
    return (kind, compression) if kind and not (compression and kind == "parquet") else None


def _known() -> str:
    return ", ".join(SUFFIXES) + f" (text ones also with {' or '.join(COMPRESSIONS)})"


def _file_input(path: Path) -> Input:
    found = _kind_of(path)
    if found is None:
        raise DataError(f"input {path} has suffix {path.suffix!r}, not one of {_known()}")
    return Input(str(path), found[0], found[1], path.stat().st_size)


def block_bytes(inputs: list[Input]) -> int:
    """The size of a block: a 64th of everything, between 1 and 64 MB."""
    return min(max(sum(i.size for i in inputs) // 64, MIN_BLOCK), MAX_BLOCK)


def plan_blocks(
    inputs: list[Input], options: SourceOptions, is_done: Callable[[int, int], bool] = lambda *_: False
) -> Iterator[Block]:
    """All blocks in order. ``is_done(input, number)`` spares the bytes of blocks that need not be read again."""
    size = block_bytes(inputs)
    group: list[Slice] = []
    grouped = 0
    for number, item in enumerate(inputs):
        whole_file = item.kind == "txt" and options.txt_documents == "file"
        small = not item.compression and item.kind in ("jsonl", "txt") and (whole_file or item.size < size)
        if whole_file and not item.compression and item.size > MAX_FILE_DOCUMENT:
            raise DataError(_huge_document(item, item.size))
        if small:  # many small files share a block
            if group and grouped + item.size > size:
                yield Block(group[0].input, 0, tuple(group), grouped)
                group, grouped = [], 0
            group.append(Slice(number, 0, item.size))
            grouped += item.size
            continue
        if group:
            yield Block(group[0].input, 0, tuple(group), grouped)
            group, grouped = [], 0
        if item.kind == "parquet":
            yield from _plan_parquet(number, item, options, size)
        elif item.kind == "arrow":
            yield from _plan_arrow(number, item, options, size)
        elif item.compression or item.kind == "hub":
            yield from _stream_blocks(number, item, options, is_done)
        else:
            for at, start in enumerate(range(0, item.size, size)):
                stop = min(start + size, item.size)
                yield Block(number, at, (Slice(number, start, stop),), stop - start)
    if group:
        yield Block(group[0].input, 0, tuple(group), grouped)


def read_block(inputs: list[Input], block: Block, options: SourceOptions) -> Iterator[tuple[Slice, Record]]:
    """Every record of a block."""
    for part in block.slices:
        item = inputs[part.input]
        if item.kind == "parquet":
            records = _read_parquet(item, part, options)
        elif item.kind == "arrow":
            records = _read_arrow(item, part, options)
        elif item.kind == "txt" and options.txt_documents != "line":
            records = _read_txt(item, part, options, block.data)
        else:
            parse = _parse_line if item.kind == "txt" else _json_parser(options.key)
            records = ((n, share, parse(line)) for n, share, line in _lines(item, part, block.data))
        for record in records:
            yield part, record


def iterate_texts(specs: list[str], key: str = "text", options: SourceOptions | None = None) -> Iterator[str]:
    """The good texts of all inputs in order, in this process; an error if there is none at all."""
    inputs = find_inputs(specs)
    options = options or SourceOptions(key=key)
    problem: Problem | None = None
    found = False
    for block in plan_blocks(inputs, options):
        for _, (_, _, text) in read_block(inputs, block, options):
            if isinstance(text, Problem):
                problem = problem or text
            else:
                found = True
                yield text
    if not found:
        why = f": {problem.reason}{', ' + problem.detail if problem.detail else ''}" if problem else ""
        raise DataError(f"no text in {', '.join(specs)}{why}")


# --- line-based files -------------------------------------------------------------------------------------------


def _lines(item: Input, part: Slice, data: bytes | None) -> Iterator[tuple[int, float, bytes]]:
    """The lines that start inside the slice, with their number in it and the share read so far."""
    length = max(part.stop - part.start, 1)
    if data is not None:
        at = number = 0
        while at < len(data):
            end = data.find(b"\n", at) + 1 or len(data)
            yield number, end / len(data), data[at:end]
            at, number = end, number + 1
        return
    with open(item.path, "rb", buffering=1 << 20) as file:
        if part.start:
            file.seek(part.start - 1)
            file.readline()  # the line that began before
        at, number = file.tell(), 0
        while at < part.stop:
            line = file.readline()
            if not line:
                raise DataError(f"{item.path} became shorter while it was read: expected {part.stop} bytes, found {at}")
            at += len(line)
            yield number, min((at - part.start) / length, 1.0), line
            number += 1


def _parse_line(line: bytes) -> str | Problem:
    try:
        text = line.rstrip(b"\r\n").decode("utf-8")
    except UnicodeDecodeError as error:
        return Problem("invalid UTF-8", str(error))
    return text or Problem("empty")


def _json_parser(key: str) -> Callable[[bytes], str | Problem]:
    def parse(line: bytes) -> str | Problem:
        try:
            record = json.loads(line)
        except UnicodeDecodeError as error:
            return Problem("invalid UTF-8", str(error))
        except (json.JSONDecodeError, RecursionError) as error:
            return Problem("invalid JSON", str(error)) if line.strip() else Problem("empty", "blank line")
        if not isinstance(record, dict):
            return Problem("missing key", f"the line is a {type(record).__name__}, not an object")
        return check_text(record, key)

    return parse


def check_text(record: dict[str, Any], key: str) -> str | Problem:
    """The text of a record, or what is wrong with it."""
    text = record.get(key)
    if text is None:
        if key in record:
            return Problem("missing key", f"{key!r} is null")
        return Problem("missing key", f"no {key!r} among {sorted(record)[:8]}{nearest(key, record)}")
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


def _read_txt(item: Input, part: Slice, options: SourceOptions, data: bytes | None) -> Iterator[Record]:
    """Documents of a `.txt`: the file, or paragraphs separated by blank lines (owned by the slice they start in)."""
    if options.txt_documents == "file":
        content = data if data is not None else Path(item.path).read_bytes()
        yield 0, 1.0, _parse_line(content)
        return
    paragraph: list[bytes] = []
    first, share = 0, 0.0
    # The paragraph that runs over the end of the slice belongs to it; the one that runs over its start does not.
    skipping = data is None and part.start > 0 and not _after_blank_line(item.path, part.start)
    number = -1
    for number, share, line in _lines(item, part, data):
        blank = not line.strip()
        if skipping:
            skipping = not blank
        elif not blank:
            first = first if paragraph else number
            paragraph.append(line)
        elif paragraph:
            yield first, share, _parse_line(b"".join(paragraph))
            paragraph = []
    if paragraph:
        if data is None:
            paragraph += _rest_of_paragraph(item.path, part.stop)
        yield first, share, _parse_line(b"".join(paragraph))


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


# --- compressed files -------------------------------------------------------------------------------------------


def open_compressed(item: Input, raw: IO[bytes]) -> IO[bytes]:
    if item.compression == ".gz":
        return gzip.open(raw)  # type: ignore[return-value]
    try:
        import zstandard
    except ImportError:
        raise DataError(f"{item.path} is compressed with zstd: `pip install zstandard` to read it") from None
    stream: IO[bytes] = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
    return stream


def _stream_blocks(
    number: int, item: Input, options: SourceOptions, is_done: Callable[[int, int], bool]
) -> Iterator[Block]:
    if item.kind == "hub":
        from megatron_ds.data.sources_hub import hub_blocks

        yield from hub_blocks(number, item, options)
        return
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
            except Exception as error:  # gzip, zlib and zstandard each have their own
                raise DataError(f"{item.path} is damaged or truncated: {error}") from None
            data = rest + chunk
            if whole and len(data) > MAX_FILE_DOCUMENT:
                raise DataError(_huge_document(item, len(data)))
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


def _huge_document(item: Input, size: int) -> str:
    return (
        f"{item.path} is one document of more than {size >> 20} MB; say txt-documents=line or paragraph to cut it "
        "into documents"
    )


# --- tables -----------------------------------------------------------------------------------------------------


def _plan_parquet(number: int, item: Input, options: SourceOptions, size: int) -> Iterator[Block]:
    file = _open_parquet(item, options)
    groups = file.metadata.num_row_groups
    start = weight = block = rows = 0
    for group in range(groups):
        weight += file.metadata.row_group(group).total_byte_size
        if weight >= size or group == groups - 1:
            share = round(item.size * (group + 1 - start) / groups)
            yield Block(number, block, (Slice(number, start, group + 1, rows),), share)
            rows += sum(file.metadata.row_group(g).num_rows for g in range(start, group + 1))
            start, weight, block = group + 1, 0, block + 1


def _open_parquet(item: Input, options: SourceOptions) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(item.path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{item.path} is not a readable parquet file: {error}") from None
    _check_column(item, options, file.schema_arrow.names)
    return file


def _check_column(item: Input, options: SourceOptions, columns: list[str]) -> None:
    if options.key not in columns:
        raise DataError(f"{item.path} has no column {options.key!r}{nearest(options.key, columns)}; it has {columns}")


def _read_parquet(item: Input, part: Slice, options: SourceOptions) -> Iterator[Record]:
    file = _open_parquet(item, options)
    groups = list(range(part.start, part.stop))
    total = max(sum(file.metadata.row_group(group).num_rows for group in groups), 1)
    number = 0
    for batch in file.iter_batches(batch_size=256, row_groups=groups, columns=[options.key]):
        for value in batch.column(0).to_pylist():
            number += 1
            yield number - 1, number / total, check_text({options.key: value}, options.key)


def _open_arrow(item: Input, options: SourceOptions) -> Any:
    # datasets counts the processors and looks for the hub when it is imported; nothing is asked of the network here.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import datasets

    try:
        dataset = datasets.load_from_disk(item.path)
    except Exception as error:
        raise DataError(f"{item.path} is not a dataset saved by `datasets`: {error}") from None
    if isinstance(dataset, datasets.DatasetDict):
        if options.dataset_split not in dataset:
            raise DataError(
                f"{item.path} has no split {options.dataset_split!r}{nearest(options.dataset_split, dataset)}; it has "
                f"{sorted(dataset)}"
            )
        dataset = dataset[options.dataset_split]
    _check_column(item, options, dataset.column_names)
    return dataset


def _plan_arrow(number: int, item: Input, options: SourceOptions, size: int) -> Iterator[Block]:
    rows = len(_open_arrow(item, options))
    step = max(1, rows * size // max(item.size, 1)) if rows else 1
    for block, start in enumerate(range(0, rows, step)):
        stop = min(start + step, rows)
        yield Block(number, block, (Slice(number, start, stop, start),), round(item.size * (stop - start) / rows))


def _read_arrow(item: Input, part: Slice, options: SourceOptions) -> Iterator[Record]:
    dataset = _open_arrow(item, options).select_columns([options.key])
    for start in range(part.start, part.stop, 256):
        stop = min(start + 256, part.stop)
        for at, value in enumerate(dataset[start:stop][options.key], start):
            share = (at + 1 - part.start) / (part.stop - part.start)
            yield at - part.start, share, check_text({options.key: value}, options.key)
