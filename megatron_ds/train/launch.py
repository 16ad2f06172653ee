"""Starting and ending a job: ranks, devices, the rendezvous, and who failed first.

Started by ``torchrun`` (or SLURM through it), a rank finds its place in the environment; started plainly, it is a job
of one. Configurations are compared through the rendezvous store, before the first collective. The first rank to fail
leaves a note there, so that the others end with one line instead of a traceback about a lost connection.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_ds.errors import ConfigError, MegatronDSError
from megatron_ds.mesh import init_process_group

_FAILED = "megatron_ds/failed"
_RANK_0_SPEAKS_FIRST = 10.0  # seconds


@dataclass(frozen=True)
class Place:
    """This process among the processes of the job."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @staticmethod
    def from_environment() -> Place:
        """What ``torchrun`` set; a job of one where it set nothing."""
        keys = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        missing = [key for key in keys if key not in os.environ]
        if len(missing) == len(keys):
            return Place()
        if missing:
            raise ConfigError(
                f"the environment has some of {', '.join(keys)} but lacks {', '.join(missing)}; start with torchrun"
            )
        return Place(*(int(os.environ[key]) for key in keys))

    def device(self, wanted: str) -> torch.device:
        """``auto``: a GPU where every local rank has its own, else the CPU."""
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if wanted == "cuda" and count < self.local_world_size:
            raise ConfigError(
                f"device=cuda, but this node has {count} GPU(s) for {self.local_world_size} ranks; "
                f"start {max(count, 1)} rank(s) a node, or use device=cpu"
            )
        if wanted == "cuda" or (wanted == "auto" and count >= self.local_world_size):
            return torch.device("cuda", self.local_rank)
        return torch.device("cpu")


def set_threads(place: Place, threads: int | None) -> None:
    """One share of the node's cores a rank, unless told otherwise."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads or max(1, available // place.local_world_size))


def keep_freed_memory() -> None:
    """Have glibc keep the memory of freed tensors for the next ones, on a CPU rank, before it has any.

    By default every large temporary is mapped and unmapped anew: 100,000 page faults a step of a small model, 6% of
    the CPU time in fp32 and 11% in bf16. Where the C library is another one, nothing happens.
    """
    mmap_threshold, trim_threshold, arena_max = -3, -1, -8  # from malloc.h
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)
        libc.mallopt(arena_max, 1)


@contextlib.contextmanager
def job(place: Place, device: torch.device, fingerprint: str, timeout: float) -> Iterator[None]:
    """The process group for the time of a run; nothing at all for a job of one.

    Args:
        fingerprint: of the configuration; a rank whose fingerprint differs from rank 0's fails here.
        timeout: seconds a collective may take.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if place.world_size == 1:
        yield
        return
    store, _, _ = next(dist.rendezvous("env://", place.rank, place.world_size, timeout=timedelta(seconds=timeout)))
    store.set_timeout(timedelta(seconds=timeout))
    store = dist.PrefixStore("megatron_ds", store)
    try:
        _compare(store, place, fingerprint)
        init_process_group("nccl" if device.type == "cuda" else "gloo", place.rank, place.world_size, store, timeout)
        yield
        dist.barrier()
    except BaseException as error:
        _report_failure(store, place, error)
        raise
    finally:
        if dist.is_initialized():
            with contextlib.suppress(Exception):
                dist.destroy_process_group()


def _compare(store: dist.Store, place: Place, fingerprint: str) -> None:
    store.set(f"fingerprint/{place.rank}", fingerprint)
    everyone = [f"fingerprint/{rank}" for rank in range(place.world_size)]
    store.wait(everyone)
    seen = [value.decode() for value in store.multi_get(everyone)]
    different = [rank for rank, value in enumerate(seen) if value != seen[0]]
    if different:
        raise ConfigError(
            f"ranks {different[:8]} were started with a configuration that differs from rank 0's "
            f"({seen[different[0]]} against {seen[0]}); give every node the same arguments and files "
            "(compare `--print-config` on both)"
        )


class _LostPeer(SystemExit):
    """This rank ends because another failed before it."""


def _report_failure(store: dist.Store, place: Place, error: BaseException) -> None:
    """Leave a note, or end quietly if another rank's note is there already."""
    try:
        first = store.compare_set(_FAILED, "", f"rank {place.rank}: {type(error).__name__}: {error}").decode()
    except Exception:
        return  # the store went with rank 0; torchrun reports that one
    own = first.startswith(f"rank {place.rank}:")
    everywhere_alike = isinstance(error, MegatronDSError)
    if not own and not everywhere_alike:
        print(f"rank {place.rank} stops: {first}", file=sys.stderr, flush=True)
        raise _LostPeer(1) from None


def run_main(main: Callable[[Place], int]) -> int:
    """Call ``main`` with this process's place; a user's mistake is one line, said once, and exit code 2."""
    place = Place()
    try:
        place = Place.from_environment()
        return main(place)
    except MegatronDSError as error:
        if place.rank > 0:
            # Most mistakes are found by every rank alike. Rank 0 says it and ends the job meanwhile; who is still here
            # after that has an error of its own.
            time.sleep(_RANK_0_SPEAKS_FIRST)
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        if place.rank == 0:
            print("interrupted", file=sys.stderr, flush=True)
        return 130
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        return 1


def gpu_count() -> int:
    """GPUs of this node that torch can use."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def clear_launch_environment() -> dict[str, str]:
    """This process's environment without what a launcher set in it, for starting a job of its own."""
    launcher = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK"}
    return {key: value for key, value in os.environ.items() if key not in launcher}
