"""Swap files made on trial before the run: whether a folder can be used, and its space had, only the kernel can tell.

A quota, a limit on file sizes and two folders on one disk do not show in what the filesystem says is free. So every
rank makes its swap files and reserves all of them, and holds that until all ranks have: what they need together must
be there. The store makes its own afterwards. A rank gives its trial back before it reserves anew, so that never more
than the run needs is taken, however far the others are.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping
from pathlib import Path

from megatron_ds.checkpoint.direct_io import DirectFile
from megatron_ds.errors import OffloadError
from megatron_ds.zero.store.nvme import make_swap_file


class SwapReservation:
    """The swap files of this rank that are on trial now."""

    def __init__(self) -> None:
        self._files: list[DirectFile] = []
        self._made: list[Path] = []  # folders that were not there, the outermost first

    def acquire(self, sizes: Mapping[str, int]) -> None:
        """Make a file of so many bytes in each folder. Where the filesystem cannot reserve, it stays empty.

        Raises:
            OffloadError: a folder cannot be used, or does not have the room.
        """
        for folder, size in sizes.items():
            path = Path(folder)
            self._made += [each for each in (*reversed(path.absolute().parents), path) if not each.exists()]
            file = make_swap_file(path, direct=False)  # no transfers, so no word on whether they would be direct
            self._files.append(file)
            try:
                file.reserve(0, size)
            except OSError as error:
                raise OffloadError(
                    f"{size / 1e6:,.1f} MB for this rank's swap file in {folder} cannot be reserved: {error.strerror}; "
                    f"{shutil.disk_usage(folder).free / 1e6:,.1f} MB are free there now, beside what other ranks on "
                    "that disk have reserved, and a quota or `ulimit -f` may allow less. Make room, or use another "
                    "folder, a smaller offload ratio or more ranks"
                ) from error

    def end(self, keep_folders: bool) -> None:
        """Give the space back. Folders made for the trial go too, unless they are to be used or others do."""
        while self._files:
            self._files.pop().close()
        while self._made and not keep_folders:
            with contextlib.suppress(OSError):
                self._made.pop().rmdir()
