"""Fields of JSON that somebody made: each is taken with its type and its range, or a ``ValueError`` says what it is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

from megatron_ds.checkpoint.safetensors_header import DTYPES

MOST = (1 << 63) - 1
_CHECKSUM = re.compile(r"[0-9a-f]{16}")


def take(value: Any, names: Iterable[str], what: str) -> list[Any]:
    """The values of exactly these fields, in this order."""
    fields, names = an_object(value, what), tuple(names)
    if set(fields) != set(names):
        lacks = [name for name in names if name not in fields]
        unknown = [name for name in fields if name not in names]
        raise ValueError(f"{what} lacks {shown(lacks)}" if lacks else f"{what} has the unknown {shown(unknown)}")
    return [fields[name] for name in names]


def an_object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{what} is {shown(value)}, not an object")
    return dict(value)


def integers(value: Any, what: str) -> tuple[int, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{what}: {shown(value)}, not a list")
    return tuple(integer(item, what) for item in value)


def integer(value: Any, what: str, least: int = 0, most: int = MOST) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{what} is {shown(value)}, not a whole number from {least} to {most}")
    return value


def a_checksum(value: Any, what: str) -> str:
    if not (isinstance(value, str) and _CHECKSUM.fullmatch(value)):
        raise ValueError(f"{what} has the checksum {shown(value)}, not 16 hexadecimal digits")
    return value


def shape_and_dtype(shape: Any, dtype: Any, what: str) -> tuple[tuple[int, ...], str]:
    """Of a tensor whose elements, and bytes, can be counted in 64 bits."""
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{what} has dtype {shown(dtype)}, not one of {', '.join(DTYPES)}")
    sizes = integers(shape, f"the shape of {what}")
    if prod(size or 1 for size in sizes) > MOST >> 3:
        raise ValueError(f"{what} has shape {shown(sizes)}: more elements than can be counted")
    return sizes, dtype


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."
