"""What is in a dataset: counts, lengths of documents, samples of text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_ds.data.indexed import IndexedDataset
from megatron_ds.data.order import permute
from megatron_ds.data.tokenizer_base import Tokenizer
from megatron_ds.errors import DataError
from megatron_ds.files import replacing

CHUNK = 1 << 20


@dataclass(frozen=True)
class LengthHistogram:
    """Document lengths in bins of doubling width.

    Attributes:
        edges: int64 [n + 1]: bin i holds lengths ``edges[i] <= length < edges[i + 1]``: 0, 1, 2, 4, 8 and so on.
        documents, tokens: int64 [n], per bin.
        percentiles: {1: ..., 50: ..., 99: ...}, and so on, in tokens; exact up to :data:`CHUNK` documents, else
            from that many evenly spaced ones.
    """

    edges: npt.NDArray[np.int64]
    documents: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]
    shortest: int
    longest: int
    percentiles: dict[int, int]


def length_histogram(dataset: IndexedDataset) -> LengthHistogram:
    """One pass over the index, in chunks."""
    edges = np.concatenate([[0], 1 << np.arange(41, dtype=np.int64)])
    documents, tokens = np.zeros(edges.size - 1, np.int64), np.zeros(edges.size - 1, np.int64)
    shortest, longest = np.iinfo(np.int64).max, 0
    every = max(1, -(-dataset.num_documents // CHUNK))
    sampled = []
    for start in range(0, dataset.num_documents, CHUNK):
        lengths = dataset.document_lengths(start, min(start + CHUNK, dataset.num_documents))
        which = np.searchsorted(edges, lengths, "right") - 1
        documents += np.bincount(which, minlength=documents.size)
        tokens += np.bincount(which, weights=lengths, minlength=tokens.size).astype(np.int64)
        shortest, longest = min(shortest, int(lengths.min())), max(longest, int(lengths.max()))
        sampled.append(lengths[::every])
    wanted = (1, 10, 50, 90, 99)
    values = np.percentile(np.concatenate(sampled), wanted, method="nearest")
    first, last = int(np.flatnonzero(documents)[0]), int(np.flatnonzero(documents)[-1])
    used = slice(first, last + 1)
    percentiles = {name: int(value) for name, value in zip(wanted, values)}
    return LengthHistogram(edges[first : last + 2], documents[used], tokens[used], int(shortest), longest, percentiles)


def draw_histogram(histogram: LengthHistogram) -> str:
    """The histogram as text: one line a bin, bars by number of documents."""
    most = int(histogram.documents.max())
    lines = [f"{'tokens':>23}  {'documents':>12}  share of tokens"]
    total = max(int(histogram.tokens.sum()), 1)
    for low, high, documents, tokens in zip(
        histogram.edges[:-1], histogram.edges[1:], histogram.documents, histogram.tokens
    ):
        label = f"{low:,}" if high - low == 1 else f"{low:,} to {high - 1:,}"
        bar = "█" * round(50 * int(documents) / most) or ("▏" if documents else "")
        lines.append(f"{label:>23}  {documents:>12,}  {tokens / total:>6.1%}  {bar}")
    names = ", ".join(f"{name}% {value:,}" for name, value in histogram.percentiles.items())
    lines.append(f"shortest {histogram.shortest:,}, longest {histogram.longest:,}; shorter or equal: {names}")
    return "\n".join(lines)


def draw_histogram_png(histogram: LengthHistogram, path: Path, title: str) -> None:
    """Documents, and the share of tokens in them, by length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    places = np.arange(histogram.documents.size)
    axes.bar(places - 0.2, histogram.documents / histogram.documents.sum(), 0.4, label="share of documents")
    axes.bar(places + 0.2, histogram.tokens / max(histogram.tokens.sum(), 1), 0.4, label="share of tokens")
    axes.set_xticks(places, [f"{edge:,}" for edge in histogram.edges[:-1]], rotation=45, ha="right")
    axes.set_xlabel("tokens in a document, at least")
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.set_title(title)
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def sample_documents(dataset: IndexedDataset, count: int, seed: int = 0) -> list[int]:
    """Numbers of ``count`` documents drawn without replacement, in ascending order."""
    drawn = permute(np.arange(min(count, dataset.num_documents)), dataset.num_documents, seed)
    return sorted(drawn.tolist())


def show_document(dataset: IndexedDataset, document: int, tokenizer: Tokenizer | None, tokens: int = 64) -> str:
    """The beginning of a document: its ids, or their text where a tokenizer is given.

    Raises:
        DataError: the tokenizer has no such ids.
    """
    ids = dataset.document(document)
    begin = ids[:tokens].tolist()
    more = f" ... {ids.size - tokens:,} more tokens" if ids.size > tokens else ""
    if tokenizer is not None:
        if foreign := [i for i in begin if not 0 <= i < tokenizer.vocab_size]:
            raise DataError(
                f"document {document:,} has token id {foreign[0]}, and the tokenizer has {tokenizer.vocab_size:,} "
                "entries; give --tokenizer the one that made the data, or look at its counts alone with --samples 0"
            )
        return f"document {document:,} ({ids.size:,} tokens): {tokenizer.decode(begin)!r}{more}"
    return f"document {document:,} ({ids.size:,} tokens): {begin}{more}"
