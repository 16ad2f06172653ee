"""What the ranks of a job compare before the first collective: settings, versions, device, data and checkpoint.

Each node reads its own command line, its own installation and, where folders are not shared, its own files. A
difference in one of them trains a model that nobody asked for, and no error says so.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy
import torch

import megatron_ds

SETTINGS, VERSIONS, DEVICE, DATA, CHECKPOINT = "settings", "versions", "device", "data", "checkpoint"
_DIFFERS = {
    SETTINGS: ("another configuration than", "give every node the same arguments and files"),
    VERSIONS: ("other versions than", "install the same on every node"),
    DEVICE: ("another kind of device than", "start nodes of one kind, or give --device"),
    DATA: ("other data than", "give every node the same files"),
    CHECKPOINT: ("another checkpoint than", "let all nodes share the folder that it is in"),
}
_SHOWN = 8
_LONGEST = 80  # characters of a value


def versions() -> dict[str, str]:
    """Of what the numbers and the order of a run depend on."""
    return {"megatron_ds": megatron_ds.__version__, "torch": torch.__version__, "numpy": numpy.__version__}


def facts_of(options: Any) -> dict[str, Any]:
    """The facts of a program whose settings are the fields of one dataclass."""
    return {SETTINGS: {name: str(value) for name, value in vars(options).items()}, VERSIONS: versions()}


def digest(facts: Mapping[str, Any]) -> str:
    """A hash of what a rank was started with."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def differences(who: str, theirs: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """A line for each of the facts that ``who`` and rank 0 (``own``) have both learnt, and that differ.

    A rank that found fault with something has not come to what it would have looked at next.
    """
    lines = []
    for kind, (what, way_out) in _DIFFERS.items():
        if kind in theirs and kind in own and theirs[kind] != own[kind]:
            changed = changes(own[kind], theirs[kind])
            found = [f"{key + ': ' if key else ''}{_short(new)} against {_short(old)}" for key, old, new in changed]
            more = f"; and {len(found) - _SHOWN} more" if found[_SHOWN:] else ""
            lines.append(f"{who}: {what} on rank 0 ({'; '.join(found[:_SHOWN])}{more}); {way_out}")
    return lines


def changes(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) of all that differs in nested plain values."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in dict.fromkeys([*old, *new]):
            yield from changes(old.get(name), new.get(name), f"{key}.{name}" if key else str(name))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, (one, other) in enumerate(zip(old, new)):
            yield from changes(one, other, f"{key}[{number}]")
    elif old != new:
        yield key, old, new


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
