"""The frame of the data tools: options in, one line per error out."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

from megatron_ds.errors import MegatronDSError

Options = TypeVar("Options")


def run(main: Callable[[Options], None], options: type[Options], description: str | None) -> None:
    """Parse the command line into ``options`` and call ``main``. Exit status: 0, 2 for an error that the input
    caused (one message, no traceback), 130 when interrupted from the keyboard."""
    import tyro  # not at the top: worker processes import the tools' modules again and need no parser

    try:
        main(tyro.cli(options, description=description))
    except MegatronDSError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
