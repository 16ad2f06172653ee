"""The header of a safetensors file: which tensor lies where. https://github.com/huggingface/safetensors#format

A file is a little-endian u64 (bytes of header), a JSON header, then the tensors without holes. The header may end
in spaces, so this writer makes the data start at a multiple of 4096 bytes: direct I/O and aligned views both work.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from megatron_ds.files.direct_io import ALIGNMENT

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of a dtype; a ``TypeError`` for one the format does not have."""
    for name, known in DTYPES.items():
        if known == dtype:
            return name
    raise TypeError(f"safetensors has no {dtype}; known are {', '.join(DTYPES)}")


@dataclass(frozen=True)
class Entry:
    """One tensor of a file."""

    key: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Layout:
    """A file before it is written: its header's bytes, where each entry starts, and its size, all in bytes."""

    header: bytes
    starts: tuple[int, ...]
    size: int


def layout(entries: Sequence[Entry], metadata: dict[str, str] | None = None) -> Layout:
    """Lay ``entries`` out in the given order. Wider dtypes must come first, so that every tensor is aligned."""
    widths = [DTYPES[entry.dtype].itemsize for entry in entries]
    if widths != sorted(widths, reverse=True):
        raise ValueError("the entries of a safetensors file must be ordered from the widest dtype to the narrowest")
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    ends = [0]
    for entry in entries:
        ends.append(ends[-1] + entry.nbytes)
        header[entry.key] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [ends[-2], ends[-1]],
        }
    if len(header) != len(entries) + bool(metadata):
        raise ValueError("two entries of a safetensors file have the same key")
    text = json.dumps(header, separators=(",", ":")).encode()
    data_start = -(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT
    padded = (data_start - 8).to_bytes(8, "little") + text.ljust(data_start - 8)
    return Layout(padded, tuple(data_start + end for end in ends[:-1]), data_start + ends[-1])
