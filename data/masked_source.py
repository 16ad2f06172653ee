"""Samples for masked language modelling, made from those for causal language modelling.

Of the tokens chosen to be predicted, 80% are replaced by the mask token, 10% by a random token, and 10% stay
(Devlin et al. 2018, section 3.1). The choice is a function of (seed, place in the run's order) alone: the same on every
mesh and after every resumption, and another one in every epoch (Liu et al. 2019, section 4.1).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from megatron_ds.data.gpt_dataset import TextSource
from megatron_ds.data.gpt_sources import GPTSources
from megatron_ds.data.samples import Batch
from megatron_ds.data.tokenizers import load_tokenizer
from megatron_ds.errors import DataError

_REPLACED, _RANDOM = 0.8, 0.1  # of the chosen tokens
# So that sample k of the run and row k of the file are not masked alike.
_BY_PLACE, _BY_ROW = 1, 2


@dataclass
class MaskedSource:
    """A :class:`~megatron_ds.data.gpt_dataset.TextSource` that masks another one's tokens.

    ``labels`` are the tokens themselves, not the next ones, and ``loss_mask`` is True where one was chosen.

    Args:
        source: where tokens come from; its labels and loss mask are not used.
        mask_id: what replaces a token.
        vocab_size: random tokens are below it.
        probability: of a token to be chosen.
        never: ids that are not chosen, such as the one that ends a document.

    Raises:
        DataError: a mask id that the vocabulary does not hold.
    """

    source: TextSource
    mask_id: int
    vocab_size: int
    probability: float = 0.15
    never: Sequence[int] = ()
    seed: int = 0
    sequence_length: int = field(init=False)

    def __post_init__(self) -> None:
        if not 0 <= self.mask_id < self.vocab_size:
            raise DataError(f"data.mask_token={self.mask_id} is not one of the ids 0 to {self.vocab_size - 1}")
        self.sequence_length = self.source.sequence_length

    def __len__(self) -> int:
        return len(self.source)

    def batch(self, indices: npt.ArrayLike) -> Batch:
        return self._masked(self.source.batch(indices), _BY_PLACE, indices)

    def rows(self, rows: npt.ArrayLike) -> Batch:
        return self._masked(self.source.rows(rows), _BY_ROW, rows)

    def _masked(self, batch: Batch, kind: int, numbers: npt.ArrayLike) -> Batch:
        text = batch["tokens"]
        tokens, chosen, never = text.copy(), np.empty(text.shape, bool), [self.mask_id, *self.never]
        for i, number in enumerate(np.asarray(numbers, np.int64).tolist()):
            chance = np.random.default_rng((self.seed, kind, number))
            choice, fate = chance.random((2, self.sequence_length))
            chosen[i] = (choice < self.probability) & ~np.isin(text[i], never)
            others = chance.integers(self.vocab_size, size=self.sequence_length)
            changed = np.where(fate < _REPLACED, self.mask_id, np.where(fate < _REPLACED + _RANDOM, others, text[i]))
            tokens[i] = np.where(chosen[i], changed, text[i])
        return {**batch, "tokens": tokens, "labels": text, "loss_mask": chosen}


def mask_sources(
    sources: GPTSources,
    *,
    mask_id: int | None,
    probability: float,
    vocab_size: int,
    seed: int,
    tokenizer: str | None = None,
) -> GPTSources:
    """The samples of every split, masked.

    Args:
        mask_id: what replaces a token; None: the tokenizer's own mask token.

    Raises:
        DataError: there is no mask token, or the vocabulary does not hold it.
    """
    loaded = None if tokenizer is None else load_tokenizer(tokenizer)
    if mask_id is None and loaded is not None:
        mask_id = loaded.mask_id
    if mask_id is None:
        whose = "no tokenizer is given" if loaded is None else f"the tokenizer {tokenizer} has no mask token"
        raise DataError(f"data.mask_token is not set and {whose}; set it to the id that replaces masked tokens")
    never = () if loaded is None else tuple(i for i in (loaded.eod_id, loaded.bos_id) if i is not None)

    masked = functools.partial(
        MaskedSource, mask_id=mask_id, vocab_size=vocab_size, probability=probability, never=never, seed=seed
    )
    valid = None if sources.valid is None else masked(sources.valid)
    return replace(sources, train=masked(sources.train), valid=valid)
