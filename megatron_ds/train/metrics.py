"""Speed in terms that can be compared: tokens/s, TFLOP/s a rank, and MFU where the device's peak is known.

A *token* here is a position that the model computes; a *target* is a position whose loss counts. BERT predicts 15% of
its tokens, and a packed conversation only its answers: FLOPs are those of all tokens.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping

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


class Speedometer:
    """Tokens/s and what follows from it, between two calls of :meth:`read`. Of the whole job.

    Args:
        flops_per_token: model FLOPs of forward and backward (the model states its convention).
        ranks: ranks of the job.
        peak: of one device in TFLOP/s, or None.
        tokens: positions that the model computed of so many samples with so many targets.
    """

    def __init__(
        self,
        flops_per_token: float,
        ranks: int,
        peak: float | None,
        tokens: Callable[[int, int], float] = lambda samples, targets: samples,
    ):
        self.flops_per_token, self.ranks, self.peak = flops_per_token, ranks, peak
        self.tokens_of = tokens
        self.restart()

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the time of the body as time in which this rank waited for its next batch."""
        begin = time.perf_counter()
        yield
        self.waited += time.perf_counter() - begin

    def add(self, samples: int, targets: int) -> None:
        self.tokens += self.tokens_of(samples, targets)
        self.targets += targets

    def restart(self) -> None:
        """Start a new interval here: time spent on starting, evaluation or saving is not training."""
        self.tokens, self.targets, self.waited, self.start = 0.0, 0, 0.0, time.perf_counter()

    def read(self) -> dict[str, float]:
        """What the interval was like; starts a new one.

        ``seconds``, its length; ``tokens_per_s``; ``targets_per_s``; ``tflops_per_rank``; where the peak is known
        ``mfu``; ``data_wait``, the share of the time that this rank waited for data.
        """
        seconds = max(time.perf_counter() - self.start, 1e-9)
        rate = self.tokens / seconds
        tflops = rate * self.flops_per_token / self.ranks / 1e12
        values = {
            "seconds": seconds,
            "tokens_per_s": rate,
            "targets_per_s": self.targets / seconds,
            "tflops_per_rank": tflops,
            "data_wait": self.waited / seconds,
        }
        if self.peak:
            values["mfu"] = tflops / self.peak
        self.restart()
        return values


class MeanSpeed:
    """The speed of several steps together, from what :meth:`Speedometer.read` said of each."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}

    def add(self, speed: Mapping[str, float]) -> None:
        seconds = speed["seconds"]
        for name, value in speed.items():
            # All but the length itself are amounts a second.
            self._sums[name] = self._sums.get(name, 0.0) + (seconds if name == "seconds" else value * seconds)

    def read(self) -> dict[str, float]:
        """As :meth:`Speedometer.read` would have said of the steps as one interval; starts a new one."""
        sums, self._sums = self._sums, {}
        seconds = sums["seconds"]
        return {name: seconds if name == "seconds" else value / seconds for name, value in sums.items()}
