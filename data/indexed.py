"""The `.bin/.idx` indexed dataset: token sequences on disk, read through a memory map.

The layout is the one Megatron's tools write, so existing files load as they are. All little-endian, unpadded:

======================  =====================================================================
`.idx`                  ``MMIDIDX\\0\\0`` (9 bytes), u64 version = 1, u8 dtype code, u64 S sequences,
                        u64 D = documents + 1, i32[S] lengths in tokens, i64[S] byte offsets into
                        `.bin`, i64[D] document bounds counted in sequences, starting with 0
`.bin`                  the tokens alone
======================  =====================================================================

The arrays of the index are used where they lie: the i64 offsets *are* the running sum of the lengths, so finding
the document of a token is a bisection in the mapped file and opening a dataset of any size costs no memory.
(The arrays are not aligned in the file. numpy reads such arrays element by element without trouble, but a few of
its routines, ``searchsorted`` among them, first copy the whole array: use ``bisect`` here.)

Shape legend: ``S`` sequences, ``D`` documents + 1.
"""

from __future__ import annotations

import os
import struct
from bisect import bisect_right
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ds.data.dataset_files import CheckedArray, file_of
from megatron_ds.data.remote import RemoteDataset, RemoteTokens, is_url
from megatron_ds.errors import DataError
from megatron_ds.files import checksum

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype] = {
    code: np.dtype(name).newbyteorder("<")
    for code, name in {1: "u1", 2: "i1", 3: "i2", 4: "i4", 5: "i8", 6: "f8", 7: "f4", 8: "u2"}.items()
}


def dtype_for_vocabulary(vocab_size: int) -> np.dtype:
    """uint16 where every id fits (below 65,500, the bound that Megatron's tools use), int32 otherwise."""
    return DTYPES[8] if vocab_size < 65_500 else DTYPES[4]


def strip_suffix(path: str | os.PathLike[str]) -> str:
    """The prefix of a dataset, also when the user names one of its two files."""
    text = os.fspath(path)
    return text[:-4] if text.endswith((".bin", ".idx")) else text


def new_prefix(path: str | os.PathLike[str]) -> str:
    """The prefix of a dataset that is to be written; a :class:`DataError` where it would have no name."""
    prefix = strip_suffix(path)
    if Path(prefix).name in ("", ".."):
        raise DataError(f"the output prefix {os.fspath(path)!r} names a folder; give a path with a name, as runs/data")
    return prefix


def header(dtype: np.dtype, num_sequences: int, num_documents: int) -> bytes:
    """The 34 bytes in front of the index arrays."""
    return HEADER.pack(MAGIC, VERSION, dtype_code(dtype), num_sequences, num_documents + 1)


class IndexedDataset:
    """A dataset on disk, memory-mapped read-only, or at a URL (:mod:`megatron_ds.data.remote`).

    Args:
        prefix: path or URL without suffix; also taken with the suffix of one of the two files.
        cache_dir: where a remote dataset is kept; None for the user's cache folder.

    Opening reads the header and checks every size that can be checked without reading the data; anything wrong is
    a :class:`DataError` that names the file and the bytes expected and found. :meth:`check_index` reads the whole
    index and :mod:`megatron_ds.data.verify` the tokens too.

    Attributes:
        lengths: i32[S], tokens of each sequence.
        offsets: i64[S], *bytes* into `.bin` where each sequence starts.
        document_bounds: i64[D], in sequences.
        tokens: the whole of `.bin` as one array of ``dtype``, mapped; of a remote dataset, an object that gives its
            slices; after :meth:`check_reads` likewise.
        sums: checksums of chunks by file, empty until :meth:`check_reads`.
        remote: where it comes from, if not from a disk.
    """

    def __init__(self, prefix: str | os.PathLike[str], cache_dir: Path | None = None):
        self.prefix = strip_suffix(prefix)
        self.remote = RemoteDataset(self.prefix, cache_dir) if is_url(self.prefix) else None
        if self.remote is not None:
            self.prefix = self.remote.prefix
        self.bin_path, self.idx_path = file_of(self.prefix, "bin"), file_of(self.prefix, "idx")
        for path, other in ((self.idx_path, self.bin_path), (self.bin_path, self.idx_path)):
            if not path.is_file():
                here = f"; {other.name} is there" if other.is_file() else ""
                raise DataError(
                    f"{path} does not exist{here}. A dataset is a pair of files, PREFIX.bin and PREFIX.idx, "
                    "named by their prefix; tools/preprocess_data.py writes them"
                )
        size = self.idx_path.stat().st_size
        if size < HEADER.size:
            state = "is empty" if size == 0 else "is cut off inside its header"
            raise DataError(f"{self.idx_path} {state}: expected at least {HEADER.size} bytes, found {size}")
        with self.idx_path.open("rb") as index:
            magic, version, code, sequences, bounds = HEADER.unpack(index.read(HEADER.size))
        if magic != MAGIC:
            raise DataError(f"{self.idx_path} is not a dataset index: it starts with {magic!r}, not {MAGIC!r}")
        if version != VERSION:
            raise DataError(f"{self.idx_path} has layout version {version}; this library reads version {VERSION}")
        if code not in DTYPES:
            raise DataError(f"{self.idx_path} has dtype code {code}, not one of {sorted(DTYPES)}: a damaged header")
        self.dtype = DTYPES[code]
        self.num_sequences, self.num_documents = sequences, bounds - 1
        expected = HEADER.size + 12 * sequences + 8 * bounds
        if size != expected:
            raise DataError(
                f"{self.idx_path} says it indexes {sequences} sequences in {bounds - 1} documents, which takes "
                f"{expected} bytes; found {size}. It is {'truncated' if size < expected else 'too long'}: "
                "copy it again, or preprocess again"
            )
        if not sequences or bounds < 2:
            raise DataError(f"{self.idx_path} holds no document ({sequences} sequences): the dataset is empty")
        self._index = np.memmap(self.idx_path, dtype=np.uint8, mode="r")
        at = HEADER.size
        self.lengths: npt.NDArray[np.int32] = self._array("<i4", at, sequences)
        self.offsets: npt.NDArray[np.int64] = self._array("<i8", at + 4 * sequences, sequences)
        self.document_bounds: npt.NDArray[np.int64] = self._array("<i8", at + 12 * sequences, bounds)
        self._check_ends()
        self.sums: dict[str, npt.NDArray[np.uint64]] = {}
        self.tokens: Any
        if self.remote is None:
            self.tokens = np.memmap(self.bin_path, dtype=self.dtype, mode="r")
        else:
            self.tokens = RemoteTokens(self.remote, self.dtype)

    def check_reads(self, sums: dict[str, npt.NDArray[np.uint64]]) -> None:
        """Compare each chunk of the tokens with its checksum before it is first read, from now on.

        ``sums``: of the chunks of each file (``bin``, and ``loss_mask`` where there is one).
        """
        self.sums = sums
        self.tokens = CheckedArray(self.bin_path, self.dtype, sums["bin"])

    def index_checksum(self) -> str:
        """xxh3-64 of the mapped index, in hexadecimal."""
        return checksum(self._index.data)

    def _array(self, dtype: str, offset: int, count: int) -> npt.NDArray:
        # A plain ndarray view: np.memmap's own indexing is several times slower than ndarray's.
        array: npt.NDArray = np.frombuffer(self._index, dtype=dtype, count=count, offset=offset)
        return array

    def _check_ends(self) -> None:
        """The ends of each array, and with them the size of `.bin`, in constant time."""
        found = self.bin_path.stat().st_size
        end = int(self.offsets[-1]) + int(self.lengths[-1]) * self.dtype.itemsize
        if found != end:
            state = "is empty" if not found else "is truncated" if found < end else "is longer than its index"
            raise DataError(
                f"{self.bin_path} {state}: {self.idx_path.name} says it has {end} bytes, found {found}. "
                "The two files do not belong together or one of them is damaged: copy both again"
            )
        first, last = int(self.document_bounds[0]), int(self.document_bounds[-1])
        if int(self.offsets[0]) != 0 or first != 0 or last != self.num_sequences:
            raise DataError(
                f"{self.idx_path} is damaged: its first sequence is at byte {int(self.offsets[0])} (expected 0), its "
                f"documents run from sequence {first} to {last} (expected 0 to {self.num_sequences})"
            )
        if found == 0:
            raise DataError(f"{self.bin_path} is empty: expected at least one token, found 0 bytes")

    def check_index(self) -> None:
        """Read the whole index: lengths and offsets must agree everywhere, documents must be in order.

        :func:`megatron_ds.data.verify.verify` remembers the answer.
        """
        step = 1 << 20
        expected = 0
        for start in range(0, self.num_sequences, step):
            lengths = np.asarray(self.lengths[start : start + step], np.int64)
            offsets = np.asarray(self.offsets[start : start + step])
            ends = expected + np.cumsum(lengths * self.dtype.itemsize)
            starts = np.concatenate([[expected], ends[:-1]])
            wrong = np.flatnonzero((offsets != starts) | (lengths < 0))
            if wrong.size:
                at = int(wrong[0])
                raise DataError(
                    f"{self.idx_path} is damaged at sequence {start + at}: it is said to have {lengths[at]} tokens "
                    f"and start at byte {offsets[at]}, but the sequences before it end at byte {starts[at]}"
                )
            expected = int(ends[-1])
        for start in range(0, self.num_documents, step):
            bounds = np.asarray(self.document_bounds[start : start + step + 1])
            wrong = np.flatnonzero(np.diff(bounds) < 0)
            if wrong.size:
                at = int(wrong[0])
                raise DataError(
                    f"{self.idx_path} is damaged: document {start + at} runs from sequence {bounds[at]} "
                    f"back to {bounds[at + 1]}"
                )

    @property
    def num_tokens(self) -> int:
        return int(self.tokens.size)

    def __len__(self) -> int:
        return self.num_sequences

    def __getitem__(self, sequence: int) -> npt.NDArray:
        """The tokens of one sequence ``[n]``, a view of the map."""
        if not -self.num_sequences <= sequence < self.num_sequences:
            raise IndexError(f"sequence {sequence} of {self.num_sequences} in {self.prefix}")
        start = int(self.offsets[sequence]) // self.dtype.itemsize
        tokens: npt.NDArray = self.tokens[start : start + int(self.lengths[sequence])]
        return tokens

    def document_start(self, document: int) -> int:
        """The token where a document starts; ``num_tokens`` for ``document == num_documents``."""
        sequence = int(self.document_bounds[document])
        return self.num_tokens if sequence == self.num_sequences else int(self.offsets[sequence]) // self.dtype.itemsize

    def document_lengths(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Tokens of documents ``start`` to ``stop``: int64 [stop - start]."""
        bounds = np.asarray(self.document_bounds[start : stop + 1])
        at = np.asarray(self.offsets[bounds[0] : bounds[-1]]) // self.dtype.itemsize
        starts = np.append(at, self.document_start(stop))[bounds - bounds[0]]
        lengths: npt.NDArray[np.int64] = np.diff(starts)
        return lengths

    def document(self, document: int) -> npt.NDArray:
        """The tokens of one document ``[n]``, all its sequences, a view of the map."""
        tokens: npt.NDArray = self.tokens[self.document_start(document) : self.document_start(document + 1)]
        return tokens

    def document_of(self, token: int) -> int:
        """The document that holds a token (the last one starting at or before it): a bisection in the map."""
        return bisect_right(range(self.num_documents), token, key=self.document_start) - 1


def dtype_code(dtype: np.dtype) -> int:
    for code, known in DTYPES.items():
        if known == dtype:
            return code
    raise DataError(f"an indexed dataset cannot hold {dtype}; use one of {[d.name for d in DTYPES.values()]}")
