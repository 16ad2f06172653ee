"""Two hosts on one machine: a network and a process namespace each, joined by a link that can be cut or lose packets.

Their ranks share no loopback, and cannot open each other's memory. Traffic stays inside these namespaces.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import random
import select
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from started_ranks import ROOT, arguments

from megatron_ds.train.bounded import in_thread
from megatron_ds.train.launch import clear_launch_environment
from megatron_ds.train.torchrun import children

ADDRESSES = ("10.77.0.1", "10.77.0.2")
DEVICE = "tun0"


@cache
def missing() -> str:
    """Why there can be no such hosts here; empty where there can."""
    lacks = [tool for tool in ("ip", "unshare") if shutil.which(tool) is None]
    if lacks:
        return f"needs {', '.join(lacks)} (iproute2, util-linux)"
    try:
        with hosts():
            return ""
    except (OSError, subprocess.CalledProcessError) as error:
        return f"namespaces cannot be made: {getattr(error, 'stderr', error)}"


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


class Link:
    """Carries packets between two network namespaces: a tun device in each, and this process between them.

    Attributes:
        loss: the share of packets that vanish, in either direction; at 1 nothing arrives, and nobody gets an error.
    """

    def __init__(self, names: Sequence[str]):
        self.loss = 0.0
        self._ends = [in_thread(partial(_tun, name)).result(10) for name in names]
        self._closed, self._close = os.pipe()
        self._thread = threading.Thread(target=self._carry, name="link")
        self._thread.start()

    def close(self) -> None:
        os.close(self._close)
        self._thread.join()
        for descriptor in (*self._ends, self._closed):
            os.close(descriptor)

    def _carry(self) -> None:
        draw = random.Random(1)
        other = dict(zip(self._ends, reversed(self._ends)))
        while True:
            ready, _, _ = select.select([*self._ends, self._closed], [], [])
            if self._closed in ready:
                return
            for end in ready:
                packet = os.read(end, 1 << 16)
                if draw.random() >= self.loss:
                    with contextlib.suppress(OSError):  # a device that is not up yet
                        os.write(other[end], packet)


def _tun(name: str) -> int:
    """A new tun device in a network namespace, which the calling thread enters for good."""
    clone_newnet, tunsetiff, iff_tun, iff_no_pi = 0x40000000, 0x400454CA, 0x0001, 0x1000  # from sched.h, if_tun.h
    with open(f"/run/netns/{name}") as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), clone_newnet):
            raise OSError(ctypes.get_errno(), f"setns to {name}")
    descriptor = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(descriptor, tunsetiff, struct.pack("16sH14x", DEVICE.encode(), iff_tun | iff_no_pi))
    return descriptor


@dataclass
class Hosts:
    """``names``: of the network namespaces."""

    names: tuple[str, str]
    link: Link

    def command(self, host: int, *command: str) -> list[str]:
        """``command`` on a host; it ends with what this starts."""
        inside = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
        return ["ip", "netns", "exec", self.names[host], *inside, *command]


@contextlib.contextmanager
def hosts() -> Iterator[Hosts]:
    """Raises OSError or CalledProcessError where namespaces cannot be made."""
    names = (f"mds-{os.getpid()}-a", f"mds-{os.getpid()}-b")
    with contextlib.ExitStack() as stack:
        for name in names:
            _run("ip", "netns", "add", name)
            stack.callback(_run, "ip", "netns", "delete", name)
        link = Link(names)
        stack.callback(link.close)
        for name, address in zip(names, ADDRESSES):
            _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", DEVICE)
            for device in ("lo", DEVICE):
                _run("ip", "-n", name, "link", "set", device, "up")
        made = Hosts(names, link)
        _run(*made.command(0, "true"))
        yield made


@dataclass
class Job:
    """A launcher with two ranks on each host. ``output(host)`` is what was printed there."""

    folder: Path
    launchers: list[subprocess.Popen[bytes]]

    def output(self, host: int) -> str:
        return (self.folder / f"host-{host}.txt").read_text()

    def freeze(self, host: int) -> None:
        """Stop the launcher and its ranks."""
        pending = [self.launchers[host].pid]
        while pending:
            process = pending.pop()
            pending += children(process)
            os.kill(process, signal.SIGSTOP)

    def wait(self, host: int, seconds: float = 120.0) -> int:
        """Exit code of a host's launcher; no rank of it is left then, as its process namespace ends with it."""
        try:
            return self.launchers[host].wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"host {host} is still there: {self.output(0)}\n---\n{self.output(1)}") from None


@contextlib.contextmanager
def launched(where: Hosts, folder: Path, *more: str) -> Iterator[Job]:
    environment = {**clear_launch_environment(), "GLOO_SOCKET_IFNAME": DEVICE, "OMP_NUM_THREADS": "1"}
    launchers: list[subprocess.Popen[bytes]] = []
    try:
        for host in (0, 1):
            own = ["--nnodes", "2", "--node-rank", str(host), "--nproc-per-node", "2"]
            own += ["--master-addr", ADDRESSES[0], "--master-port", "29500", str(ROOT / "examples" / "pretrain_gpt.py")]
            command = [sys.executable, "-m", "megatron_ds.train.torchrun", *own, *arguments(folder / "run", *more)]
            with (folder / f"host-{host}.txt").open("w") as log:
                launchers.append(
                    subprocess.Popen(where.command(host, *command), stdout=log, stderr=log, env=environment)
                )
        yield Job(folder, launchers)
    finally:
        for launcher in launchers:
            launcher.kill()
            launcher.wait()


def wait_for_steps(job: Job, count: int) -> None:
    path, until = job.folder / "run" / "metrics.jsonl", time.monotonic() + 180
    while not path.exists() or len(path.read_text().splitlines()) < count:
        ended = [launcher.poll() for launcher in job.launchers]
        assert ended == [None, None] and time.monotonic() < until, f"{job.output(0)}\n---\n{job.output(1)}"
        time.sleep(0.05)
