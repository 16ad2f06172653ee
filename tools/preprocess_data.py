"""Tokenise a corpus into PREFIX.bin and PREFIX.idx, the files that training reads.

    python tools/preprocess_data.py --input corpus.jsonl --tokenizer tokenizer --output-prefix runs/data --append-eod
    python tools/preprocess_data.py --input part1.jsonl.zst part2.parquet texts/ --tokenizer bytes --output-prefix all

Stopped at any moment, it continues when the same command is run again. PREFIX.manifest.json says what the dataset was
made from; bad records go to PREFIX.bad.jsonl with file and line.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from megatron_ds.data.chat import load_template, split_markers
from megatron_ds.data.cli import run
from megatron_ds.data.indexed import strip_suffix
from megatron_ds.data.parts import PreprocessOptions
from megatron_ds.data.preprocess import preprocess
from megatron_ds.data.source_text import describe_problems
from megatron_ds.data.tokenizers import load_tokenizer


@dataclass(frozen=True)
class PreprocessData:
    input: list[str]
    """Files (.jsonl, .txt, .parquet; .gz and .zst of the text ones), folders of them, saved `datasets`, hub:NAME."""
    output_prefix: Path
    """Path of the result without its suffix."""
    making: PreprocessOptions
    workers: int | None = None
    """Worker processes. By default one a core."""
    restart: bool = False
    """Throw away what an interrupted run with this prefix has done."""
    quiet: bool = False
    """No progress bar."""


def main(options: PreprocessData) -> None:
    start = time.perf_counter()
    making = options.making
    tokenizer = load_tokenizer(making.tokenizer)
    print(f"tokenizer: {making.tokenizer}, encoded by {tokenizer.encoder}")
    if tokenizer.drops:
        print(
            "warning: this BPE has neither a token for unknown characters nor all bytes: what its vocabulary lacks "
            "will be missing in the data",
            file=sys.stderr,
        )
    if tokenizer.eod_id is not None and (making.append_eod or not making.source.conversations):
        end = f"{tokenizer.special['eos_token']!r}, id {tokenizer.eod_id} ({tokenizer.eod_origin})"
        none = f"none is added: documents run into each other; --append-eod ends each with {end}"
        print(f"end of document: {end if making.append_eod else none}")
    if making.source.conversations:
        template = load_template(making.chat_template, making.tokenizer, tokenizer.special)
        if cut := split_markers(template, tokenizer):
            print(
                f"warning: {', '.join(cut)} of the chat template are no tokens of this tokenizer: each is cut into "
                f"pieces. Train it with --special-tokens {' '.join(map(repr, cut))}, add them to it as special "
                "tokens, or use the template that belongs to it",
                file=sys.stderr,
            )
    counts = preprocess(
        options.input, options.output_prefix, making, options.workers, options.restart, show_progress=not options.quiet
    )
    seconds, prefix = time.perf_counter() - start, strip_suffix(options.output_prefix)
    print(
        f"{prefix}.bin/.idx: {counts.documents:,} documents, {counts.tokens:,} tokens from "
        f"{counts.text_bytes / 1e6:.1f} MB of text in {seconds:.1f} s ({counts.text_bytes / 1e6 / seconds:.1f} MB/s)"
    )
    if counts.problems:
        print(f"left out: {describe_problems(counts.problems)}; see {prefix}.bad.jsonl")


if __name__ == "__main__":
    run(main, PreprocessData, __doc__)
