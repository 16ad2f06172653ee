"""Datasets at a URL: the same samples as from the disk, only what is read is fetched, changes are noticed."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from megatron_ds.data import dataset_files
from megatron_ds.data.gpt_dataset import GPTDataset
from megatron_ds.data.indexed import IndexedDataset
from megatron_ds.data.indexed_writer import merge_datasets
from megatron_ds.data.parts import PreprocessOptions
from megatron_ds.data.preprocess import preprocess
from megatron_ds.data.source_text import SourceOptions
from megatron_ds.data.verify import check_token_ids, verify
from megatron_ds.errors import DataError

URL = "memory://bucket/set"


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_files, "FETCH_BYTES", 256)


@pytest.fixture
def memory() -> Any:
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.rm("/bucket", recursive=True)


@pytest.fixture
def local(tmp_path: Path, memory: Any) -> Path:
    """A dataset on the disk, and the same one in fsspec's memory."""
    source = tmp_path / "in.txt"
    source.write_text("\n".join(f"line {i} of a text" for i in range(100)))
    options = PreprocessOptions("bytes", source=SourceOptions(txt_documents="line"))
    preprocess([str(source)], tmp_path / "set", options, 0)
    upload(tmp_path / "set", memory)
    return tmp_path / "set"


def upload(prefix: Path, memory: Any, *suffixes: str) -> None:
    for suffix in suffixes or ("bin", "idx", "manifest.json"):
        memory.pipe_file(f"/bucket/set.{suffix}", Path(f"{prefix}.{suffix}").read_bytes())


def test_the_same_samples_and_only_what_they_need(local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[tuple[int, int]] = []
    real = fsspec.implementations.memory.MemoryFileSystem.cat_file

    def cat_file(self: Any, path: str, start: int = 0, end: int = 0, **more: Any) -> bytes:
        fetched.append((start, end))
        return real(self, path, start=start, end=end, **more)

    monkeypatch.setattr(fsspec.implementations.memory.MemoryFileSystem, "cat_file", cat_file)
    dataset = IndexedDataset(URL, tmp_path / "cache")
    assert check_token_ids(dataset, 257).max_id == IndexedDataset(local).tokens.max()
    assert fetched == []  # the manifest vouches for the ids
    ours, theirs = (GPTDataset(d, 16, seed=1, document_masking=True) for d in (dataset, IndexedDataset(local)))
    assert (ours.rows([0])["tokens"] == theirs.rows([0])["tokens"]).all()
    assert fetched == [(0, 256)]
    for _ in range(2):
        for name, array in ours.batch(range(len(ours))).items():
            assert (array == theirs.batch(range(len(theirs)))[name]).all()
    size = local.with_suffix(".bin").stat().st_size
    assert sorted(fetched) == [(at, min(at + 256, size)) for at in range(0, size, 256)]  # each chunk once
    again = IndexedDataset(URL + ".bin", tmp_path / "cache")
    assert (again.tokens[:] == IndexedDataset(local).tokens[:]).all() and len(fetched) == -(-size // 256)
    assert np.array_equal(again.tokens[0 : again.num_tokens], IndexedDataset(local).tokens)


@pytest.mark.parametrize("manifest", [True, False])
def test_merged_with_one_on_the_disk(
    local: Path, memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, manifest: bool
) -> None:
    """Its tokens are fetched, whether they have been read before or not."""
    monkeypatch.setenv("HOME", str(tmp_path))  # where it is cached
    if not manifest:
        memory.rm("/bucket/set.manifest.json")
    merge_datasets([URL, str(local)], tmp_path / "all")
    assert (tmp_path / "all.bin").read_bytes() == 2 * local.with_suffix(".bin").read_bytes()
    verify(IndexedDataset(tmp_path / "all"))


def test_without_a_manifest_everything_is_scanned(local: Path, memory: Any, tmp_path: Path) -> None:
    memory.rm("/bucket/set.manifest.json")
    dataset = IndexedDataset(URL, tmp_path / "cache")
    assert verify(dataset) == verify(IndexedDataset(local))
    assert dataset.tokens._sums.all()
    with pytest.raises(DataError, match="has 100 entries"):
        check_token_ids(IndexedDataset(URL, tmp_path / "cache"), 100)


def test_conversations_bring_their_mask(tmp_path: Path, memory: Any) -> None:
    from megatron_ds.data.conversation_dataset import ConversationDataset

    chat = '{"text": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    (tmp_path / "in.jsonl").write_text(chat * 5)
    options = PreprocessOptions("bytes", source=SourceOptions(conversations=True), chat_template="chatml")
    preprocess([str(tmp_path / "in.jsonl")], tmp_path / "set", options, 0)
    upload(tmp_path / "set", memory, "bin", "idx", "manifest.json", "loss_mask")
    ours = ConversationDataset(IndexedDataset(URL, tmp_path / "cache"), 128)
    theirs = ConversationDataset(IndexedDataset(tmp_path / "set"), 128)
    for name, array in ours.batch([0, 1]).items():
        assert (array == theirs.batch([0, 1])[name]).all()


def test_damage_is_named(local: Path, memory: Any, tmp_path: Path) -> None:
    content = bytearray(local.with_suffix(".bin").read_bytes())
    content[700] ^= 1
    memory.pipe_file("/bucket/set.bin", bytes(content))
    dataset = IndexedDataset(URL, tmp_path / "cache")
    assert dataset.document(0).tolist() == list(b"line 0 of a text")
    with pytest.raises(DataError, match=r"memory://bucket/set\.bin, chunk 2 of .*: its checksum is"):
        dataset.tokens[350]
    index = bytearray(local.with_suffix(".idx").read_bytes())
    index[40] ^= 1
    memory.pipe_file("/bucket/set.idx", bytes(index))
    with pytest.raises(DataError, match=r"memory://bucket/set\.idx is not the file that was written"):
        IndexedDataset(URL, tmp_path / "other")
    memory.pipe_file("/bucket/set.bin", bytes(content[:-2]))
    upload(local, memory, "idx")
    with pytest.raises(DataError, match=rf"set\.bin: expected {len(content)} bytes, found {len(content) - 2}"):
        IndexedDataset(URL, tmp_path / "other")


def test_a_change_on_a_web_server_is_noticed(
    local: Path, memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fsspec takes files of the same address for the same: the server's own words tell versions apart."""
    kind, tags = fsspec.implementations.memory.MemoryFileSystem, {"bin": '"1"'}
    info = kind.info

    def with_tag(self: Any, path: str) -> dict[str, Any]:
        return {**info(self, path), "ETag": tags.get(path.rpartition(".")[2])}

    monkeypatch.setattr(kind, "protocol", ("memory", "http"))
    monkeypatch.setattr(kind, "ukey", lambda self, path: path)
    monkeypatch.setattr(kind, "info", with_tag)
    IndexedDataset(URL, tmp_path / "cache")
    upload(local, memory, "bin")  # without a sign of it in size and key
    IndexedDataset(URL, tmp_path / "cache")
    tags["bin"] = '"2"'
    with pytest.raises(DataError, match=r"set\.bin changed since it was cached: .* delete .*cache"):
        IndexedDataset(URL, tmp_path / "cache")


def test_a_change_since_it_was_cached_is_noticed(local: Path, memory: Any, tmp_path: Path) -> None:
    IndexedDataset(URL, tmp_path / "cache")
    upload(local, memory, "bin")  # the same bytes, written again: another version to the store
    with pytest.raises(DataError, match=r"set\.bin changed since it was cached: .* delete .*cache"):
        IndexedDataset(URL, tmp_path / "cache")
    IndexedDataset(URL, tmp_path / "other")


def test_a_damaged_copy_is_named(local: Path, tmp_path: Path) -> None:
    dataset = IndexedDataset(URL, tmp_path / "cache")
    verify(dataset)
    whole = dataset.tokens[:].tolist()
    path = dataset.bin_path
    content = bytearray(path.read_bytes())
    content[700] ^= 1
    path.write_bytes(content)
    again = IndexedDataset(URL, tmp_path / "cache")
    assert again.tokens[:100].tolist() == whole[:100]
    with pytest.raises(
        DataError, match=r"set\.bin, the copy of memory://bucket/set\.bin .* in chunk 2 .* Delete .*cache"
    ):
        again.tokens[340:360]
    index = bytearray(dataset.idx_path.read_bytes())
    index[40] ^= 1
    dataset.idx_path.write_bytes(index)
    with pytest.raises(DataError, match=r"set\.idx is (damaged|not the file that was written)"):
        verify(IndexedDataset(URL, tmp_path / "cache"))


def test_a_cache_that_cannot_be_written(local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot be kept in .*file/.*; set data\.cache_dir to a folder"):
        IndexedDataset(URL, tmp_path / "file")
    dataset = IndexedDataset(URL, tmp_path / "cache")

    def full(*arguments: Any) -> int:
        raise OSError(28, "No space left on device")

    with (
        monkeypatch.context() as patch,
        pytest.raises(DataError, match=r"No space left on device; set data\.cache_dir"),
    ):
        patch.setattr(os, "pwrite", full)
        dataset.tokens[0]
    assert dataset.tokens[:100].tolist() == IndexedDataset(local).tokens[:100].tolist()


def test_what_cannot_be_read(tmp_path: Path, memory: Any) -> None:
    with pytest.raises(DataError, match=r"memory://bucket/none is not a dataset: there is no .*none.idx"):
        memory.pipe_file("/bucket/x", b"")
        IndexedDataset("memory://bucket/none", tmp_path)
    with pytest.raises(DataError, match="nonsense://a/b cannot be read: Protocol not known"):
        IndexedDataset("nonsense://a/b", tmp_path)


def _read_all(url: str, cache: Path, expected: list[int], barrier: Any, log: Path) -> None:
    dataset_files.FETCH_BYTES = 256
    real = fsspec.implementations.local.LocalFileSystem.cat_file

    def cat_file(self: Any, path: str, start: int = 0, end: int = 0, **more: Any) -> bytes:
        with log.open("a") as file:
            file.write(f"{start}\n")
        return real(self, path, start=start, end=end, **more)

    fsspec.implementations.local.LocalFileSystem.cat_file = cat_file
    barrier.wait()
    dataset = IndexedDataset(url, cache)
    order = np.random.default_rng(os.getpid()).permutation(len(expected) // 10)
    for place in order.tolist():
        assert dataset.tokens[place * 10 : place * 10 + 10].tolist() == expected[place * 10 : place * 10 + 10]


def test_processes_of_a_node_share_the_chunks(local: Path, tmp_path: Path) -> None:
    expected = IndexedDataset(local).tokens[:].tolist()
    context = multiprocessing.get_context("fork")
    barrier, log = context.Barrier(4), tmp_path / "log"
    arguments = (f"file://{local}", tmp_path / "cache", expected, barrier, log)
    processes = [context.Process(target=_read_all, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    fetched = log.read_text().split()
    assert len(fetched) == len(set(fetched)) == -(-len(expected) * 2 // 256)
