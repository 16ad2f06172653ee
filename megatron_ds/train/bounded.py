"""Timeouts for calls that have none: the rendezvous store's client waits in C until its server answers.

A server that was stopped, or whose link was cut, never does. So each call runs in a thread of its own, and who asks
waits in Python: for so long and no longer, and open to signals.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


class StoreSilentError(RuntimeError):
    """The rendezvous store has not answered a call."""


class BoundedStore:
    """The rendezvous store of a job, every call of which ends.

    Args:
        seconds: a call may take.

    Attributes:
        silent: a call was not answered; there is no use in another one.
    """

    def __init__(self, store: dist.Store, seconds: float):
        self.store, self.seconds = store, seconds
        self.silent = False

    def __call__(self, call: Callable[[dist.Store], T], seconds: float | None = None) -> T:
        """What ``call`` makes of the store.

        Raises:
            StoreSilentError: it did not answer in ``seconds`` (default: as long as any call may take), or once before.
        """
        if not self.silent:
            limit = self.seconds if seconds is None else seconds
            try:
                return self.ask(call).result(limit)
            except TimeoutError:
                self.silent = True
        raise StoreSilentError(f"timed out: the job's store{_address()} does not answer")

    def ask(self, call: Callable[[dist.Store], T]) -> Future[T]:
        """The same, for who does not wait for the answer."""
        return in_thread(lambda: call(self.store))


def in_thread(call: Callable[[], T]) -> Future[T]:
    """Run ``call`` in a thread of its own, which does not keep the process alive."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="bounded call", daemon=True).start()
    return future


def end_within(seconds: float, code: int) -> None:
    """End this process with exit code ``code`` in ``seconds`` if it is still there, whatever its threads wait for."""
    timer = threading.Timer(seconds, os._exit, [code])
    timer.daemon = True
    timer.start()


def _address() -> str:
    known = [os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT")]
    return " at " + ":".join(map(str, known)) if all(known) else ""
