"""Parts and whole datasets into one dataset, by copying."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import xxhash

from megatron_ds.data.cache import cached_arrays, cached_json
from megatron_ds.data.indexed import COPY_BYTES, IndexedDataset, publish, write_header
from megatron_ds.data.source_types import UnusableInput
from megatron_ds.data.verify import (
    MASK_SUFFIX,
    ChunkedHash,
    Scan,
    as_cached,
    checksum,
    dataset_identity,
    manifest_path,
    scan_path,
    sums_key,
    sums_path,
)
from megatron_ds.errors import DataError
from megatron_ds.files import parse_json, read_bytes, replacing, sync_and_close, temporary_beside

INDEX_CHUNK = 1 << 20
PLAN = "plan.json"


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


def summary_text(summary: dict[str, Any]) -> bytes:
    """The ``.json`` of a part: its checksum, a new line, and the JSON."""
    body = json.dumps(summary).encode()
    return f"{xxhash.xxh3_64_hexdigest(body)}\n".encode() + body


def read_summary(path: Path) -> dict[str, Any]:
    """What :func:`summary_text` made; a ``ValueError`` where it was damaged."""
    digest, _, body = read_bytes(path).partition(b"\n")
    if digest != xxhash.xxh3_64_hexdigest(body).encode():
        raise ValueError(f"{path} is damaged: it does not match its checksum")
    summary: dict[str, Any] = parse_json(body)
    return summary


def keep_intact(folder: Path) -> set[str]:
    """The parts of a run that did not finish whose every byte is right. What else it left, but its plan, is removed."""
    intact = {path.stem for path in folder.glob("*-*.json") if _is_intact(path)}
    for path in folder.iterdir():
        if path.stem not in intact and path.name != PLAN:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return intact


def _is_intact(path: Path) -> bool:
    try:
        for kind, expected in read_summary(path)["files"].items():
            part = path.with_suffix(f".{kind}")
            size = part.stat().st_size if part.is_file() else -1
            if size != expected["bytes"] or checksum(part) != expected["xxh3"]:
                return False
    except (OSError, ValueError):
        return False
    return True


def merge_parts(folder: Path, names: list[str], prefix: str, dtype: np.dtype, plan: dict[str, Any]) -> Counts:
    """Lay the parts end to end, each checked against its checksum, and write index, manifest and bad-record list.

    The index is written chunk by chunk: memory does not grow with the number of documents.
    """
    names_of = {"bin": "bin", "idx": "idx", "bad": "bad.jsonl"}
    if plan["settings"]["source"]["conversations"]:
        names_of["mask"] = MASK_SUFFIX
    with contextlib.ExitStack() as stack:
        temporary = {kind: stack.enter_context(temporary_beside(f"{prefix}.{name}")) for kind, name in names_of.items()}
        return _merge_into(temporary, folder, names, prefix, dtype, plan)


def _merge_into(
    temporary: dict[str, Path], folder: Path, names: list[str], prefix: str, dtype: np.dtype, plan: dict[str, Any]
) -> Counts:
    counts = Counts()
    lines: dict[int, int] = {}
    masked = "mask" in temporary
    whole = {kind: ChunkedHash() for kind in ("bin", "mask")}
    with contextlib.ExitStack() as stack:
        targets = {kind: stack.enter_context(path.open("wb")) for kind, path in temporary.items() if kind != "idx"}
        for name in names:
            summary = read_summary(folder / f"{name}.json")
            _check_part(folder / f"{name}.len", summary["files"]["len"])
            _check_part(folder / f"{name}.bad", summary["files"]["bad"])
            for kind in ("bin", "mask") if masked else ("bin",):
                _copy_part(folder / f"{name}.{kind}", summary["files"][kind], targets[kind], whole[kind])
            counts.add(Counts(**summary["counts"]))
            _copy_bad_records(folder / f"{name}.bad", targets["bad"], plan["inputs"], lines)
            for number, read in summary["lines"].items():
                lines[int(number)] = lines.get(int(number), 0) + read
        for target in targets.values():
            sync_and_close(target)
    bad = Path(f"{prefix}.bad.jsonl")
    temporary["bad"].replace(bad) if counts.problems else bad.unlink(missing_ok=True)
    if not counts.documents:
        paths = [str(item["path"]) for item in plan["inputs"]]
        shown = ", ".join(paths[:4]) + f" and {len(paths) - 4} more" * (len(paths) > 4)
        raise UnusableInput(
            f"the inputs hold no document with text ({shown}): {sum(counts.problems.values())} records were bad "
            f"({describe_problems(counts.problems) or 'there were none at all'})"
        )

    def lengths() -> Iterator[npt.NDArray[np.int64]]:
        for name in names:
            part = folder / f"{name}.len"
            yield np.fromfile(part, "<i4").astype(np.int64)

    with temporary["idx"].open("wb") as index:
        write_index(index, dtype, counts.documents, lengths)
        sync_and_close(index)
    files = {
        "bin": whole["bin"].describe(),
        "idx": {"bytes": temporary["idx"].stat().st_size, "xxh3": checksum(temporary["idx"])},
        **({MASK_SUFFIX: whole["mask"].describe()} if masked else {}),
    }
    manifest = {**plan, "counts": asdict(counts), "dtype": dtype.name, "files": files}
    mask = Path(f"{prefix}.{MASK_SUFFIX}")
    mask.unlink(missing_ok=True)
    if masked:
        temporary["mask"].replace(mask)
    sums = {kind: str(file["xxh3"]) for kind, file in files.items()}
    found = Scan(0, counts.max_id, sums["bin"], sums["idx"], sums.get(MASK_SUFFIX, ""))
    chunks = {"bin": whole["bin"].sums(), **({MASK_SUFFIX: whole["mask"].sums()} if masked else {})}
    finish(prefix, temporary["bin"], temporary["idx"], manifest, found, chunks)
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


def finish(
    prefix: str,
    temporary_bin: Path,
    temporary_idx: Path,
    manifest: dict[str, Any],
    found: Scan,
    chunks: dict[str, npt.NDArray[np.uint64]],
) -> None:
    """Publish a dataset with its manifest, and with the scan and checksums of chunks that its maker knows already."""
    for path in (manifest_path(prefix), scan_path(prefix), sums_path(prefix)):
        path.unlink(missing_ok=True)
    publish(temporary_bin, temporary_idx, prefix)
    with replacing(manifest_path(prefix)) as temporary:
        temporary.write_text(json.dumps(manifest, indent=1) + "\n")
    cached_json(scan_path(prefix), dataset_identity(IndexedDataset(prefix)), lambda: asdict(found))
    cached_arrays(sums_path(prefix), sums_key(found), lambda: as_cached(chunks))


def write_index(
    index: IO[bytes], dtype: np.dtype, documents: int, lengths: Callable[[], Iterable[npt.NDArray[np.int64]]]
) -> None:
    """The index of one-sequence documents whose lengths ``lengths()`` yields in chunks (it is called twice)."""
    write_header(index, dtype, documents, documents)
    for chunk in lengths():
        index.write(chunk.astype("<i4").tobytes())
    at = 0
    for chunk in lengths():
        ends = at + np.cumsum(chunk * dtype.itemsize)
        index.write((ends - chunk * dtype.itemsize).astype("<i8").tobytes())
        at = int(ends[-1]) if ends.size else at
    for start in range(0, documents + 1, INDEX_CHUNK):
        index.write(np.arange(start, min(start + INDEX_CHUNK, documents + 1), dtype="<i8").tobytes())


def describe_problems(problems: dict[str, int]) -> str:
    return ", ".join(f"{count} x {reason}" for reason, count in sorted(problems.items()))


def _copy_part(path: Path, expected: dict[str, Any], target: IO[bytes], whole: ChunkedHash) -> None:
    digest, size = xxhash.xxh3_64(), 0
    with path.open("rb") as source:
        while chunk := source.read(COPY_BYTES):
            digest.update(chunk)
            whole.update(chunk)
            target.write(chunk)
            size += len(chunk)
    _compare(path, expected, size, digest.hexdigest())


def _check_part(path: Path, expected: dict[str, Any]) -> None:
    _compare(path, expected, path.stat().st_size, checksum(path))


def _compare(path: Path, expected: dict[str, Any], size: int, digest: str) -> None:
    if size != expected["bytes"] or digest != expected["xxh3"]:
        raise DataError(
            f"{path} is damaged: expected {expected['bytes']} bytes with checksum {expected['xxh3']}, found {size} "
            f"with {digest}: it changed under way; run the same command again to make this part anew"
        )
