"""The index of a checkpoint: which bytes of which file hold which part of which tensor.

It is a table of 64-bit words, in three sections of rows of one width each::

    files       size in bytes, number of its first checksum    a row a file, and one more where the last one ends
    checksums   xxh3-64 of a chunk of a file                   file by file
    parts       reach, file, start, offset..., shape...        sorted by tensor, and by their first element in it

``reach`` is where the parts of the tensor up to this one end, as an index of the flattened tensor. So both ends of
what a box meets are found by bisection, and a rank reads the same few blocks whatever the number of ranks that saved.
A tensor of fewer dims than ``dims`` has offset 0 and shape 1 in the others.

On disk (:class:`BlockFile`) the table is cut into blocks of 4 KB. Each ends in a checksum that depends on the
checksum of the whole table, which the manifest holds: a block of another save, or of another place, does not match.

What is read is checked as far as it is read: every row that is used lies in its tensor and in its file, and the parts
that a request meets tile what it asks for. :meth:`Index.check` looks at everything.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_ds.checkpoint.safetensors_header import DTYPES
from megatron_ds.checkpoint.writer import FileRecord
from megatron_ds.errors import CheckpointError, RaisedAs
from megatron_ds.files import checksum, open_regular, sync_and_close
from megatron_ds.shard.boxes import Box, corners_cancel, flat_range, intersection, tiles

Words = npt.NDArray[np.int64]
Key = tuple[str, str]  # kind, name

BLOCK = 512
"""Words of a block, its checksum included."""


@dataclass(frozen=True)
class Part:
    """A box of a tensor: which file holds it, and at which byte of that file it starts."""

    file: int
    box: Box
    start: int


@dataclass(frozen=True)
class TensorRecord:
    """One tensor of a checkpoint. ``dtype`` is safetensors' name of it; ``first`` and ``count`` are of its parts."""

    kind: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    first: int
    count: int

    @property
    def width(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.width

    def __str__(self) -> str:
        return f"{self.kind} of {self.name!r}"


@dataclass(frozen=True)
class IndexSizes:
    """Numbers of rows, and the dims that a part has room for."""

    files: int
    checksums: int
    parts: int
    dims: int

    @property
    def row(self) -> int:
        return 3 + 2 * self.dims

    @property
    def words(self) -> int:
        return 2 * (self.files + 1) + self.checksums + self.parts * self.row


class Index:
    """Finds files, checksums and parts in the table that ``read(first, last)`` gives word by word.

    Every method raises a :class:`CheckpointError` that names ``path`` where what it reads cannot be right.
    """

    def __init__(self, path: Path, sizes: IndexSizes, chunk_bytes: int, read: Callable[[int, int], Words]):
        self.path, self.sizes, self.chunk_bytes, self._read = path, sizes, chunk_bytes, read
        self._checksums_at = 2 * (sizes.files + 1)
        self._parts_at = self._checksums_at + sizes.checksums
        self._files: dict[int, tuple[int, int]] = {}

    def file_sizes(self, first: int, last: int) -> list[int]:
        """Bytes of the files ``[first, last)``."""
        rows = self._read(2 * first, 2 * last + 2).reshape(-1, 2).tolist()
        for number, ((size, begin), (_, end)) in enumerate(pairwise(rows), first):
            chunks = -(-size // self.chunk_bytes)
            if size < 0 or end - begin != chunks or not 0 <= begin <= end <= self.sizes.checksums:
                raise self._wrong(
                    f"file {number} of {size} bytes is {chunks} chunks of {self.chunk_bytes}, but has "
                    f"{end - begin} checksums"
                )
            self._files[number] = size, begin
        return [size for size, _ in rows[:-1]]

    def file_size(self, number: int) -> int:
        if number not in self._files:
            self.file_sizes(number, number + 1)
        return self._files[number][0]

    def checksum(self, file: int, chunk: int) -> str:
        """Of one chunk of a file."""
        self.file_size(file)
        at = self._checksums_at + self._files[file][1] + chunk
        return f"{int(self._read(at, at + 1).view(np.uint64)[0]):016x}"

    def parts(self, record: TensorRecord, box: Box) -> list[tuple[Part, Box]]:
        """The parts that hold elements of ``box``, each with what they share; they tile it."""
        first, stop = record.first, record.first + record.count
        if (self._row(stop - 1)[0] if record.count else 0) != prod(record.shape):
            raise self._do_not_tile(record)
        if record.count > 1:
            begin, end = flat_range(box, record.shape)
            first = bisect_right(range(stop), begin, first, stop, key=lambda row: self._row(row)[0])
            stop = bisect_left(range(stop), end, first, stop, key=lambda row: self._start(record, row))
        found = []
        for part in self._parts(record, first, stop):
            shared = intersection(part.box, box)
            if shared is not None:
                found.append((part, shared))
        if len(found) != 1 or found[0][1] != box:
            here = tuple(-o for o in box.offset)
            try:
                tiled = tiles(box.shape, [shared.moved(here) for _, shared in found])
            except ValueError as error:  # so many of so many dims that it would take for ever
                raise self._wrong(f"{record} has {error}") from None
            if not tiled:
                raise self._do_not_tile(record)
        return found

    def check_apart(self, parts: Iterable[tuple[TensorRecord, Part]]) -> None:
        """No byte of a file is in two of these parts of tensors."""
        places = sorted((part.file, part.start, part.start + part.box.numel * record.width) for record, part in parts)
        for (file, _, stop), (after, start, _) in pairwise(places):
            if file == after and start < stop:
                raise self._wrong(f"two parts lie at byte {start} of file {file}")

    def check(self, tensors: Iterable[TensorRecord]) -> None:
        """All of it: every file and every part, and that the parts of each tensor tile it."""
        self.file_sizes(0, self.sizes.files)
        ends = self._read(0, self._checksums_at).reshape(-1, 2)[[0, -1]].tolist()
        if ends[0][1] != 0 or ends[1] != [0, self.sizes.checksums]:
            raise self._wrong("its checksums are not those of its files")
        places: list[tuple[TensorRecord, Part]] = []
        for record in tensors:
            reach = before = 0
            for row, part in enumerate(self._parts(record, record.first, record.first + record.count), record.first):
                begin, end = flat_range(part.box, record.shape)
                reach = max(reach, end)
                if begin < before or self._row(row)[0] != reach:
                    raise self._wrong(f"the parts of {record} are not in order")
                before = begin
                places.append((record, part))
            self.parts(record, Box((0,) * len(record.shape), record.shape))
        self.check_apart(places)

    def _parts(self, record: TensorRecord, first: int, stop: int) -> list[Part]:
        """Some rows of a tensor, each inside its tensor and its file."""
        at, width, dims = self._parts_at, self.sizes.row, len(record.shape)
        found = []
        for row in self._read(at + first * width, at + stop * width).reshape(-1, width).tolist():
            _, file, start, *rest = row
            offset, shape = rest[: self.sizes.dims], rest[self.sizes.dims :]
            box = Box(tuple(offset[:dims]), tuple(shape[:dims]))
            inside = all(o >= 0 and s > 0 and o + s <= size for o, s, size in zip(box.offset, box.shape, record.shape))
            if not inside or any(offset[dims:]) or any(size != 1 for size in shape[dims:]):
                raise self._wrong(
                    f"{record} of shape {list(record.shape)} has a part at {offset} of shape {shape}, which is not "
                    "inside it"
                )
            if not 0 <= file < self.sizes.files:
                raise self._wrong(f"{record} is in file {file}, but only {self.sizes.files} are listed")
            size, end = self.file_size(file), start + box.numel * record.width
            if start < 0 or end > size or start % record.width:
                raise self._wrong(f"{record} is at bytes {start}-{end} of file {file}, which has {size}")
            found.append(Part(file, box, start))
        return found

    def _row(self, row: int) -> list[int]:
        at = self._parts_at + row * self.sizes.row
        return self._read(at, at + self.sizes.row).tolist()

    def _start(self, record: TensorRecord, row: int) -> int:
        offset = self._row(row)[3 : 3 + len(record.shape)]
        return flat_range(Box(tuple(offset), (1,) * len(offset)), record.shape)[0]

    def _do_not_tile(self, record: TensorRecord) -> CheckpointError:
        return self._wrong(f"the parts of {record} of shape {list(record.shape)} overlap or leave a gap")

    def _wrong(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is malformed: {what}")


class IndexBuilder:
    """Puts together what several files hold of the tensors of a checkpoint."""

    def __init__(self) -> None:
        self._files: list[tuple[int, Sequence[str]]] = []
        self._tensors: dict[Key, tuple[int, tuple[int, ...], str]] = {}
        self._owners: list[Words] = []
        self._rows: list[Words] = []

    def add_file(self, file: FileRecord) -> None:
        self._files.append((file.size, file.checksums))

    def add_parts(self, tensors: Iterable[tuple[str, str, Sequence[int], str, int]], rows: npt.ArrayLike) -> None:
        """Parts of some tensors.

        Args:
            tensors: kind, name, shape, dtype and number of rows of each.
            rows: one a part, tensor by tensor: file, start, offset, shape; offset and shape of equally many dims.

        Raises:
            CheckpointError: a tensor has another dtype or shape than before.
        """
        owners = []
        for kind, name, shape, dtype, count in tensors:
            number, *old = self._tensors.setdefault((kind, name), (len(self._tensors), tuple(shape), dtype))
            if old != [tuple(shape), dtype]:
                raise CheckpointError(
                    f"{kind} of {name} is {old[1]} of shape {list(old[0])} in one part and {dtype} of "
                    f"shape {list(shape)} in another; all parts of a tensor must agree"
                )
            owners += [number] * count
        if owners:
            self._owners.append(np.array(owners, np.int64))
            self._rows.append(np.array(rows, np.int64).reshape(len(owners), -1))

    def build(self) -> tuple[dict[Key, TensorRecord], IndexSizes, Words]:
        """The tensors, those of a kind together, and the table with its sizes."""
        kinds = list(dict.fromkeys(kind for kind, _ in self._tensors))
        keys = sorted(self._tensors, key=lambda key: kinds.index(key[0]))
        shapes = [self._tensors[key][1] for key in keys]
        dims = max(map(len, shapes), default=0)
        owners = np.concatenate([np.empty(0, np.int64), *self._owners])
        owners = np.argsort(np.array([self._tensors[key][0] for key in keys], np.int64))[owners]
        places, offset, shape = self._columns(len(owners), dims)
        strides = np.zeros((len(shapes), dims), np.int64)
        for number, sizes in enumerate(shapes):
            strides[number, : len(sizes)] = [prod(sizes[dim + 1 :]) for dim in range(len(sizes))]
        begin = (offset * strides[owners]).sum(1)
        end = begin + ((shape - 1) * strides[owners]).sum(1) + 1
        order = np.lexsort((begin, owners))
        counts = np.bincount(owners, minlength=len(shapes)).tolist()
        reach, at = end[order], 0
        records: dict[Key, TensorRecord] = {}
        for key, count in zip(keys, counts):
            records[key] = TensorRecord(*key, *self._tensors[key][1:], at, count)
            np.maximum.accumulate(reach[at : at + count], out=reach[at : at + count])
            at += count
        parts = np.concatenate([reach[:, None], places[order], offset[order], shape[order]], axis=1)
        firsts = np.cumsum([0, *(len(sums) for _, sums in self._files)])
        files = np.stack([np.array([*(size for size, _ in self._files), 0], np.int64), firsts], axis=1)
        sums = np.array([int(text, 16) for _, texts in self._files for text in texts], np.uint64).view(np.int64)
        words = np.concatenate([files.ravel(), sums, parts.ravel()])
        return records, IndexSizes(len(self._files), len(sums), len(owners), dims), words

    def _columns(self, count: int, dims: int) -> tuple[Words, Words, Words]:
        """(file, start), offset and shape of all rows, those of fewer dims filled up."""
        places, offset = np.empty((count, 2), np.int64), np.zeros((count, dims), np.int64)
        shape = np.ones((count, dims), np.int64)
        at = 0
        for rows in self._rows:
            own = slice(at, at + len(rows))
            places[own] = rows[:, :2]
            has = (rows.shape[1] - 2) // 2
            offset[own, :has], shape[own, :has] = rows[:, 2 : 2 + has], rows[:, 2 + has :]
            at += len(rows)
        return places, offset, shape


# --- on disk --------------------------------------------------------------------------------------------------


class BlockFile:
    """Reads the words of an index from its file, each block once and checked.

    Attributes:
        blocks: those that were read, by number.
    """

    def __init__(self, path: Path, words: int, digest: str):
        self.path, self.words, self.digest = path, words, digest
        self.blocks: dict[int, Words] = {}

    def __call__(self, first: int, last: int) -> Words:
        begin, end = first // (BLOCK - 1), -(-last // (BLOCK - 1))
        missing = [number for number in range(begin, end) if number not in self.blocks]
        if missing:
            self._fetch(missing[0], missing[-1] + 1)
        found = [self.blocks[number] for number in range(begin, end)]
        words = found[0] if len(found) == 1 else np.concatenate([np.empty(0, np.int64), *found])
        return words[first - begin * (BLOCK - 1) :][: last - first]

    def _fetch(self, begin: int, end: int) -> None:
        with RaisedAs(CheckpointError, f"{self.path} cannot be read", OSError), open_regular(self.path) as file:
            file.seek(begin * BLOCK * 8)
            raw = file.read((end - begin) * BLOCK * 8)
        for number in range(begin, end):
            block = raw[(number - begin) * BLOCK * 8 :][: BLOCK * 8]
            body = block[:-8]
            if block[-8:] != _block_checksum(self.digest, number, body):
                raise CheckpointError(f"{self.path} is damaged: its block {number} does not match its checksum")
            self.blocks[number] = np.frombuffer(body, "<i8").astype(np.int64)


def blocks_bytes(words: int) -> int:
    """The size of the file of so many words."""
    return 8 * (words + -(-words // (BLOCK - 1)))


def write_blocks(path: Path, words: Words) -> str:
    """Write and fsync the file that :class:`BlockFile` reads; the checksum of the whole."""
    body = words.astype("<i8").tobytes()
    digest = checksum(body)
    size = (BLOCK - 1) * 8
    with open(path, "wb") as file:
        for number, at in enumerate(range(0, len(body), size)):
            block = body[at : at + size]
            file.write(block + _block_checksum(digest, number, block))
        sync_and_close(file)
    return digest


def _block_checksum(digest: str, number: int, body: bytes) -> bytes:
    return bytes.fromhex(checksum(f"{digest} {number} ".encode() + body))


def check_complete(records: Iterable[TensorRecord], sizes: IndexSizes, words: Words) -> None:
    """Every element of every tensor is in exactly one part of a table that was just built."""
    rule = "each element must be saved by exactly one rank"
    table = words[len(words) - sizes.parts * sizes.row :].reshape(-1, sizes.row)
    for record in records:
        rows, dims = table[record.first : record.first + record.count], len(record.shape)
        offset, shape = rows[:, 3 : 3 + dims], rows[:, 3 + sizes.dims : 3 + sizes.dims + dims]
        held = int(shape.prod(1).sum())
        if held != prod(record.shape):
            raise CheckpointError(
                f"{record.kind} of {record.name} has {prod(record.shape)} elements (shape {list(record.shape)}), but "
                f"the ranks gave {held} to save; {rule}"
            )
        if record.count > 1 and not corners_cancel(record.shape, offset, shape):
            raise CheckpointError(
                f"{record.kind} of {record.name} (shape {list(record.shape)}): two parts hold the same elements, and "
                f"others are in none; {rule}"
            )
