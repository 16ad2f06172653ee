"""Where raw text comes from: input files cut into blocks that any worker can read alone.

The cut depends on the inputs alone, not on the number of workers, so that a run that was interrupted, or one with
other workers, makes the same blocks. A *block* is a list of *slices*; a slice of a line-based file is a byte range
that begins and ends where a record does, of a parquet file a range of row groups, of a saved ``datasets`` dataset a
range of rows. A compressed file cannot be entered in the middle: its blocks are cut while it is decompressed and carry
their bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_ds.data import source_tables, source_text
from megatron_ds.data.folders import files_below
from megatron_ds.data.source_text import Block, Input, IsDone, Kind, Problem, Record, Slice, SourceOptions
from megatron_ds.errors import DataError, RaisedAs

SUFFIXES = (".jsonl", ".ndjson", ".json", ".txt", ".text", ".parquet")
COMPRESSIONS = (".gz", ".zst")
KNOWN = f"{', '.join(SUFFIXES)} (text ones also with {' or '.join(COMPRESSIONS)})"
UNREAD = (".bz2", ".xz", ".lz4", ".br", ".zip")
"""Compressions that are not read: the texts of a folder are not to be fewer for it, unsaid."""
MIN_BLOCK, MAX_BLOCK = 1 << 20, 64 << 20


def find_inputs(specs: list[str], options: SourceOptions) -> list[Input]:
    """The inputs that paths name: files, folders (every known file in them, sorted; none that is hidden), saved
    datasets, ``hub:NAME``.

    Raises:
        DataError: a path that does not exist, a suffix that is not known, a folder with nothing in it, or with texts
            that cannot be read.
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
            inputs += [_file_input(p, options) for p in _files_of(path, options)]
        elif path.is_file():
            inputs.append(_file_input(path, options))
        else:
            raise DataError(f"input {spec!r} {'is no regular file' if path.exists() else 'does not exist'}")
    if not inputs:
        raise DataError("no input was given")
    return inputs


def _files_of(folder: Path, options: SourceOptions) -> list[Path]:
    def is_input(path: Path) -> bool:
        if path.suffix.lower() in UNREAD and path.with_suffix("").suffix.lower() in SUFFIXES:
            raise DataError(f"{path} would be passed over: expected {KNOWN}. Compress it anew, or move it elsewhere")
        if path.name == "state.json" and any(path.parent.glob("*.arrow")):
            raise DataError(f"{path.parent} is a saved dataset; name it as an input of its own, or move it elsewhere")
        return _kind_of(path, options) is not None

    files = files_below(folder, is_input)
    if not files:
        raise DataError(f"{folder} holds no input: expected {KNOWN} or a saved `datasets` dataset")
    return files


def _kind_of(path: Path, options: SourceOptions) -> tuple[Kind, str] | None:
    last = path.suffix.lower()
    compression = last if last in COMPRESSIONS else ""
    suffix = Path(path.stem).suffix.lower() if compression else last
    if suffix == ".parquet":
        return None if compression else ("parquet", "")
    if suffix not in SUFFIXES:
        return None
    return options.txt_documents if suffix in (".txt", ".text") else "jsonl", compression


def _file_input(path: Path, options: SourceOptions) -> Input:
    found = _kind_of(path, options)
    if found is None:
        raise DataError(f"input {path} has suffix {path.suffix!r}, not one of {KNOWN}")
    with path.open("rb") as file:
        first = file.read(4096).lstrip()[:1]
    if path.suffix.lower() == ".json" and first == b"[":
        raise DataError(
            f"input {path} is one JSON array, and a record a line is read; write it as such: "
            f"jq -c '.[]' {path} > {path.with_suffix('.jsonl')}"
        )
    size = path.stat().st_size
    if found[1] and not size:
        raise DataError(f"input {path} is empty: a compressed file of no text has some bytes, so it was cut off")
    return Input(str(path), found[0], found[1], size)


def plan_blocks(inputs: list[Input], options: SourceOptions, is_done: IsDone = lambda *_: False) -> Iterator[Block]:
    """All blocks in order. ``is_done(input, number)`` spares the bytes of blocks that need not be read again."""
    # The size of a block: a 64th of everything, between 1 and 64 MB.
    size = min(max(sum(item.size for item in inputs) // 64, MIN_BLOCK), MAX_BLOCK)
    group: list[Slice] = []
    grouped = 0
    for number, item in enumerate(inputs):
        plain = item.kind not in ("parquet", "arrow", "hub") and not item.compression
        whole = plain and item.kind == "file"
        if whole and item.size > source_text.MAX_FILE_DOCUMENT:
            raise DataError(source_text.huge_document(item, item.size))
        small = plain and (whole or item.size < size)  # many small files share a block
        if group and (not small or grouped + item.size > size):
            yield Block(group[0].input, 0, tuple(group), grouped)
            group, grouped = [], 0
        if small:
            group.append(Slice(number, 0, item.size))
            grouped += item.size
        else:
            yield from _blocks_of(number, item, options, size, is_done)
    if group:
        yield Block(group[0].input, 0, tuple(group), grouped)


def _blocks_of(number: int, item: Input, options: SourceOptions, size: int, is_done: IsDone) -> Iterator[Block]:
    if item.kind == "parquet":
        return source_tables.plan_parquet(number, item, options, size)
    if item.kind == "arrow":
        return source_tables.plan_arrow(number, item, options, size)
    if item.kind == "hub":
        return source_text.stream_blocks(number, item, source_tables.hub_lines(item, options), is_done)
    if item.compression:
        return source_text.stream_blocks(number, item, source_text.decompressed(item), is_done)
    ranges = source_text.cut_file(item, size)
    return (Block(number, at, (Slice(number, a, b),), b - a) for at, (a, b) in enumerate(ranges))


def read_block(inputs: list[Input], block: Block, options: SourceOptions) -> Iterator[tuple[Slice, int, str | Problem]]:
    """Every record of a block, with its slice and its number in it; a ``DataError`` for a file that cannot be read."""
    for part in block.slices:
        item = inputs[part.input]
        with RaisedAs(DataError, f"{item.path} cannot be read, or is damaged", OSError):
            for number, text in _read_slice(item, part, block, options):
                yield part, number, text


def _read_slice(item: Input, part: Slice, block: Block, options: SourceOptions) -> Iterator[Record]:
    if item.kind == "parquet":
        return source_tables.read_parquet(item, part, options)
    if item.kind == "arrow":
        return source_tables.read_arrow(item, part, options)
    return source_text.read_text_slice(item, part, options, block.data)


def iterate_texts(specs: list[str], key: str = "text", problems: dict[str, int] | None = None) -> Iterator[str]:
    """The good texts of all inputs in order, in this process; an error if there is none at all.

    ``problems``: where bad records are counted by their reason.
    """
    options = SourceOptions(key=key)
    inputs = find_inputs(specs, options)
    first: Problem | None = None
    found = False
    for block in plan_blocks(inputs, options):
        for _, _, text in read_block(inputs, block, options):
            if isinstance(text, Problem):
                first = first or text
                if problems is not None:
                    problems[text.reason] = problems.get(text.reason, 0) + 1
            else:
                found = True
                yield text
    if not found:
        why = f": {first.reason}{', ' + first.detail if first.detail else ''}" if first else ""
        raise DataError(f"no text in {', '.join(specs)}{why}")
