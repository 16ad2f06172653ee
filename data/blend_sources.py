"""Train, valid and test samples from weighted datasets, each split with a blend of its own if it needs one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from megatron_ds.data.blend import BlendedDataset
from megatron_ds.data.document_split import SPLITS, DocumentRange, split_documents
from megatron_ds.data.gpt_dataset import TextSource
from megatron_ds.data.indexed import IndexedDataset
from megatron_ds.data.order import key
from megatron_ds.errors import DataError, nearest

Weighted = Sequence[tuple[float, str]]
"""(weight by samples, prefix of a dataset), one for each dataset."""
OpenDataset = Callable[[str], IndexedDataset]
"""Opens, and checks, the dataset of a prefix."""
MakeSource = Callable[[IndexedDataset, DocumentRange | None, int], TextSource]
"""The samples of a range of documents (None: all) of a dataset, with a seed of its own."""


def blend_of_splits(
    blend: Weighted,
    split: str,
    sequence_length: int,
    seed: int,
    make: MakeSource,
    open_dataset: OpenDataset = IndexedDataset,
) -> dict[str, TextSource | None]:
    """Split every dataset alike, and blend the parts of each split: ``{"train": ..., "valid": ..., "test": ...}``.

    A split without weight is None. Raises DataError as :func:`~megatron_ds.data.document_split.split_documents` does.
    """
    opened = [(weight, open_dataset(prefix)) for weight, prefix in blend]
    ranges = [split_documents(dataset, split, sequence_length) for _, dataset in opened]
    found: dict[str, TextSource | None] = {}
    for name in SPLITS:
        members = [
            (weight, make(dataset, documents[name], _seed(seed, number)))
            for number, ((weight, dataset), documents) in enumerate(zip(opened, ranges))
            if documents[name] is not None
        ]
        found[name] = _blended(members)
    return found


def splits_of_blends(
    blends: Mapping[str, Weighted], seed: int, make: MakeSource, open_dataset: OpenDataset = IndexedDataset
) -> dict[str, TextSource | None]:
    """A blend for each split, of whole datasets: ``blends`` maps train, valid and test to their datasets.

    Raises:
        DataError: an unknown split, or a dataset named in two splits (what is trained on would be evaluated).
    """
    if unknown := [name for name in blends if name not in SPLITS]:
        raise DataError(f"split {unknown[0]!r} is none of {', '.join(SPLITS)}{nearest(unknown[0], SPLITS)}")
    used: dict[str, str] = {}
    for name, blend in blends.items():
        for _, prefix in blend:
            if used.setdefault(prefix, name) != name:
                raise DataError(
                    f"{prefix} is in the blends of both {used[prefix]} and {name}; give each split datasets of its "
                    "own, or one blend and split weights"
                )
    return {
        name: _blended(
            [
                (weight, make(open_dataset(prefix), None, _seed(seed, number)))
                for number, (weight, prefix) in enumerate(blends.get(name, ()))
            ]
        )
        for name in SPLITS
    }


def _seed(seed: int, number: int) -> int:
    """The first dataset keeps the run's seed, so that a blend of one is that dataset."""
    return key(seed, number) if number else seed


def _blended(members: list[tuple[float, TextSource]]) -> TextSource | None:
    if not members:
        return None
    if len(members) == 1:
        return members[0][1]
    return BlendedDataset([source for _, source in members], [weight for weight, _ in members])
