"""Attempts of a job whose launcher starts failed ranks again (``torchrun --max-restarts``), on one node or several.

torchrun's rendezvous store outlives the ranks, with all that those before have said in it: which rank failed, the
addresses of processes that are gone. So every attempt has keys of its own. A node alone could number the attempts by
``TORCHELASTIC_RESTART_COUNT``. Several cannot: each launcher counts for itself, sees its own ranks fail at another
moment than the others do, and counts nothing when it only follows them. So the ranks settle the number in the store.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from functools import partial

import torch.distributed as dist

from megatron_ds.train.bounded import BoundedStore
from megatron_ds.train.failure import FAILED, FirstFailure

_LATEST, _MET = "latest", "met"
_LOOKS = 1000  # a second, of all ranks together


def met(store: dist.Store, rank: int, world_size: int, timeout: float) -> int:
    """The number of the attempt in which all ranks of this job have begun.

    An attempt that all have begun, or this rank, or that has failed, is over. Ranks that are still in it are told.

    Raises:
        ConnectionError: the other ranks have not begun in ``timeout`` seconds.
        RuntimeError: the store does not answer, or its connection broke.
    """
    bounded, end = BoundedStore(store, timeout), time.monotonic() + timeout
    attempt = bounded(partial(_begin, rank=rank))
    while (begun := bounded(partial(_begun, attempt=attempt))) < world_size:
        if bounded(_latest) > attempt:
            attempt = bounded(partial(_begin, rank=rank))
        if time.monotonic() >= end:
            raise ConnectionError(f"{begun} of {world_size} ranks have begun in {timeout:.0f} s")
        time.sleep(max(0.05, world_size / _LOOKS))
    bounded(lambda store: store.set(f"{attempt}/{_MET}", ""))
    return attempt


def _begin(store: dist.Store, rank: int) -> int:
    """The number of the first attempt that is not over, and in which this rank is from now on."""
    attempt = max(_latest(store), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))
    while store.add(f"{attempt}/begun by {rank}", 1) > 1 or any(
        store.check([f"{attempt}/{k}"]) for k in (_MET, FAILED)
    ):
        attempt += 1
    over = FirstFailure(rank, "was started again by its launcher")
    while (latest := _latest(store)) < attempt:
        store.compare_set(f"{latest}/{FAILED}", "", json.dumps(asdict(over)))
        store.compare_set(_LATEST, str(latest) if store.check([_LATEST]) else "", str(attempt))
    store.add(f"{attempt}/begun", 1)
    return attempt


def _begun(store: dist.Store, attempt: int) -> int:
    return store.add(f"{attempt}/begun", 0)


def _latest(store: dist.Store) -> int:
    return int(store.get(_LATEST)) if store.check([_LATEST]) else 0
