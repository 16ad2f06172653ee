"""The ranks that serve one model: this process and those that it starts, or the ranks of ``torchrun``."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_ds import comm
from megatron_ds.comm.together import blames_peer, exchange, group_device, plain_message
from megatron_ds.errors import ConfigError
from megatron_ds.inference.serving_options import EngineOptions
from megatron_ds.mesh import Axis, Mesh, MeshShape, init_process_group

_PATHS = ("model", "tokenizer", "speculative_model")
_SERVED = "served model"
"""What the process group of ranks that an LLM has started says of itself."""
_BEAT = 5.0
"""Seconds between heartbeats, or a quarter of ``rank_timeout`` where that is less."""
_LAST_WORDS = 2.0
"""Seconds from a lost connection until its process has ended for sure, if that is why."""


class Ranks:
    """The mesh of a served model.

    Ranks that this process starts find their places where ``torchrun`` puts those of its own: in the environment.

    Attributes:
        interrupted: an exchange has not ended as it should; the other ranks may wait in the middle of it.
        sharing: ranks that take from the same memory; each GPU has its own.
    """

    def __init__(self, options: EngineOptions):
        self._children: list[subprocess.Popen[bytes]] = []
        self.owns_group, self.interrupted = False, False
        self._timeout, self._lock = options.rank_timeout, threading.Lock()
        self._failure: BaseException | None = None
        self._closed = threading.Event()
        shape = MeshShape(pp=options.pipeline_parallel_size, tp=options.tensor_parallel_size)
        world, started = shape.world_size, int(os.environ.get("WORLD_SIZE", "1")) > 1
        alone = {"RANK": 0, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": world}
        rank, local, here = (int(os.environ.get(name, n)) if started else n for name, n in alone.items())
        self.device = _device(options.device, local, here)
        self.sharing = here if self.device.type == "cpu" else 1
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        try:
            if world > 1 and not dist.is_initialized():
                self._make_group(rank, world, started, options)
            elif world > 1 and getattr(dist.group.WORLD, "group_desc", "") == _SERVED:
                raise ConfigError("another LLM of this process is served on several ranks; close it first")
            if world > 1 and dist.get_world_size() != world:
                raise ConfigError(
                    f"tensor_parallel_size x pipeline_parallel_size = {world}, but the job has {dist.get_world_size()} "
                    "ranks; start as many, or let the first process start them"
                )
            self.mesh = Mesh.create(shape, self.device, self._timeout)
            self._require_same(options)
        except BaseException as error:
            self.abort()
            if not isinstance(error, RuntimeError):
                raise
            why = plain_message(error)
            raise ConfigError(f"rank {rank} has not met the other ranks of the served model: {why}") from error

    def _make_group(self, rank: int, world: int, started: bool, options: EngineOptions) -> None:
        address, port = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])) if started else ("127.0.0.1", 0)
        # torchrun serves the store itself, other launchers leave that to the first rank.
        serves = rank == 0 and not (started and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True")
        wait = timedelta(seconds=self._timeout)
        served = dist.TCPStore(address, port, world, serves, wait, wait_for_workers=False)
        # torchrun's outlives its ranks: those that it starts anew must not find the addresses of the old ones.
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", served)
        if not started:
            self._children = [_start(other, world, served.port, options) for other in range(1, world)]
            self._wait_for_children(store)
        else:
            store.set(_here(rank), "")
        init_process_group("nccl" if self.device.type == "cuda" else "gloo", rank, world, store, self._timeout)
        self.owns_group = True
        if not started and dist.group.WORLD is not None:
            dist.group.WORLD._set_group_desc(_SERVED)

    def _require_same(self, options: EngineOptions) -> None:
        """Each rank may have been started with settings of its own; paths may differ from host to host."""
        own = {name: value for name, value in options.engine_arguments().items() if name not in _PATHS}
        first, *others = map(json.loads, exchange(self.mesh.world, json.dumps(own)))
        for rank, other in enumerate(others, 1):
            if names := [name for name in own if other[name] != first[name]]:
                raise ConfigError(
                    f"rank {rank} was started with {names[0]}={other[names[0]]!r} and the first rank with "
                    f"{first[names[0]]!r}: give all ranks of a served model the same settings"
                )

    def _wait_for_children(self, store: dist.Store) -> None:
        """The process group, which would wait for one that has ended, is made when all are there."""
        while not store.check([_here(rank) for rank in range(1, len(self._children) + 1)]):
            self.require_alive()
            time.sleep(0.02)

    @contextlib.contextmanager
    def exchange(self) -> Iterator[None]:
        """Context of the collectives of a step or of a heartbeat, of which one is under way at a time.

        Raises:
            ConfigError: another rank has ended, has not answered within ``rank_timeout``, or waits in the middle of an
                exchange that was interrupted.
        """
        with self._lock:
            self.require_alive()
            if self.interrupted and self.mesh.world.size > 1:
                raise ConfigError(
                    "a step was interrupted, and the other ranks wait in the middle of it: make the LLM anew"
                )
            self.interrupted = True
            try:
                yield
            except RuntimeError as error:
                if self.mesh.world.size == 1 or not blames_peer(error):
                    raise
                self.require_alive(_LAST_WORDS)
                raise ConfigError(
                    f"rank {self.mesh.rank} of the served model cannot go on with the others: {plain_message(error)} "
                    f"(rank_timeout={self._timeout:g} s)"
                ) from error
            self.interrupted = False

    def start_heartbeat(self, beat: Callable[[], None]) -> None:
        """On the first rank: exchange ``beat`` from time to time, so that ranks which wait for requests know of each
        other, however long none comes."""
        if self.mesh.world.size > 1 and self.mesh.rank == 0:
            threading.Thread(target=self._beat, args=(beat,), name="heartbeat", daemon=True).start()

    def _beat(self, beat: Callable[[], None]) -> None:
        try:
            while not self._closed.wait(min(_BEAT, self._timeout / 4)):
                with self.exchange():
                    if not self._closed.is_set():
                        beat()
        except Exception as error:
            self._failure = error

    def close(self, stop: Callable[[], None] | None = None) -> None:
        """End the ranks that this process has started; ``stop`` tells all others to end, where they can hear it.

        Raises:
            ConfigError: one of them has ended before.
        """
        self._closed.set()
        quiet = self._lock.acquire(timeout=_BEAT)  # else a heartbeat is not answered
        if quiet:
            self._lock.release()
        if not quiet or self.interrupted:
            self.abort()
            return
        try:
            if stop is not None:
                with self.exchange():
                    stop()
        finally:
            self._end()

    def abort(self) -> None:
        """End the others at once: nobody will tell them to stop."""
        self._closed.set()
        for child in self._children:
            child.kill()
        self._end()

    def _end(self) -> None:
        """Wait for the others, unless one of them has ended otherwise, which the rest may wait for."""
        if any(child.poll() not in (None, 0) for child in self._children):
            for child in self._children:
                child.kill()
        for child in self._children:
            try:
                child.wait(timeout=30)
            except subprocess.TimeoutExpired:
                child.kill()
        if self.owns_group and dist.is_initialized():
            dist.destroy_process_group()
            self.owns_group = False

    def require_alive(self, patience: float = 0.0) -> None:
        """Raises :class:`ConfigError` where a rank that was started has ended (within ``patience`` seconds), or one has
        not answered the last heartbeat."""
        if self._failure is not None:
            raise self._failure
        until = time.monotonic() + patience
        while self._children:
            ended = [(rank, code) for rank, child in enumerate(self._children, 1) if (code := child.poll()) is not None]
            if ended:
                what = ", ".join(f"rank {rank} ended with exit code {code}" for rank, code in ended)
                raise ConfigError(f"{what}, and with it the served model: see the output above")
            if time.monotonic() >= until:
                return
            time.sleep(0.02)


def rank_of_launch() -> int:
    """That torchrun, or another launcher, has given this process; 0 where none has started several."""
    return int(os.environ["RANK"]) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else 0


def _here(rank: int) -> str:
    """The key by which a rank says in the store that it has begun."""
    return f"megatron-ds/rank-{rank}"


def _device(wanted: str, local: int, ranks: int) -> torch.device:
    """Of one of the ``ranks`` of this machine; on a CPU are all of them, or none."""
    count = torch.cuda.device_count() if torch.cuda.is_available() and wanted != "cpu" else 0
    if wanted == "cuda" and count < ranks:
        raise ConfigError(f"device='cuda', but {ranks} ranks have {count} GPUs; use device='cpu', or fewer ranks")
    return torch.device("cuda", local) if count >= ranks else torch.device("cpu")


def _start(rank: int, world: int, port: int, options: EngineOptions) -> subprocess.Popen[bytes]:
    settings = json.dumps(options.engine_arguments(), default=str)
    command = [sys.executable, "-m", "megatron_ds.inference.follower", settings, str(os.getpid())]
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in place.items()}}
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment)


def from_first(axis: Axis, value: Any) -> Any:
    """What the first rank of the axis says to all, as JSON."""
    return _told(axis, value, 0)


def from_last(axis: Axis, value: Any) -> Any:
    """What the last rank of the axis says to all, as JSON."""
    return _told(axis, value, axis.size - 1)


def _told(axis: Axis, value: Any, source: int) -> Any:
    if axis.size == 1:
        return value
    text = json.dumps(value).encode() if axis.rank == source else b""
    device = group_device(axis)
    size = comm.broadcast(torch.tensor([len(text)], device=device), axis, source)
    data = torch.empty(int(size), dtype=torch.uint8, device=device)
    if axis.rank == source:
        data.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    comm.broadcast(data, axis, source)
    return json.loads(bytes(data.cpu().numpy()))
