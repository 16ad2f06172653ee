"""Compile for sm_90 what a launch would compile, on a machine without a GPU, and read what came out.

The launching functions of ``megatron_ds.kernels.triton`` are called with meta tensors of real shapes under a driver
that stands for an H100: every launch is turned into Triton's own ``warmup``, so the specialisation (alignment,
divisibility by 16, constants) is the launcher's, whole, and nothing runs. Meta tensors have address 0: aligned.
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
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

SHARED_LIMIT = 227 * 1024
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

    def count(self, instruction: str) -> int:
        """How many instructions match the pattern, e.g. ``LDG\\.E\\S*\\.128``."""
        return len(re.findall(rf"\b{instruction}", self.sass))

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
        found.append(read(self.__name__, kernel))
        return kernel

    original = JITFunction.run
    with patch.object(triton.runtime.driver, "_active", HopperDriver()), patch.object(JITFunction, "run", run):
        yield found


def read(name: str, kernel: Any) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        sass = _tool("nvdisasm", "-c", file.name)
    numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    shared = max(numbers["SHARED"], kernel.metadata.shared)
    return Compiled(name, numbers["REG"], numbers["STACK"] + numbers["LOCAL"], shared, kernel.metadata.num_warps, sass)


def _tool(*command: str) -> str:
    done = subprocess.run([str(TOOLS / command[0]), *command[1:]], capture_output=True, text=True, check=True)
    return done.stdout
