"""Draw a pipeline schedule: what each rank does when, how long it idles, and what it has to hold in memory.

Without options it shows 1F1B on 4 stages. Try the other schedule, more micro-batches (the bubble shrinks), a slow
last stage (the output head) or slow transfers:

    python tools/show_schedule.py --pp 4 --micro-batches 8
    python tools/show_schedule.py --schedule gpipe --png gpipe.png
    python tools/show_schedule.py --forward 1 1 1 1.4 --backward 2 2 2 2.8
    python tools/show_schedule.py --send 0.5 --no-early-receives
    python tools/show_schedule.py --recorded runs/mine/timeline --png measured.png
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_ds.data.cli import run
from megatron_ds.errors import ConfigError, DataError
from megatron_ds.pipeline.draw import draw_png, draw_text
from megatron_ds.pipeline.passes import add_communication, hoist_receives
from megatron_ds.pipeline.placement import PlacementKind
from megatron_ds.pipeline.schedule import Schedule
from megatron_ds.pipeline.schedules import activation_bound, build_schedule
from megatron_ds.pipeline.simulate import Costs, simulate
from megatron_ds.pipeline.timeline import Timeline
from megatron_ds.pipeline.validator import validate

MOST_ACTIONS = 50_000  # some seconds, and far more than a screen shows


@dataclass(frozen=True)
class ShowSchedule:
    schedule: str = "1f1b"
    """Name of the schedule: gpipe (all forwards, then all backwards) or 1f1b (the same bubble, less memory)."""
    pp: int = 4
    """Pipeline ranks."""
    chunks: int = 1
    """Stages of the model a rank holds; above 1 with gpipe."""
    placement: PlacementKind = "looped"
    """Where the stages lie: looped (0 1 2 0 1 2) or v (0 1 2 2 1 0)."""
    micro_batches: int = 8
    """Micro-batches of one optimizer step. The bubble of p equal stages is (p - 1) / (m + p - 1)."""
    forward: tuple[float, ...] = (1.0,)
    """Time of one micro-batch's forward, in any unit: one number for all stages, or one a stage."""
    backward: tuple[float, ...] = (2.0,)
    """Time of one micro-batch's backward, in the same unit: one number for all stages, or one a stage."""
    send: float = 0.0
    """Time of one transfer between two stages, in the same unit."""
    early_receives: bool = True
    """Post each receive one compute action early, so that the transfer runs beside it. Matters only with --send."""
    recorded: Path | None = None
    """Draw a recorded run instead: its timeline folder (the last step in it), or one step's, which holds one JSON file
    a pipeline rank. The options above are then not used."""
    png: Path | None = None
    """Also write the drawing, to scale, to this PNG file."""
    width: int = 100
    """Columns of the text drawing."""
    color: bool = sys.stdout is not None and sys.stdout.isatty()
    """Forward on blue, backward on green. By default only when the output is a terminal."""


def main(options: ShowSchedule) -> None:
    if options.recorded is not None:
        folder = _step_folder(options.recorded)
        timeline, title = _recorded(folder), f"{folder.name}, recorded"
    else:
        timeline, title = _predicted(options), f"{options.schedule}, {options.pp} ranks"
    micro_batches = 1 + max(event.action.micro_batch for event in timeline.compute)
    title += f", {micro_batches} micro-batches"

    print(title)
    if options.recorded is None:
        schedule = _schedule(options)
        print("\nin steps (one action each)\n" + draw_text(schedule, options.width, options.color))
    print("\nto scale\n" + draw_text(timeline, options.width, options.color))
    print(f"\nbubble     {timeline.bubble_fraction:.1%} of the time of all ranks")
    print(f"makespan   {timeline.makespan:.4g} {timeline.unit}".rstrip())
    held = " ".join(str(timeline.peak_in_flight(rank)) for rank in range(timeline.num_ranks))
    print(f"in flight  {held}   (most micro-batches whose activations each rank holds at once)")
    if options.png is not None:
        draw_png(timeline, options.png, title)
        print(f"wrote      {options.png}")


def _schedule(options: ShowSchedule) -> Schedule:
    actions = 2 * options.pp * options.chunks * options.micro_batches
    if actions > MOST_ACTIONS:
        raise ConfigError(
            f"pp={options.pp} x chunks={options.chunks} x micro_batches={options.micro_batches} have {actions:,} "
            f"forwards and backwards, and at most {MOST_ACTIONS:,} are drawn; a smaller pipeline has the same shape"
        )
    return build_schedule(options.schedule, options.pp, options.micro_batches, options.chunks, options.placement)


def _predicted(options: ShowSchedule) -> Timeline:
    schedule = hoist_receives(add_communication(_schedule(options)), ahead=int(options.early_receives))
    validate(schedule, activation_bound(options.schedule, schedule))

    def one_or_all(values: tuple[float, ...]) -> float | tuple[float, ...]:
        return values[0] if len(values) == 1 else values

    return simulate(schedule, Costs(one_or_all(options.forward), one_or_all(options.backward), send=options.send))


def _step_folder(folder: Path) -> Path:
    """The last recorded step of a run's timeline folder; a folder without steps is one itself."""
    return max(folder.glob("step-*/"), default=folder)


def _recorded(folder: Path) -> Timeline:
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise DataError(f"{folder} holds no .json file; give the timeline folder of a run with --log.record-steps")
    return Timeline.from_json_files(paths)


if __name__ == "__main__":
    run(main, ShowSchedule, __doc__)
