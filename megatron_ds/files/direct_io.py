"""A file read and written past the page cache (``O_DIRECT``), with the page cache as the fallback.

In large chunks from a few threads writes reach the disk's own rate, and the CPU is left alone.
Offsets, lengths and buffers must be multiples of 4096.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import secrets
import threading
from pathlib import Path

import torch

ALIGNMENT = 4096

log = logging.getLogger(__name__)


class DirectFile:
    """One open file; every method may be called from several threads at once.

    Args:
        direct: False goes through the page cache from the start, and says nothing of it.

    Attributes:
        direct: False where the filesystem refuses ``O_DIRECT`` (some do at open, some at the first transfer). It is
            logged once per file; the results are the same.
    """

    def __init__(self, path: Path, flags: int, direct: bool = True):
        self.path = path
        self.direct = direct
        self._falling_back = threading.Lock()
        if not direct:
            self.fd = os.open(path, flags, 0o644)
            return
        existed = path.exists()
        try:
            self.fd = os.open(path, flags | os.O_DIRECT, 0o644)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            if not existed:
                path.unlink(missing_ok=True)  # Linux creates the file before it refuses the flag
            self.fd = os.open(path, flags, 0o644)
            self._warn_buffered()

    @staticmethod
    def create(path: Path, size: int) -> DirectFile:
        """A new file of ``size`` bytes with its blocks reserved, so that a full disk is an error here.

        Direct writes into reserved blocks run in parallel; those that extend a file do not.
        """
        file = DirectFile(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        try:
            file.reserve(0, size)
        except OSError:
            file.close()
            raise
        return file

    @staticmethod
    def scratch(folder: Path, name: str, direct: bool = True) -> DirectFile:
        """A new empty file to write and read that vanishes with this process, however it ends.

        It has no name (``O_TMPFILE``), or, where the filesystem cannot do that, loses it at once; ``name`` is for
        messages, and the short-lived name begins with it. A process id would not make that unique: ranks in
        containers have the same ones.
        """
        path = folder / name
        try:
            file = DirectFile(folder, os.O_TMPFILE | os.O_RDWR, direct)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR):
                raise
            path = folder / f"{name}-{secrets.token_hex(8)}"
            file = DirectFile(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, direct)
            path.unlink()
        file.path = path
        return file

    @staticmethod
    def open(path: Path) -> DirectFile:
        return DirectFile(path, os.O_RDONLY)

    def reserve(self, offset: int, size: int) -> None:
        """Reserve the blocks of ``[offset, offset + size)``, lengthening the file to its end.

        ``os.posix_fallocate`` is not used: where the filesystem cannot reserve, glibc would write a byte into every
        block. There, nothing is reserved.

        Raises:
            OSError: the disk is full, or the file would be longer than the process may make it.
        """
        libc = ctypes.CDLL(None, use_errno=True)
        if size and libc.fallocate(self.fd, 0, ctypes.c_longlong(offset), ctypes.c_longlong(size)) != 0:
            code = ctypes.get_errno()
            if code not in (errno.EOPNOTSUPP, errno.ENOSYS):
                raise OSError(code, os.strerror(code), str(self.path))

    def write(self, data: memoryview, offset: int) -> None:
        while data:
            direct = self.direct
            try:
                written = os.pwrite(self.fd, data, offset)
            except OSError as error:
                self._fall_back_or_raise(error, direct)
                continue
            data, offset = data[written:], offset + written

    def read(self, buffer: memoryview, offset: int) -> int:
        """Fill ``buffer``; the bytes read, fewer than asked for only at the end of the file."""
        filled = 0
        while filled < len(buffer):
            direct = self.direct
            try:
                got = os.preadv(self.fd, [buffer[filled:]], offset + filled)
            except OSError as error:
                self._fall_back_or_raise(error, direct)
                continue
            filled += got
            if got == 0 or (direct and got % ALIGNMENT):
                break  # the end of the file; a direct read stops there unaligned
        return filled

    def finish(self, size: int) -> None:
        """Cut the file to ``size`` (the last direct write is padded), wait for the disk, and close."""
        os.ftruncate(self.fd, size)
        os.fsync(self.fd)
        self.close()

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _fall_back_or_raise(self, error: OSError, direct: bool) -> None:
        """``direct``: what the transfer began as; several threads may be refused before the first falls back."""
        if error.errno != errno.EINVAL or not direct:
            raise error
        with self._falling_back:
            if self.direct:
                fcntl.fcntl(self.fd, fcntl.F_SETFL, fcntl.fcntl(self.fd, fcntl.F_GETFL) & ~os.O_DIRECT)
                self._warn_buffered()

    def _warn_buffered(self) -> None:
        self.direct = False
        log.warning("%s: the filesystem refuses direct I/O; the page cache is used (slower)", self.path)


def aligned_buffer(size: int, pin: bool = False) -> torch.Tensor:
    """Uninitialised uint8 ``[size]`` that starts at a multiple of 4096; ``pin``: page-locked, for CUDA."""
    base = torch.empty(size + ALIGNMENT, dtype=torch.uint8, pin_memory=pin)
    skip = -base.data_ptr() % ALIGNMENT
    return base[skip : skip + size]


def aligned_up(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
