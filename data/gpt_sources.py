"""The train, valid and test samples of a GPT run, opened and checked against the model before anything starts."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ds.data.gpt_dataset import GPTDataset, SampleSource
from megatron_ds.data.indexed import IndexedDataset
from megatron_ds.data.split import split_documents
from megatron_ds.data.synthetic import SyntheticDataset
from megatron_ds.data.tokenizers import load_tokenizer
from megatron_ds.data.verify import check_token_ids, read_manifest
from megatron_ds.errors import DataError


@dataclass(frozen=True)
class GPTSources:
    """Samples by split; None where the split has no weight."""

    train: SampleSource
    valid: SampleSource | None = None
    test: SampleSource | None = None


def open_sources(
    prefix: str | None,
    *,
    split: str,
    sequence_length: int,
    vocab_size: int,
    seed: int,
    tokenizer: str | None = None,
    document_masking: bool = False,
) -> GPTSources:
    """Open the dataset at ``prefix``, or random tokens where it is None.

    Raises:
        DataError: a missing or damaged file, a token id or a tokenizer that the model's vocabulary does not hold,
            a tokenizer that did not make the dataset, or a split too short for one sample.
    """
    loaded = None if tokenizer is None else load_tokenizer(tokenizer)
    if loaded is not None:
        entries = loaded.vocab_size
        if entries > vocab_size:
            raise DataError(
                f"the tokenizer {tokenizer} has {entries} entries, but model.vocab_size={vocab_size}; "
                f"set model.vocab_size={entries}, or use the tokenizer that belongs to the model"
            )
    if prefix is None:
        return GPTSources(SyntheticDataset(vocab_size, sequence_length, seed))
    indexed = IndexedDataset(prefix)
    check_token_ids(indexed, vocab_size, "model.vocab_size")
    made_with = (read_manifest(indexed.prefix) or {}).get("tokenizer")
    if loaded is not None and made_with is not None and made_with["xxh3"] != loaded.fingerprint:
        raise DataError(
            f"{indexed.prefix} was made with the tokenizer {made_with['spec']} ({made_with['xxh3']}), not with "
            f"{tokenizer} ({loaded.fingerprint}), to which the same ids may be other text; set data.tokenizer to the "
            "one that made the data, preprocess again with this one, or leave it unset to train without it"
        )
    ranges = split_documents(indexed, split, sequence_length)
    if ranges["train"] is None:
        raise DataError(f"split={split!r} gives no weight to train; its first number must be positive")

    def source(name: str) -> GPTDataset | None:
        if ranges[name] is None:
            return None
        return GPTDataset(
            indexed,
            sequence_length,
            ranges[name],
            seed,
            reset_positions=document_masking,
            mask_documents=document_masking,
            mask_boundary_loss=document_masking,
        )

    train = source("train")
    assert train is not None
    return GPTSources(train, source("valid"), source("test"))
