"""Train a tokenizer and write a folder that this library and `transformers` both load.

python tools/train_tokenizer.py --input runs/corpus.jsonl --output runs/tokenizer --vocab-size 8192
python tools/train_tokenizer.py --input books/ --output runs/sp --kind unigram --vocab-size 32000
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from megatron_ds.data.cli import run
from megatron_ds.data.tokenizer_training import Kind, train_tokenizer
from megatron_ds.data.tokenizers import load_tokenizer


@dataclass(frozen=True)
class TrainTokenizer:
    input: list[str]
    """Files (.jsonl, .txt, .parquet, also .gz and .zst of the text ones), folders of them, or saved datasets."""
    output: Path
    """The folder to write."""
    vocab_size: int = 8192
    """Entries of the vocabulary, special tokens included."""
    kind: Kind = "bpe"
    """bpe: byte-level, every text comes back exactly. unigram: SentencePiece. wordpiece: BERT's, lower-cased."""
    key: str = "text"
    """The key of the text in a record."""
    max_megabytes: float | None = None
    """Train on at most this many MB (10^6 bytes) of text; a sample of the corpus is enough."""
    special_tokens: tuple[str, ...] = ()
    """Further special tokens, e.g. the sentinels of fill-in-the-middle."""
    quiet: bool = False
    """No progress bars."""


def main(options: TrainTokenizer) -> None:
    start = time.perf_counter()
    folder = train_tokenizer(
        options.input,
        options.output,
        options.vocab_size,
        options.kind,
        options.key,
        options.max_megabytes,
        options.special_tokens,
        show_progress=not options.quiet,
        warn=print,
    )
    tokenizer = load_tokenizer(folder)
    print(f"{folder}: {options.kind} with {tokenizer.vocab_size:,} entries, {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    run(main, TrainTokenizer, __doc__)
