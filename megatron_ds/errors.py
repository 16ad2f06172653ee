"""The errors a user can cause, one class per place where they are caught and shown.

Every message names the value, the rule it broke and a way out. The command-line entry points print these
without a traceback; anything else that escapes is a defect of this library and keeps its traceback.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType


class MegatronDSError(Exception):
    """Base of every error that is the input's fault, not the library's."""


class ConfigError(MegatronDSError):
    """A setting, or a combination of settings, that cannot run."""


class DataError(MegatronDSError):
    """A dataset, tokenizer or index file that is missing, damaged or does not fit the model."""


class CheckpointError(MegatronDSError):
    """A checkpoint that is missing, incomplete, damaged, or of another model."""


class OffloadError(MegatronDSError):
    """Offloaded state that cannot be written or read back: a full disk, a file that vanished or was damaged."""


class ScheduleError(MegatronDSError):
    """A pipeline schedule that would deadlock, lose a micro-batch or exceed its activation bound."""


class EngineError(MegatronDSError):
    """An engine's methods were called in an order that cannot work, or its model was changed behind its back."""


class ReplicaError(MegatronDSError):
    """Copies of a parameter that must be equal differ: the run is no longer that of one model."""


class ShardedParameterError(MegatronDSError):
    """A parameter's values were asked for while ZeRO stage 3 has them sharded."""


class ShardedGradientError(MegatronDSError):
    """A parameter's ``.grad`` was computed with while an engine has the gradients sharded."""


class RaisedAs:
    """A context manager that turns exceptions of other libraries into ``error``, with the message ``what: reason``.

    Args:
        kinds: those exceptions. Ours pass as they are.
    """

    def __init__(self, error: type[MegatronDSError], what: str, *kinds: type[Exception]):
        self.error, self.what, self.kinds = error, what, kinds

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, reason: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(reason, self.kinds) and not isinstance(reason, MegatronDSError):
            raise self.error(f"{self.what}: {reason}") from reason


def divisors(number: int) -> str:
    """``1, 2, 4 or 8``: what may divide ``number``, for an error message."""
    return one_of([d for d in range(1, number + 1) if number % d == 0])


def one_of(numbers: Sequence[int]) -> str:
    """``1, 2 or 4``, for an error message."""
    found = [str(number) for number in numbers]
    return found[0] if len(found) == 1 else ", ".join(found[:-1]) + " or " + found[-1]


def multiples_around(number: int, step: int) -> str:
    """``96 or 104``: the multiples of ``step`` below and above ``number``, for an error message."""
    below, above = number // step * step, -(-number // step) * step
    return f"{below} or {above}" if below else str(above)


def listed(names: Iterable[object], most: int = 10) -> str:
    """``a, b and 3 more``: the first ones of what may be many, for an error message."""
    found = [str(name) for name in names]
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")


def itemised(faults: Sequence[str]) -> str:
    """One fault as it is, several below each other."""
    return faults[0] if len(faults) == 1 else "".join(f"\n  - {fault}" for fault in faults)


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known name closest to ``name`` in letters of any case, or an empty string when
    none is close."""
    names = {each.casefold(): each for each in known}
    matches = difflib.get_close_matches(name.casefold(), list(names), n=1, cutoff=0.5)
    return f"; did you mean {names[matches[0]]!r}?" if matches else ""


def not_there(path: object) -> str:
    """``x does not exist``, with the way out where it looks like a model's name on the Hugging Face Hub."""
    text = str(path)
    hub = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", text) and not Path(text).parent.exists()
    way_out = f"; if it is one of the Hugging Face Hub: hf download {text} --local-dir FOLDER, and give that folder"
    return f"{text} does not exist{way_out if hub else ''}"
