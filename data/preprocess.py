"""Raw text to `.bin/.idx`, by worker processes, so that it can be stopped at any moment and finished later.

Each block of the inputs (:mod:`megatron_ds.data.sources`) becomes a *part* in ``PREFIX.parts/``
(:mod:`megatron_ds.data.parts`). A run skips the parts that are there and whole, so a run after a kill continues; parts
are named by their block, so the merged dataset is the same bytes whoever made them. The merge copies, and does not
tokenise again.

Memory is bounded: a worker holds one batch of text (:data:`megatron_ds.data.parts.BATCH_BYTES`), and no block
waits in a queue.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_ds.data.cache import first_difference, locked
from megatron_ds.data.chat import load_template
from megatron_ds.data.dataset_files import MANIFEST, file_identity
from megatron_ds.data.indexed import dtype_for_vocabulary, new_prefix
from megatron_ds.data.indexed_writer import IndexedDatasetWriter
from megatron_ds.data.parts import (
    BAD_RECORDS,
    PLAN,
    Counts,
    Job,
    PartMaker,
    PreprocessOptions,
    keep_intact,
    merge_parts,
)
from megatron_ds.data.source_tables import hub_revision
from megatron_ds.data.source_text import Block, Input, UnusableInput
from megatron_ds.data.sources import find_inputs, plan_blocks
from megatron_ds.data.tokenizers import Tokenizer, load_tokenizer
from megatron_ds.data.workers import run_tasks, usable_cores
from megatron_ds.errors import DataError
from megatron_ds.files import read_json, replacing

VERSION = 4
"""Of what is made of the inputs: a run that another version began is not continued."""
OWN = re.compile(rf"{re.escape(PLAN)}|\d{{6,}}-\d{{6,}}\.")
"""How the names of a run's files in its folder begin."""


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
        restart: throw away the parts of a run that did not finish instead of continuing it.
        show_progress: a bar on stderr with MB/s, documents, tokens and the time left.

    Raises:
        DataError: nothing to read, no EOD/BOS token where one is asked for, a bad record with
            ``on_error="fatal"``, an output prefix without a name, fewer than no workers, inputs or options that are
            not those of the interrupted run, files of others where its parts would be, another run at work on the same
            prefix, a worker that died.
    """
    prefix = new_prefix(output_prefix)
    if workers is not None and workers < 0:
        raise DataError(f"workers={workers}: give a number of processes, 0 for none, or leave it out for one a core")
    tokenizer = load_tokenizer(options.tokenizer)
    _require_tokens(options, tokenizer)
    folder = Path(f"{prefix}.parts")
    own = [os.path.abspath(path) for path in (folder / PLAN, f"{prefix}.{MANIFEST}", f"{prefix}.{BAD_RECORDS}")]
    # In a folder of inputs a run may leave JSON of its own.
    found = [item for item in find_inputs(inputs, options.source) if os.path.abspath(item.path) not in own]
    plan = _plan(found, options, tokenizer)
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        lock = Path(f"{prefix}.lock")
        try:
            stack.enter_context(locked(lock, wait=False))
        except BlockingIOError:
            raise DataError(f"another run is writing this dataset: {lock} is locked; wait for it, or stop it") from None
        except OSError as error:
            raise DataError(f"the lock {lock} cannot be made: {error}; choose another output prefix") from None
        _start_or_continue(folder, plan, restart)
        job = Job(str(folder), found, options, dtype_for_vocabulary(tokenizer.vocab_size).name, tokenizer.fast)
        try:
            parts = _make_parts(job, usable_cores() if workers is None else workers, show_progress)
            _check_unchanged(found, plan)
            with IndexedDatasetWriter(prefix, job.dtype, options.source.conversations) as output:
                counts = merge_parts(folder, parts, output, plan)
        except UnusableInput:
            shutil.rmtree(folder)  # the way on is another input or setting, to which these parts do not belong
            raise
        except OSError as error:
            error.filename = error.filename or prefix  # a full disk does not say where
            raise
        shutil.rmtree(folder)
    return counts


def _require_tokens(options: PreprocessOptions, tokenizer: Tokenizer) -> None:
    """Raises :class:`DataError` where a token is to be added that the tokenizer lacks."""
    for wanted, token, what in (
        (options.append_eod, tokenizer.eod_id, "end-of-document"),
        (options.prepend_bos, tokenizer.bos_id, "begin-of-sequence"),
    ):
        if wanted and token is None:
            raise DataError(f"the tokenizer {options.tokenizer} has no {what} token to add")


def _plan(inputs: list[Input], options: PreprocessOptions, tokenizer: Tokenizer) -> dict[str, Any]:
    """What a run depends on, to be compared when it is continued and kept in the dataset's manifest."""
    template = None
    if options.source.conversations:
        template = load_template(options.chat_template, options.tokenizer, tokenizer.special)
    settings = {k: v for k, v in asdict(options).items() if k != "tokenizer"}
    return {
        "version": VERSION,
        "inputs": [{"path": i.path, **_identity(i)} for i in inputs],
        "settings": settings,
        **({"chat_template_xxh3": template.fingerprint} if template else {}),
        "tokenizer": {
            "spec": options.tokenizer,
            "vocab_size": tokenizer.vocab_size,
            "xxh3": tokenizer.fingerprint,
            # Settings beside the tokenizer's file, which the fingerprint does not cover.
            "eod_id": tokenizer.eod_id,
            "bos_id": tokenizer.bos_id,
        },
    }


def _identity(item: Input) -> dict[str, Any]:
    if item.kind == "hub":
        return {"revision": hub_revision(item)}
    if item.kind == "arrow":
        files = sorted(Path(item.path).rglob("*.arrow"))
        return {"files": {str(p.relative_to(item.path)): file_identity(p) for p in files}}
    return file_identity(Path(item.path))


def _start_or_continue(folder: Path, plan: dict[str, Any], restart: bool) -> None:
    path = folder / PLAN
    if folder.exists() and (restart or not path.is_file()):
        if foreign := [name for name in sorted(os.listdir(folder)) if not OWN.match(name)]:
            raise DataError(
                f"{folder} is where the parts of a run would be, and holds {foreign[0]}, which is of none; choose "
                "another output prefix, or move it away"
            )
        shutil.rmtree(folder)
    if not folder.exists():
        folder.mkdir(parents=True)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(plan, indent=1))
        return
    try:
        before = read_json(path)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}, of a run that did not finish, is damaged: {error}. Start anew with --restart"
        ) from None
    if difference := first_difference(before, json.loads(json.dumps(plan))):
        raise DataError(
            f"{folder} holds the parts of a run that did not finish, with other inputs or settings: {difference}. "
            "Restore them to continue it, or start anew with --restart"
        )


def _check_unchanged(inputs: list[Input], plan: dict[str, Any]) -> None:
    now = [{"path": i.path, **_identity(i)} for i in inputs]
    if difference := first_difference(plan["inputs"], now):
        raise DataError(f"an input changed while it was read: {difference}. Start anew with --restart")


def _make_parts(job: Job, workers: int, show_progress: bool) -> list[str]:
    """Make every part that is not there yet; the names of all, in order."""
    from tqdm import tqdm

    there = keep_intact(Path(job.folder))
    names: list[str] = []
    bar = tqdm(
        total=sum(item.size for item in job.inputs),
        unit="B",
        unit_scale=True,
        desc="preprocess",
        smoothing=0.05,
        disable=not show_progress,
    )

    def is_done(number: int, block: int) -> bool:
        return f"{number:06d}-{block:06d}" in there

    def missing() -> Iterator[Block]:
        for block in plan_blocks(job.inputs, job.options.source, is_done):
            names.append(block.name)
            if not is_done(block.input, block.number):
                yield block
            elif show_progress:
                bar.total -= block.weight  # done by an earlier run: not part of this run's speed

    documents = tokens = 0
    with bar, contextlib.closing(run_tasks(missing(), functools.partial(PartMaker, job), workers)) as made:
        for weight, counts in made:
            documents, tokens = documents + counts.documents, tokens + counts.tokens
            bar.set_postfix_str(f"{documents:,} docs, {tokens:,} tokens", refresh=False)
            bar.update(weight)
    return names
