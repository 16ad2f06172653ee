"""The ranks that serve one model: this process and those that it starts, or the ranks of ``torchrun``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_ds import comm
from megatron_ds.errors import ConfigError
from megatron_ds.inference.serving_options import EngineOptions
from megatron_ds.mesh import Axis, Mesh, MeshShape, init_process_group

FOREVER = 10 * 365 * 86400.0
"""Seconds: a rank without requests waits for the next one."""


class Ranks:
    """The mesh of a served model.

    Ranks that this process starts find their places where ``torchrun`` puts those of its own: in the environment.
    """

    def __init__(self, options: EngineOptions):
        self._children: list[subprocess.Popen[bytes]] = []
        self.owns_group = False
        shape = MeshShape(pp=options.pipeline_parallel_size, tp=options.tensor_parallel_size)
        world, started = shape.world_size, int(os.environ.get("WORLD_SIZE", "1")) > 1
        alone = {"RANK": 0, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": world}
        rank, local, here = (int(os.environ.get(name, n)) if started else n for name, n in alone.items())
        self.device = _device(options.device, local, here)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if world > 1 and not dist.is_initialized():
            address, port = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])) if started else ("127.0.0.1", 0)
            # torchrun serves the store itself, other launchers leave that to the first rank.
            serves = rank == 0 and not (started and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True")
            store = dist.TCPStore(address, port, world, serves, timedelta(seconds=600), wait_for_workers=False)
            if not started:
                self._children = [_start(other, world, store.port, options) for other in range(1, world)]
                self._wait_for_children(store)
            else:
                store.set(_here(rank), "")
            init_process_group("nccl" if self.device.type == "cuda" else "gloo", rank, world, store, FOREVER)
            self.owns_group = True
        if world > 1 and dist.get_world_size() != world:
            raise ConfigError(
                f"tensor_parallel_size x pipeline_parallel_size = {world}, but the job has {dist.get_world_size()} "
                "ranks; start as many, or let the first process start them"
            )
        self.mesh = Mesh.create(shape, self.device, FOREVER if world > 1 else None)

    def _wait_for_children(self, store: dist.Store) -> None:
        """The process group, which waits without end for those that are missing, is made when all are there."""
        try:
            while not store.check([_here(rank) for rank in range(1, len(self._children) + 1)]):
                self.require_alive()
                time.sleep(0.02)
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """End the others at once: nobody will tell them to stop."""
        for child in self._children:
            child.kill()
        self.close()

    def close(self) -> None:
        """The others have been told to stop, unless one of them has ended, which the rest may wait for."""
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

    def require_alive(self) -> None:
        """Raises :class:`ConfigError` where a rank that was started has ended: the others wait for it for ever."""
        for child in self._children:
            if child.poll() is not None:
                raise ConfigError(f"a rank of the served model ended with exit code {child.returncode}: see its output")


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
    command = [sys.executable, "-m", "megatron_ds.inference.follower", settings]
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
    size = torch.tensor([len(text)])
    comm.broadcast(size, axis, source)
    data = torch.empty(int(size), dtype=torch.uint8)
    if axis.rank == source:
        data.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    comm.broadcast(data, axis, source)
    return json.loads(bytes(data.numpy()))
