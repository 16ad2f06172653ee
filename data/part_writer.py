"""What a preprocessing worker does: one block of the inputs into one part."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt
import xxhash

from megatron_ds.data.indexed import sync_and_close
from megatron_ds.data.parts import Counts
from megatron_ds.data.source_types import Block, Input, Problem, Slice, SourceOptions
from megatron_ds.data.sources import read_block
from megatron_ds.data.tokenizers import Tokenizer, load_tokenizer
from megatron_ds.data.workers import Report
from megatron_ds.errors import DataError

BATCH_BYTES = 1 << 20


@dataclass(frozen=True)
class PreprocessOptions:
    """What the output depends on, apart from the inputs.

    Args:
        tokenizer: for :func:`load_tokenizer`.
        append_eod, prepend_bos: put the tokenizer's end-of-document, begin-of-sequence token around each document.
        on_error: bad records (invalid JSON, missing key, invalid UTF-8, empty) are written to
            ``PREFIX.bad.jsonl`` and skipped, or the first one ends the run.
        source: how records become texts.
    """

    tokenizer: str
    append_eod: bool = False
    prepend_bos: bool = False
    on_error: Literal["skip", "fatal"] = "skip"
    source: SourceOptions = field(default_factory=SourceOptions)


@dataclass(frozen=True)
class Job:
    """All that a worker needs besides the block."""

    folder: str
    inputs: list[Input]
    options: PreprocessOptions
    dtype: str


class PartMaker:
    """Makes the parts of a worker: a handler for :func:`megatron_ds.data.workers.run_tasks`."""

    def __init__(self, job: Job):
        self.job = job
        self.tokenizer = load_tokenizer(job.options.tokenizer, proved=True)  # the parent has loaded it before

    def __call__(self, block: Block, report: Report) -> None:
        PartWriter(self.job, self.tokenizer, block, report).run()


class PartWriter:
    """Turns one block into one part."""

    def __init__(self, job: Job, tokenizer: Tokenizer, block: Block, report: Report):
        self.job, self.tokenizer, self.block, self.report = job, tokenizer, block, report
        self.dtype = np.dtype(job.dtype)
        self.counts = Counts()
        self.lengths: list[npt.NDArray[np.int32]] = []
        self.lines: dict[int, int] = {}
        self.bad: list[dict[str, Any]] = []
        self._reported = 0.0
        options = job.options
        self._before = [tokenizer.bos_id] if options.prepend_bos else []
        self._after = [tokenizer.eod_id] if options.append_eod else []

    def run(self) -> None:
        base = Path(self.job.folder) / self.block.name
        temporary = base.with_suffix(f".{os.getpid()}.tmp")
        with temporary.open("wb") as file:
            self._hash = xxhash.xxh3_64()
            batch: list[str] = []
            size = 0
            total = max(sum(s.stop - s.start for s in self.block.slices), 1)
            passed = 0
            last: Slice | None = None
            for part, (number, share, text) in read_block(self.job.inputs, self.block, self.job.options.source):
                if last is not None and part is not last:
                    passed += last.stop - last.start
                last = part
                self.lines[part.input] = self.lines.get(part.input, 0) + 1
                if isinstance(text, Problem):
                    self._problem(part, number, text)
                    continue
                batch.append(text)
                size += len(text)
                if size >= BATCH_BYTES:
                    self._write(file, batch, (passed + share * (part.stop - part.start)) / total)
                    batch, size = [], 0
            self._write(file, batch, 1.0)
            sync_and_close(file)
        lengths = np.concatenate(self.lengths) if self.lengths else np.empty(0, np.int32)
        temporary.replace(base.with_suffix(".bin"))
        self._commit(base.with_suffix(".len"), lengths.astype("<i4").tobytes())
        summary = {
            "counts": asdict(self.counts),
            "lines": self.lines,
            "bad": self.bad,
            "bin": {"bytes": self.counts.tokens * self.dtype.itemsize, "xxh3": self._hash.hexdigest()},
            "len": {"bytes": lengths.nbytes, "xxh3": xxhash.xxh3_64_hexdigest(lengths.astype("<i4").tobytes())},
        }
        self._commit(base.with_suffix(".json"), json.dumps(summary).encode())

    def _commit(self, path: Path, content: bytes) -> None:
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        with temporary.open("wb") as file:
            file.write(content)
            sync_and_close(file)
        temporary.replace(path)

    def _problem(self, part: Slice, number: int, problem: Problem) -> None:
        item = self.job.inputs[part.input]
        if self.job.options.on_error == "fatal":
            line = number + 1 + (_lines_before(item, part.start) if part.first is None else part.first)
            raise DataError(
                f"{item.path}, {'row' if item.kind in ('parquet', 'arrow') else 'line'} {line}: {problem.reason}"
                f"{': ' + problem.detail if problem.detail else ''}. Mend it, or skip bad records with --on-error skip"
            )
        self.counts.problems[problem.reason] = self.counts.problems.get(problem.reason, 0) + 1
        self.bad.append({"input": part.input, "line": number, "reason": problem.reason, "detail": problem.detail})

    def _write(self, file: IO[bytes], texts: list[str], share: float) -> None:
        encoded = self.tokenizer.encode_batch(texts) if texts else []
        arrays: list[npt.NDArray] = []
        lengths = []
        for ids in encoded:
            if not len(ids):
                # A tokenizer may map a text to nothing; its document would be empty.
                self.counts.problems["empty"] = self.counts.problems.get("empty", 0) + 1
                continue
            if self._before:
                arrays.append(np.array(self._before, self.dtype))
            arrays.append(np.asarray(ids).astype(self.dtype, copy=False))
            if self._after:
                arrays.append(np.array(self._after, self.dtype))
            lengths.append(len(ids) + len(self._before) + len(self._after))
        if arrays:
            tokens = np.concatenate(arrays)
            file.write(tokens.data)
            self._hash.update(tokens.data)
            self.lengths.append(np.array(lengths, np.int32))
            self.counts.documents += len(lengths)
            self.counts.tokens += tokens.size
            self.counts.text_bytes += sum(len(t) if t.isascii() else len(t.encode()) for t in texts)
            self.counts.max_id = max(self.counts.max_id, int(tokens.max(initial=0)))
        self.report((share - self._reported) * self.block.weight, len(lengths), sum(lengths))
        self._reported = share


def _lines_before(item: Input, start: int) -> int:
    """Lines of a plain file that start before byte ``start``."""
    if start == 0:
        return 0
    lines = 0
    with open(item.path, "rb") as file:
        left = start - 1
        while left > 0 and (chunk := file.read(min(left, 1 << 20))):
            lines += chunk.count(b"\n")
            left -= len(chunk)
    return lines + 1
