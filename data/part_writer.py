"""What a preprocessing worker does: one block of the inputs into one part."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from megatron_ds.data import chat
from megatron_ds.data.chat import ChatTemplate, load_template
from megatron_ds.data.chat_records import BadConversation
from megatron_ds.data.dataset_files import checksum
from megatron_ds.data.indexed_writer import IndexedDatasetWriter
from megatron_ds.data.parts import BAD, SUMMARY, Counts, Part
from megatron_ds.data.source_types import Block, Input, Problem, Slice, SourceOptions, UnusableInput
from megatron_ds.data.sources import read_block
from megatron_ds.data.tokenizer_base import Ids, Tokenizer
from megatron_ds.data.tokenizers import load_tokenizer
from megatron_ds.files import replacing, sync_and_close

BATCH_BYTES = 1 << 20


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


Text = tuple[Slice, int, str]
"""A good record on its way, with its slice and its number in it: for when the tokenizer or template has something
against it."""


class PartMaker:
    """Makes the parts of a worker: a handler for :func:`megatron_ds.data.workers.run_tasks`."""

    def __init__(self, job: Job):
        self.job = job
        options = job.options
        self.tokenizer = load_tokenizer(options.tokenizer, job.fast)
        self.template = None
        if options.source.conversations:
            self.template = load_template(options.chat_template, options.tokenizer, self.tokenizer.special)

    def __call__(self, block: Block) -> tuple[int, Counts]:
        """The block's weight, and what is in it."""
        return block.weight, PartWriter(self.job, self.tokenizer, self.template, block).run()


class PartWriter:
    """Turns one block into one part: a dataset, ``.bad`` records left out, and ``.part``, which makes it valid."""

    def __init__(self, job: Job, tokenizer: Tokenizer, template: ChatTemplate | None, block: Block):
        self.job, self.tokenizer, self.template, self.block = job, tokenizer, template, block
        self.dtype = np.dtype(job.dtype)
        self.counts = Counts()
        self.lines: dict[int, int] = {}
        self._bos = tokenizer.bos_id if job.options.prepend_bos else None
        self._eod = tokenizer.eod_id if job.options.append_eod else None

    def run(self) -> Counts:
        base = Path(self.job.folder) / self.block.name
        bad = base.with_suffix(BAD)
        with (
            IndexedDatasetWriter(base, self.dtype, masked=self.template is not None) as self._dataset,
            replacing(bad) as temporary,
            temporary.open("wb") as self._bad,
        ):
            self._write_all()
            sync_and_close(self._bad)
        self.counts.max_id = self._dataset.found.max_id
        checksums = {f".{kind}": file["xxh3"] for kind, file in self._dataset.files.items()}
        Part(self.counts, self.lines, {**checksums, BAD: checksum(bad)}).write(base.with_suffix(SUMMARY))
        return self.counts

    def _write_all(self) -> None:
        batch: list[Text] = []
        size = 0
        for part, number, text in read_block(self.job.inputs, self.block, self.job.options.source):
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

    def _problem(self, part: Slice, number: int, problem: Problem) -> None:
        item = self.job.inputs[part.input]
        if self.job.options.on_error == "fatal":
            line = number + 1 + (_lines_before(item, part.start) if part.first is None else part.first)
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
        for item, ids in zip(items, self._encode_each(items)):
            if ids is None:
                continue
            self.counts.text_bytes += _utf8_size(item[2])
            array = np.asarray(ids).astype(self.dtype, copy=False)
            if array.size:
                before = [] if self._bos is None or array[0] == self._bos else [self._bos]
                after = [] if self._eod is None or array[-1] == self._eod else [self._eod]
                if before or after:
                    array = np.concatenate([before, array, after]).astype(self.dtype)
            yield item, array, nothing

    def _encode_each(self, items: list[Text]) -> list[Ids | None]:
        """The ids of each text; None for one that the tokenizer cannot take, which is then noted as a problem."""
        if not items:
            return []
        try:
            return list(self.tokenizer.encode_batch([text for _, _, text in items]))
        except RuntimeError:
            raise  # two encoders disagree: no fault of the text
        except Exception as error:  # the Rust side raises bare Exception
            if len(items) > 1:  # one of them has failed: which?
                return [ids for item in items for ids in self._encode_each([item])]
            part, number, _ = items[0]
            self._problem(part, number, Problem("not encodable", str(error)))
            return [None]

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


def _lines_before(item: Input, start: int) -> int:
    """Lines of a plain file before byte ``start``."""
    lines = 0
    with open(item.path, "rb") as file:
        while start > 0 and (chunk := file.read(min(start, 1 << 20))):
            lines += chunk.count(b"\n")
            start -= len(chunk)
    return lines
