"""Ranks agree on the next collective before they start it, where they may come to different ones.

A collective is matched by its order: ranks that start different ones take each other's bytes, abort or wait for ever.
So each rank says first what it is about to do, in one message of a fixed size. Nothing else is sent while all say the
same.
"""

from __future__ import annotations

import secrets
from hashlib import blake2b

import torch
import torch.distributed as dist

from megatron_ds.comm.collectives import gather_dim0
from megatron_ds.comm.together import exchange
from megatron_ds.errors import EngineError
from megatron_ds.mesh import Axis


class Agreement:
    """Of the ranks of ``axis``, on what they do next. Every call is collective, the first one included."""

    def __init__(self, axis: Axis):
        self.axis = axis
        # Tells the messages of one object from those of another on the same axis.
        self._name = f"{gather_dim0(torch.tensor([secrets.randbits(62)]), axis).wait()[0].item():x}"

    def differences(self, text: str) -> list[str]:
        """Every rank's ``text``, by rank in the axis; nothing if all are the same.

        Raises:
            EngineError: on all ranks, if some of them asked another object.
        """
        text = f"{self._name} {text}"
        digest = int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), signed=True)
        everyone = gather_dim0(torch.tensor([digest]), self.axis).wait().tolist()
        if all(other == digest for other in everyone):
            return []
        said = [other.partition(" ") for other in exchange(self.axis, text)]
        if any(name != said[0][0] for name, _, _ in said):
            raise EngineError(
                "some ranks are in a pass of one engine and some in one of another, where a gather takes all of them; "
                "let all ranks use several engines in one order, or train the models in one, as an nn.ModuleDict"
            )
        return [other for _, _, other in said]


def open_agreement(axis: Axis) -> Agreement | None:
    """None on one rank, and where the host runs ahead of its device (NCCL): there it must not wait for peers."""
    return Agreement(axis) if axis.group is not None and dist.get_backend(axis.group) == "gloo" else None
