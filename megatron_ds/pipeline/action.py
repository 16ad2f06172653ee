"""The vocabulary of a pipeline schedule: what one rank does next, as plain data.

An action is written ``<stage><op><micro batch>``: ``0F3`` is the forward of micro-batch 3 on stage 0, ``1B0`` the
backward of micro-batch 0 on stage 1, ``1W0`` its weight gradient where a schedule computes that apart from the
input gradient. Transfers carry the letter of what they move: ``0SF3`` sends the activation of micro-batch 3 from
stage 0 to stage 1, ``1RF3`` is its receive; ``1SB3`` sends the gradient of stage 1's *input* back to stage 0,
``0RB3`` is its receive.

Stages are numbered over the whole pipeline; :mod:`~megatron_ds.pipeline.placement` says which rank holds which.

What the operations mean, to the executor, the validator and the simulator alike:

* a send is asynchronous: the rank issues it and goes on, unless :data:`MAX_SENDS` of its sends are under way: then it
  waits for the oldest first;
* a receive is posted and the rank goes on; the compute action that uses the data waits for it;
* a transfer starts when both ends are there, and the transfers of one direction between two ranks run one at a
  time, in the order they were issued.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from megatron_ds.errors import ScheduleError


class Op(StrEnum):
    """What an action does; the value is its spelling in ``0F3``."""

    F = "F"
    B = "B"
    W = "W"
    SEND_F = "SF"
    RECV_F = "RF"
    SEND_B = "SB"
    RECV_B = "RB"

    __hash__ = str.__hash__  # Enum hashes in Python; actions are dictionary keys by the ten thousand

    @property
    def is_compute(self) -> bool:
        return self is Op.F or self is Op.B or self is Op.W

    @property
    def is_send(self) -> bool:
        return self is Op.SEND_F or self is Op.SEND_B

    @property
    def is_receive(self) -> bool:
        return self is Op.RECV_F or self is Op.RECV_B


MAX_SENDS = 8
"""Sends of one rank that may be under way at once. gloo cannot be asked whether a send is done, so without a bound
every activation of a step would stay in memory. The validator proves that no schedule stops because of it."""

_SPELLING = re.compile(r"([0-9]+)(SF|RF|SB|RB|F|B|W)([0-9]+)")
# Op of the other end of a transfer, and how far that end's stage lies from this one's.
_OTHER_END = {
    Op.SEND_F: (Op.RECV_F, 1),
    Op.RECV_F: (Op.SEND_F, -1),
    Op.SEND_B: (Op.RECV_B, -1),
    Op.RECV_B: (Op.SEND_B, 1),
}


@dataclass(frozen=True, order=True, slots=True)
class Action:
    """One thing a rank does: ``op`` for ``micro_batch`` on (global virtual) ``stage``."""

    stage: int
    op: Op
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.op.value}{self.micro_batch}"

    @staticmethod
    def parse(text: str) -> Action:
        """The action spelled ``text``. Raises ScheduleError when it is no action."""
        match = _SPELLING.fullmatch(text)
        if match is None:
            raise ScheduleError(
                f"{text!r} is not an action: write <stage><op><micro batch> with op one of "
                f"{', '.join(op.value for op in Op)}, as in 0F3 or 1SB0"
            )
        return Action(int(match[1]), Op(match[2]), int(match[3]))

    @property
    def counterpart(self) -> Action:
        """The action at the other end of a transfer: ``0SF3`` <-> ``1RF3``, ``1SB3`` <-> ``0RB3``."""
        op, distance = _OTHER_END[self.op]
        return Action(self.stage + distance, op, self.micro_batch)

    @property
    def producer(self) -> Action:
        """For a transfer, at either end: the compute action whose result it moves."""
        sender = self if self.op.is_send else self.counterpart
        return Action(sender.stage, Op.F if sender.op is Op.SEND_F else Op.B, self.micro_batch)

    @property
    def consumer(self) -> Action:
        """For a transfer, at either end: the compute action that uses what it moves."""
        receiver = self if self.op.is_receive else self.counterpart
        return Action(receiver.stage, Op.F if receiver.op is Op.RECV_F else Op.B, self.micro_batch)
