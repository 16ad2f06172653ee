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
from typing import Literal

from megatron_ds.data.chat import load_template, split_markers
from megatron_ds.data.cli import run
from megatron_ds.data.indexed import strip_suffix
from megatron_ds.data.part_writer import PreprocessOptions
from megatron_ds.data.parts import describe_problems
from megatron_ds.data.preprocess import preprocess
from megatron_ds.data.source_types import SourceOptions, TxtDocuments
from megatron_ds.data.tokenizers import load_tokenizer


@dataclass(frozen=True)
class PreprocessData:
    input: list[str]
    """Files (.jsonl, .txt, .parquet; .gz and .zst of the text ones), folders of them, saved `datasets`, hub:NAME."""
    tokenizer: str
    """A folder or tokenizer.json of Hugging Face tokenizers, a SentencePiece .model, a .tiktoken
    file, or the word bytes."""
    output_prefix: Path
    """Path of the result without its suffix."""
    key: str = "text"
    """The key of the text in a JSON record, or the column of a table."""
    append_eod: bool = False
    """End each document with the tokenizer's end-of-document token, unless it ends with one already."""
    prepend_bos: bool = False
    """Begin each document with the tokenizer's begin-of-sequence token, unless it begins with one already."""
    workers: int | None = None
    """Worker processes. By default one a core."""
    on_error: Literal["skip", "fatal"] = "skip"
    """Bad records (invalid JSON, missing key, invalid UTF-8, empty, refused by tokenizer or chat template): leave them
    out and list them, or stop."""
    txt_documents: TxtDocuments = "file"
    """What one document of a .txt is: the file, a line, or a paragraph (blank lines between)."""
    conversations: bool = False
    """The value of the key is a list of messages (role and content): learn the assistant's answers alone."""
    chat_template: str | None = None
    """How conversations are written: a Jinja file, or chatml. By default the tokenizer's own template."""
    dataset_split: str = "train"
    """Which split of a saved or hub dataset."""
    restart: bool = False
    """Throw away what an interrupted run with this prefix has done."""
    quiet: bool = False
    """No progress bar."""


def main(options: PreprocessData) -> None:
    start = time.perf_counter()
    tokenizer = load_tokenizer(options.tokenizer)
    print(f"tokenizer: {options.tokenizer}, encoded by {tokenizer.encoder}")
    if options.append_eod and tokenizer.eod_id is not None:
        print(f"end of document: {tokenizer.special['eos_token']!r}, id {tokenizer.eod_id} ({tokenizer.eod_origin})")
    if options.conversations:
        template = load_template(options.chat_template, options.tokenizer, tokenizer.special)
        if cut := split_markers(template, tokenizer):
            print(
                f"warning: {', '.join(cut)} of the chat template are no tokens of this tokenizer: each is cut into "
                f"pieces. Train it with --special-tokens {' '.join(map(repr, cut))}, or use the template that belongs "
                "to it",
                file=sys.stderr,
            )
    counts = preprocess(
        options.input,
        options.output_prefix,
        PreprocessOptions(
            tokenizer=options.tokenizer,
            append_eod=options.append_eod,
            prepend_bos=options.prepend_bos,
            on_error=options.on_error,
            source=SourceOptions(options.key, options.txt_documents, options.dataset_split, options.conversations),
            chat_template=options.chat_template,
        ),
        options.workers,
        options.restart,
        show_progress=not options.quiet,
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
