"""Merge datasets into one, by copying; nothing is tokenised again.

python tools/merge_datasets.py --input runs/part1 runs/part2 --output-prefix runs/all
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_ds.data.cli import run
from megatron_ds.data.indexed import strip_suffix
from megatron_ds.data.indexed_writer import merge_datasets


@dataclass(frozen=True)
class MergeDatasets:
    input: list[str]
    """Prefixes of the datasets, in the order they shall have: PREFIX.bin and PREFIX.idx are read."""
    output_prefix: Path
    """Path of the result without its suffix."""
    quiet: bool = False
    """No progress bar."""


def main(options: MergeDatasets) -> None:
    from tqdm import tqdm

    with tqdm(unit="B", unit_scale=True, desc="merge", disable=options.quiet) as bar:
        manifest = merge_datasets(options.input, options.output_prefix, lambda size: bar.update(size) and None)
    counts = manifest["counts"]
    prefix = strip_suffix(options.output_prefix)
    print(f"{prefix}.bin/.idx: {counts['documents']:,} documents, {counts['tokens']:,} tokens")


if __name__ == "__main__":
    run(main, MergeDatasets, __doc__)
