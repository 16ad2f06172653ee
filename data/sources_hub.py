"""Datasets of the Hugging Face hub, streamed: ``hub:NAME`` or ``hub:NAME:CONFIG``, with ``dataset_split``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from megatron_ds.data.sources import STREAM_BLOCK, Block, Input, Slice, SourceOptions
from megatron_ds.errors import DataError


def open_hub(item: Input, options: SourceOptions) -> Any:
    """The dataset as an iterable of records; nothing is stored."""
    import datasets

    name, _, config = item.path.removeprefix("hub:").partition(":")
    try:
        return datasets.load_dataset(name, config or None, split=options.dataset_split, streaming=True)
    except Exception as error:  # datasets, huggingface_hub and the network each have their own
        raise DataError(
            f"{item.path} (split {options.dataset_split!r}) cannot be streamed: {type(error).__name__}: {error}"
        ) from None


def hub_blocks(number: int, item: Input, options: SourceOptions) -> Iterator[Block]:
    """Records as JSON lines, so that they are read like any compressed `.jsonl`."""
    lines: list[bytes] = []
    size = at = block = row = 0
    for record in open_hub(item, options):
        line = json.dumps({options.key: record[options.key]} if options.key in record else {}).encode() + b"\n"
        lines.append(line)
        size += len(line)
        if size >= STREAM_BLOCK:
            yield Block(number, block, (Slice(number, at, at + size, row),), 0, b"".join(lines))
            at, block, row = at + size, block + 1, row + len(lines)
            lines, size = [], 0
    if lines:
        yield Block(number, block, (Slice(number, at, at + size, row),), 0, b"".join(lines))
