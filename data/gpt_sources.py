"""The train and valid samples of a GPT run, opened and checked against the model before anything starts.

Train, valid and test are disjoint: ranges of the documents of each dataset, or datasets of their own. A run reads the
first two. What is kept for a test afterwards may be shorter than a sample: then it has no samples.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ds.data.blend import BlendedDataset
from megatron_ds.data.conversation_dataset import ConversationDataset
from megatron_ds.data.dataset_files import MASK_SUFFIX, read_manifest
from megatron_ds.data.fim import sentinels
from megatron_ds.data.gpt_dataset import DocumentRange, GPTDataset, SyntheticDataset, TextSource
from megatron_ds.data.indexed import IndexedDataset, strip_suffix
from megatron_ds.data.order import key
from megatron_ds.data.remote import is_url
from megatron_ds.data.samples import Sources
from megatron_ds.data.tokenizer_base import Tokenizer
from megatron_ds.data.tokenizers import load_tokenizer
from megatron_ds.data.verify import check_token_ids
from megatron_ds.errors import DataError, nearest

GPTSources = Sources[TextSource]
SPLITS = ("train", "valid", "test")
READ = SPLITS[:2]
"""Those of which a run makes samples."""
MOST_UNUSED = 1.1
"""A vocabulary this much larger than its tokenizer's is said; published models leave room for some tokens."""
Weighted = Sequence[tuple[float, str]]
"""(weight by samples, prefix of a dataset), one for each dataset."""


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
    blends = split_blends or {"": blend}
    files = _Files(sequence_length, vocab_size, options, tokenizer, loaded, cache_dir)
    if loaded is not None:
        files.notes += _unused(vocab_size, str(tokenizer), loaded.vocab_size)
    # A conversation is a sample of its own, however short.
    least = 1 if options.conversations else sequence_length
    found = open_splits(blends, split, least, seed, files.samples, files.open)
    if found["train"] is None:
        raise DataError(f"split={split!r} gives no weight to train; its first number must be positive")
    identity = {
        "datasets": files.opened,
        "weights": {name: [weight for weight, _ in weighted] for name, weighted in blends.items()},
        "split": None if split_blends else split,
        "sequence_length": sequence_length,
        "conversations": options.conversations,
    }
    return GPTSources(found["train"], found["valid"], tuple(files.notes), identity)


@dataclass
class _Files:
    """The datasets of a run: each is checked against the model's vocabulary, and all against one tokenizer."""

    sequence_length: int
    vocab_size: int
    options: SampleOptions
    spec: str | None
    tokenizer: Tokenizer | None
    cache_dir: Path | None
    opened: list[dict[str, Any]] = field(default_factory=list)
    """What was opened, in order, by its content."""
    notes: list[str] = field(default_factory=list)
    _makers: dict[str, tuple[str, str]] = field(default_factory=dict)
    """By the fingerprint of a tokenizer: (its name, the first dataset that it made)."""

    def __post_init__(self) -> None:
        o, self._fim = self.options, None
        if o.fim_rate:
            if o.fim_tokens is None or self.tokenizer is None:
                raise DataError("fill-in-the-middle needs the names of its three sentinels, and a tokenizer with them")
            self._fim = sentinels(o.fim_tokens, self.tokenizer, self.vocab_size, o.fim_rate, o.fim_spm_rate)

    def open(self, prefix: str) -> IndexedDataset:
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
        if found.checksums[MASK_SUFFIX] and not self.options.conversations:
            self.notes.append(
                f"{prefix} holds conversations, all tokens of which count alike, prompts too; data.conversations "
                "counts the answers alone"
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
        if self.tokenizer is None and not self._makers:
            self.notes += _unused(self.vocab_size, made_with["spec"], made_with.get("vocab_size", self.vocab_size))
        self._makers.setdefault(fingerprint, (made_with["spec"], prefix))
        if len(self._makers) > 1:
            (one, first), (other, second) = list(self._makers.values())[:2]
            raise DataError(
                f"{first} was made with the tokenizer {one}, but {second} with {other}: the same ids are other text. "
                "Datasets of one run need one tokenizer; preprocess one of them again"
            )
        return indexed

    def samples(self, indexed: IndexedDataset, documents: DocumentRange, seed: int) -> TextSource:
        if self.options.conversations:
            packed = ConversationDataset(indexed, self.sequence_length, documents, seed, cache_dir=self.cache_dir)
            if note := packed.describe_losses():
                self.notes.append(note)
            return packed
        return GPTDataset(indexed, self.sequence_length, documents, seed, self.options.document_masking, self._fim)


def _unused(vocab_size: int, tokenizer: str, has: int) -> list[str]:
    """A note where a good part of the vocabulary is of no use."""
    if vocab_size <= MOST_UNUSED * has:
        return []
    return [
        f"model.vocab_size={vocab_size}, of which the tokenizer {tokenizer} has {has}: no text has the others, which "
        "cost memory and time"
    ]


def open_splits(
    blends: Mapping[str, Weighted],
    split: str,
    sequence_length: int,
    seed: int,
    make: Callable[[IndexedDataset, DocumentRange, int], TextSource],
    open_dataset: Callable[[str], IndexedDataset],
) -> dict[str, TextSource | None]:
    """The blended samples of each split that is read, ``{"train": ..., "valid": ...}``; None for one without weight.

    Args:
        blends: ``{"": blend}``, whose datasets are all divided by ``split`` (see :func:`split_documents`); or a blend
            of whole datasets for each split. Those for ``"test"`` are not opened.
        make: the samples of a range of documents, with a seed of its own.

    Raises:
        DataError: an unknown split, a dataset named in two splits (what is trained on would be evaluated), or one that
            cannot be divided.
    """
    if unknown := [name for name in blends if name not in ("", *SPLITS)]:
        raise DataError(f"split {unknown[0]!r} is none of {', '.join(SPLITS)}{nearest(unknown[0], SPLITS)}")
    used: dict[str, str] = {}
    for name, blend in blends.items():
        for _, prefix in blend:
            place = strip_suffix(prefix)  # whatever it is called
            place = place if is_url(place) else os.path.realpath(f"{place}.idx")
            if used.setdefault(place, name) != name:
                raise DataError(
                    f"{prefix} is in the blends of both {used[place]} and {name}; give each split datasets of its "
                    "own, or one blend and split weights"
                )
    opened = {name: [open_dataset(prefix) for _, prefix in blends.get(name, ())] for name in ("", *READ)}
    members: dict[str, list[tuple[float, TextSource]]] = {name: [] for name in READ}
    for whole, datasets in opened.items():
        ranges = [
            {whole: (0, dataset.num_documents)} if whole else split_documents(dataset, split, sequence_length)
            for dataset in datasets
        ]
        for name in READ:
            for number, (dataset, found) in enumerate(zip(datasets, ranges)):
                if documents := found.get(name):
                    # The first dataset keeps the run's seed, so that a blend of one is that dataset.
                    source = make(dataset, documents, key(seed, number) if number else seed)
                    members[name].append((blends[whole][number][0], source))
    return {name: _blended(found) for name, found in members.items()}


def _blended(members: list[tuple[float, TextSource]]) -> TextSource | None:
    if not members:
        return None
    if len(members) == 1:
        return members[0][1]
    return BlendedDataset([source for _, source in members], [weight for weight, _ in members])


def parse_split(split: str) -> tuple[float, float, float]:
    """``"949,50,1"`` -> the three fractions, summing to 1. Fewer than three weights mean 0 for the rest."""
    try:
        weights = [float(part) for part in split.split(",")]
    except ValueError:
        weights = []
    if not 1 <= len(weights) <= 3 or min(weights) < 0 or not 0 < sum(weights) < float("inf"):
        raise DataError(
            f"split={split!r} is not one to three weights for {', '.join(SPLITS)}; write for example '949,50,1'"
        )
    weights += [0.0] * (3 - len(weights))
    total = sum(weights)
    return weights[0] / total, weights[1] / total, weights[2] / total


def split_documents(dataset: IndexedDataset, split: str, sequence_length: int) -> dict[str, DocumentRange | None]:
    """``{"train": (start, stop), "valid": ..., "test": ...}``: documents ``start <= i < stop``; None for weight 0, and
    for a test split without one sample.

    Args:
        dataset: what is split where the *tokens* have the wanted proportions (documents may be very uneven, and are
            never cut).
        split: weights, see :func:`parse_split`.
        sequence_length: train and valid must hold one sample, ``sequence_length + 1`` tokens.

    Raises:
        DataError: train or valid has a weight and is too short for one sample; the message says what would do.
    """
    fractions = parse_split(split)
    cuts = [0]
    for index in range(3):
        cuts.append(max(cuts[-1], _cut(dataset, sum(fractions[: index + 1]))))
    # Rounding must not leave a document to a split of weight 0, or to none.
    last = max(index for index in range(3) if fractions[index])
    cuts[last + 1 :] = [dataset.num_documents] * (3 - last)
    ranges: dict[str, DocumentRange | None] = {}
    for name, fraction, start, stop in zip(SPLITS, fractions, cuts[:-1], cuts[1:]):
        tokens = dataset.document_start(stop) - dataset.document_start(start)
        enough = tokens > sequence_length
        ranges[name] = (start, stop) if fraction and enough else None
        if fraction and not enough and name != "test":
            needed = (sequence_length + 1) / dataset.num_tokens
            if needed > 1:
                way_out = f"Use sequence_length <= {dataset.num_tokens - 1}, or more data"
            elif fraction >= needed:
                way_out = f"Its documents are too few to cut there: use more data, or give {name} weight 0"
            else:
                shorter = max(1, int(fraction * dataset.num_tokens) - 1)
                way_out = (
                    f"Give {name} at least {needed:.2%} of the weight (it has {fraction:.2%}) and somewhat more for "
                    f"whole documents, give it weight 0, or use sequence_length <= {shorter}"
                )
            raise DataError(
                f"split={split!r} leaves {stop - start} documents with {tokens} tokens of {dataset.prefix} for {name}, "
                f"but one sample takes sequence_length + 1 = {sequence_length + 1} tokens. The dataset has "
                f"{dataset.num_documents} documents and {dataset.num_tokens} tokens. {way_out}"
            )
    return ranges


def _cut(dataset: IndexedDataset, fraction: float) -> int:
    wanted = fraction * dataset.num_tokens
    document = dataset.document_of(min(int(wanted), dataset.num_tokens - 1))
    before, after = dataset.document_start(document), dataset.document_start(document + 1)
    return document if wanted - before < after - wanted else document + 1
