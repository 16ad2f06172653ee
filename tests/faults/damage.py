"""What happens to files on disks and on their way: chosen by a seed, said in a line, done to one or two files."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_ds.errors import MegatronDSError

Damage = Callable[[random.Random, Path], str]


def flip(draw: random.Random, path: Path) -> str:
    content = bytearray(path.read_bytes())
    if not content:
        return append(draw, path)
    bits = [draw.randrange(8 * len(content)) for _ in range(draw.choice((1, 1, 1, 2, 20)))]
    for bit in bits:
        content[bit // 8] ^= 1 << bit % 8
    _rewrite(path, bytes(content))
    return f"bits {bits} flipped"


def flip_unseen(draw: random.Random, path: Path) -> str:
    """As a disk does it: the size and the times stay."""
    before = path.stat()
    text = flip(draw, path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    return text + ", times as before"


def truncate(draw: random.Random, path: Path) -> str:
    size = path.stat().st_size
    left = draw.choice((0, 1, size // 2, max(size - 1, 0), draw.randrange(size + 1)))
    _rewrite(path, path.read_bytes()[:left])
    return f"cut to {left} of {size} bytes"


def append(draw: random.Random, path: Path) -> str:
    more = draw.choice((b"\0", b"\n", b"}", draw.randbytes(draw.randrange(1, 5000))))
    _rewrite(path, path.read_bytes() + more)
    return f"{len(more)} bytes added"


def blank(draw: random.Random, path: Path) -> str:
    """Zeros in place of a range, as a lost page leaves them."""
    content = bytearray(path.read_bytes())
    start = draw.randrange(len(content) + 1)
    stop = min(len(content), start + draw.choice((1, 16, 512, 4096)))
    content[start:stop] = bytes(stop - start)
    _rewrite(path, bytes(content))
    return f"bytes {start}-{stop} are zero"


def cut_out(draw: random.Random, path: Path) -> str:
    content = path.read_bytes()
    start = draw.randrange(len(content) + 1)
    length = draw.choice((1, 8, 512, 4096))
    _rewrite(path, content[:start] + content[start + length :])
    return f"{length} bytes from {start} on are gone"


def double(draw: random.Random, path: Path) -> str:
    content = path.read_bytes()
    start = draw.randrange(len(content) + 1)
    length = draw.choice((1, 8, 512, 4096))
    _rewrite(path, content[: start + length] + content[start:])
    return f"{length} bytes from {start} on are there twice"


def remove(draw: random.Random, path: Path) -> str:
    path.unlink()
    return "removed"


def become_other(draw: random.Random, path: Path) -> str:
    path.unlink()
    kind = draw.choice(("folder", "fifo", "dangling", "device", "loop"))
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to({"dangling": "nowhere", "device": "/dev/zero", "loop": path.name}[kind])
    return f"now a {kind}"


TO_CONTENT: tuple[Damage, ...] = (flip, truncate, append, blank, cut_out, double)
TO_FILES: tuple[Damage, ...] = (*TO_CONTENT, remove, become_other)


def _rewrite(path: Path, content: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(content)


def swap(draw: random.Random, one: Path, other: Path) -> str:
    """Two files change places, or one takes the other's."""
    if draw.random() < 0.5:
        shutil.copyfile(one, other)
        return f"a copy of {one.name} in its place"
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)
    return f"has changed places with {one.name}"


def files_of(folder: Path) -> list[Path]:
    """All files below a folder, in one order."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def damage(draw: random.Random, files: Sequence[Path], kinds: Sequence[Damage] = TO_FILES) -> list[Path]:
    """Do harm to one of the files, seldom to two; which and how is printed. Returns those that were harmed."""
    harmed = []
    for path in draw.sample(list(files), min(len(files), draw.choice((1, 1, 1, 2)))):
        others = [other for other in files if other != path and other.is_file()]
        if others and path.is_file() and draw.random() < 0.15 and kinds is TO_FILES:
            other = draw.choice(others)
            print(f"{path}: {swap(draw, other, path)}")
            harmed += [path, other]
        elif path.is_file():
            before = path.read_bytes()
            print(f"{path}: {draw.choice(kinds)(draw, path)}")
            if not path.is_file() or path.read_bytes() != before:  # zeros may have been zeros
                harmed.append(path)
    return harmed


def refused(read: Callable[[], object], *names: str) -> str:
    """The error of ours with which a reader ends, empty where it ends well. Anything else is a failure of the trial.

    It has to name one of ``names``.
    """
    try:
        read()
    except MegatronDSError as error:
        text = str(error)
        print(f"refused: {text}")
        assert text.strip() and len(text) < 5000 and "Traceback" not in text, text
        assert not names or any(name in text for name in names), f"none of {names} is named: {text}"
        return text
    return ""
