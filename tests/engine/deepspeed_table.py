"""The table of DeepSpeed's keys in the documentation: its rows, and what its last column has to say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import megatron_ds.deepspeed_json
from megatron_ds.deepspeed_json.keys import ALIASES, CPU_OFFLOAD, KEYS, Becomes, Noted, Refused

LINES = (Path(megatron_ds.deepspeed_json.__file__).parent / "README.md").read_text().splitlines()


class Meaning(NamedTuple):
    """``type``: as JSON has it. ``default``: what a file that is silent means; None: nothing, or it is computed."""

    type: str
    default: Any
    meaning: str
    here: str


def _rows() -> Iterator[tuple[str, Meaning]]:
    for line in LINES:
        if line.startswith("| `"):
            key, kind, default, meaning, here = (cell.strip() for cell in line.strip("|").split(" | "))
            text = default.strip("`")
            is_text = kind == "string" or text == "auto"
            value = None if not default else text if is_text else json.loads(text.replace("'", '"'))
            yield key.strip("`"), Meaning(kind, value, meaning, here)


MEANINGS = dict(_rows())


def row_of(key: str) -> Becomes | Noted | Refused | None:
    """What a key becomes here: its own row, or that of the section around it; None: a section whose keys have rows."""
    while key and key not in KEYS:
        key = key.rpartition(".")[0]
    return KEYS.get(key)


def here(key: str) -> str:
    """The last column: what the code makes of a key."""
    if key not in KEYS:
        return "as the section"
    row = KEYS[key]
    if isinstance(row, Becomes):
        return f"`{row.to}`"
    return f"refused: {row.instead}" if isinstance(row, Refused) else row.how or "honoured"


def lists() -> Iterator[str]:
    """The lines of the lists below the table."""
    yield from (f"- `{name}`: `{own}`" for name, own in ALIASES.items())
    yield from (f'- `{name}: true`: `{own}: "cpu"`' for name, own in CPU_OFFLOAD.items())
    for key, row in KEYS.items():
        if key not in MEANINGS and not (isinstance(row, Noted) and not row.how):
            yield f"- `{key}`: {here(key)}"
