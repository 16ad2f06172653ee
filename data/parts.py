"""The parts of a preprocessing run: how a worker makes one, what is kept of a run that did not finish, and how all
become one dataset.

A part is a dataset of one block of the inputs, with the list of the records that were left out of it. Its ``.part``
file says what is in it, with a checksum of each of its files, and appears last: it makes the part valid.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt

from megatron_ds.data import chat
from megatron_ds.data.chat_records import BadConversation
from megatron_ds.data.dataset_files import file_checksum, file_of, require_checksum
from megatron_ds.data.indexed import IndexedDataset
from megatron_ds.data.indexed_writer import IndexedDatasetWriter
from megatron_ds.data.source_text import (
    Block,
    Input,
    Problem,
    Slice,
    SourceOptions,
    UnusableInput,
    describe_problems,
)
from megatron_ds.data.sources import read_block
from megatron_ds.data.tokenizer_base import Ids
from megatron_ds.data.tokenizers import load_tokenizer
from megatron_ds.data.verify import Scan
from megatron_ds.errors import DataError, listed
from megatron_ds.files import (
    checksum,
    parse_json,
    read_bytes,
    replacing,
    sync_and_close,
    temporary_beside,
    write_text_durably,
)

BATCH_BYTES = 1 << 20
PLAN, BAD_RECORDS = "plan.json", "bad.jsonl"
SUMMARY, BAD = ".part", ".bad"


@dataclass
class Counts:
    """Totals of a part or a dataset; ``problems`` counts bad records by reason; ``max_id`` is -1 without tokens."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    max_id: int = -1
    problems: dict[str, int] = field(default_factory=dict)

    def add(self, other: Counts) -> None:
        self.documents += other.documents
        self.tokens += other.tokens
        self.text_bytes += other.text_bytes
        self.max_id = max(self.max_id, other.max_id)
        for reason, count in other.problems.items():
            self.problems[reason] = self.problems.get(reason, 0) + count


@dataclass(frozen=True)
class PreprocessOptions:
    """What the output depends on, apart from the inputs."""

    tokenizer: str
    """A folder or tokenizer.json of Hugging Face tokenizers, a SentencePiece .model, a .tiktoken
    file, or the word bytes."""
    append_eod: bool = False
    """End each document with the tokenizer's end-of-document token, unless it ends with one already."""
    prepend_bos: bool = False
    """Begin each document with the tokenizer's begin-of-sequence token, unless it begins with one already."""
    on_error: Literal["skip", "fatal"] = "skip"
    """Bad records (invalid JSON, missing key, invalid UTF-8, empty, refused by tokenizer or chat template): leave them
    out and list them in PREFIX.bad.jsonl, or stop."""
    source: SourceOptions = field(default_factory=SourceOptions)
    chat_template: str | None = None
    """How conversations are written: a Jinja file, or chatml. By default the tokenizer's own template."""


@dataclass(frozen=True)
class Job:
    """All that a worker needs besides the block."""

    folder: str
    inputs: list[Input]
    options: PreprocessOptions
    dtype: str
    fast: bool
    """See :attr:`~megatron_ds.data.tokenizer_base.Tokenizer.fast`."""


@dataclass(frozen=True)
class Part:
    """What a ``.part`` file says.

    Attributes:
        lines: by the number of an input, how many of its lines or rows were read.
        checksums: by the suffix of each file.
    """

    counts: Counts
    lines: dict[int, int]
    checksums: dict[str, str]

    def write(self, path: Path) -> None:
        body = json.dumps(asdict(self))
        with replacing(path) as temporary:
            write_text_durably(temporary, f"{checksum(body.encode())}\n{body}")

    @staticmethod
    def read(path: Path) -> Part:
        """A ``DataError`` where it is not what was written."""
        digest, _, body = read_bytes(path).partition(b"\n")
        _require(path, checksum(body), digest.decode("ascii", "replace"))
        found = parse_json(body)
        lines = {int(number): read for number, read in found["lines"].items()}
        return Part(Counts(**found["counts"]), lines, found["checksums"])

    def check(self, path: Path, suffixes: Iterable[str]) -> None:
        """Compare those of its files, of which ``path`` is the ``.part``."""
        for suffix in suffixes:
            file = path.with_suffix(suffix)
            _require(file, file_checksum(file), self.checksums[suffix])


Text = tuple[Slice, int, str]
"""A good record on its way, with its slice and its number in it: for when the tokenizer or template has something
against it."""


class PartMaker:
    """Turns blocks into parts, one after another: a handler for :func:`megatron_ds.data.workers.run_tasks`."""

    def __init__(self, job: Job):
        self.job, options = job, job.options
        self.tokenizer = load_tokenizer(options.tokenizer, job.fast)
        self.template = None
        if options.source.conversations:
            self.template = chat.load_template(options.chat_template, options.tokenizer, self.tokenizer.special)
        self.dtype = np.dtype(job.dtype)
        self._bos = self.tokenizer.bos_id if options.prepend_bos else None
        self._eod = self.tokenizer.eod_id if options.append_eod else None

    def __call__(self, block: Block) -> tuple[int, Counts]:
        """The block's weight, and what is in it. Its files: a dataset, ``.bad``, and ``.part``."""
        self.block, self.counts, self.lines = block, Counts(), dict[int, int]()
        base = Path(self.job.folder) / block.name
        bad = base.with_suffix(BAD)
        with (
            IndexedDatasetWriter(base, self.dtype, masked=self.template is not None) as self._dataset,
            replacing(bad) as temporary,
            temporary.open("wb") as self._bad,
        ):
            self._write_all()
            sync_and_close(self._bad)
        found = self._dataset.found
        self.counts.max_id = found.max_id
        checksums = {f".{kind}": digest for kind, digest in found.checksums.items() if digest}
        Part(self.counts, self.lines, {**checksums, BAD: file_checksum(bad)}).write(base.with_suffix(SUMMARY))
        return block.weight, self.counts

    def _write_all(self) -> None:
        batch: list[Text] = []
        size = 0
        for part, number, text in read_block(self.job.inputs, self.block, self.job.options.source):
            if self.job.inputs[part.input].kind != "paragraph":  # a record is one line, or row
                self.lines[part.input] = self.lines.get(part.input, 0) + 1
            if isinstance(text, Problem):
                self._problem(part, number, text)
                continue
            batch.append((part, number, text))
            size += len(text)
            if size >= BATCH_BYTES:
                self._write(batch)
                batch, size = [], 0
        self._write(batch)
        for part in self.block.slices:
            if (item := self.job.inputs[part.input]).kind == "paragraph":
                data = self.block.data
                ends = _line_ends(item, part.start, part.stop) if data is None else data.count(b"\n")
                self.lines[part.input] = self.lines.get(part.input, 0) + ends

    def _problem(self, part: Slice, number: int, problem: Problem) -> None:
        item = self.job.inputs[part.input]
        if self.job.options.on_error == "fatal":
            line = number + 1 + (_line_ends(item, 0, part.start) if part.first is None else part.first)
            raise UnusableInput(
                f"{item.path}, {'row' if item.kind in ('parquet', 'arrow') else 'line'} {line}: {problem.reason}"
                f"{': ' + problem.detail if problem.detail else ''}. Mend it, or skip bad records with --on-error skip"
            )
        self.counts.problems[problem.reason] = self.counts.problems.get(problem.reason, 0) + 1
        record = {"input": part.input, "line": number, "reason": problem.reason, "detail": problem.detail}
        self._bad.write(json.dumps(record).encode() + b"\n")

    def _write(self, items: list[Text]) -> None:
        tokens: list[npt.NDArray] = []
        masks: list[npt.NDArray[np.uint8]] = []
        encoded = self._encode_conversations(items) if self.template else self._encode_texts(items)
        for (part, number, _), ids, mask in encoded:
            if not ids.size:
                self._problem(part, number, Problem("empty", "the tokenizer makes nothing of it"))
                continue
            tokens.append(ids)
            masks.append(mask)
        if tokens:
            lengths = np.array([ids.size for ids in tokens])
            learnt = np.concatenate(masks) if self.template else None
            self._dataset.add_documents(np.concatenate(tokens), lengths, learnt)
            self.counts.documents += lengths.size
            self.counts.tokens += int(lengths.sum())

    def _encode_texts(self, items: list[Text]) -> Iterator[tuple[Text, npt.NDArray, npt.NDArray[np.uint8]]]:
        nothing = np.empty(0, np.uint8)
        for item, ids in self._encode_each(items):
            self.counts.text_bytes += _utf8_size(item[2])
            array = np.asarray(ids).astype(self.dtype, copy=False)
            if array.size:
                before = [] if self._bos is None or array[0] == self._bos else [self._bos]
                after = [] if self._eod is None or array[-1] == self._eod else [self._eod]
                if before or after:
                    array = np.concatenate([before, array, after]).astype(self.dtype)
            yield item, array, nothing

    def _encode_each(self, items: list[Text]) -> Iterator[tuple[Text, Ids]]:
        """The ids of each text; one that the tokenizer cannot take is noted as a problem."""
        try:
            yield from zip(items, list(self.tokenizer.encode_batch([text for _, _, text in items])))
        except RuntimeError:
            raise  # two encoders disagree: no fault of the text
        except Exception as error:  # the Rust side raises bare Exception
            if len(items) > 1:  # one of them has failed: which?
                for item in items:
                    yield from self._encode_each([item])
            else:
                part, number, _ = items[0]
                self._problem(part, number, Problem("not encodable", str(error)))

    def _encode_conversations(self, items: list[Text]) -> Iterator[tuple[Text, npt.NDArray, npt.NDArray[np.uint8]]]:
        """One document for each text that shows answers as generation would: all or nothing of a conversation."""
        assert self.template is not None
        for item in items:
            part, number, conversation = item
            try:
                renderings = self.template.renderings(**json.loads(conversation))
                encoded = [chat.encode(self.tokenizer, rendering, self._bos, self._eod) for rendering in renderings]
            except Exception as error:
                bad = isinstance(error, BadConversation)
                self._problem(part, number, Problem("bad conversation" if bad else "not encodable", str(error)))
                continue
            self.counts.text_bytes += sum(_utf8_size(rendering.text) for rendering in renderings)
            for ids, mask in encoded:
                yield item, ids.astype(self.dtype), mask


def _utf8_size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _line_ends(item: Input, start: int, stop: int) -> int:
    """How many there are in these bytes of a plain file."""
    ends = 0
    with open(item.path, "rb") as file:
        file.seek(start)
        while start < stop and (chunk := file.read(min(stop - start, 1 << 20))):
            ends += chunk.count(b"\n")
            start += len(chunk)
    return ends


def _require(path: Path, digest: str, stated: str) -> None:
    require_checksum(path, digest, stated, f"{path.stem}{SUMMARY}", "run the same command again")


def keep_intact(folder: Path) -> set[str]:
    """The parts of a run that did not finish whose every byte is right. What else it left, but its plan, is removed."""
    intact = set()
    for path in folder.glob(f"*{SUMMARY}"):
        with contextlib.suppress(OSError, DataError):
            part = Part.read(path)
            part.check(path, part.checksums)
            intact.add(path.stem)
    for path in folder.iterdir():
        if path.stem not in intact and path.name != PLAN:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return intact


def merge_parts(folder: Path, names: Sequence[str], output: IndexedDatasetWriter, plan: dict[str, Any]) -> Counts:
    """Lay the parts end to end, each compared with its checksums, with a manifest and a list of bad records."""
    counts, lines = Counts(), dict[int, int]()
    bad = file_of(output.prefix, BAD_RECORDS)
    with temporary_beside(bad) as temporary:
        with temporary.open("wb") as target:
            for name in names:
                path = folder / f"{name}{SUMMARY}"
                part = Part.read(path)
                part.check(path, [BAD])  # the writer compares the others when it copies them
                if part.counts.documents:
                    checksums = {suffix[1:]: digest for suffix, digest in part.checksums.items()}
                    output.add_dataset(IndexedDataset(folder / name), Scan(0, part.counts.max_id, checksums))
                counts.add(part.counts)
                _copy_bad_records(path.with_suffix(BAD), target, plan["inputs"], lines)
                for number, read in part.lines.items():
                    lines[number] = lines.get(number, 0) + read
            sync_and_close(target)
        temporary.replace(bad) if counts.problems else bad.unlink(missing_ok=True)
    if not counts.documents:
        shown = listed((item["path"] for item in plan["inputs"]), 4)
        raise UnusableInput(
            f"the inputs hold no document with text ({shown}): {sum(counts.problems.values())} records were bad "
            f"({describe_problems(counts.problems) or 'there were none at all'}){_first_of(bad)}"
        )
    output.close({**plan, "counts": asdict(counts)})
    return counts


def _first_of(bad: Path) -> str:
    """The first of the bad records, for a message; nothing where there are none."""
    if not bad.exists():
        return ""
    with bad.open(encoding="utf-8") as lines:
        first = json.loads(next(lines))
    detail = f": {first['detail']}" if first.get("detail") else ""
    return f"; the first, {first['file']}, line {first['line']}: {first['reason']}{detail} (all of them: {bad})"


def _copy_bad_records(part: Path, target: IO[bytes], inputs: list[dict[str, Any]], lines: dict[int, int]) -> None:
    """``lines``: of each input, those that the parts before this one read; a part counts from its own first line."""
    with part.open("rb") as records:
        for line in records:
            record = json.loads(line)
            number = record.pop("input")
            record = {"file": inputs[number]["path"], **record}
            record["line"] += 1 + lines.get(number, 0)
            target.write(json.dumps(record).encode() + b"\n")
