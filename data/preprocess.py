"""Raw text to `.bin/.idx`, by worker processes, so that it can be stopped at any moment and finished later.

Each block of the inputs (:mod:`megatron_ds.data.sources`) becomes a *part* in ``PREFIX.parts/``: its tokens, its
lengths, and a JSON file with counts and checksums that appears last and makes the part valid. A run skips the parts
that are there, so a run after a kill continues; parts are named by their block, so the merged dataset is the same
bytes whoever made them. The merge copies, and does not tokenise again.

Memory is bounded: a worker holds one batch of about :data:`BATCH_BYTES` of text, and no more than two blocks a
worker are on their way.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt
import xxhash

from megatron_ds.data.cache import locked
from megatron_ds.data.indexed import dtype_for_vocabulary, sync_and_close
from megatron_ds.data.parts import Counts, merge_parts
from megatron_ds.data.sources import Block, Input, Problem, Slice, SourceOptions, find_inputs, plan_blocks, read_block
from megatron_ds.data.tokenizers import Tokenizer, load_tokenizer
from megatron_ds.data.verify import file_identity
from megatron_ds.errors import DataError

BATCH_BYTES = 1 << 20
VERSION = 1


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


def preprocess(
    inputs: list[str],
    output_prefix: str | Path,
    options: PreprocessOptions,
    workers: int | None = None,
    restart: bool = False,
    show_progress: bool = False,
) -> Counts:
    """Tokenise ``inputs`` into ``output_prefix.bin/.idx`` and describe it in ``output_prefix.manifest.json``.

    Args:
        inputs: see :func:`~megatron_ds.data.sources.find_inputs`.
        output_prefix: path without suffix.
        options: what the output depends on.
        workers: processes; None for one a core, 0 for none (in this process).
        restart: throw away the parts of an interrupted run instead of continuing it.
        show_progress: a bar on stderr with MB/s, documents, tokens and the time left.

    Raises:
        DataError: nothing to read, no EOD/BOS token where one is asked for, a bad record with
            ``on_error="fatal"``, inputs or options that are not those of the interrupted run, another run at work
            on the same prefix, a worker that died.
    """
    prefix = str(output_prefix)
    tokenizer = load_tokenizer(options.tokenizer)
    for wanted, token, what in (
        (options.append_eod, tokenizer.eod_id, "end-of-document"),
        (options.prepend_bos, tokenizer.bos_id, "begin-of-sequence"),
    ):
        if wanted and token is None:
            raise DataError(f"the tokenizer {options.tokenizer} has no {what} token to add")
    found = find_inputs(inputs)
    plan = _plan(found, options, tokenizer)
    folder = Path(f"{prefix}.parts")
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        lock = Path(f"{prefix}.lock")
        try:
            stack.enter_context(locked(lock, wait=False))
        except BlockingIOError:
            raise DataError(f"another run is writing this dataset: {lock} is locked; wait for it, or stop it") from None
        _start_or_continue(folder, plan, restart)
        job = Job(str(folder), found, options, dtype_for_vocabulary(tokenizer.vocab_size).name)
        parts = _make_parts(job, os.cpu_count() or 1 if workers is None else workers, show_progress)
        _check_unchanged(found, plan)
        counts = merge_parts(folder, parts, prefix, np.dtype(job.dtype), plan)
        shutil.rmtree(folder)
    return counts


def _plan(inputs: list[Input], options: PreprocessOptions, tokenizer: Tokenizer) -> dict[str, Any]:
    """What a run depends on, to be compared when it is continued and kept in the dataset's manifest."""
    settings = {k: v for k, v in asdict(options).items() if k != "tokenizer"}
    return {
        "version": VERSION,
        "inputs": [{"path": i.path, **_identity(i)} for i in inputs],
        "settings": settings,
        "tokenizer": {"spec": options.tokenizer, "vocab_size": tokenizer.vocab_size, "xxh3": tokenizer.fingerprint},
    }


def _identity(item: Input) -> dict[str, Any]:
    if item.kind == "hub":
        return {}
    if item.kind == "arrow":
        files = sorted(Path(item.path).rglob("*.arrow"))
        return {"files": {str(p.relative_to(item.path)): file_identity(p) for p in files}}
    return file_identity(Path(item.path))


def _start_or_continue(folder: Path, plan: dict[str, Any], restart: bool) -> None:
    path = folder / "plan.json"
    if folder.exists() and (restart or not path.is_file()):
        shutil.rmtree(folder)
    if not folder.exists():
        folder.mkdir(parents=True)
        temporary = folder / "plan.json.tmp"
        temporary.write_text(json.dumps(plan, indent=1))
        temporary.replace(path)
        return
    before = json.loads(path.read_text())
    if difference := _first_difference(before, json.loads(json.dumps(plan))):
        raise DataError(
            f"{folder} holds the parts of an interrupted run with other inputs or settings: {difference}. "
            "Restore them to continue it, or start anew with --restart"
        )


def _first_difference(before: Any, now: Any, where: str = "") -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in {**before, **now}:
            label = f"{before['path']}: {name}" if "path" in before and name != "path" else f"{where}{name}"
            if found := _first_difference(before.get(name), now.get(name), f"{label}." if "path" not in before else ""):
                return found if found.startswith(label) else f"{label}{found}"
        return ""
    if isinstance(before, list) and isinstance(now, list):
        for one, other in zip(before, now):
            if found := _first_difference(one, other):
                return found
        return f" had {len(before)} entries, now {len(now)}" if len(before) != len(now) else ""
    return f" was {before!r}, is now {now!r}" if before != now else ""


def _check_unchanged(inputs: list[Input], plan: dict[str, Any]) -> None:
    now = [{"path": i.path, **_identity(i)} for i in inputs]
    if difference := _first_difference(plan["inputs"], now):
        raise DataError(f"an input changed while it was read: {difference}. Start anew with --restart")


def _make_parts(job: Job, workers: int, show_progress: bool) -> list[str]:
    """Make every part that is not there yet; the names of all, in order."""
    folder = Path(job.folder)

    def is_done(number: int, block: int) -> bool:
        return (folder / f"{number:06d}-{block:06d}.json").is_file()

    names: list[str] = []
    blocks = plan_blocks(job.inputs, job.options.source, is_done)
    context = multiprocessing.get_context("spawn")  # forking a process that has threads may deadlock
    counters = context.Array("d", 3)
    bar = _Bar(sum(i.size for i in job.inputs), counters, show_progress)
    with bar, contextlib.ExitStack() as stack:
        if workers:
            pool = stack.enter_context(
                ProcessPoolExecutor(workers, context, _start_worker, (job, counters, os.getpid()))
            )
            stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        else:
            _start_worker(job, counters, 0)
        running: list[Future[None]] = []
        for block in blocks:
            names.append(block.name)
            if is_done(block.input, block.number):
                bar.skip(block.weight)
                continue
            if not workers:
                _run_block(block)
                bar.refresh()
                continue
            running.append(pool.submit(_run_block, block))
            while len(running) >= 2 * workers:
                running = _collect(running, bar)
        while running:
            running = _collect(running, bar)
    return names


def _collect(running: list[Future[None]], bar: _Bar) -> list[Future[None]]:
    """Wait a little; the futures (in the order of their blocks) that are not done yet."""
    wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
    bar.refresh()
    if any(future.done() and future.exception() for future in running):
        # Which block fails first depends on the machine; report the first in order, whichever that was.
        for future in running:
            try:
                future.result()
            except BrokenProcessPool:
                raise DataError(
                    "a preprocessing worker was killed (out of memory?); run the same command again to continue where "
                    "it was, perhaps with fewer --workers"
                ) from None
    return [future for future in running if not future.done()]


class _Bar:
    """A progress bar over shared counters: input bytes done, documents, tokens."""

    def __init__(self, total: int, counters: Any, shown: bool):
        from tqdm import tqdm

        self._counters = counters
        self._bar = tqdm(
            total=total, unit="B", unit_scale=True, disable=not shown, desc="preprocess", smoothing=0.05, delay=0.2
        )

    def refresh(self) -> None:
        done, documents, tokens = self._counters[:]
        self._bar.set_postfix_str(f"{documents:,.0f} docs, {tokens:,.0f} tokens", refresh=False)
        self._bar.update(max(0, int(done) - self._bar.n))

    def skip(self, weight: int) -> None:
        """A block that an earlier run has done: not part of this run's speed."""
        if not self._bar.disable:
            self._bar.initial += weight
            self._bar.n += weight
            self._bar.last_print_n += weight
        with self._counters.get_lock():
            self._counters[0] += weight

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.refresh()
        self._bar.close()


# --- in the worker ----------------------------------------------------------------------------------------------


class _Worker:
    """What a worker process keeps between blocks."""

    def __init__(self, job: Job, counters: Any):
        self.job, self.counters = job, counters
        self.tokenizer = load_tokenizer(job.options.tokenizer, proved=True)  # by the parent


_worker: dict[int, _Worker] = {}  # one entry, keyed by process id: a pool's initializer can only leave things here


def _start_worker(job: Job, counters: Any, parent: int) -> None:
    if parent:
        # One thread a worker: the workers are the parallelism.
        os.environ.update(TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1")
        threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()
    _worker.clear()
    _worker[os.getpid()] = _Worker(job, counters)


def _end_with_parent(parent: int) -> None:
    """A pool's workers wait for ever on a queue of their own when their parent is killed: notice it and leave."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _run_block(block: Block) -> None:
    worker = _worker[os.getpid()]
    PartWriter(worker.job, worker.tokenizer, block, worker.counters).run()


class PartWriter:
    """Turns one block into one part."""

    def __init__(self, job: Job, tokenizer: Tokenizer, block: Block, counters: Any):
        self.job, self.tokenizer, self.block, self.counters = job, tokenizer, block, counters
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
        with self.counters.get_lock():
            self.counters[0] += (share - self._reported) * self.block.weight
            self.counters[1] += len(lengths)
            self.counters[2] += sum(lengths)
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
