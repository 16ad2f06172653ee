"""Real filesystems of a few megabytes, for tests that fill them up, wear them out or take them away."""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

_SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN, _IOR('X', 125, __u32)
_NO_LOG_FLUSH = 2


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int, kind: str = "ext4", read_only: bool = False) -> Iterator[Path]:
    """A filesystem of its own below ``folder``, for as long as the context lasts.

    Args:
        kind: ``"ext4"`` on a loop device, where direct I/O works, or ``"tmpfs"``.

    Skips the test, saying why, where this process may not mount.
    """
    place, image = folder / f"{kind}-disk", folder / f"{kind}-image"
    place.mkdir(parents=True)
    mode = "ro" if read_only else "rw"
    if kind == "tmpfs":
        command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,{mode}", "none", str(place)]
    else:
        # Zeros all through, so that the image itself takes its blocks before the test and not during it.
        image.write_bytes(bytes(megabytes << 20))
        _run(["mkfs.ext4", "-q", "-F", "-m", "0", "-b", "4096", str(image)])
        command = ["mount", "-t", "ext4", "-o", f"loop,{mode}", str(image), str(place)]
    _run(command)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def _run(command: list[str]) -> None:
    # Where they are is not on everybody's path.
    program = shutil.which(command[0], path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if program is None:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run([program, *command[1:]], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"this process may not set up a disk of its own: {done.stderr.strip() or command}")


def fill(folder: Path, leave: int = 0) -> None:
    """Take all space of the disk but about ``leave`` bytes."""
    file = os.open(folder / "fill", os.O_CREAT | os.O_WRONLY)
    step, taken = 1 << 20, 0
    while step >= 4096:
        free = shutil.disk_usage(folder).free - leave
        if step <= free:
            with contextlib.suppress(OSError):
                os.posix_fallocate(file, taken, step)
                taken += step
                continue
        step //= 2
    os.close(file)


def take_away(folder: Path) -> None:
    """Shut an ext4 disk down as if its device were gone: from now on every transfer is an I/O error."""
    handle = os.open(folder, os.O_RDONLY)
    fcntl.ioctl(handle, _SHUTDOWN, _NO_LOG_FLUSH.to_bytes(4, "little"))
    os.close(handle)


def used(folder: Path) -> int:
    """Bytes taken on the disk, of files without a name too."""
    return shutil.disk_usage(folder).used


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A real refusal by the kernel: no file may be written beyond ``size`` bytes."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
