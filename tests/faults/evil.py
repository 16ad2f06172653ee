"""Files that somebody made to do harm: JSON whose values mean nothing or too much, headers, and whole files."""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

HUGE = 1 << 60


class RawJson(str):
    """A text that stands in a JSON file as it is."""


EVIL: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1.5, -0.0, 1e308, HUGE, -HUGE, (1 << 63) - 1, 1 << 64, 1 << 200),
    *("", "\0", "../../../etc/passwd", "/etc/passwd", "a" * 100_000, "\ud800", "nan", "1", "\n\x1b[2J", "{{7*7}}"),
    *([], {}, [None], [[]], [-1], [HUGE], {"a": {}}, [0] * 5000, "__class__", "$(touch evil)", "file:///etc/passwd"),
    *(RawJson("NaN"), RawJson("Infinity"), RawJson("-Infinity"), RawJson("9" * 5000), RawJson("1e999")),
    *(RawJson("[" * 100_000), RawJson('{"a":' * 100_000), RawJson("[" * 900 + "]" * 900), RawJson('1,"x":2')),
)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += _places(item, (*path, key))
    return found


def altered(draw: random.Random, value: Any) -> str:
    """The JSON of ``value`` in which something, somewhere, is not what it should be."""
    value = copy.deepcopy(value)
    raw: dict[str, str] = {}
    for _ in range(draw.choice((1, 1, 1, 3))):
        places = _places(value)
        if not places:
            break
        *path, last = draw.choice(places)
        target = value
        for key in path:
            target = target[key]
        what = draw.choice(("value", "value", "value", "value", "gone", "renamed", "number", "more"))
        if what == "gone":
            del target[last]
        elif what == "renamed" and isinstance(target, dict):
            target[draw.choice(("", "a" * 1000, "../x", "__proto__", "0", last + " "))] = target.pop(last)
        elif what == "number" and type(target[last]) in (int, float):
            target[last] = draw.choice((-target[last], target[last] + 1, target[last] * 1000, -1, 0, HUGE, 0.5))
        elif what == "more" and isinstance(target[last], list) and target[last]:
            target[last] = target[last] * draw.choice((2, 1000))
        else:
            evil = draw.choice(EVIL)
            if isinstance(evil, RawJson):
                mark = f"raw-{len(raw)}"
                raw[json.dumps(mark)] = str(evil)
                evil = mark
            target[last] = evil
        print(f"{what} at {'.'.join(map(str, (*path, last)))[:200]}: {str(evil)[:60] if what == 'value' else ''}")
    text = json.dumps(value)
    for mark, evil in raw.items():
        text = text.replace(mark, evil)
    return text


class Pickled:
    """What runs when a pickle of it is loaded."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.mark),)


def _pickle(draw: random.Random, path: Path) -> None:
    path.write_bytes(pickle.dumps({"weight": Pickled(path.parent / "evil")}))


def _zipped_pickle(draw: random.Random, path: Path) -> None:
    """As ``torch.save`` writes."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps({"weight": Pickled(path.parent / "evil")}))
        file.writestr("archive/version", "3")


def _huge_header(draw: random.Random, path: Path) -> None:
    size = draw.choice((HUGE, (1 << 64) - 1, 1 << 31, 100_000_001, 17, 0))
    path.write_bytes(size.to_bytes(8, "little") + draw.choice((b"{}", b"{", b'{"a":{"dtype":"F32"}}', b"")))


def _deep(draw: random.Random, path: Path) -> None:
    text = draw.choice(("[", '{"a":', "[{", '{"weight_map":[')) * 200_000
    front = len(text).to_bytes(8, "little") if path.suffix == ".safetensors" else b""
    path.write_bytes(front + text.encode())


def _sparse(draw: random.Random, path: Path) -> None:
    """It takes no room on the disk and says that it has a terabyte."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    with path.open("ab") as file:
        file.truncate(draw.choice((1 << 33, 1 << 40)))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _link_out(draw: random.Random, path: Path) -> None:
    target = draw.choice(("/etc/passwd", "/dev/zero", "/dev/stdin", "/proc/self/mem", "..", path.name, "/proc/kmsg"))
    path.symlink_to(target)


def _fifo(draw: random.Random, path: Path) -> None:
    os.mkfifo(path)


def _folder(draw: random.Random, path: Path) -> None:
    path.mkdir()


def _noise(draw: random.Random, path: Path) -> None:
    path.write_bytes(
        draw.choice((b"", b"\0" * 5000, b"\xff\xfe\x00", draw.randbytes(5000), b"PK\x03\x04" + b"\0" * 90))
    )


def _other_values(draw: random.Random, path: Path) -> None:
    path.write_text(draw.choice(("null", "[]", "{}", '""', "1", "NaN", "true", '{"a":1,"a":2}', "9" * 5000)))


WHOLE: tuple[Callable[[random.Random, Path], None], ...] = (
    *(_pickle, _zipped_pickle, _huge_header, _deep, _sparse, _link_out, _fifo, _folder, _noise, _other_values),
)


def instead(draw: random.Random, path: Path) -> None:
    """Another file in its place."""
    make = draw.choice(WHOLE)
    print(f"{path.name}: {make.__name__}")
    if make is not _sparse:
        path.unlink(missing_ok=True)
    make(draw, path)
