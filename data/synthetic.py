"""Random tokens in place of a dataset, for measuring speed and for tests."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from megatron_ds.data.gpt_dataset import assemble
from megatron_ds.data.samples import Batch


class SyntheticDataset:
    """Uniform random tokens, sample k from (seed, k) alone. A :class:`~megatron_ds.data.gpt_dataset.TextSource`.

    Args:
        vocab_size: ids are 0..vocab_size-1.
        sequence_length: tokens of a sample.
        length: rows of one epoch, for evaluation.
    """

    def __init__(self, vocab_size: int, sequence_length: int, seed: int = 0, length: int = 1 << 20):
        self.vocab_size, self.sequence_length, self.seed, self.length = vocab_size, sequence_length, seed, length

    def __len__(self) -> int:
        return self.length

    def batch(self, indices: npt.ArrayLike) -> Batch:
        return self.rows(indices)

    def rows(self, rows: npt.ArrayLike) -> Batch:
        wanted, shape = np.asarray(rows, np.int64), self.sequence_length + 1
        texts = [np.random.default_rng((self.seed, k)).integers(self.vocab_size, size=shape) for k in wanted.tolist()]
        return assemble(np.stack(texts))
