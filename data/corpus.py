"""A real text corpus without a download: the source of the Python standard library on this machine."""

from __future__ import annotations

import json
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from megatron_ds.errors import DataError
from megatron_ds.files import replacing

SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True)
class CorpusSummary:
    """What was written: documents, bytes of text, files left out because they are not UTF-8 (or empty)."""

    documents: int
    text_bytes: int
    skipped: int


def build_corpus(
    output: str | Path, max_megabytes: float | None = None, source: str | Path | None = None, suffix: str = ".py"
) -> CorpusSummary:
    """Write one JSON line ``{"text": ..., "path": ...}`` per source file, in order of path.

    Args:
        output: the `.jsonl` to write; appears only when complete.
        max_megabytes: stop before the text exceeds this (10^6 bytes); None for everything (about 31 MB). Files are
            then taken evenly from the whole tree, not from its start.
        source: folder to read; None for the running interpreter's standard library.
        suffix: which files.

    Raises:
        DataError: the folder holds no such file.
    """
    root = Path(source) if source is not None else Path(sysconfig.get_paths()["stdlib"])
    files = sorted(
        (p for p in root.rglob(f"*{suffix}") if not SKIPPED_FOLDERS.intersection(p.relative_to(root).parts)),
        key=lambda p: p.relative_to(root).as_posix(),
    )
    chosen, skipped = _choose(files, None if max_megabytes is None else int(max_megabytes * 1e6))
    if not chosen:
        raise DataError(f"{root} holds no readable, non-empty *{suffix} file to build a corpus from")
    target = Path(output)
    target.parent.mkdir(parents=True, exist_ok=True)
    documents = text_bytes = 0
    with replacing(target) as temporary, temporary.open("w", encoding="utf-8") as lines:
        for path in chosen:
            try:
                text = path.read_bytes().decode("utf-8")
            except UnicodeDecodeError:
                skipped += 1
                continue
            record = {"text": text, "path": path.relative_to(root).as_posix()}
            lines.write(json.dumps(record, ensure_ascii=False) + "\n")
            documents += 1
            text_bytes += len(text.encode("utf-8"))
    return CorpusSummary(documents, text_bytes, skipped)


def _choose(files: list[Path], limit: int | None) -> tuple[list[Path], int]:
    """Non-empty files within the limit, thinned evenly, and how many were empty."""
    sizes = [path.stat().st_size for path in files]
    empty = sum(size == 0 for size in sizes)
    filled = [(path, size) for path, size in zip(files, sizes) if size]
    total = sum(size for _, size in filled)
    if limit is None or total <= limit:
        return [path for path, _ in filled], empty
    chosen, seen, taken = [], 0, 0
    for path, size in filled:
        seen += size
        # Keep the share taken so far at limit / total of what has been passed.
        if taken + size <= limit * seen // total:
            chosen.append(path)
            taken += size
    return chosen, empty
