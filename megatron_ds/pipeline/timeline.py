"""When each action ran: predicted by the simulator or recorded by a run, in one form.

**Recorded runs.** One JSON file a rank, a list of objects::

    [{"rank": 0, "action": "0F0", "start": 12.000431, "end": 12.004875}, ...]

``rank`` is the pipeline rank, ``action`` its spelling (see ``action.py``), ``start`` and ``end`` are seconds on one
clock that all ranks share (``time.perf_counter()`` on one Linux host, ``time.time()`` across hosts). Loading moves
the first start to 0. The interval of a compute action is the time it computed; of a receive, the time the rank
*waited* for the data (empty if it had arrived); of a send, from issue to arrival where that is known, else to the
return of the issuing call. Only compute counts as busy, and transfers may be left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from pathlib import Path

from megatron_ds.errors import DataError, ScheduleError
from megatron_ds.files import read_json
from megatron_ds.pipeline.action import Action
from megatron_ds.pipeline.placement import Placement
from megatron_ds.pipeline.schedule import Schedule, peak_in_flight


@dataclass(frozen=True, slots=True)
class Event:
    """``action`` as it ran (or would run) on pipeline rank ``rank``, from ``start`` to ``end``."""

    rank: int
    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """The events of all ranks: by rank, and within a rank in the order they ran.

    ``unit`` names the unit of time: ``"s"`` for a recorded run, empty where the costs were given in none.
    """

    events: tuple[Event, ...]
    unit: str = ""

    @cached_property
    def by_rank(self) -> tuple[tuple[Event, ...], ...]:
        ranks: list[list[Event]] = [[] for _ in range(max((event.rank for event in self.events), default=-1) + 1)]
        for event in self.events:
            ranks[event.rank].append(event)
        return tuple(tuple(events) for events in ranks)

    @cached_property
    def compute(self) -> tuple[Event, ...]:
        """The events that keep a rank busy."""
        return tuple(event for event in self.events if event.action.op.is_compute)

    @property
    def num_ranks(self) -> int:
        return len(self.by_rank)

    @property
    def start(self) -> float:
        """When the first compute action starts."""
        return min((event.start for event in self.compute), default=0.0)

    @property
    def makespan(self) -> float:
        """From the first compute action's start to the last one's end."""
        return max((event.end for event in self.compute), default=0.0) - self.start

    @property
    def bubble_fraction(self) -> float:
        """Share of ``num_ranks * makespan`` in which no compute ran; (p - 1) / (m + p - 1) for p equal stages."""
        total = self.num_ranks * self.makespan
        busy = math.fsum(event.end - event.start for event in self.compute)
        return 1.0 - busy / total if total > 0 else 0.0

    def schedule(self) -> Schedule:
        """The order in which each rank ran its actions, as a schedule that the validator can be asked about.

        A receive stands where its data was waited for, not where it was posted. Each stage is placed on the rank that
        ran it; DataError where a stage ran on none.
        """
        rank_of = {event.action.stage: event.rank for event in self.compute}
        if (missing := _first_missing(rank_of)) is not None:
            raise DataError(f"no rank ran stage {missing}; give the files of all ranks")
        placement = Placement(self.num_ranks, tuple(rank_of[stage] for stage in range(len(rank_of))))
        return Schedule.of(([event.action for event in events] for events in self.by_rank), placement)

    def peak_in_flight(self, rank: int) -> int:
        """The most micro-batches whose activations ``rank`` held at once."""
        return peak_in_flight([event.action for event in self.by_rank[rank]])

    def to_json_file(self, path: Path | str, rank: int | None = None) -> None:
        """Write the events, of one rank or of all, in the format at the top of this module."""
        rows = [
            {"rank": event.rank, "action": str(event.action), "start": event.start, "end": event.end}
            for event in self.events
            if rank is None or event.rank == rank
        ]
        Path(path).write_text(json.dumps(rows, indent=0) + "\n", encoding="utf-8")

    @staticmethod
    def from_json_files(paths: Iterable[Path | str], unit: str = "s") -> Timeline:
        """A recorded run from its files: one a rank, or all ranks in one.

        Raises DataError for a file that is missing or not in the format, an event that ends before it starts, a rank
        without events, or no event at all.
        """
        events = [event for path in paths for event in _read_events(Path(path))]
        if not events:
            raise DataError("the files hold no pipeline event; record at least one step first")
        if (missing := _first_missing(event.rank for event in events)) is not None:
            raise DataError(f"no events of rank {missing}; give the files of all ranks")
        first = min(event.start for event in events)
        # The sort is stable: events of no length that start together keep the order in which they were written.
        events.sort(key=attrgetter("rank", "start"))
        return Timeline(tuple(Event(e.rank, e.action, e.start - first, e.end - first) for e in events), unit)


def _first_missing(numbers: Iterable[int]) -> int | None:
    """The lowest number from 0 on that is not among ``numbers``, which a file may hold of any size; None below them."""
    return next((at for at, number in enumerate(sorted(set(numbers))) if at != number), None)


def _read_events(path: Path) -> list[Event]:
    try:
        events = [
            Event(int(row["rank"]), Action.parse(row["action"]), float(row["start"]), float(row["end"]))
            for row in read_json(path)
        ]
    except (OSError, ValueError, KeyError, TypeError, ScheduleError) as error:
        raise DataError(
            f"{path} is not a recorded pipeline run ({type(error).__name__}: {error}); it should be a JSON list of "
            '{"rank": 0, "action": "0F0", "start": 0.0, "end": 0.1}'
        ) from error
    for event in events:
        if not (event.rank >= 0 and -math.inf < event.start <= event.end < math.inf):
            raise DataError(
                f"{path}: {event.action} of rank {event.rank} runs from {event.start} to {event.end}; the rank must "
                "be 0 or more and the end not before the start. Record the run again"
            )
    return events
