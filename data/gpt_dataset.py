"""Samples for causal language modelling: documents laid end to end and cut every ``sequence_length`` tokens.

Row ``k`` of a range of documents is tokens ``k * s`` to ``k * s + s`` (both included: ``s`` inputs and the last
target) of their concatenation in file order; what does not fill a last row is not used. So a row is one contiguous
read, no index is built for any number of documents, and the documents inside a row are found by bisection in the
mapped index (:mod:`megatron_ds.data.indexed`). The *order* of the rows is a keyed permutation per epoch
(:mod:`megatron_ds.data.order`).

Shape legend: ``b`` samples, ``s`` sequence length.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megatron_ds.data.fim import FillInTheMiddle
from megatron_ds.data.indexed import IndexedDataset
from megatron_ds.data.order import key, order
from megatron_ds.data.samples import Batch, SampleSource
from megatron_ds.errors import DataError

DocumentRange = tuple[int, int]
"""Documents ``start <= i < stop``."""


class TextSource(SampleSource, Protocol):
    """Samples of text: ``tokens``, ``labels`` and ``position_ids`` int64 [b, s], ``loss_mask`` bool [b, s], with
    document masking also ``document_ids`` int64 [b, s]."""

    sequence_length: int


def leave_out(batch: Batch, real: npt.NDArray[np.bool_]) -> None:
    """Let no token count of the samples that are not ``real`` (bool [b])."""
    batch["loss_mask"] &= real[:, None]


class GPTDataset:
    """Packed samples of ``sequence_length + 1`` tokens from a range of documents.

    Args:
        indexed: the tokens.
        sequence_length: ``s``, tokens of input per sample.
        documents: ``(start, stop)`` document range; None for all.
        seed: of the sample order.
        document_masking: also give ``document_ids`` (0, 1, ... within the row), for attention that stays inside a
            document; ``position_ids`` start again at 0 with each document (otherwise they run 0..s-1); and the
            prediction of a document's first token from the one before it does not count.
        fim: rearrange each document for fill-in-the-middle, the same on every mesh and after a resume.

    Raises:
        DataError: the range has fewer than ``sequence_length + 1`` tokens, or the dataset holds no integers.
    """

    def __init__(
        self,
        indexed: IndexedDataset,
        sequence_length: int,
        documents: DocumentRange | None = None,
        seed: int = 0,
        document_masking: bool = False,
        fim: FillInTheMiddle | None = None,
    ):
        if indexed.dtype.kind not in "iu":
            raise DataError(f"{indexed.bin_path} holds {indexed.dtype.name} values, not token ids")
        if sequence_length < 1:
            raise DataError(f"sequence_length={sequence_length} must be at least 1")
        start, stop = documents if documents is not None else (0, indexed.num_documents)
        if not 0 <= start < stop <= indexed.num_documents:
            raise DataError(
                f"documents {start} to {stop} were asked for, but {indexed.prefix} has 0 to {indexed.num_documents}"
            )
        self.indexed, self.sequence_length, self.seed = indexed, sequence_length, seed
        self.documents, self.document_masking, self.fim = (start, stop), document_masking, fim
        self.first_token = indexed.document_start(start)
        self.num_tokens = indexed.document_start(stop) - self.first_token
        self._num_rows = (self.num_tokens - 1) // sequence_length
        if self._num_rows < 1:
            raise DataError(
                f"{indexed.prefix} has {self.num_tokens} tokens in documents {start} to {stop}, but one sample takes "
                f"sequence_length + 1 = {sequence_length + 1}: use sequence_length <= {max(self.num_tokens - 1, 1)}, "
                "or more data"
            )

    def __len__(self) -> int:
        """Rows of one epoch."""
        return self._num_rows

    def batch(self, indices: npt.ArrayLike) -> Batch:
        places = np.asarray(indices, np.int64).ravel()
        return self._rows(order(self.seed, places, self._num_rows), places)

    def rows(self, rows: npt.ArrayLike) -> Batch:
        wanted = np.asarray(rows, np.int64).ravel()
        if wanted.size and not 0 <= int(wanted.min()) <= int(wanted.max()) < self._num_rows:
            raise IndexError(f"rows {wanted.min()} to {wanted.max()} of {self._num_rows} in {self.indexed.prefix}")
        return self._rows(wanted, -1 - wanted)

    def _rows(self, rows: npt.NDArray[np.int64], keys: npt.NDArray[np.int64]) -> Batch:
        """``keys``: of random numbers. In a run other ones each epoch, in each evaluation the same."""
        windows = np.empty((rows.size, self.sequence_length + 1), np.int64)
        for i, row in enumerate(rows.tolist()):
            windows[i] = self.window(row)
        starts = list(map(self.document_starts, rows.tolist())) if self.document_masking or self.fim else []
        if self.fim is not None:
            for i, place in enumerate(keys.tolist()):
                draw = functools.partial(key, self.seed, place)
                windows[i], starts[i] = self.fim.rearrange_row(windows[i], starts[i], draw)
        return assemble(windows, starts if self.document_masking else None)

    def window(self, row: int) -> npt.NDArray:
        """The tokens of a row with its last target ``[s + 1]``, as they are stored."""
        at = self.first_token + row * self.sequence_length
        tokens: npt.NDArray = self.indexed.tokens[at : at + self.sequence_length + 1]
        return tokens

    def document_starts(self, row: int) -> npt.NDArray[np.int64]:
        """Where documents start within a row: sorted places in ``1..s`` (0 is not listed, ``s`` is the last target).

        Documents without tokens start nowhere.
        """
        s = self.sequence_length
        begin = self.first_token + row * s
        document = self.indexed.document_of(begin) + 1
        starts: list[int] = []
        while document < self.documents[1] and (start := self.indexed.document_start(document) - begin) <= s:
            if start > 0 and (not starts or start > starts[-1]):
                starts.append(start)
            document += 1
        return np.array(starts, np.int64)


def assemble(windows: npt.NDArray[np.int64], starts: Iterable[npt.NDArray[np.int64]] | None = None) -> Batch:
    """A batch from ``windows [b, s + 1]``; with document masking where they have ``starts`` of documents, sorted places
    in ``1..s``."""
    b, s = windows.shape[0], windows.shape[1] - 1
    batch = {
        # Copies: a view of the window would be no contiguous tensor.
        "tokens": np.ascontiguousarray(windows[:, :-1]),
        "labels": np.ascontiguousarray(windows[:, 1:]),
        "loss_mask": np.ones((b, s), bool),
        "position_ids": np.tile(np.arange(s, dtype=np.int64), (b, 1)),
    }
    if starts is not None:
        first = np.zeros((b, s), np.int64)
        for i, places in enumerate(starts):
            inside = places[places < s]
            batch["loss_mask"][i, places - 1] = False
            first[i, inside] = 1
            # Each token's position is its distance from the last start at or before it.
            last_start = np.zeros(s, np.int64)
            last_start[inside] = inside
            batch["position_ids"][i] -= np.maximum.accumulate(last_start)
        batch["document_ids"] = np.cumsum(first, axis=1)
    return batch


@dataclass
class SyntheticDataset:
    """A :class:`TextSource` of uniform random tokens, for measuring speed and for tests: sample k is a function of
    (seed, k) alone, and an epoch is 2^20 of them."""

    vocab_size: int
    sequence_length: int
    seed: int = 0

    def __len__(self) -> int:
        return 1 << 20

    def batch(self, indices: npt.ArrayLike) -> Batch:
        return self.rows(indices)

    def rows(self, rows: npt.ArrayLike) -> Batch:
        wanted, shape = np.asarray(rows, np.int64), self.sequence_length + 1
        texts = [np.random.default_rng((self.seed, k)).integers(self.vocab_size, size=shape) for k in wanted.tolist()]
        return assemble(np.stack(texts))
