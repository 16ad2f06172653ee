"""Ranks that fail together: an error on one rank becomes the same error on every rank.

Text travels as bytes in plain tensors: the object collectives of ``torch.distributed`` use pickle.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from megatron_ds.errors import CheckpointError, listed
from megatron_ds.mesh import Axis

SHOWN_RANKS = 4
# What gloo and NCCL say, and our own tokens, when a peer is gone or does not come.
_PEER = re.compile(r"connection (closed|reset|refused)|broken pipe|time(d |-)?out|gloo|nccl", re.IGNORECASE)


def blames_peer(error: BaseException | str) -> bool:
    """Whether a collective's error, or its text, says that another rank is gone or does not answer."""
    return isinstance(error, RuntimeError | str) and _PEER.search(str(error)) is not None


def plain_message(error: BaseException) -> str:
    """A backend's message without its source line, its stack and its advice."""
    lines = str(error).splitlines() or [type(error).__name__]
    return re.sub(r"^\[[^\]]*\] ", "", lines[0]).partition(". This is typically")[0]


def group_device(axis: Axis) -> torch.device:
    """The device whose tensors the group can reduce."""
    if axis.group is not None and dist.get_backend(axis.group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def total(axis: Axis, value: int) -> int:
    """The sum of ``value`` over the ranks of ``axis``."""
    if axis.group is None:
        return value
    tensor = torch.tensor([value], dtype=torch.int64, device=group_device(axis))
    dist.all_reduce(tensor, group=axis.group)
    return int(tensor.item())


def exchange(axis: Axis, text: str) -> list[str]:
    """Every rank's ``text``, in rank order, on every rank. All empty costs one all-reduce of 8 bytes."""
    if axis.group is None:
        return [text]
    device = group_device(axis)
    mine = text.encode()
    longest = torch.tensor([len(mine)], dtype=torch.int64, device=device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=axis.group)
    width = int(longest.item())
    if width == 0:
        return [""] * axis.size
    padded = torch.frombuffer(bytearray(mine.ljust(width, b"\0")), dtype=torch.uint8).to(device)
    gathered = [torch.empty_like(padded) for _ in range(axis.size)]
    dist.all_gather(gathered, padded, group=axis.group)
    return [bytes(row.cpu().numpy()).rstrip(b"\0").decode() for row in gathered]


@contextmanager
def together(axis: Axis) -> Iterator[None]:
    """If the body fails on any rank, every rank raises the same :class:`CheckpointError`.

    An exception that is neither a :class:`CheckpointError` nor an ``OSError`` is a defect: it keeps its type and
    traceback on the rank where it happened, and is a :class:`CheckpointError` on the others.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    text = ""
    if isinstance(failure, CheckpointError):
        text = str(failure) or "CheckpointError"
    elif failure is not None:
        text = f"{type(failure).__name__}: {failure}"
    texts = exchange(axis, text)
    if failure is not None and not isinstance(failure, CheckpointError | OSError):
        raise failure
    message = merged(texts)
    if message:
        raise CheckpointError(message) from failure


def merged(texts: list[str]) -> str:
    """One message out of one per rank (empty: that rank is well): each distinct text once, with its ranks."""
    ranks_of: dict[str, list[int]] = {}
    for rank, text in enumerate(texts):
        if text:
            ranks_of.setdefault(text, []).append(rank)
    if not ranks_of:
        return ""
    if len(texts) == 1 or list(ranks_of.values()) == [list(range(len(texts)))]:
        return next(iter(ranks_of))
    parts = []
    for text, ranks in list(ranks_of.items())[:SHOWN_RANKS]:
        parts.append(f"rank {listed(ranks, SHOWN_RANKS)}: {text}")
    rest = len(ranks_of) - SHOWN_RANKS
    return "\n".join(parts) + (f"\nand {rest} more messages" if rest > 0 else "")
