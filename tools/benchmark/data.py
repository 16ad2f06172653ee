"""The data tools beside their peers on this machine: tokenising, index, loader, memory.

Contestants run one after the other in each round, so that a ratio is taken under the same conditions; the table shows
the median ratio over the rounds.

    python tools/benchmark/data.py --rounds 3
    python tools/benchmark/data.py --only index loader
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from unittest import mock

import numpy as np

from megatron_ds.data.blend import BlendedDataset
from megatron_ds.data.cli import run
from megatron_ds.data.conversation_dataset import ConversationDataset
from megatron_ds.data.corpus import build_corpus
from megatron_ds.data.dataset_files import CheckedArray
from megatron_ds.data.fim import FillInTheMiddle
from megatron_ds.data.gpt_dataset import GPTDataset, TextSource
from megatron_ds.data.indexed import IndexedDataset, header
from megatron_ds.data.loader import BatchLoader
from megatron_ds.data.tokenizer_training import train_tokenizer
from megatron_ds.data.verify import verify

Part = Literal["tokenise", "memory", "index", "loader"]


@dataclass(frozen=True)
class DataBenchmark:
    rounds: int = 3
    """How often every contestant runs."""
    only: tuple[Part, ...] = ("tokenise", "index", "loader")
    """Which parts to run. memory preprocesses 1 GB, which takes minutes."""
    max_megabytes: float | None = None
    """Size of the corpus in MB (10^6 bytes). By default the whole standard library, about 31 MB."""


def main(options: DataBenchmark) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if {"tokenise", "memory"} & set(options.only):
            summary = build_corpus(folder / "corpus.jsonl", options.max_megabytes)
            train_tokenizer([str(folder / "corpus.jsonl")], folder / "bpe", 8192, max_megabytes=8)
            with_normalizer(folder / "bpe", folder / "bpe-nfc")
            print(f"corpus: {summary.text_bytes / 1e6:.1f} MB of text, {os.cpu_count()} cores")
        if "tokenise" in options.only:
            tokenise(folder, summary.text_bytes / 1e6, options.rounds)
        if "memory" in options.only:
            memory(folder)
        if "index" in options.only:
            index(folder)
        if "loader" in options.only:
            loader(folder)


def with_normalizer(source: Path, target: Path) -> None:
    """The same vocabulary, with a normalizer: tiktoken cannot stand in for it."""
    target.mkdir()
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "NFC"}
    (target / "tokenizer.json").write_text(json.dumps(tokenizer))


Cost = tuple[float, float]
"""Seconds by the clock, and of all processors together: the second says what a busy machine hides."""

# --- tokenising -------------------------------------------------------------------------------------------------

ALONE = """
import json, os, sys, time
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(sys.argv[1] + "/tokenizer.json")
texts = [json.loads(line)["text"] for line in open(sys.argv[2])]
start, used = time.perf_counter(), sum(os.times()[:4])
tokenizer.encode_batch(texts, add_special_tokens=False)
print(time.perf_counter() - start, sum(os.times()[:4]) - used)
"""
DATASETS_MAP = """
import os, sys, time
import datasets
from tokenizers import Tokenizer
datasets.disable_progress_bars()
corpus = datasets.load_dataset("json", data_files=sys.argv[2], split="train", cache_dir=sys.argv[3])
tokenizer = Tokenizer.from_file(sys.argv[1] + "/tokenizer.json")
def encode(batch):
    return {"ids": [e.ids for e in tokenizer.encode_batch(batch["text"], add_special_tokens=False)]}
os.environ["TOKENIZERS_PARALLELISM"] = "false"
start, used = time.perf_counter(), sum(os.times()[:4])
corpus.map(encode, batched=True, batch_size=100, num_proc=os.cpu_count(), remove_columns=corpus.column_names,
           load_from_cache_file=False)
print(time.perf_counter() - start, sum(os.times()[:4]) - used)
"""


def script(text: str, *arguments: str) -> Callable[[], Cost]:
    """What a script says it took; a process of its own, so that no contestant warms another's pools."""

    def measure() -> Cost:
        done = subprocess.run([sys.executable, "-c", text, *arguments], capture_output=True, text=True, check=True)
        seconds, used = done.stdout.split()[-2:]
        return float(seconds), float(used)

    return measure


OURS = """
import os, sys, time
from megatron_ds.data.parts import PreprocessOptions
from megatron_ds.data.preprocess import preprocess
if __name__ == "__main__":
    start, used = time.perf_counter(), sum(os.times()[:4])
    preprocess([sys.argv[2]], sys.argv[3], PreprocessOptions(sys.argv[1]))
    print(time.perf_counter() - start, sum(os.times()[:4]) - used)
"""


def ours(corpus: Path, tokenizer: Path, prefix: Path) -> Callable[[], Cost]:
    """Everything that the tool does: worker processes, reading, JSON, tokens, parts, merge, index, checksums.

    A file, because worker processes import the main module again: not this one, which imports torch.
    """
    program = prefix.with_suffix(".py")
    program.write_text(OURS)

    def measure() -> Cost:
        command = [sys.executable, str(program), str(tokenizer), str(corpus), str(prefix)]
        seconds, used = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        return float(seconds), float(used)

    return measure


def tokenise(folder: Path, megabytes: float, rounds: int) -> None:
    corpus = folder / "corpus.jsonl"
    bpe, nfc = folder / "bpe", folder / "bpe-nfc"
    cache = str(folder / "datasets")
    contestants: dict[str, tuple[str, Callable[[], Cost]]] = {
        "tokenizers alone, one batch call": ("", script(ALONE, str(bpe), str(corpus))),
        "ours": ("tokenizers alone, one batch call", ours(corpus, bpe, folder / "ours")),
        "datasets.map": ("tokenizers alone, one batch call", script(DATASETS_MAP, str(bpe), str(corpus), cache)),
        "tokenizers alone, with NFC": ("", script(ALONE, str(nfc), str(corpus))),
        "ours, with NFC (no tiktoken)": ("tokenizers alone, with NFC", ours(corpus, nfc, folder / "ours-nfc")),
    }
    costs: dict[str, list[Cost]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, (_, measure) in contestants.items():
            costs[name].append(measure())
    print(f"\n{'':<36}{'MB/s':>8}{'of tokenizers alone':>22}{'MB per CPU-second':>20}{'of it':>8}")
    for name, (reference, _) in contestants.items():
        rate, per_cpu = (statistics.median(megabytes / cost[i] for cost in costs[name]) for i in (0, 1))
        shown, cpu = "", ""
        if reference:
            ratios = [[r[i] / c[i] for c, r in zip(costs[name], costs[reference])] for i in (0, 1)]
            shown = f"{statistics.median(ratios[0]):.2f} ({min(ratios[0]):.2f} to {max(ratios[0]):.2f})"
            cpu = f"{statistics.median(ratios[1]):.2f}"
        print(f"{name:<36}{rate:>8.1f}{shown:>22}{per_cpu:>20.1f}{cpu:>8}")
    same_ids(corpus, bpe, folder / "ours")


def same_ids(corpus: Path, tokenizer: Path, prefix: Path) -> None:
    """Every id of the corpus, against `tokenizers` alone."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    dataset = IndexedDataset(prefix)
    with corpus.open() as lines:
        for document, line in enumerate(lines):
            expected = backend.encode(json.loads(line)["text"], add_special_tokens=False).ids
            assert dataset.document(document).tolist() == expected, f"document {document} differs"
    print(f"all {dataset.num_tokens:,} ids are those of tokenizers")


# --- memory -----------------------------------------------------------------------------------------------------

PEAK = """
import os, sys, threading, time
from megatron_ds.data.parts import PreprocessOptions
from megatron_ds.data.preprocess import preprocess
def peak(pid):  # of this program alone; ru_maxrss would begin with the size of the process it was forked from
    lines = open(f"/proc/{pid}/status").read().splitlines()
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)
largest = 0.0
def watch():
    global largest
    while True:
        for pid in open(f"/proc/self/task/{os.getpid()}/children").read().split():
            try:
                largest = max(largest, peak(pid))
            except OSError:
                pass
        time.sleep(0.05)
if __name__ == "__main__":
    threading.Thread(target=watch, daemon=True).start()
    preprocess([sys.argv[2]], sys.argv[3], PreprocessOptions(sys.argv[1]))
    print(peak(os.getpid()), largest)
"""


def memory(folder: Path) -> None:
    """Peak resident memory for the corpus, and for 30 copies of it one after the other."""
    corpus, large = folder / "corpus.jsonl", folder / "corpus30.jsonl"
    with large.open("wb") as target:
        for _ in range(30):
            target.write(corpus.read_bytes())
    program = folder / "peak.py"
    program.write_text(PEAK)
    print(f"\n{'peak memory, MB':<36}{'parent':>8}{'a worker':>12}{'seconds':>10}")
    for name, path in (("corpus", corpus), ("30 times the corpus", large)):
        start = time.perf_counter()
        command = [sys.executable, str(program), str(folder / "bpe"), str(path), str(folder / "peak")]
        parent, worker = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        print(f"{name:<36}{float(parent):>8.0f}{float(worker):>12.0f}{time.perf_counter() - start:>10.1f}")


# --- index ------------------------------------------------------------------------------------------------------

INDEX = """
import json, sys, time
from megatron_ds.data.gpt_dataset import GPTDataset
from megatron_ds.data.indexed import IndexedDataset
imported = time.perf_counter()
dataset = IndexedDataset(sys.argv[1])
if sys.argv[2] == "check":
    dataset.check_index()
samples = GPTDataset(dataset, 4096, document_masking=True)
opened = time.perf_counter()
samples.batch(range(8))
first = time.perf_counter() - opened
status = open("/proc/self/status").read().splitlines()
peak = next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))
print(json.dumps([opened - imported, first, peak, len(samples)]))
"""


def index(folder: Path, documents: int = 10_000_000, tokens: int = 10_000_000_000) -> None:
    """10 million documents, 10 billion tokens: the `.bin` is a sparse file, the `.idx` is real."""
    prefix = folder / "large"
    generator = np.random.default_rng(0)
    lengths = generator.exponential(tokens / documents, documents).astype(np.int64) + 1
    lengths[-1] += max(0, tokens - int(lengths.sum()))
    with (folder / "large.idx").open("wb") as file:
        file.write(header(np.dtype("u2"), documents, documents))
        file.write(lengths.astype("<i4").tobytes())
        file.write(((np.cumsum(lengths) - lengths) * 2).astype("<i8").tobytes())
        file.write(np.arange(documents + 1, dtype="<i8").tobytes())
    with (folder / "large.bin").open("wb") as file:
        file.truncate(int(lengths.sum()) * 2)
    print(f"\nindex of {documents:,} documents, {int(lengths.sum()):,} tokens")
    for name, mode in (("first open, index read and checked", "check"), ("open again", "open")):
        done = subprocess.run([sys.executable, "-c", INDEX, str(prefix), mode], capture_output=True, check=True)
        opened, batch, megabytes, rows = json.loads(done.stdout)
        print(
            f"{name:<36}{opened * 1e3:>8.1f} ms; first 8 samples {batch * 1e3:.1f} ms; "
            f"{megabytes:.0f} MB resident at most, libraries included; {rows:,} samples"
        )


# --- loader -----------------------------------------------------------------------------------------------------


def loader(folder: Path, sequence: int = 2048, micro_batch: int = 8, steps: int = 100) -> None:
    """Tokens a second of one rank from a warm file, read in the training thread and ahead of it."""
    from megatron_ds.data.indexed_writer import IndexedDatasetWriter

    generator = np.random.default_rng(0)
    with IndexedDatasetWriter(folder / "loader", "uint16") as writer:
        for _ in range(100):
            lengths = generator.integers(1, 2000, 500)
            writer.add_documents(generator.integers(0, 50_000, lengths.sum()).astype(np.uint16), lengths)
    (folder / "loader.loss_mask").write_bytes(bytes([0, 1]) * ((folder / "loader.bin").stat().st_size // 4 + 1))
    os.truncate(folder / "loader.loss_mask", (folder / "loader.bin").stat().st_size // 2)
    dataset = IndexedDataset(folder / "loader")
    remote = IndexedDataset(f"file://{folder}/loader", folder / "cache")
    for one in (dataset, remote):
        verify(one)  # warms the file, and fetches the remote one
    print(f"\nloader: sequences of {sequence}, micro-batches of {micro_batch}, {dataset.num_tokens:,} tokens")
    fim = FillInTheMiddle(50_000, 50_001, 50_002)
    kinds: dict[str, TextSource] = {
        "plain": GPTDataset(dataset, sequence),
        "document masking": GPTDataset(dataset, sequence, None, 0, True),
        "blend of three": BlendedDataset([GPTDataset(dataset, sequence, seed=n) for n in range(3)], [0.5, 0.3, 0.2]),
        "fill-in-the-middle, every second": GPTDataset(dataset, sequence, fim=fim),
        "conversations": ConversationDataset(dataset, sequence),
        "a URL's copy on the node": GPTDataset(remote, sequence),
    }
    for name, samples in kinds.items():
        for prefetch in (0, 2):
            with BatchLoader(samples, micro_batch * 4, micro_batch, prefetch=prefetch) as batches:
                next(batches)
                start = time.perf_counter()
                for _ in range(steps):
                    next(batches)
                rate = steps * micro_batch * 4 * sequence / (time.perf_counter() - start)
            print(f"{name + ', read ahead' * (prefetch > 0):<46}{rate / 1e6:>8.1f} million tokens/s")
    checks_of_first_use(folder, sequence, micro_batch * 4, steps)


def checks_of_first_use(folder: Path, sequence: int, batch: int, steps: int) -> None:
    """What comparing each chunk's checksum when it is first read adds to a step, at the beginning of a run."""
    dataset = IndexedDataset(folder / "loader")
    verify(dataset)
    seconds: list[float] = []
    compare = CheckedArray._compare

    def timed(array: CheckedArray, chunk: int) -> None:
        start = time.perf_counter()
        compare(array, chunk)
        seconds.append(time.perf_counter() - start)

    samples = GPTDataset(dataset, sequence)
    with mock.patch.object(CheckedArray, "_compare", timed):
        samples.rows(np.random.default_rng(0).permutation(len(samples))[: batch * steps].tolist())
    a_step = sum(seconds) / steps
    print(
        f"checksums at first use: {len(seconds) / steps:.1f} chunks of 64 KB a step of {batch * sequence:,} tokens, "
        f"{statistics.median(seconds) * 1e6:.1f} µs each: {a_step * 1e3:.3f} ms, which is 1% of a step at "
        f"{batch * sequence / a_step / 1e8:,.1f} million tokens/s a rank"
    )


if __name__ == "__main__":
    run(main, DataBenchmark, __doc__)
