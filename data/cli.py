"""The frame of the command line tools: options in, one line per error out."""

from __future__ import annotations

import contextlib
import errno
import io
import math
import os
import re
import signal
import sys
from collections.abc import Callable
from typing import TypeVar

from megatron_ds.errors import ConfigError, MegatronDSError

Options = TypeVar("Options")

# The system's refusals; any other OSError is a defect of this library and keeps its traceback.
REFUSALS = frozenset(
    (
        *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENXIO, errno.EMFILE, errno.ENFILE),
        *(errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTEMPTY, errno.ETXTBSY),
    )
)
# Libraries written in Rust (tokenizers, safetensors) report the system's refusal with types of their own.
_RUST_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_WAYS_OUT = {
    errno.EMFILE: "; allow more open files with `ulimit -n`",
    errno.ENOSPC: "; free some space, or choose another place",
    errno.EDQUOT: "; free some space, or choose another place",
}


def run(main: Callable[[Options], None], options: type[Options], description: str | None) -> None:
    """Parse the command line into ``options``, call ``main`` and exit as :func:`guarded` says."""
    import tyro  # not at the top: worker processes import the tools' modules again and need no parser

    # Lines that belong together are one paragraph to tyro; examples stay lines of their own where they are indented.
    shown = None if description is None else re.sub(r"^(?=python )", "    ", description, flags=re.MULTILINE)
    flat = (tyro.conf.OmitArgPrefixes,)  # the settings of a part of the library are options like the tool's own
    sys.exit(guarded(lambda: main(_finite(tyro.cli(options, description=shown, config=flat)))))


def _finite(options: Options) -> Options:
    """The options; an error for a number among them that means nothing."""
    for name, value in vars(options).items():
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, float) and not math.isfinite(item):
                raise ConfigError(f"--{name.replace('_', '-')} {item}: not a finite number")
    return options


def print_error(text: str, code: int = 2) -> int:
    """Print the last word of a program, and return its exit status."""
    with contextlib.suppress(OSError, AttributeError):  # a stderr that is full, or closed
        print(text, file=sys.stderr, flush=True)
    return code


def guarded(program: Callable[[], int | None], report: Callable[[str, int], int] = print_error) -> int:
    """Run a program and return its exit status.

    What it returned, or 0; 2 for an error that the input or the system caused (one message, no traceback); 130 when it
    was interrupted from the keyboard; 141 when the reader of its output has gone (``| head``).
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path may hold what the locale's encoding lacks
    try:
        try:
            code = program() or 0
        except SystemExit as left:  # --help
            code = left.code if isinstance(left.code, int) else 0 if left.code is None else report(str(left.code), 1)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except BrokenPipeError:
        _leave_stdout()
        return 128 + signal.SIGPIPE
    except MegatronDSError as error:
        return report(f"error: {error}", 2)
    except KeyboardInterrupt:
        return report("interrupted", 128 + signal.SIGINT)
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        _leave_stdout()
        return report(f"error: {_described(error)}", 2)
    except Exception as error:
        found = _RUST_OS_ERROR.search(str(error))
        if found is None:
            raise
        return report(f"error: {error}{_WAYS_OUT.get(int(found[1]), '')}", 2)


def _described(error: OSError) -> str:
    name = error.filename if error.filename2 is None else error.filename2  # of a rename, the name that was asked for
    where = f"{name}: " if name is not None else ""
    return f"{where}{error.strerror or error}{_WAYS_OUT.get(error.errno or 0, '')}"


def _leave_stdout() -> None:
    """What is still buffered goes nowhere: else Python's end fails once more."""
    with contextlib.suppress(OSError, AttributeError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
