"""Ranks that do not come: who waits for them says where they are, long before the wait times out.

A thread of each rank leaves a note in the job's store every few seconds: which call of the engine it is in or was in
last, and the lines of its main thread. A rank that waits in one call for long reads the notes of the others and names
those that are elsewhere, in one warning. Training itself pays an attribute write a call.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch.distributed as dist

from megatron_ds.comm.together import exchange
from megatron_ds.errors import EngineError
from megatron_ds.mesh import Axis
from megatron_ds.train.whereabouts import innermost, main_thread, note_of, notes_of, waits_in

_NAMED_AFTER = 30.0  # seconds, or a fifth of a shorter timeout
_LOOKS = 4  # in that time
_SHOWN = 8
_TIMEOUT = re.compile(r"time(d |-)?out", re.IGNORECASE)  # of a process group, and of our own tokens
_JOIN = "where ranks have different numbers of batches, put `with engine.join():` around the loop"


@dataclass(frozen=True)
class _Note:
    """Which call a rank is in or was in last, and where its main thread stands."""

    call: str
    lines: str


class LateRanks:
    """Leaves this rank's notes, and warns of ranks that a call of this one waits for.

    Args:
        world: the ranks that take part; all of them make this object, and later close it, alike.
        timeout: seconds that a rank waits in a collective.
        warn: takes the warning.
    """

    def __init__(self, world: Axis, timeout: float, warn: Callable[[str], None]):
        self._world, self._timeout, self._warn = world, timeout, warn
        self._after = min(_NAMED_AFTER, timeout / 5)
        self._call = "before its first call", False  # and whether it is in one; a new object each time
        self._seen, self._since, self._warned = self._call, time.monotonic(), False
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="late ranks", daemon=True)
        if world.group is not None:
            name = exchange(world, secrets.token_hex(4))[0]  # of this engine, among others of the job
            self._store: dist.Store = dist.PrefixStore(name, dist.distributed_c10d._get_default_store())
            self._thread.start()
            atexit.register(self.close)  # a thread that Python's end finds inside torch would abort the process

    def close(self) -> None:
        self._stopped.set()
        atexit.unregister(self.close)
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    @contextlib.contextmanager
    def awaited(self, what: str, step: int) -> Iterator[None]:
        """Around what takes all ranks. A time-out says what this rank waited in, and where the others were."""
        self._call = f"in the {what} of step {step}", True
        try:
            yield
        except RuntimeError as error:
            if _TIMEOUT.search(str(error)) is None:
                raise
            late = self._elsewhere(self._call[0])
            raise EngineError(
                f"rank {self._rank} waited for others {self._call[0]}, and they did not come within "
                f"timeout={self._timeout:g} s{f': {late}' if late else ''}. {_JOIN.capitalize()}; where one is busy "
                "with something else, raise `timeout`"
            ) from error
        finally:
            self._call = f"after the {what} of step {step}", False

    @property
    def _rank(self) -> int:
        return self._world.ranks[self._world.rank]

    def _run(self) -> None:
        while not self._stopped.wait(self._after / _LOOKS):
            try:
                self._look()
            except Exception:
                return  # the store has gone with the rank that held it: nobody is left to be told

    def _look(self) -> None:
        call, lines = self._call, main_thread()
        place, inside = call
        self._store.set(note_of(self._rank), json.dumps(asdict(_Note(place, innermost(lines)))))
        now = time.monotonic()
        if call is not self._seen:
            self._seen, self._since, self._warned = call, now, False
        due = inside and now - self._since >= self._after and not self._warned and waits_in(lines)
        if due and (late := self._elsewhere(place)):
            self._warned = True
            self._warn(f"rank {self._rank} has waited {now - self._since:.0f} s {place}: {late}. {_JOIN}")

    def _elsewhere(self, call: str) -> str:
        """The others that are not in this call, and where they are; of those that said so."""
        others = [rank for rank in self._world.ranks if rank != self._rank]
        try:
            notes = {rank: _Note(**json.loads(text)) for rank, text in notes_of(others, self._store).items()}
        except Exception:
            return ""  # no store, no word
        found = [f"rank {rank} is {note.call}, at {note.lines}" for rank, note in notes.items() if note.call != call]
        more = f", and {len(found) - _SHOWN} more are not here" if len(found) > _SHOWN else ""
        return "; ".join(found[:_SHOWN]) + more
