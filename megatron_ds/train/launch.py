"""Starting and ending a job: ranks, devices, the rendezvous, and the checks that all ranks pass or fail together.

Started by ``torchrun`` (or SLURM through it), a rank finds its place in the environment; started plainly, it is a job
of one. What is wrong on any rank is wrong on all of them before the process group exists, through the rendezvous store.
What goes wrong after that is `failure.py`'s.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_ds.comm.together import merged
from megatron_ds.data.cli import guarded, print_error
from megatron_ds.data.workers import usable_cores
from megatron_ds.errors import ConfigError, MegatronDSError, RaisedAs, listed
from megatron_ds.mesh import MOST_RANKS, init_process_group
from megatron_ds.train.alike import differences, digest
from megatron_ds.train.attempts import met
from megatron_ds.train.bounded import BoundedStore, StoreSilentError, in_thread
from megatron_ds.train.failure import FAILED, FirstFailure, Watch
from megatron_ds.train.signals import LAUNCHER, REQUESTS, end_with_launcher, unheard_requests

_CHECKS_TAKE = 3600.0  # seconds at most: a rank may read a whole dataset for the first time
_RANK_0_SPEAKS_FIRST = 10.0  # seconds
_NCCL_MARGIN = 60.0  # seconds
_SPELL = 2.0  # seconds
_PARTING = 5.0  # seconds at most that ranks which end wait for each other
_TORCH_TIMES_OUT_FIRST = 5.0  # seconds
_KINDS_SHOWN = 4


class StartError(MegatronDSError):
    """The ranks of a job did not find each other, or differ in what they were started with."""


@dataclass(frozen=True)
class RankInfo:
    """This process among the processes of the job."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @staticmethod
    def from_environment() -> RankInfo:
        """What ``torchrun`` set; a job of one where it set nothing."""
        numbers = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        keys = (*numbers, "MASTER_ADDR", "MASTER_PORT")
        if not any(key in os.environ for key in numbers):
            return RankInfo()
        missing = [key for key in keys if key not in os.environ]
        if missing:
            raise ConfigError(
                f"the environment has some of {', '.join(keys)} but lacks {', '.join(missing)}; start with torchrun"
            )
        with RaisedAs(ConfigError, f"{', '.join(numbers)} in the environment must be numbers", ValueError):
            place = RankInfo(*(int(os.environ[key]) for key in numbers))
        if not (0 <= place.rank < place.world_size and 0 <= place.local_rank < place.local_world_size):
            raise ConfigError(f"{place}, from the environment, is not one of the ranks; start with torchrun")
        if place.world_size > MOST_RANKS:
            raise ConfigError(f"WORLD_SIZE={place.world_size} in the environment; a job has at most {MOST_RANKS} ranks")
        return place

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


def set_threads(place: RankInfo, threads: int | None) -> None:
    """One share of the node's cores a rank, unless told otherwise."""
    torch.set_num_threads(threads or max(1, usable_cores() // place.local_world_size))


@contextlib.contextmanager
def job(place: RankInfo, timeout: float) -> Iterator[Job]:
    """The ranks of a run, for the time of the run; nothing at all for a job of one.

    Args:
        timeout: seconds that ranks wait for each other, to start and in a collective.
    """
    if place.world_size == 1:
        yield Job(place, timeout, None)
        return
    ranks = Job(place, timeout, connect(place, timeout))
    with contextlib.ExitStack() as parting:
        try:
            yield ranks
            parting.enter_context(unheard_requests())
            if dist.is_initialized():
                dist.barrier()
        except BaseException as error:
            if ranks.watch is None:
                raise
            raise SystemExit(ranks.watch.conclude(error)) from None
        finally:
            if ranks.watch is not None:
                ranks.watch.stop()
            if dist.is_initialized():
                with contextlib.suppress(Exception):
                    dist.destroy_process_group()


class Job:
    """What the ranks do together besides training. ``watch`` is there once the job has started."""

    def __init__(self, place: RankInfo, timeout: float, store: dist.Store | None):
        self.place, self.timeout = place, timeout
        self.store = None if store is None else BoundedStore(store, timeout)
        self.watch: Watch | None = None

    @contextlib.contextmanager
    def checking(self, facts: Mapping[str, Any]) -> Iterator[None]:
        """If the body fails on any rank, or the ranks' facts differ, every rank ends; none waits for one that failed.

        Args:
            facts: what must be alike on all ranks (see ``alike.py``), as JSON values; the body may add to it.

        Raises:
            SystemExit: in a job of several ranks. What is wrong has been said then, once a node.
        """
        failure: BaseException | None = None
        try:
            yield
        except BaseException as error:
            failure = error
        if self.store is None:
            if failure is not None:
                raise failure
            return
        verdict = self._verdict(self.store, facts, "" if failure is None else _text(failure))
        if not verdict:
            return
        defect = failure is not None and _is_defect(failure)
        if defect:
            traceback.print_exception(failure)
        # The rank that speaks for this node may be the one that is stopped.
        if self.place.local_rank == 0 or self.store.silent:
            print(f"error: {verdict}", file=sys.stderr)
        sys.stderr.flush()
        _part(self.store, self.place)
        raise SystemExit(1 if defect else 2)

    def _verdict(self, store: BoundedStore, facts: Mapping[str, Any], problem: str) -> str:
        """One message for all ranks, empty where all is well. Rank 0 gathers and answers: O(ranks) messages."""
        rank, world_size = self.place.rank, self.place.world_size
        fingerprint = digest(facts)
        try:
            _post(store, fingerprint, facts)
            _set(store, f"check/{rank}", json.dumps([world_size, fingerprint, problem]))
            if rank > 0:
                told, verdict = json.loads(_patiently(store, "verdict"))
                return str(verdict) or (_other_world(rank, world_size, told) if told != world_size else "")
            checks = [json.loads(_patiently(store, f"check/{other}")) for other in range(world_size)]
            worlds = [other for other, check in enumerate(checks) if check[0] != world_size]
            if worlds:
                verdict = _other_world(worlds[0], checks[worlds[0]][0], world_size)
            else:
                lines = [*_differences(store, facts, [check[1] for check in checks]), merged([c[2] for c in checks])]
                verdict = "\n".join(filter(None, lines))
        except StartError as error:
            verdict = "\n".join(filter(None, [problem, str(error)]))
            with contextlib.suppress(StartError):
                _set(store, "verdict", json.dumps([world_size, str(error)]))
            return verdict
        _set(store, "verdict", json.dumps([world_size, verdict]))
        return verdict

    def start(self, device: torch.device) -> None:
        """Make the process group. From here on a failure is everybody's."""
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if self.store is None:
            return
        place = self.place
        own = place.rank, place.world_size, place.local_rank, place.local_world_size
        self.watch = Watch(self.store, *own, self.timeout)
        self.watch.start()
        backend = "nccl" if device.type == "cuda" else "gloo"
        init_process_group(backend, place.rank, place.world_size, self.store.store, self.group_timeout(device))

    def group_timeout(self, device: torch.device) -> float:
        """Seconds after which a process group gives up. NCCL then ends the process without a word of where it was, so
        there the watch comes first."""
        return self.timeout + (_NCCL_MARGIN if device.type == "cuda" else 0.0)

    def describe(self, where: Callable[[], str]) -> None:
        """Whom to ask where this rank is, should a rank fail; called from another thread."""
        if self.watch is not None:
            self.watch.describe = where


def connect(place: RankInfo, timeout: float) -> dist.Store:
    """The store where the ranks of this job meet. Raises StartError if they do not."""
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    limit = timedelta(seconds=timeout)
    try:
        if place.rank > 0:
            _reach(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout)
        # A server that takes the connection and says nothing is no case of torch's own timeout.
        joining = in_thread(lambda: next(dist.rendezvous("env://", place.rank, place.world_size, timeout=limit)))
        store, _, _ = joining.result(timeout + _TORCH_TIMES_OUT_FIRST)
        store.set_timeout(limit)
        store = dist.PrefixStore("megatron_ds", store)
        # The store of torchrun itself outlives the ranks that it starts again.
        agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        attempt = met(store, place.rank, place.world_size, timeout) if agents else 0
        return dist.PrefixStore(str(attempt), store)
    except TimeoutError:
        raise StartError(
            f"rank {place.rank} of {place.world_size}: what listens at MASTER_ADDR:MASTER_PORT={address} has not "
            f"answered in {timeout:.0f} s; it is stopped, or not this job's rank 0: choose another port"
        ) from None
    except (RuntimeError, ValueError, OverflowError, ConnectionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise StartError(
            f"rank {place.rank} of {place.world_size} could not join the others at MASTER_ADDR:MASTER_PORT={address}: "
            f"{reason}. Are all {place.world_size} ranks started, is the address rank 0's "
            "machine, and the port free there?"
        ) from error


def _reach(host: str, port: int, seconds: float) -> None:
    """Wait until somebody listens there; a ConnectionError where nobody does.

    torch waits too, but says in 25 C++ frames that it did so in vain, above the line that says where.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            with socket.create_connection((host, port), max(end - time.monotonic(), 0.1)):
                return
        except OSError as error:  # also a name that is not known yet
            if time.monotonic() >= end:
                raise ConnectionError(f"no connection in {seconds:.0f} s: {error}") from None
        time.sleep(0.1)


def _post(store: BoundedStore, fingerprint: str, facts: Mapping[str, Any]) -> None:
    """Facts for who has to name what differs in them: once for all ranks that have the same."""
    try:
        if not store(lambda store: store.check([f"facts/{fingerprint}"])):
            _set(store, f"facts/{fingerprint}", json.dumps(facts))
    except RuntimeError as error:
        raise _lost(error) from error


def _differences(store: BoundedStore, own: Mapping[str, Any], fingerprints: Sequence[str]) -> list[str]:
    """How ranks differ from this one, a line for each of the facts; by their fingerprints."""
    ranks: dict[str, list[int]] = {}
    for rank, fingerprint in enumerate(fingerprints):
        ranks.setdefault(fingerprint, []).append(rank)
    lines = []
    for fingerprint, who in list(ranks.items())[1 : 1 + _KINDS_SHOWN]:
        theirs = json.loads(_patiently(store, f"facts/{fingerprint}"))
        lines += differences(f"rank {listed(who, 8)}", theirs, own)
    return lines


def _set(store: BoundedStore, key: str, value: str) -> None:
    try:
        store(lambda store: store.set(key, value))
    except RuntimeError as error:
        raise _lost(error) from error


def _patiently(store: BoundedStore, key: str) -> bytes:
    """The value of a key that another rank will set. Waits in short spells: then a store that is silent is noticed."""
    end = time.monotonic() + _CHECKS_TAKE
    while time.monotonic() < end:
        try:
            store(lambda store: store.wait([key], timedelta(seconds=_SPELL)), _SPELL + store.seconds)
            return store(lambda store: store.get(key))
        except RuntimeError as error:
            if isinstance(error, StoreSilentError) or "timeout" not in str(error):
                raise _lost(error) from error
        with contextlib.suppress(RuntimeError):
            if store(lambda store: store.check([FAILED])):
                failed = FirstFailure(**json.loads(store(lambda store: store.get(FAILED))))
                raise StartError(f"rank {failed.rank} {failed.text}")
    raise StartError(f"rank {key.rpartition('/')[2]} has not checked its input in {_CHECKS_TAKE:.0f} s")


def _lost(error: RuntimeError) -> StartError:
    """The store does not answer, or its connection broke."""
    what = "does not answer any more" if isinstance(error, StoreSilentError) else "ended"
    return StartError(
        f"rank 0, or its torchrun, {what} while the ranks were starting; see its output ({str(error).splitlines()[0]})"
    )


def _part(store: BoundedStore, place: RankInfo) -> None:
    """End together: under torchrun the first process to end ends all, and rank 0 may be the store's home."""
    with contextlib.suppress(RuntimeError):
        said = store(lambda store: store.add("said", 1), _PARTING)
        if place.rank > 0:
            store(lambda store: store.wait(["parted"], timedelta(seconds=_PARTING)), 2 * _PARTING)
            return
        end = time.monotonic() + _PARTING
        while said < place.world_size and time.monotonic() < end:
            time.sleep(0.02)
            said = store(lambda store: store.add("said", 0), _PARTING)
        store(lambda store: store.set("parted", ""), _PARTING)
        time.sleep(0.1)  # until the answers have left


def _other_world(rank: int, world_size: int, wanted: int) -> str:
    return (
        f"rank {rank} was started as one of WORLD_SIZE={world_size} ranks, rank 0 as one of {wanted}; "
        "start all with the same numbers of nodes and of ranks a node"
    )


def _is_defect(error: BaseException) -> bool:
    """Not the input's fault: it keeps its type and its traceback."""
    return not isinstance(error, MegatronDSError)


def _text(error: BaseException | None) -> str:
    if error is None:
        return ""
    return f"{type(error).__name__}: {error}" if _is_defect(error) else str(error)


def run_main(main: Callable[[RankInfo], int]) -> int:
    """Call ``main`` with this process's place and return its exit code; a mistake of the user's is one line, said once,
    and exit code 2."""
    place = RankInfo()

    def start() -> int:
        nonlocal place
        place = RankInfo.from_environment()
        code = main(place)
        if place.world_size > 1:
            for number in REQUESTS:
                signal.signal(number, signal.SIG_IGN)  # all that is left is Python's end
        return code

    def speak(text: str, code: int) -> int:
        if place.rank > 0 and code == 128 + signal.SIGINT:
            return code
        if place.rank > 0:
            # Nearly always every rank has found the same; rank 0 says it, and its end is the end of the job. A rank
            # that is still there after that speaks too: first one a node, then all.
            time.sleep(_RANK_0_SPEAKS_FIRST * (1 if place.local_rank == 0 else 2))
        return print_error(text, code)

    end_with_launcher()
    try:
        return guarded(start, speak)
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
    launcher |= {LAUNCHER, "TORCHELASTIC_RUN_ID"}
    return {key: value for key, value in os.environ.items() if key not in launcher}
