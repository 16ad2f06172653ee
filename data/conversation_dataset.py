"""Samples for supervised fine-tuning: whole conversations packed into rows, the loss on the answers alone.

Conversations are packed best-fit decreasing (Johnson, 1973): the longest first, each into the row that it fills best;
what is left of a row is padding. A conversation of ``n`` tokens takes ``n - 1`` places (its last token is only a
target), never continues in the next row, and neither sees nor predicts its neighbours: positions restart,
``document_ids`` differ, and no target crosses a border. A longer conversation than a row is cut at its end; one with
nothing to learn in what remains is left out.

Shape legend: ``b`` samples, ``s`` sequence length, ``c`` conversations that are used, ``r`` rows.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ds.data.cache import cached_arrays
from megatron_ds.data.dataset_files import MASK_SUFFIX, CheckedArray, file_of
from megatron_ds.data.gpt_dataset import DocumentRange
from megatron_ds.data.indexed import IndexedDataset
from megatron_ds.data.order import order
from megatron_ds.data.samples import Batch
from megatron_ds.data.verify import dataset_identity
from megatron_ds.errors import DataError

CHUNK_TOKENS = 1 << 24
FORMAT = 2


class ConversationDataset:
    """A :class:`~megatron_ds.data.gpt_dataset.TextSource` of packed conversations.

    Args:
        indexed: tokens made by preprocessing with ``conversations``; ``PREFIX.loss_mask`` lies beside them.
        sequence_length: ``s``.
        documents: ``(start, stop)`` range; None for all.
        seed: of the row order.
        cache_dir: where the packing is kept instead of beside the dataset.

    Attributes:
        truncated, left_out: conversations cut at a row's length; those with nothing to learn.

    Raises:
        DataError: no loss mask, one of another size than the tokens, or nothing to learn anywhere.
    """

    def __init__(
        self,
        indexed: IndexedDataset,
        sequence_length: int,
        documents: DocumentRange | None = None,
        seed: int = 0,
        cache_dir: Path | None = None,
    ):
        self.indexed, self.sequence_length, self.seed = indexed, sequence_length, seed
        self.documents = documents if documents is not None else (0, indexed.num_documents)
        path = file_of(indexed.prefix, MASK_SUFFIX)
        if not path.is_file():
            raise DataError(
                f"{path} does not exist: {indexed.prefix} holds texts, not conversations. Preprocess them with "
                "--conversations"
            )
        if (found := path.stat().st_size) != indexed.num_tokens:
            raise DataError(f"{path} has {found} bytes, but there are {indexed.num_tokens} tokens: copy it again")
        sums = indexed.sums.get(MASK_SUFFIX)
        self.mask: Any = np.memmap(path, np.uint8, "r") if sums is None else CheckedArray(path, np.uint8, sums)
        start, stop = self.documents
        key = {
            "format": FORMAT,
            "dataset": dataset_identity(indexed),
            "documents": [start, stop],
            "sequence_length": sequence_length,
        }
        name = f"{indexed.prefix}.{start}-{stop}-{sequence_length}.packing"
        packing = cached_arrays(Path(name), key, self._pack, cache_dir)
        self._conversations, self._row_starts = packing["conversations"], packing["row_starts"]
        self.truncated, self.left_out = (int(count) for count in packing["counts"])
        if not self._conversations.size:
            raise DataError(
                f"{indexed.prefix} has nothing to learn in its {stop - start} conversations {start} to {stop}: no "
                f"answer begins within sequence_length={sequence_length} tokens"
            )

    def _pack(self) -> dict[str, npt.NDArray]:
        """``conversations`` i64[c]: which are used, row by row; ``row_starts`` i64[r + 1]: the first of each row."""
        kept, costs = [], []
        truncated = left_out = 0
        at, stop = self.documents
        while at < stop:
            # As many documents as have about CHUNK_TOKENS tokens together, at least one.
            end = self.indexed.document_of(
                min(self.indexed.document_start(at) + CHUNK_TOKENS, self.indexed.num_tokens - 1)
            )
            end = min(max(end, at + 1), stop)
            lengths = self.indexed.document_lengths(at, end)
            learnt = self._learnt(at, lengths)
            used = np.minimum(lengths - 1, self.sequence_length)
            good = learnt > 0
            left_out += int((~good).sum())
            truncated += int((good & (lengths - 1 > self.sequence_length)).sum())
            kept.append(at + np.flatnonzero(good))
            costs.append(used[good])
            at = end
        conversations, cost = np.concatenate(kept).astype(np.int64), np.concatenate(costs)
        places, starts = best_fit_decreasing(cost, self.sequence_length)
        return {
            "conversations": conversations[places],
            "row_starts": starts,
            "counts": np.array([truncated, left_out], np.int64),
        }

    def _learnt(self, first: int, lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """How many targets that count each document has within its first ``s + 1`` tokens; the first is no target."""
        begin = self.indexed.document_start(first)
        total = int(lengths.sum())
        sums = np.concatenate([[0], np.cumsum(self.mask[begin : begin + total], dtype=np.int64)])
        starts = np.cumsum(lengths) - lengths
        ends = starts + np.minimum(lengths, self.sequence_length + 1)
        learnt: npt.NDArray[np.int64] = sums[ends] - sums[np.minimum(starts + 1, ends)]
        return learnt

    def describe_losses(self) -> str:
        """What of the conversations is not trained on, in one line; empty if nothing."""
        start, stop = self.documents
        cut = f"{self.truncated:,} are longer than sequence_length={self.sequence_length} and cut at their end"
        out = f"{self.left_out:,} have nothing to learn within it and are left out"
        lost = [text for count, text in ((self.truncated, cut), (self.left_out, out)) if count]
        return f"{self.indexed.prefix}: of {stop - start:,} conversations {', '.join(lost)}" if lost else ""

    def __len__(self) -> int:
        return int(self._row_starts.size) - 1

    def batch(self, indices: npt.ArrayLike) -> Batch:
        return self.rows(order(self.seed, indices, len(self)))

    def rows(self, rows: npt.ArrayLike) -> Batch:
        s = self.sequence_length
        wanted = np.asarray(rows, np.int64).ravel()
        if wanted.size and not 0 <= int(wanted.min()) <= int(wanted.max()) < len(self):
            raise IndexError(f"rows {wanted.min()} to {wanted.max()} of {len(self)} in {self.indexed.prefix}")
        shape = (wanted.size, s)
        batch = {
            "tokens": np.zeros(shape, np.int64),
            "labels": np.zeros(shape, np.int64),
            "loss_mask": np.zeros(shape, bool),
            "position_ids": np.zeros(shape, np.int64),
            "document_ids": np.zeros(shape, np.int64),
        }
        for i, row in enumerate(wanted.tolist()):
            at = 0
            conversations = self._conversations[self._row_starts[row] : self._row_starts[row + 1]].tolist()
            for number, conversation in enumerate(conversations):
                begin = self.indexed.document_start(conversation)
                size = min(self.indexed.document_start(conversation + 1) - begin - 1, s)
                place = slice(at, at + size)
                batch["tokens"][i, place] = self.indexed.tokens[begin : begin + size]
                batch["labels"][i, place] = self.indexed.tokens[begin + 1 : begin + size + 1]
                batch["loss_mask"][i, place] = self.mask[begin + 1 : begin + size + 1] != 0
                batch["position_ids"][i, place] = np.arange(size)
                batch["document_ids"][i, place] = number
                at += size
            # The padding is a document of its own, so that its attention has something to look at.
            batch["position_ids"][i, at:] = np.arange(s - at)
            batch["document_ids"][i, at:] = len(conversations)
        return batch


def best_fit_decreasing(
    costs: npt.NDArray[np.int64], capacity: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Pack items of ``costs [c]`` (1 to ``capacity`` each) into rows: (items row by row i64[c], row starts i64[r + 1]).

    Rows are in the order of their first item, and the items of a row in theirs. A million items take about a second.
    """
    row_of = np.empty(costs.size, np.int64)
    rows_with: list[list[int]] = [[] for _ in range(capacity + 1)]  # by the room that is left in them
    rooms: list[int] = []  # those for which there is a row, ascending
    rows = 0
    sizes = costs.tolist()
    for item in np.argsort(-costs, kind="stable").tolist():
        at = bisect_left(rooms, sizes[item])
        if at < len(rooms):
            room = rooms[at]
            row = rows_with[room].pop()
            if not rows_with[room]:
                del rooms[at]
        else:
            room, row, rows = capacity, rows, rows + 1
        row_of[item] = row
        if left := room - sizes[item]:
            if not rows_with[left]:
                insort(rooms, left)
            rows_with[left].append(row)
    first = np.full(rows, costs.size)
    np.minimum.at(first, row_of, np.arange(costs.size))
    rank = np.argsort(np.argsort(first))[row_of]
    items = np.argsort(rank, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(rank, minlength=rows))])
    return items.astype(np.int64), starts.astype(np.int64)
