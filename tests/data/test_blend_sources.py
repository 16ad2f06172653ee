"""Blends by split: every part of a dataset in its split alone, in the proportions asked for."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from megatron_ds.data.conversation_dataset import ConversationDataset
from megatron_ds.data.fim import FillInTheMiddle
from megatron_ds.data.gpt_dataset import DocumentRange, GPTDataset, SyntheticDataset, TextSource
from megatron_ds.data.gpt_sources import SampleOptions, open_sources, open_splits
from megatron_ds.data.indexed import IndexedDataset
from megatron_ds.data.indexed_writer import IndexedDatasetWriter
from megatron_ds.data.order import key
from megatron_ds.errors import DataError

S = 4


def make(dataset: IndexedDataset, documents: DocumentRange, seed: int) -> TextSource:
    return GPTDataset(dataset, S, documents, seed)


@pytest.fixture
def prefixes(tmp_path: Path) -> list[str]:
    for number in range(3):
        with IndexedDatasetWriter(tmp_path / str(number), "int32") as writer:
            for document in range(100):
                writer.add_document(np.arange(20) + document * 20 + number * 10_000)
    return [str(tmp_path / str(number)) for number in range(3)]


def test_one_blend_split_alike(prefixes: list[str]) -> None:
    weights = [0.5, 0.3, 0.2]
    found = open_splits({"": list(zip(weights, prefixes))}, "80,20,0", S, 1, make, IndexedDataset)
    for name, documents in (("train", range(0, 80)), ("valid", range(80, 100))):
        source = found[name]
        assert source is not None
        tokens = source.batch(range(100))["tokens"]
        datasets = tokens[:, 0] // 10_000
        assert np.abs(np.bincount(datasets) - 100 * np.array(weights)).max() < 2
        assert set((tokens % 10_000 // 20).ravel().tolist()) <= set(documents)


def test_no_samples_are_made_of_the_test_split(prefixes: list[str]) -> None:
    """To check a dataset's tokens, or to pack its conversations, takes minutes. Its documents are in no other split."""
    made: list[DocumentRange] = []
    seeds = []

    def noted(dataset: IndexedDataset, documents: DocumentRange, seed: int) -> TextSource:
        made.append(documents)
        seeds.append(seed)
        return make(dataset, documents, seed)

    found = open_splits({"": [(1.0, prefix) for prefix in prefixes]}, "70,20,10", S, 1, noted, IndexedDataset)
    assert found.keys() == {"train", "valid"} and made == [(0, 70)] * 3 + [(70, 90)] * 3
    assert seeds == [1, key(1, 1), key(1, 2)] * 2, "the first keeps the run's: a blend of one is that dataset"
    own = {name: [(1.0, prefix)] for name, prefix in zip(("train", "valid", "test"), [*prefixes[:2], "/none"])}
    assert open_splits(own, "", S, 1, make, IndexedDataset).keys() == {"train", "valid"}, "and it is not opened"
    with pytest.raises(DataError, match="is in the blends of both train and test"):
        open_splits({**own, "test": own["train"]}, "", S, 1, make, IndexedDataset)


def test_a_blend_for_each_split(prefixes: list[str]) -> None:
    found = open_splits(
        {"train": [(1, prefixes[0]), (3, prefixes[1])], "valid": [(1, prefixes[2])]}, "", S, 1, make, IndexedDataset
    )
    assert found["train"] is not None and found["valid"] is not None
    counts = np.bincount(found["train"].batch(range(400))["tokens"][:, 0] // 10_000)
    assert counts.tolist() == [100, 300]
    alone = GPTDataset(IndexedDataset(prefixes[2]), S, seed=1)
    assert (found["valid"].batch(range(20))["tokens"] == alone.batch(range(20))["tokens"]).all()


def same_samples(one: TextSource | None, other: TextSource) -> None:
    assert one is not None and len(one) == len(other)
    for got, want in ((one.batch(range(50)), other.batch(range(50))), (one.rows([3, 1]), other.rows([3, 1]))):
        assert got.keys() == want.keys() and all(np.array_equal(got[name], want[name]) for name in want)


def test_every_option_reaches_the_samples(prefixes: list[str], tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    names = ("<P>", "<M>", "<S>")
    backend = Tokenizer(models.WordLevel({word: 2000 + i for i, word in enumerate(["a", *names])}, unk_token="a"))
    backend.add_special_tokens(list(names))
    backend.save(str(tmp_path / "tokenizer.json"))
    opened = partial(open_sources, prefixes[0], split="75,25", sequence_length=16, seed=9)
    options = SampleOptions(document_masking=True, fim_rate=0.7, fim_spm_rate=0.2, fim_tokens=("<P>", "<M>", "<S>"))
    found = opened(vocab_size=3000, tokenizer=str(tmp_path / "tokenizer.json"), options=options)
    fim = FillInTheMiddle(2001, 2002, 2003, rate=0.7, spm_rate=0.2)
    indexed = IndexedDataset(prefixes[0])
    same_samples(found.train, GPTDataset(indexed, 16, (0, 75), 9, document_masking=True, fim=fim))
    same_samples(found.valid, GPTDataset(indexed, 16, (75, 100), 9, document_masking=True, fim=fim))
    Path(f"{prefixes[0]}.loss_mask").write_bytes(bytes(i % 3 == 0 for i in range(2000)))
    found = opened(vocab_size=2000, options=SampleOptions(conversations=True))
    same_samples(found.train, ConversationDataset(IndexedDataset(prefixes[0]), 16, (0, 75), 9))
    same_samples(found.valid, ConversationDataset(IndexedDataset(prefixes[0]), 16, (75, 100), 9))
    made_up = open_sources(split="1", sequence_length=16, vocab_size=70, seed=9)
    same_samples(made_up.train, SyntheticDataset(70, 16, 9))


def test_what_is_refused(prefixes: list[str]) -> None:
    with pytest.raises(DataError, match=r"split 'vaild' is none of train, valid, test; did you mean 'valid'\?"):
        open_splits({"vaild": [(1, prefixes[0])]}, "", S, 1, make, IndexedDataset)
    for name in (prefixes[0], f"{prefixes[0]}.bin", os.path.relpath(prefixes[0])):
        with pytest.raises(DataError, match="is in the blends of both train and valid"):
            open_splits({"train": [(1, prefixes[0])], "valid": [(1, name)]}, "", S, 1, make, IndexedDataset)
    with pytest.raises(DataError, match="must be positive numbers"):
        open_splits({"": [(1, prefixes[0]), (0, prefixes[1])]}, "1", S, 1, make, IndexedDataset)
