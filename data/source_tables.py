"""Tables as inputs: parquet files, datasets saved by `datasets`, and datasets streamed from the Hugging Face hub."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

from megatron_ds.data.source_text import STREAM_BLOCK, Block, Input, Problem, Record, Slice, SourceOptions, check_record
from megatron_ds.errors import DataError, RaisedAs, nearest


def plan_parquet(number: int, item: Input, options: SourceOptions, size: int) -> Iterator[Block]:
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

    with RaisedAs(DataError, f"{item.path} is not a readable parquet file", pyarrow.ArrowInvalid, OSError):
        file = pyarrow.parquet.ParquetFile(item.path, page_checksum_verification=True)
    _check_column(item, options, file.schema_arrow.names)
    return file


def _check_column(item: Input, options: SourceOptions, columns: list[str]) -> None:
    if options.key not in columns:
        raise DataError(f"{item.path} has no column {options.key!r}{nearest(options.key, columns)}; it has {columns}")
    if (count := columns.count(options.key)) > 1:
        raise DataError(f"{item.path} has {count} columns {options.key!r}; rename those that are not meant")


def read_parquet(item: Input, part: Slice, options: SourceOptions) -> Iterator[Record]:
    groups = list(range(part.start, part.stop))
    file = _open_parquet(item, options)
    names = options.columns(file.schema_arrow.names)
    batches = file.iter_batches(batch_size=256, row_groups=groups, columns=names)
    rows = (values for batch in batches for values in zip(*(batch.column(name) for name in names)))
    for number, values in enumerate(rows):
        yield number, _checked(functools.partial(_row, names, values), options)


def _row(names: list[str], values: tuple[Any, ...]) -> dict[str, Any]:
    return {name: value.as_py() for name, value in zip(names, values)}


def _present(row: dict[str, Any], options: SourceOptions) -> dict[str, Any]:
    """A row of conversations without the nulls inside its values: a column gives each object the keys of all others.

    Otherwise a call would be learnt with the arguments of other functions, each of them null.
    """
    return {name: _without_nulls(value) for name, value in row.items()} if options.conversations else row


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _checked(read: Callable[[], dict[str, Any]], options: SourceOptions) -> str | Problem:
    """The text of a row; a table may hold as text what is none, which shows when the values are read."""
    try:
        return check_record(_present(read(), options), options)
    except UnicodeDecodeError as error:
        return Problem("invalid UTF-8", str(error))


def _open_arrow(item: Input, options: SourceOptions) -> Any:
    import datasets

    with RaisedAs(DataError, f"{item.path} is not a dataset saved by `datasets`", Exception):
        dataset = datasets.load_from_disk(item.path)
    if isinstance(dataset, datasets.DatasetDict):
        if options.dataset_split not in dataset:
            raise DataError(
                f"{item.path} has no split {options.dataset_split!r}{nearest(options.dataset_split, dataset)}; it has "
                f"{sorted(dataset)}"
            )
        dataset = dataset[options.dataset_split]
    _check_column(item, options, dataset.column_names)
    return dataset.with_format(None)  # saved with one, it may show other columns alone, or tensors


def plan_arrow(number: int, item: Input, options: SourceOptions, size: int) -> Iterator[Block]:
    rows = len(_open_arrow(item, options))
    step = max(1, rows * size // max(item.size, 1)) if rows else 1
    for block, start in enumerate(range(0, rows, step)):
        stop = min(start + step, rows)
        yield Block(number, block, (Slice(number, start, stop, start),), round(item.size * (stop - start) / rows))


def read_arrow(item: Input, part: Slice, options: SourceOptions) -> Iterator[Record]:
    dataset = _open_arrow(item, options)
    names = options.columns(dataset.column_names)
    dataset = dataset.select_columns(names)
    for start in range(part.start, part.stop, 256):
        stop = min(start + 256, part.stop)
        readers: list[Callable[[], dict[str, Any]]]
        try:
            columns = dataset[start:stop]
            readers = [functools.partial(dict, zip(names, row)) for row in zip(*(columns[name] for name in names))]
        except UnicodeDecodeError:  # one of them is no text: which?
            readers = [functools.partial(dataset.__getitem__, at) for at in range(start, stop)]
        for number, read in enumerate(readers, start - part.start):
            yield number, _checked(read, options)


def hub_revision(item: Input) -> str:
    """The commit of a hub dataset that a run reads, so that a continued run notices another one.

    Raises:
        DataError: the hub does not answer, or has no such dataset.
    """
    import huggingface_hub

    name = _hub_name(item)[0]
    try:
        return str(huggingface_hub.HfApi().dataset_info(name).sha)
    except Exception as error:  # huggingface_hub and the network each have their own
        raise DataError(f"{item.path} was not found on the hub: {type(error).__name__}: {error}") from None


def hub_lines(item: Input, options: SourceOptions) -> Iterator[tuple[bytes, int]]:
    """Records as JSON lines, some MB at a time, to be read like those of any compressed `.jsonl`; nothing is stored."""
    import datasets

    name, config = _hub_name(item)
    split, revision = options.dataset_split, hub_revision(item)
    lines: list[bytes] = []
    size = 0
    try:
        for record in datasets.load_dataset(name, config, split=split, streaming=True, revision=revision):
            value = {name: record[name] for name in options.columns(record) if name in record}
            lines.append(json.dumps(_present(value, options)).encode() + b"\n")
            size += len(lines[-1])
            if size >= STREAM_BLOCK:
                yield b"".join(lines), 0
                lines, size = [], 0
    except Exception as error:  # datasets, huggingface_hub and the network each have their own
        raise DataError(f"{item.path} (split {split!r}) cannot be streamed: {type(error).__name__}: {error}") from None
    yield b"".join(lines), 0


def _hub_name(item: Input) -> tuple[str, str | None]:
    name, _, config = item.path.removeprefix("hub:").partition(":")
    return name, config or None
