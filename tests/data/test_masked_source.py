"""Masking for BERT: the same for every reader of a sample, in the proportions of the paper, on the same text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ds.data.gpt_dataset import SyntheticDataset
from megatron_ds.data.gpt_sources import GPTSources
from megatron_ds.data.loader import BatchLoader
from megatron_ds.data.masked_source import MaskedSource, mask_sources
from megatron_ds.errors import DataError

VOCABULARY, LENGTH, MASK = 1000, 128, 999


def source(seed: int = 0, **settings: float) -> MaskedSource:
    text = SyntheticDataset(VOCABULARY, LENGTH, seed=7)
    return MaskedSource(text, mask_id=MASK, vocab_size=VOCABULARY, seed=seed, never=[3, 4], **settings)


def test_what_is_masked_and_what_is_predicted() -> None:
    batch, text = source().batch(np.arange(400)), SyntheticDataset(VOCABULARY, LENGTH, seed=7).batch(np.arange(400))
    tokens, chosen = batch["tokens"], batch["loss_mask"]
    assert np.array_equal(batch["labels"], text["tokens"]), "the tokens themselves are predicted"
    assert np.array_equal(batch["position_ids"], text["position_ids"])
    assert np.array_equal(tokens[~chosen], text["tokens"][~chosen]), "what is not predicted is not changed"
    assert not np.isin(text["tokens"][chosen], [3, 4, MASK]).any()
    n = chosen.sum()
    assert chosen.mean() == pytest.approx(0.15, abs=0.005)
    masked, same = tokens[chosen] == MASK, tokens[chosen] == batch["labels"][chosen]
    assert masked.mean() == pytest.approx(0.8, abs=4 * np.sqrt(0.16 / n))
    assert same.mean() == pytest.approx(0.1, abs=4 * np.sqrt(0.09 / n))
    others = tokens[chosen][~masked & ~same]
    assert abs(others.mean() - VOCABULARY / 2) < 4 * VOCABULARY / np.sqrt(12 * len(others))
    assert source(probability=0.4).batch(np.arange(50))["loss_mask"].mean() == pytest.approx(0.4, abs=0.02)


def test_masks_follow_from_seed_and_place_alone() -> None:
    whole = source().batch(np.arange(16))
    for rank in range(2):
        loader = BatchLoader(source(), 8, 2, rank, 2, consumed=8, prefetch=0)
        for j, micro_batch in enumerate(next(loader)):
            places = 8 + 4 * j + 2 * rank + np.arange(2)
            assert np.array_equal(micro_batch["sample_index"].numpy(), places)
            for name in ("tokens", "labels", "loss_mask"):
                assert np.array_equal(micro_batch[name].numpy(), whole[name][places]), name
    assert not np.array_equal(source(seed=1).batch([0])["loss_mask"], whole["loss_mask"][:1])
    assert not np.array_equal(source().rows([0])["loss_mask"], whole["loss_mask"][:1]), "row 0 is not sample 0"
    # The same text in the next epoch is masked anew.
    short = MaskedSource(_OneRow(), mask_id=MASK, vocab_size=VOCABULARY)
    first, second = (short.batch([place]) for place in (0, 1))
    assert np.array_equal(first["labels"], second["labels"])
    assert not np.array_equal(first["loss_mask"], second["loss_mask"])


def test_every_split_is_masked_by_all_settings() -> None:
    train, valid = SyntheticDataset(50, 8, seed=1), SyntheticDataset(50, 8, seed=2)
    made = mask_sources(GPTSources(train, valid), mask_id=7, probability=0.5, vocab_size=50, seed=3)
    rows = np.array([4, 9, 0])
    for got, text in ((made.train, train), (made.valid, valid)):
        assert got is not None
        want = MaskedSource(text, mask_id=7, vocab_size=50, probability=0.5, seed=3)
        for kind in ("batch", "rows"):
            ours, theirs = getattr(got, kind)(rows), getattr(want, kind)(rows)
            assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
            alone = [getattr(got, kind)([row]) for row in rows]
            assert all(np.array_equal(ours[name], np.concatenate([one[name] for one in alone])) for name in ours)
            assert 0.25 < ours["loss_mask"].mean() < 0.75


class _OneRow(SyntheticDataset):
    def __init__(self) -> None:
        super().__init__(VOCABULARY, LENGTH)

    def rows(self, rows: object) -> dict[str, np.ndarray]:  # type: ignore[override]
        return super().rows(np.zeros_like(rows))


def tokenizer(folder: Path, mask: bool) -> str:
    from tokenizers import Tokenizer, models

    words = {word: i for i, word in enumerate(["[SEP]", "[CLS]", "a", *(["[MASK]"] if mask else [])])}
    folder.mkdir()
    backend = Tokenizer(models.WordLevel(words, unk_token="a"))
    backend.add_special_tokens([word for word in words if word != "a"])
    backend.save(str(folder / "tokenizer.json"))
    return str(folder)


def test_the_tokenizer_knows_its_mask_token(tmp_path: Path) -> None:
    sources = GPTSources(SyntheticDataset(10, 8))
    settings: dict[str, Any] = {"probability": 0.5, "vocab_size": 10, "seed": 0}
    given = mask_sources(sources, mask_id=None, **settings, tokenizer=tokenizer(tmp_path / "mask", True))
    assert given.valid is None
    assert isinstance(given.train, MaskedSource) and given.train.mask_id == 3
    assert set(given.train.never) == {0, 1}
    with pytest.raises(DataError, match=r"mask_token is not set and no tokenizer is given; set it to the id"):
        mask_sources(sources, mask_id=None, **settings)
    plain = tokenizer(tmp_path / "plain", False)
    with pytest.raises(DataError, match=re.escape(f"the tokenizer {plain} has no mask token")):
        mask_sources(sources, mask_id=None, **settings, tokenizer=plain)
    with pytest.raises(DataError, match=r"data.mask_token=10 is not one of the ids 0 to 9"):
        mask_sources(sources, mask_id=10, **settings)
