"""Two small corpora, of texts and of conversations, and how a run reads what is made of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_ds.data.gpt_sources import GPTSources, SampleOptions, open_sources
from megatron_ds.data.parts import PreprocessOptions
from megatron_ds.data.source_text import SourceOptions

TEXTS = [f"document {i}: {'word ' * (i % 40)}{chr(0x1F600 + i)}" for i in range(120)]
CHATS = [
    [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"answer {i} " * (1 + i % 5)}]
    for i in range(60)
]
PLAIN = PreprocessOptions("bytes", append_eod=True)
CONVERSATIONS = PreprocessOptions("bytes", source=SourceOptions("messages", conversations=True), chat_template="chatml")


def opened(prefix: Path, kind: str) -> GPTSources:
    options = SampleOptions(conversations=True) if kind == "chat" else SampleOptions()
    return open_sources(
        str(prefix), split="90,10,0", sequence_length=64, vocab_size=300, seed=3, tokenizer="bytes", options=options
    )


def read(found: GPTSources) -> list[list[int]]:
    """Every sample that a run could get."""
    rows = []
    for source in (found.train, found.valid):
        assert source is not None
        batch = source.rows(np.arange(len(source)))
        rows += [np.asarray(value).ravel().tolist() for _, value in sorted(batch.items())]
    return rows
