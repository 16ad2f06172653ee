"""Which files below a folder are data: none is passed over unsaid, but for hidden ones."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from megatron_ds.errors import DataError


def files_below(folder: Path, wanted: Callable[[Path], bool]) -> list[Path]:
    """The files of a folder and its subfolders that are ``wanted`` by their name, sorted by path.

    As ``datasets`` does, hidden files, and folders whose name starts with ``.`` or ``__``, are passed over: what
    editors and file managers leave. So is a disk's own ``lost+found``.

    Raises:
        DataError: a folder that cannot be listed or is a link, or a wanted file that is a link to nothing, a pipe or
            a device.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"the folder {error.filename} cannot be read: {error.strerror}; mend that, or move it away")

    found: list[Path] = []
    for place, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith((".", "__")) and name != "lost+found"]
        for name in folders:
            if (link := Path(place, name)).is_symlink():
                raise DataError(f"{link} is a link to a folder, which is not followed; put the folder itself there")
        for path in (Path(place, name) for name in files if not name.startswith(".")):
            if wanted(path):
                if not path.is_file():
                    raise DataError(f"{path} is a link to nothing, or no regular file; mend it, or move it away")
                found.append(path)
    return sorted(found)
