"""Show what is in a dataset: counts, how long its documents are, some of them, and whether its files are intact.

python tools/inspect_dataset.py runs/data --tokenizer runs/tokenizer --samples 3 --png lengths.png
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ds.data.cli import run
from megatron_ds.data.dataset_files import read_manifest
from megatron_ds.data.indexed import IndexedDataset
from megatron_ds.data.inspect import (
    draw_histogram,
    draw_histogram_png,
    length_histogram,
    sample_documents,
    show_document,
)
from megatron_ds.data.source_text import describe_problems
from megatron_ds.data.tokenizers import load_tokenizer
from megatron_ds.data.verify import verify

if TYPE_CHECKING:
    Positional = str
else:
    from tyro.conf import Positional

    Positional = Positional[str]


@dataclass(frozen=True)
class InspectDataset:
    prefix: Positional
    """Path of the dataset without its suffix."""
    tokenizer: str | None = None
    """Show samples as text, decoded by this tokenizer. By default the one that made the dataset, if it is there."""
    samples: int = 3
    """How many documents to show the beginning of."""
    seed: int = 0
    """Which documents these are."""
    tokens: int = 64
    """How many tokens of each to show."""
    png: Path | None = None
    """Also draw the histogram of lengths into this file."""
    check: bool = True
    """Read the whole dataset and compare its checksums with the manifest (remembered until a file changes)."""


def main(options: InspectDataset) -> None:
    dataset = IndexedDataset(options.prefix)
    manifest = read_manifest(dataset.prefix) or {}
    print(f"dataset    {dataset.prefix}.bin/.idx")
    size = dataset.num_tokens * dataset.dtype.itemsize
    print(f"tokens     {dataset.num_tokens:,} of {dataset.dtype.name} ({size / 1e6:,.1f} MB)")
    print(f"documents  {dataset.num_documents:,} of {dataset.num_sequences:,} sequences")
    if options.check:
        found = verify(dataset)
        compared = "as in the manifest" if manifest else "no manifest to compare with"
        print(f"ids        {found.min_id:,} to {found.max_id:,}")
        print(f"checksums  .bin {found.checksums['bin']}, .idx {found.checksums['idx']} (xxh3; {compared})")
    made = manifest.get("tokenizer")
    if made:
        print(f"tokenizer  {made['spec']}, {made['vocab_size']:,} entries")
    if problems := manifest.get("counts", {}).get("problems"):
        print(f"left out   {describe_problems(problems)}")
    histogram = length_histogram(dataset)
    print(f"\n{draw_histogram(histogram)}\n")
    if options.png is not None:
        draw_histogram_png(histogram, options.png, f"{dataset.num_documents:,} documents of {dataset.prefix}")
        print(f"wrote {options.png}\n")
    spec = options.tokenizer
    if spec is None and made and (made["spec"] == "bytes" or Path(made["spec"]).exists()):
        spec = made["spec"]
    tokenizer = load_tokenizer(spec) if spec is not None else None
    for document in sample_documents(dataset, options.samples, options.seed):
        print(show_document(dataset, document, tokenizer, options.tokens))


if __name__ == "__main__":
    run(main, InspectDataset, __doc__)
