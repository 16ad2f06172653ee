"""Fill-in-the-middle: the documents can be put together again, the rates are right, the draws are repeatable."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ds.data.fim import FillInTheMiddle, sentinels
from megatron_ds.data.gpt_dataset import GPTDataset
from megatron_ds.data.indexed import IndexedDataset
from megatron_ds.data.indexed_writer import IndexedDatasetWriter
from megatron_ds.data.tokenizers import load_tokenizer
from megatron_ds.errors import DataError

PREFIX, MIDDLE, SUFFIX, EOD, BOS = 900, 901, 902, 903, 904
FIM = FillInTheMiddle(PREFIX, MIDDLE, SUFFIX, eod_id=EOD, bos_id=BOS)


def undo(tokens: list[int]) -> tuple[str, list[int]]:
    """(order, the document) of one rearranged document."""
    if PREFIX not in tokens:
        return "plain", tokens
    assert [tokens.count(t) for t in (PREFIX, MIDDLE, SUFFIX)] == [1, 1, 1] and tokens[0] == PREFIX
    s, m = tokens.index(SUFFIX), tokens.index(MIDDLE)
    assert s < m
    prefix, suffix, rest = tokens[1:s], tokens[s + 1 : m], tokens[m + 1 :]
    # SPM has nothing between the first two sentinels; so has a PSM document with an empty prefix, which is the same.
    return ("SPM" if s == 1 else "PSM"), prefix + rest + suffix


@given(size=st.integers(0, 40), draw=st.integers(0, 2**64 - 1), spm=st.sampled_from([0.0, 0.5, 1.0]))
@settings(max_examples=300, deadline=None)
def test_nothing_is_lost(size: int, draw: int, spm: float) -> None:
    document = list(range(size))
    new = FillInTheMiddle(PREFIX, MIDDLE, SUFFIX, rate=1.0, spm_rate=spm).rearrange(np.array(document), draw).tolist()
    how, back = undo(new)
    assert back == document
    assert how == "plain" if size < 2 else len(new) == size + 3
    if size >= 2 and spm == 1.0:
        assert how == "SPM"


def test_rates_and_cuts_are_uniform() -> None:
    document = np.arange(9)
    kinds: dict[str, int] = {"plain": 0, "PSM": 0, "SPM": 0}
    middles = np.zeros(10)
    n = 6000
    for draw in range(n):
        new = FillInTheMiddle(PREFIX, MIDDLE, SUFFIX, rate=0.6, spm_rate=0.25).rearrange(document, draw).tolist()
        kinds[undo(new)[0]] += 1
        if len(new) > 9:
            suffix = new[new.index(SUFFIX) + 1 : new.index(MIDDLE)]
            middles[9 - len(suffix)] += 1  # the second cut
    assert abs(kinds["plain"] / n - 0.4) < 0.03
    # A PSM document whose prefix is empty (both cuts uniform over 10 places: 19 of 100) looks like SPM.
    assert abs(kinds["SPM"] / n - 0.6 * (0.25 + 0.75 * 0.19)) < 0.03
    # The larger of two uniform cuts over 10 places.
    expected = (2 * np.arange(10) + 1) / 100
    assert np.abs(middles / middles.sum() - expected).max() < 0.03


@pytest.fixture
def dataset(tmp_path: Path) -> GPTDataset:
    with IndexedDatasetWriter(tmp_path / "set", "int32") as writer:
        for number in range(60):
            begin = [BOS] * (number % 2)
            writer.add_document([*begin, *range(number * 10, number * 10 + 3 + number % 6), EOD])
    return GPTDataset(IndexedDataset(tmp_path / "set"), 32, seed=4, document_masking=True)


def with_fim(dataset: GPTDataset, fim: FillInTheMiddle) -> GPTDataset:
    return GPTDataset(dataset.indexed, 32, seed=4, document_masking=True, fim=fim)


def test_rows_keep_their_documents_and_masks_follow_them(dataset: GPTDataset) -> None:
    fim = with_fim(dataset, FIM)
    assert len(fim) == len(dataset)
    plain, new = dataset.batch(range(len(dataset))), fim.batch(range(len(dataset)))
    rearranged = 0
    for i in range(len(dataset)):
        before = np.split(plain["tokens"][i], np.flatnonzero(np.diff(plain["document_ids"][i])) + 1)
        after = np.split(new["tokens"][i], np.flatnonzero(np.diff(new["document_ids"][i])) + 1)
        for old, document in list(zip(before, after))[:-1]:  # the last one of a row is cut
            positions = new["position_ids"][i][: document.size]
            assert positions.tolist() == list(range(document.size))
            assert document[-1] == EOD == old[-1]
            begin = int(old[0] == BOS)
            how, back = undo(document[begin:-1].tolist())
            assert back == old[begin:-1].tolist()
            assert document[:begin].tolist() == old[:begin].tolist()
            rearranged += how != "plain"
            new["position_ids"][i] = np.roll(new["position_ids"][i], -document.size)
    assert rearranged > 10
    assert (new["labels"][:, :-1] == new["tokens"][:, 1:]).all()
    assert new["tokens"].shape == plain["tokens"].shape


def test_draws_depend_on_the_place_in_the_run_alone(dataset: GPTDataset) -> None:
    fim = with_fim(dataset, FIM)
    whole = fim.batch(range(3 * len(fim)))["tokens"]
    pieces = [fim.batch(range(a, b))["tokens"] for a, b in ((0, 7), (7, 30), (30, 3 * len(fim)))]
    assert (np.concatenate(pieces) == whole).all()
    # Another epoch cuts elsewhere: compare the same rows.
    first, second = (fim.batch(np.argsort(_rows(dataset, e)) + e * len(fim))["tokens"] for e in (0, 1))
    assert (first != second).any(axis=1).mean() > 0.8
    assert (fim.rows([3, 1])["tokens"] == fim.rows([3, 1])["tokens"]).all()


def _rows(dataset: GPTDataset, epoch: int) -> np.ndarray:
    from megatron_ds.data.order import order

    return order(dataset.seed, np.arange(len(dataset)) + epoch * len(dataset), len(dataset))


def test_rate_zero_changes_nothing(dataset: GPTDataset) -> None:
    fim = with_fim(dataset, FillInTheMiddle(PREFIX, MIDDLE, SUFFIX, rate=0.0, eod_id=EOD))
    ours, plain = fim.batch(range(20)), dataset.batch(range(20))
    assert all((ours[name] == plain[name]).all() for name in plain)


def test_sentinels_are_tokens_of_the_tokenizer(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    words = ["[SEP]", "[CLS]", "a", "<P>", "<M>", "<S>"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="a"))
    backend.add_special_tokens([word for word in words if word != "a"])
    backend.save(str(tmp_path / "tokenizer.json"))
    names, tokenizer = ("<P>", "<M>", "<S>"), load_tokenizer(str(tmp_path))
    found = sentinels(names, tokenizer, 6, 0.3, 0.2)
    assert found == FillInTheMiddle(3, 4, 5, rate=0.3, spm_rate=0.2, eod_id=0, bos_id=1)
    with pytest.raises(DataError, match=r"'<S>' has the id 5, but model\.vocab_size=5"):
        sentinels(names, tokenizer, 5, 0.3, 0.2)


def test_bad_settings() -> None:
    with pytest.raises(DataError, match=r"rate=1\.5 and spm_rate=0\.5 must lie between 0 and 1"):
        FillInTheMiddle(1, 2, 3, rate=1.5)
    with pytest.raises(DataError, match="must be three different tokens"):
        FillInTheMiddle(1, 2, 2)
