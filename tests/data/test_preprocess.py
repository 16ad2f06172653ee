"""Preprocessing: every input kind, bad records, and the tools."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import indexed_reference
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from preprocess_helpers import REPOSITORY, TEXTS, Killed, blocks_of, jsonl, run, texts_of

from megatron_ds.data import parts, source_tables, source_text, sources
from megatron_ds.data.indexed import IndexedDataset
from megatron_ds.data.indexed_writer import merge_datasets
from megatron_ds.data.parts import PartMaker, PreprocessOptions
from megatron_ds.data.preprocess import preprocess
from megatron_ds.data.source_text import Block, Input, Kind, Slice, SourceOptions, TxtDocuments
from megatron_ds.errors import DataError


def zstd(text: bytes) -> bytes:
    packed: bytes = pyarrow.compress(text, "zstd", asbytes=True)
    return packed


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "arrow", "folder"])
def test_every_kind_of_input_gives_the_same_documents(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In more than one batch of texts."""
    monkeypatch.setattr(parts, "BATCH_BYTES", sum(map(len, TEXTS)) // 3)
    source = tmp_path / f"in.{kind}"
    if kind == "jsonl":
        source.write_bytes(jsonl(TEXTS))
    elif kind == "jsonl.gz":
        source.write_bytes(gzip.compress(jsonl(TEXTS)))
    elif kind == "jsonl.zst":
        source.write_bytes(zstd(jsonl(TEXTS[:20])) + zstd(jsonl(TEXTS[20:])))  # two frames
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"n": range(40), "text": TEXTS}), source, row_group_size=7)
    elif kind == "arrow":
        import datasets

        shown = datasets.Dataset.from_dict({"text": TEXTS, "n": range(len(TEXTS))}).with_format("arrow", columns=["n"])
        shown.save_to_disk(source)
    else:
        (source / "sub").mkdir(parents=True)
        (source / "a.jsonl").write_bytes(jsonl(TEXTS[:10]))
        (source / "sub" / "b.jsonl").write_bytes(jsonl(TEXTS[10:]))
        (source / "README.md").write_text("not an input")
        for hidden in (".ipynb_checkpoints/a.jsonl", "__MACOSX/b.jsonl", "._a.jsonl"):
            (source / hidden).parent.mkdir(exist_ok=True)
            (source / hidden).write_bytes(jsonl(TEXTS))
    assert run([source], tmp_path / "out") == TEXTS
    manifest = json.loads((tmp_path / "out.manifest.json").read_text())
    assert manifest["counts"]["documents"] == len(TEXTS)
    assert manifest["counts"]["text_bytes"] == manifest["counts"]["tokens"] == sum(len(t.encode()) for t in TEXTS)


def test_hub_datasets_are_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the hub replaced by a function: what is asked of it, blocks, continuation, another revision."""
    import datasets
    import huggingface_hub

    asked, revision = [], ["abc"]

    def load_dataset(*arguments: object, **options: object) -> object:
        asked.append((arguments, options))
        return iter([{"text": text, "n": i} for i, text in enumerate(TEXTS)] + [{"n": 1}])

    class HfApi:
        def dataset_info(self, name: str) -> object:
            if not name.startswith("owner/name"):
                raise FileNotFoundError(name)
            return type("Info", (), {"sha": revision[0]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub, "HfApi", HfApi)
    monkeypatch.setattr(source_tables, "STREAM_BLOCK", 300)
    options = PreprocessOptions("bytes", source=SourceOptions(dataset_split="validation"))
    preprocess(["hub:owner/name:small"], tmp_path / "out", options, 0)
    assert texts_of(tmp_path / "out") == TEXTS
    expected = {"split": "validation", "streaming": True, "revision": "abc"}
    assert asked == [(("owner/name", "small"), expected)]
    (bad,) = (tmp_path / "out.bad.jsonl").read_text().splitlines()
    assert json.loads(bad)["line"] == len(TEXTS) + 1

    real = PartMaker.__call__

    def stop_after_first(maker: PartMaker, block: Block) -> None:
        real(maker, block)
        raise Killed

    monkeypatch.setattr(PartMaker, "__call__", stop_after_first)
    with pytest.raises(Killed):
        preprocess(["hub:owner/name"], tmp_path / "again", options, 0)
    monkeypatch.setattr(PartMaker, "__call__", real)
    revision[0] = "def"
    with pytest.raises(DataError, match="hub:owner/name: revision was 'abc', is now 'def'"):
        preprocess(["hub:owner/name"], tmp_path / "again", options, 0)
    revision[0] = "abc"
    preprocess(["hub:owner/name"], tmp_path / "again", options, 0)
    assert texts_of(tmp_path / "again") == TEXTS
    with pytest.raises(DataError, match="hub:owner/other was not found on the hub: FileNotFoundError"):
        preprocess(["hub:owner/other"], tmp_path / "other", options, 0)


@pytest.mark.parametrize("documents, expected", [
    ("file", ["one\ntwo\n\n\nthree\r\n four\n \nfive\r\n", "x\n\ny"]),
    ("line", ["one", "two", "three", " four", " ", "five", "x", "y"]),
    ("paragraph", ["one\ntwo", "three\r\n four", "five", "x", "y"]),
])  # fmt: skip
@pytest.mark.parametrize("compressed", [False, True])
def test_documents_of_txt(tmp_path: Path, documents: str, expected: list[str], compressed: bool) -> None:
    contents = ("one\ntwo\n\n\nthree\r\n four\n \nfive\r\n", "x\n\ny")
    names = []
    for number, content in enumerate(contents):
        names.append(tmp_path / (f"{number}.txt" + (".gz" if compressed else "")))
        names[-1].write_bytes(gzip.compress(content.encode()) if compressed else content.encode())
    options = PreprocessOptions("bytes", source=SourceOptions(txt_documents=documents))  # type: ignore[arg-type]
    assert run(names, tmp_path / "out", options) == expected


@given(
    lines=st.lists(st.text(alphabet="ab \té", max_size=12), min_size=1, max_size=30),
    size=st.integers(1, 40),
    documents=st.sampled_from(["line", "paragraph"]),
    last=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_the_cut_into_blocks_never_shows(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], size: int, documents: str, last: bool
) -> None:
    """Byte ranges of any size over a `.txt` give the documents of the whole, each once, in order."""
    path = tmp_path_factory.mktemp("cut") / "in.txt"
    path.write_bytes(("\n".join(lines) + ("\n" if last else "")).encode())
    total = path.stat().st_size
    if not total:
        return
    options = SourceOptions(txt_documents=documents)  # type: ignore[arg-type]
    inputs = sources.find_inputs([str(path)], options)

    def read(ranges: Iterable[tuple[int, int]]) -> list[str]:
        found = []
        for start, stop in ranges:
            block = Block(0, 0, (Slice(0, start, stop),), stop - start)
            found += [text for _, _, text in sources.read_block(inputs, block, options) if isinstance(text, str)]
        return found

    pieces = list(source_text.cut_file(inputs[0], size))
    assert [start for start, _ in pieces] == [0, *(stop for _, stop in pieces[:-1])] and pieces[-1][1] == total
    assert all(stop - start >= size for start, stop in pieces[:-1])
    assert read(pieces) == read([(0, total)])
    if documents == "line":
        assert read(pieces) == [line for line in lines if line]
    else:
        groups: list[list[str]] = [[]]
        for line in lines:
            if line.strip():
                groups[-1].append(line)
            elif groups[-1]:
                groups.append([])
        assert read(pieces) == ["\n".join(group) for group in groups if group]


def test_every_byte_of_many_files_is_in_one_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files share blocks, which are closed before they would become too large; a large one is cut."""
    blocks_of(100, monkeypatch)
    sizes = [40, 40, 40, 250, 30, 60, 20, 100, 10]
    for number, size in enumerate(sizes):
        (tmp_path / f"{number}.txt").write_text("a\n" * (size // 2))
    options = SourceOptions(txt_documents="line")
    inputs = sources.find_inputs([str(tmp_path)], options)
    blocks = list(sources.plan_blocks(inputs, options))
    assert [(part.input, part.start, part.stop) for block in blocks for part in block.slices if part.input != 3] == [
        (number, 0, size) for number, size in enumerate(sizes) if number != 3
    ]
    cuts = [(part.start, part.stop) for block in blocks for part in block.slices if part.input == 3]
    assert (
        [start for start, _ in cuts] == [0, *(stop for _, stop in cuts[:-1])] and cuts[-1][1] == 250 and len(cuts) > 1
    )
    shared = [block for block in blocks if len(block.slices) > 1]
    assert len(shared) >= 2 and all(block.weight == sum(p.stop - p.start for p in block.slices) for block in blocks)
    assert all(block.weight <= 100 for block in shared)


def test_end_and_beginning_tokens(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(jsonl(["ab", "c"]))
    preprocess([str(source)], tmp_path / "out", PreprocessOptions("bytes", append_eod=True), workers=0)
    assert indexed_reference.read(tmp_path / "out") == (8, [[[97, 98, 256]], [[99, 256]]])
    with pytest.raises(DataError, match="the tokenizer bytes has no begin-of-sequence token"):
        preprocess([str(source)], tmp_path / "out", PreprocessOptions("bytes", prepend_bos=True), workers=0)


# --- bad records ------------------------------------------------------------------------------------------------

BAD_LINES = [
    (b'{"text": "good"}\n', None),
    (b'{"text": "cut of\n', "invalid JSON"),
    (b'{"txt": "no"}\n', "missing key"),
    (b'{"text": null}\n', "missing key"),
    (b'{"text": 5}\n', "missing key"),
    (b'["text"]\n', "missing key"),
    (b'{"text": "\xff\xfe"}\n', "invalid UTF-8"),
    (b'{"text": "\\ud83d"}\n', "invalid UTF-8"),
    (b'{"text": ""}\n', "empty"),
    (b"\n", "empty"),
    (b'{"text": "\\ud83d\\ude42"}', None),
]


@pytest.mark.parametrize("compressed", [False, True])
def test_bad_records_are_listed_with_file_and_line(
    tmp_path: Path, compressed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks_of(30, monkeypatch)  # lines are counted over blocks
    source = tmp_path / ("in.jsonl.gz" if compressed else "in.jsonl")
    content = b"".join(line for line, _ in BAD_LINES)
    source.write_bytes(gzip.compress(content) if compressed else content)
    assert run([source], tmp_path / "out") == ["good", "🙂"]
    listed = [json.loads(line) for line in (tmp_path / "out.bad.jsonl").read_text().splitlines()]
    expected = [(i, reason) for i, (_, reason) in enumerate(BAD_LINES, 1) if reason]
    assert [(bad["line"], bad["reason"]) for bad in listed] == expected
    assert {bad["file"] for bad in listed} == {str(source)}
    counts = json.loads((tmp_path / "out.manifest.json").read_text())["counts"]["problems"]
    assert counts == {"invalid JSON": 1, "missing key": 4, "invalid UTF-8": 2, "empty": 2}

    fatal = PreprocessOptions("bytes", on_error="fatal")
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"in\.jsonl(\.gz)?, line 2: invalid JSON: .*--on-error skip"):
            preprocess([str(source)], tmp_path / "fatal", fatal, workers)
    assert not (tmp_path / "fatal.idx").exists()


@pytest.mark.parametrize("compressed", [False, True])
def test_bad_paragraphs_are_listed_with_their_first_line(
    compressed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks_of(30, monkeypatch)
    content = b"one\ntwo\n\n\n" * 20 + b"\xff\nx\n\n" + b"one\ntwo\n\n\n" * 20 + b"\xff"
    source = tmp_path / ("in.txt.gz" if compressed else "in.txt")
    source.write_bytes(gzip.compress(content) if compressed else content)
    run([source], tmp_path / "out", PreprocessOptions("bytes", source=SourceOptions(txt_documents="paragraph")))
    listed = [json.loads(line)["line"] for line in (tmp_path / "out.bad.jsonl").read_text().splitlines()]
    assert listed == [number for number, line in enumerate(content.split(b"\n"), 1) if line == b"\xff"]


def test_fatal_counts_the_lines_of_the_blocks_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks_of(50, monkeypatch)
    source = tmp_path / "in.jsonl"
    source.write_bytes(jsonl(TEXTS) + b"{\n" + jsonl(TEXTS))
    with pytest.raises(DataError, match=r"in\.jsonl, line 41: invalid JSON"):
        preprocess([str(source)], tmp_path / "out", PreprocessOptions("bytes", on_error="fatal"), 0)


@pytest.mark.parametrize("content, message", [
    (b"", r"the inputs hold no document with text \(.*in\.jsonl\): 0 records were bad"),
    (b'{"a": 1}\n{}\n', r"2 records were bad \(2 x missing key\); the first, .*in\.jsonl, line 1: missing key: no "
                        r"'text' among \['a'\] \(all of them: .*out\.bad\.jsonl\)"),
    (2 * '{"text": "a"}\n'.encode("utf-16-le"), r"3 records were bad \(3 x invalid JSON\)"),  # one is big-endian text
])  # fmt: skip
def test_nothing_to_read(tmp_path: Path, content: bytes, message: str) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(content)
    with pytest.raises(DataError, match=message):
        run([source], tmp_path / "out")


def test_fewer_than_no_workers(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="workers=-1: give a number of processes, 0 for none"):
        preprocess([str(tmp_path)], tmp_path / "out", PreprocessOptions("bytes"), workers=-1)


def test_inputs_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="input 'nowhere' does not exist"):
        preprocess(["nowhere"], tmp_path / "out", PreprocessOptions("bytes"))
    os.mkfifo(tmp_path / "fifo.jsonl")
    with pytest.raises(DataError, match=r"fifo\.jsonl' is no regular file"):
        preprocess([str(tmp_path / "fifo.jsonl")], tmp_path / "out", PreprocessOptions("bytes"))
    with pytest.raises(DataError, match=r"fifo\.jsonl is a link to nothing, or no regular file"):
        preprocess([str(tmp_path)], tmp_path / "out", PreprocessOptions("bytes"))
    (tmp_path / "fifo.jsonl").unlink()
    (tmp_path / "in.csv").write_text("a,b")
    with pytest.raises(DataError, match=r"in\.csv has suffix '\.csv', not one of \.jsonl"):
        preprocess([str(tmp_path / "in.csv")], tmp_path / "out", PreprocessOptions("bytes"))
    (tmp_path / "in.json").write_text('\n[{"text": "a"},\n {"text": "b"}]')
    with pytest.raises(DataError, match=r"in\.json is one JSON array, .*: jq -c '\.\[\]' .*in\.json > .*in\.jsonl$"):
        preprocess([str(tmp_path / "in.json")], tmp_path / "out", PreprocessOptions("bytes"))
    (tmp_path / "in.json").unlink()
    with pytest.raises(DataError, match=r"holds no input: expected \.jsonl"):
        preprocess([str(tmp_path)], tmp_path / "out", PreprocessOptions("bytes"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.jsonl").write_bytes(jsonl(TEXTS))
    for name, target, message in (
        ("b.jsonl.xz", None, "would be passed over: expected .jsonl"),
        ("B.JSONL.GZ", None, "is empty: .* it was cut off"),
        ("c", tmp_path, "is a link to a folder"),
        ("d.jsonl", tmp_path / "nowhere", "is a link to nothing"),
    ):
        path = tmp_path / "folder" / name
        path.touch() if target is None else path.symlink_to(target)
        with pytest.raises(DataError, match=f"{path} {message}"):
            preprocess([str(tmp_path / "folder")], tmp_path / "out", PreprocessOptions("bytes"))
        path.unlink()
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(jsonl(TEXTS))[:-20])
    with pytest.raises(DataError, match=r"in\.jsonl\.gz is damaged or truncated"):
        run([tmp_path / "in.jsonl.gz"], tmp_path / "out")
    twice = pyarrow.table([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(DataError, match=r"twice\.parquet has 2 columns 'text'"):
        run([tmp_path / "twice.parquet"], tmp_path / "twice")
    (tmp_path / "in.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"in\.parquet is not a readable parquet file"):
        preprocess([str(tmp_path / "in.parquet")], tmp_path / "other", PreprocessOptions("bytes"))


@pytest.mark.parametrize(("kind", "what", "text"), [("jsonl", "line", b"["), ("paragraph", "paragraph", b"a line\r\n")])
def test_a_compressed_record_without_an_end_is_refused_as_it_comes(
    monkeypatch: pytest.MonkeyPatch, kind: Kind, what: str, text: bytes
) -> None:
    monkeypatch.setattr(source_text, "MAX_FILE_DOCUMENT", 1000)
    chunks = iter([(text * (600 // len(text)), 1)] * 9)
    with pytest.raises(DataError, match=rf"x\.gz has a {what} of more than 0 MB: is it a text\?"):
        next(source_text.stream_blocks(0, Input("x.gz", kind, ".gz"), chunks, lambda *_: False))
    assert len(list(chunks)) == 7


@pytest.mark.parametrize("end", ["\n", "\r\n", " \n"])
def test_a_compressed_text_is_cut_at_any_blank_line(end: str) -> None:
    text = f"one{end}more{end}{end}two{end}{end}three{end}".encode()
    chunks = ((text[at : at + 5], 5) for at in range(0, len(text), 5))
    blocks = list(source_text.stream_blocks(0, Input("x.txt.gz", "paragraph", ".gz"), chunks, lambda *_: False))
    assert [(block.data or b"").split() for block in blocks] == [[b"one", b"more"], [b"two"], [b"three"]]
    assert b"".join(block.data or b"" for block in blocks) == text


def test_a_prefix_that_names_a_file_or_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in.txt").write_text("text")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for prefix in (".", "..", "/", "", "x/.."):
        with pytest.raises(DataError, match="names a folder; give a path with a name"):
            preprocess(["../in.txt"], prefix, PreprocessOptions("bytes"), 0)
        with pytest.raises(DataError, match="names a folder; give a path with a name"):
            merge_datasets(["../in"], prefix)
    assert not list(Path.cwd().iterdir())
    preprocess(["../in.txt"], "../named.bin", PreprocessOptions("bytes"), 0)
    merge_datasets(["../named"], "../merged.idx")
    assert IndexedDataset("../named").num_tokens == IndexedDataset("../merged").num_tokens == 4


def test_a_missing_column_is_named_with_the_nearest(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"content": TEXTS, "texts": TEXTS}), tmp_path / "in.parquet")
    with pytest.raises(DataError, match=r"no column 'text'; did you mean 'texts'\?; it has \['content', 'texts'\]"):
        preprocess([str(tmp_path / "in.parquet")], tmp_path / "out", PreprocessOptions("bytes"))


def test_the_first_bad_record_is_reported_whoever_finds_one_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks_of(4000, monkeypatch)
    source = tmp_path / "in.jsonl"
    # The first block has its bad line at its end, after much work; the second at its start.
    source.write_bytes(b'{"text": "' + b"a" * 3000 + b'"}\n' + b"{1}\n" + b" " * 1500 + b"\n" + b"{2}\n" * 400)
    with pytest.raises(DataError, match="line 2: invalid JSON"):
        preprocess([str(source)], tmp_path / "out", PreprocessOptions("bytes", on_error="fatal"), 2)


def test_the_tools_explain_themselves_and_exit_with_2(tmp_path: Path) -> None:
    corpus, tokenizer, prefix = tmp_path / "corpus.jsonl", tmp_path / "tokenizer", tmp_path / "data"

    def tool(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(REPOSITORY / "tools" / name), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    for result in (
        tool("build_corpus.py", "--output", corpus, "--max-megabytes", 0.3),
        tool("train_tokenizer.py", "--input", corpus, "--output", tokenizer, "--vocab-size", 600),
        tool("preprocess_data.py", "--input", corpus, "--tokenizer", tokenizer, "--output-prefix", prefix, "--quiet"),
    ):
        assert result.returncode == 0, result.stderr
    assert "documents" in result.stdout and IndexedDataset(prefix).num_tokens > 10_000
    wrong = tool("preprocess_data.py", "--input", "nowhere", "--tokenizer", tokenizer, "--output-prefix", prefix)
    assert wrong.returncode == 2 and wrong.stderr == "error: input 'nowhere' does not exist\n"
    shown = tool("preprocess_data.py", "--help").stdout
    assert "Worker processes. By default one a core" in " ".join(shown.replace("│", " ").split())


@pytest.mark.parametrize("documents", ["file", "line", "paragraph"])
@pytest.mark.parametrize("compressed", [False, True])
def test_the_byte_order_mark_is_no_text(tmp_path: Path, documents: TxtDocuments, compressed: bool) -> None:
    """At the start of a file alone: elsewhere U+FEFF is a character."""
    content = "\ufefffirst\n\nse\ufeffcond\n".encode()
    path = tmp_path / ("in.txt.gz" if compressed else "in.txt")
    path.write_bytes(gzip.compress(content) if compressed else content)
    texts = run([path], tmp_path / "out", PreprocessOptions("bytes", source=SourceOptions(txt_documents=documents)))
    assert "".join(texts).replace("\n", "") == "firstse\ufeffcond"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_its_inputs_ended_leaves_no_parts(tmp_path: Path, workers: int) -> None:
    """The mended command runs: it is not refused for the parts of a run that nobody interrupted."""
    source = tmp_path / "in.jsonl"
    source.write_bytes(jsonl(TEXTS) + b"{\n")
    prefix = str(tmp_path / "out")
    with pytest.raises(DataError, match="invalid JSON"):
        preprocess([str(source)], prefix, PreprocessOptions("bytes", on_error="fatal"), workers)
    with pytest.raises(DataError, match="the inputs hold no document with text"):
        preprocess([str(source)], prefix, PreprocessOptions("bytes", source=SourceOptions("content")), workers)
    assert not Path(f"{prefix}.parts").exists()
    assert preprocess([str(source)], prefix, PreprocessOptions("bytes"), workers).documents == len(TEXTS)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_table_that_holds_as_text_what_is_none(tmp_path: Path, kind: str) -> None:
    import pyarrow
    import pyarrow.parquet

    column = pyarrow.array([b"one", b"\xff\xfe", b"three"], pyarrow.binary()).view(pyarrow.utf8())
    source = tmp_path / f"in.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), source)
    else:
        import datasets

        datasets.Dataset(datasets.table.InMemoryTable(pyarrow.table({"text": column}))).save_to_disk(str(source))
    assert run([source], tmp_path / "out") == ["one", "three"]
    (bad,) = map(json.loads, (tmp_path / "out.bad.jsonl").open())
    assert (bad["line"], bad["reason"]) == (2, "invalid UTF-8")
