"""Many ranks on one machine, for tests: :func:`run_ranks` runs a function on each rank and returns every result.

A ``forkserver`` that has torch imported starts 8 gloo ranks in a fraction of a second, so that a test matrix can
afford hundreds of multi-rank rows. On a machine with enough GPUs the same tests run on NCCL.

Ranks of one host share memory where ranks of several gather and send: ``run_ranks(..., apart=True)`` runs them as
several hosts would, and with ``RANKS_APART=1`` in the environment (``make test-apart``) so does every test.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

# Imported once in the fork server; a child then starts with them in memory. Names only: nothing here imports them.
_PRELOAD = [
    "torch._dynamo",  # activation checkpointing imports it when first used, in each rank otherwise
    "torch._dynamo.backends.common",  # and this whatever compiles, in as long
    "torch.distributed.device_mesh",
    "torch.utils.checkpoint",
    "megatron_ds.testing",
    "megatron_ds.models.families",
    "megatron_ds.train.build",
    "megatron_ds.engine",
    "megatron_ds.models.dit_task",
]

# These too where whoever starts ranks has them in memory, as a run of many test files has: seconds of each rank.
# None of them starts a thread.
_PRELOAD_IF_IMPORTED = [
    "pytest",
    "hypothesis",
    "megatron_ds.inference.serving_engine",
    "transformers.models.llama.modeling_llama",
    "peft",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.schedulers.scheduling_euler_discrete",
    "diffusers.schedulers.scheduling_flow_match_euler_discrete",
]

_MOMENTS = 1.5
"""Seconds in which ranks report after the first of them has failed."""


class RankFailed(AssertionError):
    """A rank raised, died or did not finish; the message starts with that rank's own traceback."""


def device_of_rank(rank: int, world_size: int) -> torch.device:
    """A GPU of its own for every rank where there are enough of them, else the CPU."""
    if torch.cuda.is_available() and torch.cuda.device_count() >= world_size:
        return torch.device("cuda", rank)
    return torch.device("cpu")


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 120.0,
    backend: str | None = None,
    device: str | None = None,
    apart: bool | None = None,
) -> list[Any]:
    """Run ``function(*args)`` on every rank of a fresh job and return the results in rank order.

    ``function`` must be importable (a module-level function) and its arguments and result picklable; inside it
    ``torch.distributed`` is initialised and each rank has one compute thread. Every rank must reach its end.

    Args:
        backend: another than NCCL or gloo; the module of ``function`` registers it when it is imported.
        device: one for all ranks, instead of that of :func:`device_of_rank`; ``function`` is not told.
        apart: ranks share no memory, as on hosts of their own. Default: as the environment's ``RANKS_APART`` says.

    Raises:
        RankFailed: a rank raised or died (its traceback first), or the job took longer than ``timeout`` seconds.
            No process is left behind.
    """
    if apart is None:
        apart = os.environ.get("RANKS_APART", "0") == "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(modules_to_preload())
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        processes, pipes = [], {}
        try:
            for rank in range(world_size):
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(
                    target=_rank_main,
                    args=(function, args, rank, world_size, folder, timeout, backend, device, apart, theirs),
                    daemon=True,
                )
                with _plain_main(function):
                    process.start()
                theirs.close()
                processes.append(process)
                pipes[ours] = rank
            return _collect(processes, pipes, world_size, timeout, folder)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
            for process in processes:
                process.join()


def modules_to_preload() -> list[str]:
    """Modules that the fork server imports when it starts; one that is not installed is passed over."""
    return _PRELOAD + [name for name in _PRELOAD_IF_IMPORTED if name in sys.modules]


@contextlib.contextmanager
def _plain_main(function: Callable[..., Any]) -> Iterator[None]:
    """Start a child that does not import this process's main module (pytest) without need."""
    main = sys.modules["__main__"]
    if function.__module__ == "__main__":
        yield
        return
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _collect(
    processes: list[Any], pipes: dict[Connection, int], world_size: int, timeout: float, folder: str
) -> list[Any]:
    results: dict[int, Any] = {}
    failures: list[tuple[float, int, str]] = []
    deadline = time.monotonic() + timeout
    waiting = dict(pipes)
    while waiting and not failures:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankFailed(
                f"ranks {sorted(waiting.values())} of {world_size} did not finish in {timeout:.0f} s"
                + _stacks(folder, sorted(waiting.values()))
            )
        for pipe in ready:
            assert isinstance(pipe, Connection)
            _receive(pipe, waiting.pop(pipe), processes, results, failures)
    # Ranks that only lost their peer report within moments of the one that failed; the earliest failure is the cause.
    # On a busy machine the death of a rank may be seen after what its peers say of it.
    end = time.monotonic() + _MOMENTS
    while failures and waiting and (ready := wait(list(waiting), timeout=max(0.0, end - time.monotonic()))):
        for pipe in ready:
            assert isinstance(pipe, Connection)
            _receive(pipe, waiting.pop(pipe), processes, results, failures)
    if failures:
        _, rank, text = min(failures)
        others = sorted(r for _, r, _ in failures if r != rank)
        tail = f"\n(ranks {others} failed after it)" if others else ""
        raise RankFailed(f"rank {rank} of {world_size} failed first:\n{text}{tail}")
    return [results[rank] for rank in range(world_size)]


def _receive(
    pipe: Connection,
    rank: int,
    processes: list[Any],
    results: dict[int, Any],
    failures: list[tuple[float, int, str]],
) -> None:
    try:
        kind, when, payload = pickle.loads(pipe.recv_bytes())
    except EOFError:
        processes[rank].join(5)
        # A death leaves no time stamp of its own; it is the cause of what its peers report.
        failures.append((0.0, rank, f"died without a traceback, exit code {processes[rank].exitcode}"))
        return
    if kind == "result":
        results[rank] = payload
    else:
        failures.append((when, rank, payload))


def _stacks(folder: str, ranks: list[int]) -> str:
    text = ""
    for rank in ranks:
        path = os.path.join(folder, f"stack-{rank}")
        if os.path.exists(path):
            with open(path) as file:
                text += f"\nrank {rank} was at:\n{file.read()}"
    return text


def _rank_main(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    rank: int,
    world_size: int,
    folder: str,
    timeout: float,
    backend: str | None,
    device_for_all: str | None,
    apart: bool,
    pipe: Connection,
) -> None:
    gc.freeze()  # a collection would copy the heap of the fork server: a tenth of a rank's time
    if apart:
        os.__dict__.pop("memfd_create", None)  # without which no rank offers its memory to another
    stack_file = open(os.path.join(folder, f"stack-{rank}"), "w")  # noqa: SIM115  (faulthandler needs it open)
    faulthandler.dump_traceback_later(max(timeout - 2.0, timeout / 2), file=stack_file)
    torch.set_num_threads(1)
    device = torch.device(device_for_all) if device_for_all else device_of_rank(rank, world_size)
    store = dist.FileStore(os.path.join(folder, "rendezvous"), world_size)
    connected = [f"connected/{rank}" for rank in range(world_size)]
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            backend or ("nccl" if device.type == "cuda" else "gloo"),
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        store.set(connected[rank], "")
        payload = pickle.dumps(("result", time.monotonic(), function(*args)))
    except BaseException:
        connected = []
        payload = pickle.dumps(("failure", time.monotonic(), traceback.format_exc()))
    pipe.send_bytes(payload)
    pipe.close()
    sys.stdout.flush()
    sys.stderr.flush()
    # Its end breaks connections that slower ranks are still making. The parent ends a rank that waits in vain.
    store.wait(connected, timedelta(seconds=timeout))
    os._exit(0)  # the parent has everything; tearing groups down one by one only costs time
