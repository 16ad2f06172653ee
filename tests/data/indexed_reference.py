"""An independent reader and writer of the `.bin/.idx` layout, byte by byte from its description, without numpy."""

from __future__ import annotations

import struct
from itertools import pairwise
from pathlib import Path

FORMATS = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 6: "d", 7: "f", 8: "H"}


def read(prefix: str | Path) -> tuple[int, list[list[list[int]]]]:
    """(dtype code, documents as lists of sequences)."""
    idx, data = Path(f"{prefix}.idx").read_bytes(), Path(f"{prefix}.bin").read_bytes()
    assert idx[:9] == b"MMIDIDX\0\0"
    (version,) = struct.unpack_from("<Q", idx, 9)
    assert version == 1
    code = idx[17]
    sequences, bounds = struct.unpack_from("<QQ", idx, 18)
    lengths = struct.unpack_from(f"<{sequences}i", idx, 34)
    offsets = struct.unpack_from(f"<{sequences}q", idx, 34 + 4 * sequences)
    documents = struct.unpack_from(f"<{bounds}q", idx, 34 + 12 * sequences)
    assert len(idx) == 34 + 12 * sequences + 8 * bounds
    tokens = [list(struct.unpack_from(f"<{n}{FORMATS[code]}", data, at)) for n, at in zip(lengths, offsets)]
    assert len(data) == sum(lengths) * struct.calcsize(FORMATS[code])
    return code, [tokens[a:b] for a, b in pairwise(documents)]


def write(prefix: str | Path, code: int, documents: list[list[list[int]]]) -> None:
    sequences = [sequence for document in documents for sequence in document]
    size = struct.calcsize(FORMATS[code])
    offsets, bounds = [0], [0]
    for sequence in sequences:
        offsets.append(offsets[-1] + len(sequence) * size)
    for document in documents:
        bounds.append(bounds[-1] + len(document))
    idx = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(sequences), len(bounds))
    idx += struct.pack(f"<{len(sequences)}i", *(len(s) for s in sequences))
    idx += struct.pack(f"<{len(sequences)}q", *offsets[:-1])
    idx += struct.pack(f"<{len(bounds)}q", *bounds)
    Path(f"{prefix}.idx").write_bytes(idx)
    Path(f"{prefix}.bin").write_bytes(b"".join(struct.pack(f"<{len(s)}{FORMATS[code]}", *s) for s in sequences))
