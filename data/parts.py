"""The parts of a preprocessing run: what is kept of a run that did not finish, and how all become one dataset.

A part is a dataset of one block, with the list of the records that were left out of it. Its ``.part`` file says what
is in it, with a checksum of each of its files, and appears last: it makes the part valid.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import xxhash

from megatron_ds.data.dataset_files import checksum, require_checksum
from megatron_ds.data.indexed import IndexedDataset
from megatron_ds.data.indexed_writer import IndexedDatasetWriter
from megatron_ds.data.source_types import UnusableInput
from megatron_ds.data.verify import Scan
from megatron_ds.errors import DataError
from megatron_ds.files import parse_json, read_bytes, sync_and_close, temporary_beside

PLAN = "plan.json"
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
class Part:
    """What a ``.part`` file says.

    Attributes:
        lines: by the number of an input, how many of its records were read.
        checksums: by the suffix of each file.
    """

    counts: Counts
    lines: dict[int, int]
    checksums: dict[str, str]

    def write(self, path: Path) -> None:
        body = json.dumps(asdict(self)).encode()
        with temporary_beside(path) as temporary:
            with temporary.open("wb") as file:
                file.write(f"{xxhash.xxh3_64_hexdigest(body)}\n".encode() + body)
                sync_and_close(file)
            temporary.replace(path)

    @staticmethod
    def read(path: Path) -> Part:
        """A ``DataError`` where it is not what was written."""
        digest, _, body = read_bytes(path).partition(b"\n")
        _require(path, xxhash.xxh3_64_hexdigest(body), digest.decode("ascii", "replace"))
        found = parse_json(body)
        lines = {int(number): read for number, read in found["lines"].items()}
        return Part(Counts(**found["counts"]), lines, found["checksums"])

    def check(self, path: Path, suffixes: Iterable[str]) -> None:
        """Compare those of its files, of which ``path`` is the ``.part``."""
        for suffix in suffixes:
            file = path.with_suffix(suffix)
            _require(file, checksum(file), self.checksums[suffix])


def _require(path: Path, digest: str, stated: str) -> None:
    require_checksum(path, digest, stated, f"{path.stem}{SUMMARY}", "run the same command again")


def keep_intact(folder: Path) -> set[str]:
    """The parts of a run that did not finish whose every byte is right. What else it left, but its plan, is removed."""
    intact = {path.stem for path in folder.glob(f"*{SUMMARY}") if _is_intact(path)}
    for path in folder.iterdir():
        if path.stem not in intact and path.name != PLAN:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return intact


def _is_intact(path: Path) -> bool:
    try:
        part = Part.read(path)
        part.check(path, part.checksums)
    except (OSError, DataError):
        return False
    return True


def merge_parts(folder: Path, names: Sequence[str], output: IndexedDatasetWriter, plan: dict[str, Any]) -> Counts:
    """Lay the parts end to end, each compared with its checksums, with a manifest and a list of bad records."""
    counts, lines = Counts(), dict[int, int]()
    bad = Path(f"{output.prefix}.bad.jsonl")
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
        paths = [str(item["path"]) for item in plan["inputs"]]
        shown = ", ".join(paths[:4]) + f" and {len(paths) - 4} more" * (len(paths) > 4)
        raise UnusableInput(
            f"the inputs hold no document with text ({shown}): {sum(counts.problems.values())} records were bad "
            f"({describe_problems(counts.problems) or 'there were none at all'})"
        )
    output.close({**plan, "counts": asdict(counts)})
    return counts


def _copy_bad_records(part: Path, target: IO[bytes], inputs: list[dict[str, Any]], lines: dict[int, int]) -> None:
    """``lines``: of each input, those that the parts before this one read; a part counts from its own first line."""
    with part.open("rb") as records:
        for line in records:
            record = json.loads(line)
            number = record.pop("input")
            record = {"file": inputs[number]["path"], **record}
            record["line"] += 1 + lines.get(number, 0)
            target.write(json.dumps(record).encode() + b"\n")


def describe_problems(problems: dict[str, int]) -> str:
    return ", ".join(f"{count} x {reason}" for reason, count in sorted(problems.items()))
