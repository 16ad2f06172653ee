"""Datasets, their caches, half-made datasets, corpora and tokenizers that were damaged: right, or refused."""

from __future__ import annotations

import gzip
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from corpora import CONVERSATIONS, PLAIN, TEXTS, opened, read
from damage import TO_CONTENT, TO_FILES, damage, files_of, flip_unseen, refused

from megatron_ds.data import preprocess as preprocess_module
from megatron_ds.data import source_text, sources
from megatron_ds.data.indexed import IndexedDataset
from megatron_ds.data.indexed_writer import merge_datasets
from megatron_ds.data.parts import Counts, PartMaker, PreprocessOptions
from megatron_ds.data.preprocess import preprocess
from megatron_ds.data.source_text import Block
from megatron_ds.data.tokenizers import load_tokenizer
from megatron_ds.pipeline.timeline import Timeline


@pytest.fixture(scope="module")
def right(made: Path) -> dict[str, list[list[int]]]:
    """By kind, the samples of the whole datasets, whose caches lie beside them from now on."""
    return {kind: read(opened(made / kind / kind, kind)) for kind in ("text", "chat")}


@pytest.mark.trials(8, 500)
@pytest.mark.parametrize("kind", ["text", "chat"])
def test_what_is_left_of_a_dataset(
    draw: random.Random, made: Path, right: dict[str, list[list[int]]], place: Path, kind: str
) -> None:
    folder = place / kind
    shutil.copytree(made / kind, folder)
    cached = draw.random() < 0.5
    if not cached:
        for path in files_of(folder):
            if path.name.count(".") > 1 and "manifest" not in path.name:
                path.unlink()
    damage(draw, files_of(folder))
    found: list[list[int]] = []
    error = refused(lambda: found.extend(read(opened(folder / kind, kind))), str(folder))
    assert error or found == right[kind], "other samples than before, without a word"


@pytest.mark.trials(4, 150)
@pytest.mark.parametrize("kind", ["text", "chat"])
def test_damage_after_a_run_has_begun(
    draw: random.Random, made: Path, right: dict[str, list[list[int]]], place: Path, kind: str
) -> None:
    """A disk flips bits while sizes and times stay: what was not read yet is compared when it is."""
    folder = place / kind
    shutil.copytree(made / kind, folder)
    found = opened(folder / kind, kind) if draw.random() < 0.7 else None
    # Opening conversations reads their whole mask: it has been compared then.
    names = [".bin"] if kind == "text" or found else [".bin", ".loss_mask"]
    path = draw.choice([path for path in files_of(folder) if path.suffix in names or path.name.endswith(tuple(names))])
    print(f"{path}: {flip_unseen(draw, path)}")
    rows: list[list[int]] = []
    error = refused(lambda: rows.extend(read(found or opened(folder / kind, kind))), str(folder))
    assert error or rows == right[kind]


@pytest.mark.trials(2, 60)
def test_a_damaged_dataset_is_not_merged(draw: random.Random, made: Path, place: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(made / "text", place / name)
    damage(draw, [path for path in files_of(place / "one") if path.name.count(".") == 1])
    error = refused(lambda: merge_datasets([str(place / n / "text") for n in ("one", "two")], place / "all"), "one")
    whole = [IndexedDataset(place / "two" / "text").document(i).tolist() for i in range(len(TEXTS))]
    if not error:
        both = IndexedDataset(place / "all")
        assert [both.document(i).tolist() for i in range(both.num_documents)] == whole * 2
    else:
        assert not (place / "all.idx").exists()


@pytest.mark.trials(4, 300)
@pytest.mark.parametrize("kind", ["text", "chat"])
def test_what_an_interrupted_run_left(
    draw: random.Random, made: Path, place: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its parts are damaged before it goes on: the same dataset in the end, or one error that says how to begin."""
    for module, name in ((sources, "MIN_BLOCK"), (sources, "MAX_BLOCK"), (source_text, "STREAM_BLOCK")):
        monkeypatch.setattr(module, name, 1500)
    options = PLAIN if kind == "text" else CONVERSATIONS
    inputs = [str(made / f"{kind}.jsonl")]
    real, left = PartMaker.__call__, draw.randrange(1, 4)

    def make(self: PartMaker, block: Block) -> tuple[int, Counts]:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return real(self, block)

    with monkeypatch.context() as patch:
        patch.setattr(PartMaker, "__call__", make)
        with pytest.raises(KeyboardInterrupt):
            preprocess(inputs, place / "out", options, workers=0)
    damage(draw, files_of(place / "out.parts"))
    error = refused(lambda: preprocess(inputs, place / "out", options, workers=0), str(place / "out.parts"))
    if error:
        assert "--restart" in error, "the way out is not named"
        preprocess(inputs, place / "out", options, workers=0, restart=True)
    for suffix in ("bin", "idx"):
        assert (place / f"out.{suffix}").read_bytes() == (made / kind / f"{kind}.{suffix}").read_bytes()


def _jsonl(path: Path) -> Path:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS))
    return path


def _parquet(path: Path) -> Path:
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), path, row_group_size=30)
    return path


def _packed(compress: Callable[[bytes], bytes]) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        path.write_bytes(compress(_jsonl(path).read_bytes()))
        return path

    return make


CORPORA: dict[str, Callable[[Path], Path]] = {
    "corpus.jsonl": _jsonl,
    "corpus.json": _jsonl,
    "corpus.txt": lambda path: _jsonl(path),
    "corpus.jsonl.gz": _packed(gzip.compress),
    "corpus.jsonl.zst": _packed(lambda data: pyarrow.compress(data, "zstd", asbytes=True)),
    "corpus.parquet": _parquet,
}


@pytest.mark.trials(1, 50)
@pytest.mark.parametrize("name", CORPORA)
def test_what_is_left_of_a_corpus(draw: random.Random, place: Path, name: str) -> None:
    """The good records of it, each as it was, and a list of the others; or one error that names the file."""
    path = CORPORA[name](place / name)
    damage(draw, [path])
    options = PreprocessOptions("bytes", on_error=draw.choice(("skip", "fatal")))
    error = refused(lambda: preprocess([str(path)], place / "out", options, workers=0), name)
    if error:
        assert not (place / "out.idx").exists()
        return
    dataset = IndexedDataset(place / "out")
    texts = [bytes(dataset.document(i).tolist()).decode() for i in range(dataset.num_documents)]
    assert sum(text in TEXTS for text in texts) >= len(texts) - 25 or name.endswith("txt")
    if name.endswith((".gz", ".zst", ".parquet")):
        assert len(texts) in (len(TEXTS), 0) or (place / "out.bad.jsonl").exists(), "records are gone unsaid"


@pytest.mark.trials(2, 60)
@pytest.mark.parametrize("kind", ["bpe", "unigram", "wordpiece"])
def test_what_is_left_of_a_tokenizer(draw: random.Random, tokenizers: Path, place: Path, kind: str) -> None:
    """What it says cannot be checked: but it encodes, or is refused."""
    shutil.copytree(tokenizers / kind, place / kind)
    damage(draw, files_of(place / kind), TO_FILES if draw.random() < 0.5 else TO_CONTENT)

    def use() -> None:
        tokenizer = load_tokenizer(place / kind)
        for ids in tokenizer.encode_batch(TEXTS[:5]):
            assert all(0 <= i < tokenizer.vocab_size for i in ids)
            tokenizer.decode(ids)

    refused(use, str(place / kind))


@pytest.mark.trials(4, 60)
def test_what_is_left_of_a_recorded_timeline(draw: random.Random, place: Path) -> None:
    rows = [
        {"rank": rank, "action": f"{m}F{rank}", "start": m + rank, "end": m + rank + 1.0}
        for rank in (0, 1)
        for m in range(4)
    ]
    for rank in (0, 1):
        (place / f"rank-{rank}.json").write_text(json.dumps([row for row in rows if row["rank"] == rank]))
    paths = files_of(place)
    damage(draw, paths)
    refused(lambda: Timeline.from_json_files(paths).schedule(), str(place), "no rank", "no events")


def test_the_modules_that_are_patched_are_those_that_work() -> None:
    """A trial whose blocks are as large as its corpus would damage no part."""
    assert preprocess_module.plan_blocks is sources.plan_blocks
