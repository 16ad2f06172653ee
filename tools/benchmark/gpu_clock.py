"""What every part of `make bench-gpu` gets: the device, the time that is left, where its rows go, and its clocks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

Row = dict[str, Any]


@dataclass
class Bench:
    """One part's run.

    Attributes:
        tiny: every size is small, on a CPU too: the code runs, its figures mean nothing.
        ends: when the part is to have ended, by ``time.perf_counter``.
        rows: what was found so far.
        keep: called with each row at once, so that a part that is killed keeps what it has.
    """

    tiny: bool
    device: str
    ends: float
    keep: Callable[[Row], None] = lambda row: None
    rows: list[Row] = field(default_factory=list)

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    def size(self, count: int, tiny: int) -> int:
        return min(count, tiny) if self.tiny else count

    def row(self, name: str, **figures: Any) -> None:
        self.rows.append({"name": name, **figures})
        self.keep(self.rows[-1])

    def each(self, name: str, measure: Callable[[], Row]) -> None:
        """One row; where it fails, its error is the row, and where no time is left, that."""
        if time.perf_counter() > self.ends:
            self.row(name, note="no time left")
            return
        try:
            self.row(name, **measure())
        except Exception as error:  # one row must not cost the others
            self.row(name, note=f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:140]}")

    def normal(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, device=self.device, dtype=torch.float32).to(dtype)

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def empty_cache(self) -> None:
        if self.cuda:
            torch.cuda.empty_cache()

    def milliseconds(self, function: Callable[[], Any], repeats: int = 20) -> float:
        """Mean time on the device of one call of many in a CUDA graph, so that the host is never waited for."""
        if not self.cuda:
            start = time.perf_counter()
            function()
            return 1e3 * (time.perf_counter() - start)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(repeats):
                function()
        graph.replay()
        times = []
        for _ in range(3):
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            graph.replay()
            after.record()
            after.synchronize()
            times.append(before.elapsed_time(after) / repeats)
        return min(times)


def table(rows: list[Row]) -> str:
    """The rows with their columns under each other; notes at the end of their line."""
    columns = ["name", *dict.fromkeys(key for row in rows for key in row if key not in ("name", "note"))]
    lines = [columns] + [[shown(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)) for line in lines]
    notes = ["", *(row.get("note", "") for row in rows)]
    return "\n".join(f"{line}  {note}".rstrip() for line, note in zip(text, notes))


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3f}"
    return str(value)
