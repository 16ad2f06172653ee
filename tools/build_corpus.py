"""Write a corpus of real text without a download: the Python standard library's own source, as JSON lines.

python tools/build_corpus.py --output runs/corpus.jsonl --max-megabytes 8
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_ds.data.cli import run
from megatron_ds.data.corpus import build_corpus


@dataclass(frozen=True)
class BuildCorpus:
    output: Path
    """The .jsonl to write: one line a source file, with keys text and path."""
    max_megabytes: float | None = None
    """Stop before the text exceeds this many MB (10^6 bytes); files are taken evenly. By default all, about 31 MB."""
    source: Path | None = None
    """Folder to read. By default the standard library of the running Python."""
    suffix: str = ".py"
    """Which files to take."""


def main(options: BuildCorpus) -> None:
    summary = build_corpus(options.output, options.max_megabytes, options.source, options.suffix)
    print(
        f"{options.output}: {summary.documents:,} documents, {summary.text_bytes / 1e6:.1f} MB of text "
        f"({summary.skipped} files empty or not UTF-8 were left out)"
    )


if __name__ == "__main__":
    run(main, BuildCorpus, __doc__)
