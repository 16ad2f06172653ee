"""Compile for sm_90 what a launch would compile, on a machine without a GPU, and read what came out.

The launching functions of ``megatron_ds.kernels.triton`` are called with meta tensors of real shapes under a driver
that stands for an H100: every launch is turned into Triton's own ``warmup``, so the specialisation (alignment,
divisibility by 16, constants) is the launcher's, whole, and nothing runs. Meta tensors have address 0: aligned. They
take no memory, so that shapes may be larger than a GPU could hold.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import triton
from offsets import overflows
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from megatron_ds.kernels.triton import common

PROCESSORS = 132  # streaming multiprocessors
SHARED_LIMIT = 227 * 1024  # of a program; a kilobyte more is all that an SM has, and it keeps one for each program
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class HopperDriver:
    """As much of a driver as choosing a target and compiling needs."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass(frozen=True)
class Compiled:
    """One kernel as the GPU would run it."""

    name: str
    registers: int
    stack: int  # bytes of local memory a thread: spilled registers live there
    shared: int  # bytes
    warps: int
    sass: str
    grid: tuple[int, ...]
    overflows: list[str]  # of 32 bits, on the way to an address

    def count(self, instruction: str) -> int:
        """How many instructions match the pattern, e.g. ``LDG\\.E\\S*\\.128``."""
        return len(re.findall(rf"\b{instruction}", self.sass))

    @property
    def resident(self) -> int:
        """Programs that an SM holds at once: by its registers, given out by eights to a thread, and shared memory."""
        registers = -(-self.registers // 8) * 8 * 32 * self.warps
        return min(65536 // registers, (SHARED_LIMIT + 1024) // (self.shared + 1024), 64 // self.warps)

    @property
    def spills(self) -> int:
        return self.stack + self.count("STL") + self.count("LDL")


@contextmanager
def captured() -> Iterator[list[Compiled]]:
    """Launches inside the context are compiled and listed instead of run."""
    found: list[Compiled] = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        # The driver's limits: only the first number of a grid may be larger.
        assert grid[0] < 2**31 and all(number <= 65535 for number in grid[1:]), f"{self.__name__}: a grid of {grid}"
        kernel = original(self, *args, grid=grid, warmup=True, **kwargs)
        given = {**dict(zip(self.arg_names, args)), **kwargs}
        arguments = {name: given[name] for name, kind in kernel.src.signature.items() if kind != "constexpr"}
        found.append(read(self.__name__, kernel, grid, overflows(kernel.asm["ttir"], grid, arguments)))
        return kernel

    original = JITFunction.run
    with (
        patch.object(triton.runtime.driver, "_active", HopperDriver()),
        patch.object(JITFunction, "run", run),
        patch.object(common, "processors", lambda x: PROCESSORS),
    ):
        yield found


def read(name: str, kernel: Any, grid: tuple[int, ...], faults: list[str]) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        sass = _tool("nvdisasm", "-c", file.name)
    numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    shared = max(numbers["SHARED"], kernel.metadata.shared)
    stack, warps = numbers["STACK"] + numbers["LOCAL"], kernel.metadata.num_warps
    return Compiled(name, numbers["REG"], stack, shared, warps, sass, grid, faults)


def _tool(*command: str) -> str:
    done = subprocess.run([str(TOOLS / command[0]), *command[1:]], capture_output=True, text=True, check=True)
    return done.stdout
