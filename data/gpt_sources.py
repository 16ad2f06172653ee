"""The train and valid samples of a GPT run, opened and checked against the model before anything starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ds.data.blend import BlendedDataset
from megatron_ds.data.conversation_dataset import ConversationDataset
from megatron_ds.data.dataset_files import MASK_SUFFIX, read_manifest
from megatron_ds.data.document_split import READ, SPLITS, DocumentRange, split_documents
from megatron_ds.data.fim import FillInTheMiddle, FIMDataset, sentinels
from megatron_ds.data.gpt_dataset import GPTDataset, TextSource
from megatron_ds.data.indexed import IndexedDataset
from megatron_ds.data.order import key
from megatron_ds.data.samples import Sources
from megatron_ds.data.synthetic import SyntheticDataset
from megatron_ds.data.tokenizer_base import Tokenizer
from megatron_ds.data.tokenizers import load_tokenizer
from megatron_ds.data.verify import check_token_ids
from megatron_ds.errors import DataError, nearest

GPTSources = Sources[TextSource]
Weighted = Sequence[tuple[float, str]]
"""(weight by samples, prefix of a dataset), one for each dataset."""
OpenDataset = Callable[[str], IndexedDataset]
"""Opens, and checks, the dataset of a prefix."""
MakeSource = Callable[[IndexedDataset, DocumentRange | None, int], TextSource]
"""The samples of a range of documents (None: all) of a dataset, with a seed of its own."""


@dataclass(frozen=True)
class SampleOptions:
    """How the tokens of a dataset become samples.

    Args:
        document_masking: attention, positions and loss stay inside a document.
        conversations: whole conversations to a row (:class:`ConversationDataset`), the loss on the answers alone.
        fim_rate, fim_spm_rate, fim_tokens: fill-in-the-middle (:mod:`megatron_ds.data.fim`) with these special tokens
            of the tokenizer; a rate of 0 is none.
    """

    document_masking: bool = False
    conversations: bool = False
    fim_rate: float = 0.0
    fim_spm_rate: float = 0.5
    fim_tokens: tuple[str, str, str] | None = None


def open_sources(
    prefix: str | None = None,
    *,
    split: str,
    sequence_length: int,
    vocab_size: int,
    seed: int,
    tokenizer: str | None = None,
    options: SampleOptions = SampleOptions(),
    blend: Weighted = (),
    split_blends: Mapping[str, Weighted] | None = None,
    cache_dir: Path | None = None,
) -> GPTSources:
    """Open the dataset at ``prefix``, the ``blend`` of several, or a blend for each split; else random tokens.

    Args:
        prefix: path or URL of a dataset, divided into splits by ``split``. The test split keeps documents away from the
            run, which makes no samples of them.
        tokenizer: what the datasets have to be made with; None if that does not matter.
        blend: weighted datasets, each divided by ``split``.
        split_blends: ``{"train": ..., "valid": ...}``: weighted datasets, whole, for each split. Those for ``"test"``
            are not opened.
        cache_dir: where indexes and remote datasets are kept, instead of beside the data.

    Raises:
        DataError: a missing or damaged file, a token id or a tokenizer that the model's vocabulary does not hold,
            a tokenizer that did not make a dataset, a split too short for one sample, or nothing to train on.
    """
    loaded = None if tokenizer is None else load_tokenizer(tokenizer)
    if loaded is not None and loaded.vocab_size > vocab_size:
        raise DataError(
            f"the tokenizer {tokenizer} has {loaded.vocab_size} entries, but model.vocab_size={vocab_size}; "
            f"set model.vocab_size={loaded.vocab_size}, or use the tokenizer that belongs to the model"
        )
    if prefix is not None:
        blend = [(1.0, prefix)]
    if not blend and not split_blends:
        return GPTSources(SyntheticDataset(vocab_size, sequence_length, seed))
    opener = _Opener(vocab_size, tokenizer, loaded, cache_dir)
    make = _Maker(sequence_length, vocab_size, options, loaded, cache_dir)
    if split_blends:
        found = splits_of_blends(split_blends, seed, make, opener)
    else:
        # A conversation is a sample of its own, however short.
        least = 1 if options.conversations else sequence_length
        found = blend_of_splits(blend, split, least, seed, make, opener)
    if found["train"] is None:
        raise DataError(f"split={split!r} gives no weight to train; its first number must be positive")
    weights = {name: [w for w, _ in weighted] for name, weighted in (split_blends or {"": blend}).items()}
    identity = {
        "datasets": opener.opened,
        "weights": weights,
        "split": None if split_blends else split,
        "sequence_length": sequence_length,
        "conversations": options.conversations,
    }
    return GPTSources(found["train"], found["valid"], tuple(make.notes), identity)


@dataclass
class _Opener:
    """Opens datasets, and checks each against the model's vocabulary and all against one tokenizer."""

    vocab_size: int
    spec: str | None
    tokenizer: Tokenizer | None
    cache_dir: Path | None
    makers: dict[str, tuple[str, str]] = field(default_factory=dict)
    """By the fingerprint of a tokenizer: (its name, the first dataset that it made)."""
    opened: list[dict[str, Any]] = field(default_factory=list)
    """What was opened, in order, by its content."""

    def __call__(self, prefix: str) -> IndexedDataset:
        indexed = IndexedDataset(prefix, self.cache_dir)
        found = check_token_ids(indexed, self.vocab_size, "model.vocab_size", self.cache_dir)
        self.opened.append(
            {
                "prefix": prefix,
                "documents": indexed.num_documents,
                "tokens": indexed.num_tokens,
                "checksums": [found.checksums[kind] for kind in ("bin", "idx", MASK_SUFFIX)],
            }
        )
        made_with = (read_manifest(indexed.prefix) or {}).get("tokenizer")
        if made_with is None:
            return indexed
        fingerprint = made_with["xxh3"]
        if self.tokenizer is not None and fingerprint != self.tokenizer.fingerprint:
            raise DataError(
                f"{indexed.prefix} was made with the tokenizer {made_with['spec']} ({fingerprint}), not with "
                f"{self.spec} ({self.tokenizer.fingerprint}), to which the same ids may be other text; set "
                "data.tokenizer to the one that made the data, preprocess again with this one, or leave it unset to "
                "train without it"
            )
        self.makers.setdefault(fingerprint, (made_with["spec"], prefix))
        if len(self.makers) > 1:
            (one, first), (other, second) = list(self.makers.values())[:2]
            raise DataError(
                f"{first} was made with the tokenizer {one}, but {second} with {other}: the same ids are other text. "
                "Datasets of one run need one tokenizer; preprocess one of them again"
            )
        return indexed


@dataclass
class _Maker:
    """Makes the samples of a range of documents."""

    sequence_length: int
    vocab_size: int
    options: SampleOptions
    tokenizer: Tokenizer | None
    cache_dir: Path | None
    fim: FillInTheMiddle | None = field(init=False)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        o = self.options
        self.fim = None
        if o.fim_rate:
            if o.fim_tokens is None or self.tokenizer is None:
                raise DataError("fill-in-the-middle needs the names of its three sentinels, and a tokenizer with them")
            self.fim = sentinels(o.fim_tokens, self.tokenizer, self.vocab_size, o.fim_rate, o.fim_spm_rate)

    def __call__(self, indexed: IndexedDataset, documents: DocumentRange | None, seed: int) -> TextSource:
        if self.options.conversations:
            packed = ConversationDataset(indexed, self.sequence_length, documents, seed, cache_dir=self.cache_dir)
            if note := packed.describe_losses():
                self.notes.append(note)
            return packed
        samples = GPTDataset(indexed, self.sequence_length, documents, seed, self.options.document_masking)
        if self.fim is None or self.tokenizer is None:
            return samples
        return FIMDataset(samples, self.fim, self.tokenizer.eod_id, self.tokenizer.bos_id)


def blend_of_splits(
    blend: Weighted,
    split: str,
    sequence_length: int,
    seed: int,
    make: MakeSource,
    open_dataset: OpenDataset,
) -> dict[str, TextSource | None]:
    """Split every dataset alike, and blend the parts of each split that is read: ``{"train": ..., "valid": ...}``.

    A split without weight is None. Raises DataError as :func:`~megatron_ds.data.document_split.split_documents` does.
    """
    opened = [(weight, open_dataset(prefix)) for weight, prefix in blend]
    ranges = [split_documents(dataset, split, sequence_length) for _, dataset in opened]
    found: dict[str, TextSource | None] = {}
    for name in READ:
        members = [
            (weight, make(dataset, documents[name], _seed(seed, number)))
            for number, ((weight, dataset), documents) in enumerate(zip(opened, ranges))
            if documents[name] is not None
        ]
        found[name] = _blended(members)
    return found


def splits_of_blends(
    blends: Mapping[str, Weighted], seed: int, make: MakeSource, open_dataset: OpenDataset
) -> dict[str, TextSource | None]:
    """A blend for each split that is read, of whole datasets: ``blends`` maps train, valid and test to theirs.

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
        for name in READ
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
