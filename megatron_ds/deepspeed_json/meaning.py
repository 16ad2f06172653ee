"""A row of the table of DeepSpeed's keys."""

from __future__ import annotations

from typing import Any, NamedTuple


class Meaning(NamedTuple):
    """``type``: as JSON has it. ``default``: what a file that is silent means; None: nothing, or it is computed."""

    type: str
    default: Any
    meaning: str


B, I, F, S, O, L = "bool", "int", "float", "string", "object", "list"  # noqa: E741
