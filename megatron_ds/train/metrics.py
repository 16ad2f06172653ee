"""Speed in terms that can be compared: tokens/s, TFLOP/s a rank, and MFU where the device's peak is known."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Iterator

import torch

# Dense bf16 peaks without sparsity, TFLOP/s, from the vendors' data sheets.
_PEAKS = (
    ("H200", 989.0),
    ("H100 PCIe", 756.0),
    ("H100", 989.0),
    ("B200", 2250.0),
    ("A100", 312.0),
    ("L40S", 362.0),
    ("MI300X", 1307.0),
)


def peak_tflops(device: torch.device) -> float | None:
    """bf16 peak of the device in TFLOP/s, or None where it is not known (any CPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in _PEAKS if key in name), None)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this rank: allocated by torch on a GPU, resident of the process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024


class Speedometer:
    """Tokens/s and what follows from it, between two calls of :meth:`read`.

    Args:
        flops_per_token: model FLOPs of forward and backward (the model states its convention).
        ranks: ranks of the job.
        peak: of one device in TFLOP/s, or None.
    """

    def __init__(self, flops_per_token: float, ranks: int, peak: float | None):
        self.flops_per_token, self.ranks, self.peak = flops_per_token, ranks, peak
        self.tokens = 0
        self.waited = 0.0
        self.start = time.perf_counter()

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the time of the body as time in which this rank waited for its next batch."""
        begin = time.perf_counter()
        yield
        self.waited += time.perf_counter() - begin

    def add(self, tokens: int) -> None:
        self.tokens += tokens

    def restart(self) -> None:
        """Start a new interval here: time spent on evaluation or saving is not training."""
        self.tokens, self.waited, self.start = 0, 0.0, time.perf_counter()

    def read(self) -> dict[str, float]:
        """``tokens_per_s``, ``tflops_per_rank``, where the peak is known ``mfu``, and ``data_wait``, the share of the
        time that this rank waited for data; starts a new interval."""
        now = time.perf_counter()
        seconds = max(now - self.start, 1e-9)
        rate, wait = self.tokens / seconds, self.waited / seconds
        self.tokens, self.waited, self.start = 0, 0.0, now
        tflops = rate * self.flops_per_token / self.ranks / 1e12
        values = {"tokens_per_s": rate, "tflops_per_rank": tflops, "data_wait": wait}
        if self.peak:
            values["mfu"] = tflops / self.peak
        return values
