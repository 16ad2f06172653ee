"""What SIGTERM, SLURM's SIGUSR1 and Ctrl-C ask of a run: to finish the step, save, and end well."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

LAUNCHER = "MEGATRON_DS_LAUNCHER"  # the process id of a rank's launcher, in its environment
# By which a scheduler asks for an end; SIGUSR1 in many job scripts of SLURM (--signal=USR1@120).
REQUESTS = (signal.SIGTERM, signal.SIGUSR1)
# Seconds within which two SIGINTs are one: under torchrun a Ctrl-C comes from the terminal and from torchrun.
ONE_CTRL_C = 1.0
_HEARS_AFTER = 3.0  # seconds in which a main thread that is not stuck in C has handled a signal


def end_with_launcher() -> None:
    """Have the kernel send this rank a SIGTERM when the launcher that started it ends, however: it saves and ends too.

    Else a launcher that was killed leaves ranks behind that train on and hold their devices. On Linux alone.
    """
    if sys.platform != "linux" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    pr_set_pdeathsig = 1  # from linux/prctl.h
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    try:
        os.kill(int(os.environ.get(LAUNCHER, os.getpid())), 0)
    except ProcessLookupError:  # it has ended before that
        os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def unheard_requests() -> Iterator[None]:
    """A run has ended well: a SIGTERM that comes late, as on the second of two nodes, must not say otherwise."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in REQUESTS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def stop_signals(asked: threading.Event) -> Iterator[None]:
    """A request and the first Ctrl-C set the event: finish the step, save, and end well.

    A second Ctrl-C interrupts, even a rank that hangs in a collective, where Python handles no signals.
    """
    main = threading.main_thread()
    if threading.current_thread() is not main:
        yield
        return
    interrupt, heard = threading.Event(), threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        asked.set()
        if interrupt.is_set() and not heard.is_set():
            heard.set()
            raise KeyboardInterrupt

    def listen(receiver: socket.socket) -> None:
        """Gets the numbers of signals from the C handler as they come, also while the main thread is in C."""
        first: float | None = None
        while number := receiver.recv(1):
            now = time.monotonic()
            if first is None:
                first = now
            elif number[0] == signal.SIGINT and now - first > ONE_CTRL_C:
                interrupt.set()
                # The handler may have run before the flag was up, and a signal just before a blocking call is lost.
                while not heard.wait(0.1):
                    if time.monotonic() - now > _HEARS_AFTER:
                        os._exit(130)
                    signal.pthread_kill(main.ident or 0, signal.SIGINT)
                return

    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    with receiver, sender:
        listener = threading.Thread(target=listen, args=(receiver,), name="signals", daemon=True)
        listener.start()
        before = {number: signal.signal(number, on_signal) for number in (*REQUESTS, signal.SIGINT)}
        wakeup = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup)
            sender.shutdown(socket.SHUT_RDWR)
            listener.join()  # before the handlers go: it may be about to send a signal
            for number, handler in before.items():
                signal.signal(number, handler)
