"""Fill-in-the-middle: documents rearranged so that a causal model learns to write what is missing inside.

A document ``prefix + middle + suffix`` becomes, with ``<P>``, ``<S>``, ``<M>`` the three sentinel tokens,

* PSM: ``<P> prefix <S> suffix <M> middle``, or
* SPM: ``<P> <S> suffix <M> prefix middle``,

the two orders of Bavarian et al., "Efficient Training of Language Models to Fill in the Middle" (2022), section 3 (SPM
in its variant 2, which shares the sentinels with PSM). The cuts are uniform over places between tokens, as in its
token-level variant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_ds.data.order import mix
from megatron_ds.data.tokenizer_base import Tokenizer
from megatron_ds.errors import DataError

_UNIT = 1 << 53


@dataclass(frozen=True)
class FillInTheMiddle:
    """How documents are rearranged, anew each time they are seen.

    Args:
        rate: of documents that are rearranged. spm_rate: of those in SPM order.
        eod_id, bos_id: the tokens that end and begin documents, and stay there, if they have them.
    """

    prefix_id: int
    middle_id: int
    suffix_id: int
    rate: float = 0.5
    spm_rate: float = 0.5
    eod_id: int | None = None
    bos_id: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1 or not 0 <= self.spm_rate <= 1:
            raise DataError(f"rate={self.rate} and spm_rate={self.spm_rate} must lie between 0 and 1")
        if len({self.prefix_id, self.middle_id, self.suffix_id}) < 3:
            raise DataError(
                f"the sentinels prefix_id={self.prefix_id}, middle_id={self.middle_id} and suffix_id={self.suffix_id} "
                "must be three different tokens"
            )

    def rearrange_row(
        self, window: npt.NDArray[np.int64], starts: npt.NDArray[np.int64], draw: Callable[[int], int]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """A row, which has become longer by 3 tokens a rearranged document and is cut to its old length, and where
        documents start in it.

        Args:
            starts: where they start in ``window``. The parts of them that lie in it are rearranged one by one.
            draw: the random bits of a document by its number in the row.
        """
        new = []
        for number, piece in enumerate(np.split(window, starts)):
            start = int(piece.size > 0 and piece[0] == self.bos_id)
            stop = piece.size - int(piece.size > start and piece[-1] == self.eod_id)
            new += [np.concatenate([piece[:start], self.rearrange(piece[start:stop], draw(number)), piece[stop:]])]
        begins = np.cumsum([piece.size for piece in new])[:-1]
        return np.concatenate(new)[: window.size], begins[begins < window.size]

    def rearrange(self, tokens: npt.NDArray[np.int64], draw: int) -> npt.NDArray[np.int64]:
        """One document ``[n]``, or ``[n + 3]`` if it is rearranged; ``draw`` is 64 random bits, all that decides."""
        numbers = []
        for _ in range(4):
            draw = mix(draw)
            numbers.append((draw >> 11) / _UNIT)
        if tokens.size < 2 or numbers[0] >= self.rate:
            return tokens
        first, second = sorted(int(number * (tokens.size + 1)) for number in numbers[1:3])
        prefix, middle, suffix = tokens[:first], tokens[first:second], tokens[second:]
        if numbers[3] < self.spm_rate:
            parts = [[self.prefix_id, self.suffix_id], suffix, [self.middle_id], prefix, middle]
        else:
            parts = [[self.prefix_id], prefix, [self.suffix_id], suffix, [self.middle_id], middle]
        return np.concatenate([np.asarray(part, np.int64) for part in parts])


def sentinels(
    names: tuple[str, str, str], tokenizer: Tokenizer, vocab_size: int, rate: float, spm_rate: float
) -> FillInTheMiddle:
    """From the names of the prefix, middle and suffix sentinels, special tokens of the tokenizer.

    Raises:
        DataError: the tokenizer has no such token, an id that the model's vocabulary does not hold, or one twice.
    """
    ids: list[int] = []
    for name in names:
        if (found := tokenizer.token_id(name)) is None:
            raise DataError(
                f"the tokenizer has no token {name!r} for fill-in-the-middle; name tokens that it has, or train one "
                f"with tools/train_tokenizer.py --special-tokens {' '.join(names)}"
            )
        if found >= vocab_size:
            raise DataError(f"the sentinel {name!r} has the id {found}, but model.vocab_size={vocab_size}")
        ids.append(found)
    prefix_id, middle_id, suffix_id = ids
    return FillInTheMiddle(prefix_id, middle_id, suffix_id, rate, spm_rate, tokenizer.eod_id, tokenizer.bos_id)
