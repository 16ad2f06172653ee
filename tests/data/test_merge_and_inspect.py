"""Merging and inspecting datasets, and their tools."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import indexed_reference
import numpy as np
import pytest

from megatron_ds.data import indexed_writer, inspect
from megatron_ds.data.dataset_files import read_manifest
from megatron_ds.data.indexed import IndexedDataset
from megatron_ds.data.indexed_writer import IndexedDatasetWriter, merge_datasets
from megatron_ds.data.inspect import draw_histogram, length_histogram, sample_documents, show_document
from megatron_ds.data.parts import PreprocessOptions
from megatron_ds.data.preprocess import preprocess
from megatron_ds.data.source_text import SourceOptions
from megatron_ds.data.tokenizers import load_tokenizer
from megatron_ds.data.verify import check_token_ids, verify
from megatron_ds.errors import DataError

REPOSITORY = Path(__file__).resolve().parents[2]
SETS = {"a": [[[1, 2], [3]], [[4]]], "b": [[[]], [[5, 6, 7]]], "c": [[[8], [9]], [[10]], [[11, 12]]]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, documents in SETS.items():
        indexed_reference.write(tmp_path / name, 8, documents)
    return tmp_path


@pytest.mark.parametrize("names", ["a", "ab", "cba", "aca"])
def test_merged_documents_follow_each_other(folder: Path, names: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexed_writer, "INDEX_CHUNK", 2)
    monkeypatch.setattr(indexed_writer, "COPY_BYTES", 3)
    copied: list[int] = []
    merge_datasets([str(folder / name) for name in names], folder / "all", copied.append)
    expected = [document for name in names for document in SETS[name]]
    assert indexed_reference.read(folder / "all") == (8, expected)
    assert sum(copied) == (folder / "all.bin").stat().st_size
    verify(IndexedDataset(folder / "all"))
    assert not list(folder.glob("*.tmp"))


def test_what_does_not_merge(folder: Path) -> None:
    indexed_reference.write(folder / "wide", 4, SETS["a"])
    with pytest.raises(DataError, match=r"wide\.bin holds int32 tokens, but a\.bin is uint16"):
        merge_datasets([str(folder / "a"), str(folder / "wide")], folder / "all")
    with pytest.raises(DataError, match="is one of the datasets to merge; choose another name"):
        merge_datasets([str(folder / "a"), str(folder / "b")], folder / "b")
    with pytest.raises(DataError, match="no dataset to merge"):
        merge_datasets([], folder / "all")
    (folder / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="loop"):
        merge_datasets([str(folder / "a")], folder / "loop" / "x")
    assert not list(folder.glob("all*"))


def test_a_damaged_dataset_is_not_merged(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("some text to tokenise")
    for name in ("a", "b"):
        preprocess([str(tmp_path / "in.txt")], tmp_path / name, PreprocessOptions("bytes"), 0)
    merge_datasets([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "all")
    manifest = read_manifest(str(tmp_path / "all"))
    assert manifest is not None and manifest["tokenizer"]["spec"] == "bytes" and manifest["counts"]["tokens"] == 42
    content = bytearray((tmp_path / "b.bin").read_bytes())
    content[5] ^= 1
    (tmp_path / "b.bin").write_bytes(content)
    with pytest.raises(DataError, match=r"b\.bin is not the file that was written"):
        merge_datasets([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "other")


def test_merged_conversations_keep_what_is_learnt(tmp_path: Path) -> None:
    chat = '{"text": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    (tmp_path / "in.jsonl").write_text(chat * 3)
    options = PreprocessOptions("bytes", source=SourceOptions(conversations=True), chat_template="chatml")
    preprocess([str(tmp_path / "in.jsonl")], tmp_path / "a", options, 0)
    merge_datasets([str(tmp_path / "a")] * 2, tmp_path / "all")
    assert (tmp_path / "all.loss_mask").read_bytes() == (tmp_path / "a.loss_mask").read_bytes() * 2
    assert verify(IndexedDataset(tmp_path / "all")).checksums["loss_mask"]
    (tmp_path / "in.txt").write_text("some text to tokenise")
    preprocess([str(tmp_path / "in.txt")], tmp_path / "b", PreprocessOptions("bytes"), 0)
    with pytest.raises(DataError, match=r"a holds conversations and .*b texts; merge each kind by itself"):
        merge_datasets([str(tmp_path / "b"), str(tmp_path / "a")], tmp_path / "other")


def test_other_tokenizers_are_not_merged(tmp_path: Path) -> None:
    import json

    (tmp_path / "in.txt").write_text("some text to tokenise")
    for name in ("a", "b"):
        preprocess([str(tmp_path / "in.txt")], tmp_path / name, PreprocessOptions("bytes"), 0)
    path = tmp_path / "b.manifest.json"
    manifest = json.loads(path.read_text())
    manifest["tokenizer"] |= {"spec": "mine", "xxh3": "0" * 16}
    path.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"b was made with the tokenizer mine and .*a with bytes, another one"):
        merge_datasets([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "all")
    # Behind one of which nobody knows how it was made, and what was merged with it, neither.
    indexed_reference.write(tmp_path / "unknown", 8, [[[1, 2]]])
    with pytest.raises(DataError, match=r"b was made with the tokenizer mine and .*a with bytes, another one"):
        merge_datasets([str(tmp_path / name) for name in ("unknown", "a", "b")], tmp_path / "all")
    for names, output in ((("unknown", "a"), "all"), (("all", "a"), "more"), (("a", "more"), "most")):
        merge_datasets([str(tmp_path / name) for name in names], tmp_path / output)
        assert "tokenizer" not in (read_manifest(str(tmp_path / output)) or {}), output


def test_histogram_against_counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    lengths = [0, 1, 1, 2, 3, 4, 7, 8, *generator.integers(0, 500, 300).tolist()]
    with IndexedDatasetWriter(tmp_path / "set", "uint16") as writer:
        for length in lengths:
            writer.add_document(*(np.ones(half, np.uint16) for half in (length // 2, length - length // 2)))
    dataset = IndexedDataset(tmp_path / "set")
    assert dataset.document_lengths(0, len(lengths)).tolist() == lengths
    assert dataset.document_lengths(5, 9).tolist() == lengths[5:9]
    whole = length_histogram(dataset)
    monkeypatch.setattr(inspect, "CHUNK", 100)
    for histogram in (whole, length_histogram(dataset)):
        assert histogram.edges.tolist() == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
        for low, high, documents, tokens in zip(
            histogram.edges, histogram.edges[1:], histogram.documents, histogram.tokens
        ):
            inside = [length for length in lengths if low <= length < high]
            assert (documents, tokens) == (len(inside), sum(inside))
        assert (histogram.shortest, histogram.longest) == (0, max(lengths))
    assert whole.percentiles[50] in sorted(lengths)[len(lengths) // 2 - 1 : len(lengths) // 2 + 1]
    text = draw_histogram(whole)
    assert "256 to 511" in text and f"longest {max(lengths)}" in text


def test_samples_are_different_documents(folder: Path) -> None:
    dataset = IndexedDataset(folder / "c")
    assert sample_documents(dataset, 10) == [0, 1, 2]
    assert len(sample_documents(dataset, 2)) == 2
    assert show_document(dataset, 0, None, 1) == "document 0 (2 tokens): [8] ... 1 more tokens"


@pytest.mark.parametrize("foreign", [257, 1 << 31, 1 << 40, -5])
def test_ids_that_the_tokenizer_does_not_have(tmp_path: Path, foreign: int) -> None:
    with IndexedDatasetWriter(tmp_path / "x", "int64") as writer:
        writer.add_document([1, 2, foreign])
    with pytest.raises(DataError, match=f"token id {foreign}, and the tokenizer has 257 entries; give --tokenizer"):
        show_document(IndexedDataset(tmp_path / "x"), 0, load_tokenizer("bytes"))
    assert show_document(IndexedDataset(tmp_path / "x"), 0, load_tokenizer("bytes"), 2).startswith("document 0 (3 tok")
    with pytest.raises(DataError, match=f"has token id {foreign} at token 2") as caught:
        check_token_ids(IndexedDataset(tmp_path / "x"), 100, "the model")
    assert ("a vocab_size of at least" in str(caught.value)) == (foreign > 0)


def test_tools(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("some text to show, and ünïcode")
    preprocess([str(tmp_path / "in.txt")], tmp_path / "a", PreprocessOptions("bytes"), 0)

    def tool(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(REPOSITORY / "tools" / name), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    prefix = tmp_path / "a"
    merged = tool("merge_datasets.py", "--input", prefix, prefix, "--output-prefix", tmp_path / "b", "--quiet")
    assert merged.returncode == 0 and "2 documents, 64 tokens" in merged.stdout
    shown = tool("inspect_dataset.py", tmp_path / "b", "--png", tmp_path / "lengths.png")
    assert shown.returncode == 0, shown.stderr
    for wanted in ("64 of uint16", "as in the manifest", "32 to 63", "'some text to show, and ünïcode'"):
        assert wanted in shown.stdout
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    missing = tool("inspect_dataset.py", tmp_path / "none")
    assert missing.returncode == 2 and "none.idx does not exist" in missing.stderr
    assert load_tokenizer("bytes").decode(IndexedDataset(tmp_path / "b").document(1)).startswith("some text")
