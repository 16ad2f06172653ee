"""Tokens between the ranks of one host: "what I wrote may be read", "what you wrote I have read".

A token is eight bytes in a pipe that two ranks share. The kernel gives the order of memory that every architecture
needs, a rank that waits sleeps, and a rank that dies closes its pipes, which wakes those who wait for it.

The process group could send them too, and did: but gloo sends with a thread of its own, which takes the core from the
thread that computes, for a share of a step that a pipe does not take.
"""

from __future__ import annotations

import contextlib
import os
import select
import struct
import time
import weakref
from collections.abc import Iterable, Sequence

from megatron_ds.mesh import Axis

_TOKEN = struct.Struct("<q")
_FOREVER = 1800.0  # seconds, where the axis names no timeout: what torch gives a gloo group
_LONGEST_POLL = 1e9  # milliseconds: what poll() takes at most is an int of them


class Tokens:
    """Tokens that this rank has sent to every other rank of the axis, and theirs, which come in the same order.

    A token may carry a small number: :meth:`wait` returns when all peers sent theirs and gives every rank's number, by
    rank in the axis. Several may be under way, and be waited for in any order.
    """

    def __init__(self, pipes: TokenPipes, index: int, number: int):
        self._pipes, self._index, self._number = pipes, index, number
        self._numbers: list[int] | None = None

    def wait(self) -> list[int]:
        if self._numbers is None:
            self._numbers = self._pipes.collect(self._index, self._number)
        return self._numbers


class TokenPipes:
    """A pipe from every rank of an axis to every other one.

    All ranks :meth:`send` in the same order: the n-th token of one rank belongs to the n-th of each other.
    """

    def __init__(self, axis: Axis, incoming: dict[int, int], outgoing: dict[int, int]):
        self.axis = axis
        self._incoming, self._outgoing = incoming, outgoing  # descriptors by rank in the axis
        self._sent = 0
        self._arrived = dict.fromkeys(incoming, 0)  # tokens of each peer so far
        self._early: dict[tuple[int, int], int] = {}  # numbers not yet asked for, by peer and index
        self.close = weakref.finalize(self, _close, [*incoming.values(), *outgoing.values()])

    def send(self, number: int = 0) -> Tokens:
        token = _TOKEN.pack(number)
        for descriptor in self._outgoing.values():
            while not self._written(descriptor, token):
                # Thousands of tokens behind. The peer may wait in the same way for this rank, so what it sent is read.
                readable, _, _ = select.select(self._incoming.values(), [descriptor], [])
                for peer, incoming in self._incoming.items():
                    if incoming in readable:
                        self._receive(peer)
        self._sent += 1
        return Tokens(self, self._sent - 1, number)

    @staticmethod
    def _written(descriptor: int, token: bytes) -> bool:
        try:
            os.write(descriptor, token)
        except BrokenPipeError:
            return True  # the peer has left; whoever needs something of it will say so
        except BlockingIOError:
            return False
        return True

    def collect(self, index: int, own: int) -> list[int]:
        """Every rank's number of its token ``index``, by rank in the axis."""
        for peer in self._incoming:
            while self._arrived[peer] <= index:
                self._receive(peer)
        return [own if rank == self.axis.rank else self._early.pop((rank, index)) for rank in range(self.axis.size)]

    def _receive(self, peer: int) -> None:
        """Read what has come of a peer, one token at least. The errors read like those of a process group."""
        descriptor = self._incoming[peer]
        try:
            data = os.read(descriptor, 512 * _TOKEN.size)
        except BlockingIOError:
            self._sleep(descriptor, peer)
            data = os.read(descriptor, 512 * _TOKEN.size)
        if not data:
            raise RuntimeError(f"connection closed by rank {self.axis.ranks[peer]} of the {self.axis.name} axis")
        for (number,) in _TOKEN.iter_unpack(data):  # writes of so few bytes are never cut
            self._early[peer, self._arrived[peer]] = number
            self._arrived[peer] += 1

    def _sleep(self, descriptor: int, peer: int) -> None:
        limit = self.axis.timeout or _FOREVER
        poll, deadline = select.poll(), time.monotonic() + limit
        poll.register(descriptor, select.POLLIN)
        while not poll.poll(min(max(0.0, deadline - time.monotonic()) * 1000, _LONGEST_POLL)):
            if time.monotonic() >= deadline:
                late = f"rank {self.axis.ranks[peer]} of the {self.axis.name} axis"
                raise RuntimeError(f"timed out after {limit:g} s: {late} has not come")


class PipeOffer:
    """The reading ends of one's pipes, which the peers open to write to. See ``arena.py``.

    The order: every rank makes an offer and sends its ``descriptors``; opens what it was offered; and when all have
    done so, takes its pipes with :meth:`accept`, or closes what it has.
    """

    def __init__(self, axis: Axis):
        self.axis = axis
        self._ends: dict[int, tuple[int, int]] = {}
        self._outgoing: dict[int, int] = {}
        with contextlib.suppress(OSError):  # no descriptor is left: an offer that is not complete
            for peer in range(axis.size):
                if peer != axis.rank:
                    self._ends[peer] = os.pipe()

    @property
    def complete(self) -> bool:
        return len(self._ends) == self.axis.size - 1

    @property
    def descriptors(self) -> list[int]:
        """By rank in the axis: the number of the reading end meant for that rank; 0 for one's own."""
        return [self._ends[peer][0] if peer in self._ends else 0 for peer in range(self.axis.size)]

    def open(self, processes: Sequence[int], descriptors: Sequence[Sequence[int]]) -> bool:
        """Open the pipes to the peers: their process ids and their :attr:`descriptors`. False if one cannot be."""
        try:
            for peer in self._ends:
                path = f"/proc/{processes[peer]}/fd/{descriptors[peer][self.axis.rank]}"
                self._outgoing[peer] = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            return False
        return True

    def accept(self) -> TokenPipes:
        """All ranks have opened all pipes."""
        for reading, writing in self._ends.values():
            os.close(writing)  # else a peer's death would not be seen
            os.set_blocking(reading, False)
        incoming = {peer: reading for peer, (reading, _) in self._ends.items()}
        self._ends = {}
        return TokenPipes(self.axis, incoming, self._outgoing)

    def close(self) -> None:
        """Nothing is left open of an offer that was not accepted."""
        if self._ends:
            _close([*self._outgoing.values(), *(end for ends in self._ends.values() for end in ends)])
            self._ends = {}


def _close(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
