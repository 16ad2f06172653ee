"""Who failed first, and where everybody was: the end of a job that does not end well.

Each rank has a thread that asks the rendezvous store once a second whether a rank has failed. If one has, the thread
answers with its own rank's place (step, pipeline action, innermost lines of the main thread's stack) and sees to it
that the rank ends, even where its main thread hangs. So whoever fails can say who died without a word (no answer) and
who held up the others (waits for nobody). The training itself pays one attribute write an action, and nothing else.

Every rank ends by itself, whatever became of the others, of the store and of the links to them: what is asked of the
store is asked for a limited time, and once a rank has begun to end a timer sees to it that it does.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch.distributed as dist

from megatron_ds.comm.together import blames_peer, plain_message
from megatron_ds.errors import MegatronDSError, listed
from megatron_ds.train.bounded import BoundedStore, StoreSilentError, end_within
from megatron_ds.train.whereabouts import Line, Whereabouts, innermost, main_thread, note_of, notes_of, waits_in

FAILED = "failed"  # the store's key of the first failure
_SHOWN = 16
_TIMEOUT = re.compile(r"time(d |-)?out", re.IGNORECASE)
_ANSWERS_WITHIN = 4.0  # seconds in which a store that is there answers
_LAST_WORDS_TAKE = 30.0  # seconds at most from a rank's failure to its end


@dataclass(frozen=True)
class FirstFailure:
    """The rank that failed first, and what of. ``said``: by that rank itself, which is on ``host``."""

    rank: int
    text: str
    said: bool = True
    host: str = ""


class Watch:
    """This rank's part in finding out what went wrong.

    Args:
        store: of the job. Its one server runs in rank 0, or in torchrun.
        local_rank: the first rank of a node speaks for it.
        local_world_size: ranks of this node.
        timeout: seconds a rank may wait for others. A process group that ends such a wait does it first; this is for
            those that do not.
        interval: seconds between two looks at the store. It grows with the world: at most 2,000 looks a second.
        grace: seconds a rank has to end by itself once another has failed.

    Attributes:
        describe: says what this rank is doing; called from the watching thread.
    """

    def __init__(
        self,
        store: BoundedStore,
        rank: int,
        world_size: int,
        local_rank: int = 0,
        local_world_size: int = 1,
        timeout: float = 600.0,
        interval: float = 1.0,
        grace: float = 5.0,
    ):
        self.store, self.rank, self.world_size, self.local_rank = store, rank, world_size, local_rank
        self.node = range(rank - local_rank, rank - local_rank + local_world_size)
        self.timeout, self.interval = timeout, max(interval, world_size / 2000)
        self.grace = grace + self.interval
        self.describe: Callable[[], str] = lambda: "starting"
        self.host = socket.gethostname() if local_world_size < world_size else ""  # on one node it tells nothing
        self._first: FirstFailure | None = None
        self._asked: Future[bytes] | None = None
        self._answers_within = _ANSWERS_WITHIN + self.interval
        self._place, self._since = Whereabouts(), time.monotonic()
        self._stopped = threading.Event()
        self._concluding = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        if self.host:
            self.store.ask(lambda store: store.set(_host_of(self.rank), self.host))
        self._thread.start()

    def stop(self) -> None:
        """The job is over. A thread that Python's end finds inside torch would abort the process."""
        self._stopped.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(timeout=10)
        if self._asked is not None:
            wait([self._asked], timeout=10)

    def conclude(self, error: BaseException) -> int:
        """Say what is to be said about this rank's error, and return the exit code of its process.

        The first rank to fail says it all: a user's mistake in one line, a defect as its traceback, a lost or late
        peer as an account of where every rank was. Each further node says in one line that it stops, and why.
        """
        self._concluding.acquire()  # for good: this process ends
        mistake = isinstance(error, MegatronDSError)
        code = 2 if mistake else 130 if isinstance(error, KeyboardInterrupt) else 1
        end_within(_LAST_WORDS_TAKE + 6 * self.interval, code)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, at once after a death: let this be said first
        peer = blames_peer(error)
        text = plain_message(error) if peer else str(error) if mistake else f"{type(error).__name__}: {error}"
        lines = [(frame.f_code, number) for frame, number in traceback.walk_tb(error.__traceback__)]
        own = Whereabouts(self._text(lines[::-1]), True)
        first = self._claim(text)
        if first.rank != self.rank:
            if not (mistake and first.text == text):
                self._report_stop(first)
            elif self.local_rank == 0 and first.rank not in self.node:
                _report(f"error: {error}")  # found by all together: it is said once a node
        elif mistake:
            _report(f"error: {error}")
        elif peer:
            self._report_peer(text, own)
        elif isinstance(error, KeyboardInterrupt):
            _report("interrupted")
        else:
            _report(f"rank {self.rank} failed:\n" + "".join(traceback.format_exception(error)).rstrip())
        self._answer(own)
        if self.rank == 0 and not (peer and first.rank == self.rank):
            self._roll_call()  # the store may live here: stay until the others know
        return code

    def _claim(self, text: str) -> FirstFailure:
        """Leave a note in the store; returns the note that came first, this rank's or another's."""
        if self._first is not None:
            return self._first
        own = FirstFailure(self.rank, text, host=self.host)
        note = json.dumps(asdict(own))
        try:
            found = self.store(lambda store: store.compare_set(FAILED, "", note), self._answers_within)
            return FirstFailure(**json.loads(found))
        except StoreSilentError as error:
            end = f"no word from it or its torchrun; stopped, or its machine cannot be reached ({error})"
        except Exception:
            end = "gone without a word, it or its torchrun, and the job's store with it"
        return FirstFailure(0, end, said=False) if self.rank > 0 and blames_peer(text) else own

    def _report_stop(self, first: FirstFailure) -> None:
        if self.local_rank == 0 or not first.said:
            where = f" on {first.host}" if first.host else ""
            _report(f"rank {self.rank} stops: rank {first.rank}{where}: {first.text}")

    # The roll call

    def _report_peer(self, text: str, own: Whereabouts) -> None:
        """This rank lost a peer, or waited for it in vain, and nobody has said why."""
        late = _TIMEOUT.search(text) is not None
        hosts = self._hosts()  # before the roll call: with its own, rank 0 may end, and the store with it
        places = {**self._roll_call(), self.rank: own}
        silent = [rank for rank in range(self.world_size) if rank not in places]
        busy = [rank for rank in sorted(places) if not places[rank].waits]
        what = f"waited {self.timeout:.0f} s in vain for" if late else "lost its connection to"
        lines = [f"error: rank {self.rank} {what} another rank: {text}"]
        if self.host and "[127." in text:
            lines.append(
                f"the name of its machine, or of {self.host}, stands for the loopback there (/etc/hosts), which gloo "
                "took: set GLOO_SOCKET_IFNAME to the network's interface on every node, e.g. eth0"
            )
        if silent and self.store.silent:
            lines.append("the job's store does not answer, so that no other rank could be asked")
        elif silent:
            lines.append(
                f"no answer from {_ranks(silent)}{_on_hosts(silent, hosts)}: killed (for want of memory? see the "
                "kernel's log), stopped, or its machine is gone"
            )
        elif late and busy:
            lines.append(f"{_ranks(busy)}{_on_hosts(busy, hosts)} did not wait for any other and so held them up")
        order = [*busy, *(rank for rank in sorted(places) if rank not in busy)]
        for rank in order[:_SHOWN]:
            since = f" (for {places[rank].seconds} s)" if places[rank].seconds else ""
            lines.append(f"  rank {rank}: {places[rank].text}{since}")
        if len(order) > _SHOWN:
            lines.append(f"  ... and {len(order) - _SHOWN} more")
        _report("\n".join(lines))

    def _answer(self, place: Whereabouts) -> None:
        text = json.dumps(asdict(place))
        with contextlib.suppress(Exception):
            self.store(lambda store: store.set(note_of(self.rank), text), self._answers_within)

    def _roll_call(self) -> dict[int, Whereabouts]:
        """The other ranks' answers, of those that give one in time."""
        answers: dict[int, Whereabouts] = {}
        missing = [rank for rank in range(self.world_size) if rank != self.rank]
        deadline = time.monotonic() + 2 * self.interval + 1
        try:
            while missing and time.monotonic() < deadline:
                found = self.store(partial(notes_of, missing), self._answers_within)
                answers |= {rank: Whereabouts(**json.loads(text)) for rank, text in found.items()}
                missing = [rank for rank in missing if rank not in answers]
                time.sleep(0.05)
        except Exception:
            return answers  # the store is gone: what is known is known
        return answers

    def _hosts(self) -> dict[int, str]:
        """The machines of all ranks, as far as they have left a note of it; on one node there are no notes."""
        if not self.host:
            return {}

        def noted(store: dist.Store) -> dict[int, str]:
            keys = {rank: _host_of(rank) for rank in range(self.world_size)}
            return {rank: store.get(key).decode() for rank, key in keys.items() if store.check([key])}

        try:
            return self.store(noted, self._answers_within)
        except Exception:
            return {}

    # The thread

    def _run(self) -> None:
        while not self._stopped.wait(self.interval):
            with contextlib.suppress(Exception):  # it reads what the main thread changes meanwhile
                self._look()
            self._first = self._heard()
            if self._first is not None:
                self._answer(replace(self._place, seconds=int(time.monotonic() - self._since)))
                if self._first.rank != self.rank and not self._stopped.wait(self.grace):
                    self._end(self._first)
                return
            if self._place.waits and time.monotonic() - self._since > self.timeout + self.grace:
                self._end(None)

    def _heard(self) -> FirstFailure | None:
        """A rank's failure, if the store has told of one. It may be silent: that is no reason to end a run."""
        if self._asked is None:
            self._asked = self.store.ask(lambda store: store.get(FAILED) if store.check([FAILED]) else b"")
        if not self._asked.done() or self._asked.exception() is not None:
            return None  # a store that is gone stays so, and is not asked again
        answer = self._asked.result()
        self._asked = None
        return FirstFailure(**json.loads(answer)) if answer else None

    def _look(self) -> None:
        """Where the main thread is now, and since when."""
        lines = main_thread()
        place = Whereabouts(self._text(lines), waits_in(lines))
        if place != self._place:
            self._place, self._since = place, time.monotonic()

    def _text(self, lines: Sequence[Line]) -> str:
        """What this rank is doing, and in which lines."""
        return f"{self.describe()}: {innermost(lines)}"

    def _end(self, first: FirstFailure | None) -> None:
        """End the process from this thread: the main thread does not come back, or not from another's failure."""
        if not self._concluding.acquire(blocking=False):
            return  # the main thread is just doing it
        end_within(_LAST_WORDS_TAKE + 6 * self.interval, 1)
        text = f"timeout: {self._place.text}"
        first = first or self._claim(text)
        if first.rank == self.rank:
            self._report_peer(text, replace(self._place, seconds=int(time.monotonic() - self._since)))
        else:
            self._report_stop(first)
        sys.stdout.flush()
        os._exit(1)


def _host_of(rank: int) -> str:
    """The store's key of the name of a rank's machine."""
    return f"host/{rank}"


def _on_hosts(ranks: Sequence[int], hosts: Mapping[int, str]) -> str:
    names = sorted({hosts[rank] for rank in ranks[:_SHOWN] if rank in hosts})
    return f" on {listed(names, _SHOWN)}" if names else ""


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {listed(ranks, _SHOWN)}"


def _report(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
