"""One drawing for every schedule: in steps before it runs, to scale when it was simulated or recorded."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from megatron_ds.files import replacing
from megatron_ds.pipeline.action import Action, Op
from megatron_ds.pipeline.schedule import Schedule
from megatron_ds.pipeline.simulate import play
from megatron_ds.pipeline.timeline import Event, Timeline

_RESET = "\x1b[0m"
_ANSI = {Op.F: "\x1b[97;44m", Op.B: "\x1b[30;42m", Op.W: "\x1b[30;43m"}
_ANSI_MARK = "\x1b[97;41m"
_STROKE = {Op.F: ">", Op.B: "<", Op.W: "="}
_WORD = {Op.F: "forward", Op.B: "backward", Op.W: "weight gradient"}
_FILL = {Op.F: "#3b6fb6", Op.B: "#3f9b6c", Op.W: "#d99a2b"}


def draw_text(what: Schedule | Timeline, width: int = 100, color: bool = False) -> str:
    """One row a rank, no line longer than ``width`` columns.

    A schedule is drawn in steps of one compute action each, spelled out; where it does not fit, the middle is left
    out. A timeline is drawn to scale: ``3>>`` is the forward of micro-batch 3, ``3<<<<`` its backward, ``3==`` its
    weight gradient, ``.`` idle.

    Args:
        width: columns of the terminal.
        color: forward on blue, backward on green, weight gradient on yellow (ANSI escapes, not counted in ``width``).
    """
    if isinstance(what, Timeline):
        return _draw_to_scale(what, width, color)
    return draw_steps(what, width=width, color=color)


class _Cell(NamedTuple):
    op: Op
    text: str
    marked: bool


def draw_steps(
    schedule: Schedule, marks: Collection[tuple[int, int]] = (), width: int = 100, color: bool = False
) -> str:
    """The step grid of a schedule, with a ``!`` before each place ``(rank, index)`` of ``marks``.

    A schedule that is wrong can be drawn too: what is able to run stands in the step in which it runs, the rest
    after the last step, in order. A marked transfer takes the cell of the compute action whose data it moves.
    """
    steps = _steps(schedule)
    table = []
    for rank, actions in enumerate(schedule):
        cells = _cells(actions, {index for marked_rank, index in marks if marked_rank == rank})
        table.append(dict(zip(steps[rank], cells)))
    num_steps = max((step for row in table for step in row), default=-1) + 1

    texts = [cell.text for row in table for cell in row.values()]
    cell_width = max(map(len, [*texts, str(num_steps)])) + 1 + bool(marks)
    head = f"rank {len(schedule) - 1} "
    shown = _window(
        num_steps,
        max(3, (width - len(head)) // cell_width),
        [step for row in table for step, cell in row.items() if cell.marked],
    )
    lines = [
        "step".ljust(len(head)) + "".join(("..." if step is None else str(step)).rjust(cell_width) for step in shown)
    ]
    for rank, row in enumerate(table):
        line = f"rank {rank}".ljust(len(head))
        for step in shown:
            if step is None or step not in row:
                line += ("..." if step is None else ".").rjust(cell_width)
                continue
            text = " " + ("!" if row[step].marked else "") + row[step].text
            paint = _ANSI_MARK if row[step].marked else _ANSI[row[step].op]
            line += " " * (cell_width - len(text)) + (f"{paint}{text}{_RESET}" if color else text)
        lines.append(line)
    return "\n".join(lines)


def _steps(schedule: Schedule) -> list[list[int]]:
    """The step of each compute action, per rank."""
    computes = schedule.compute_only()
    events, _ = play(computes, lambda action: float(action.op.is_compute))
    steps: list[list[int]] = [[] for _ in schedule]
    for event in events:
        steps[event.rank].append(round(event.start))
    after = max((row[-1] for row in steps if row), default=-1) + 1
    return [[*row, *range(after, after + len(actions) - len(row))] for row, actions in zip(steps, computes)]


def _cells(actions: Sequence[Action], marks: set[int]) -> list[_Cell]:
    """The cell of each compute action of a rank, with the marked transfers written over them."""
    cells = {
        index: _Cell(action.op, str(action), index in marks)
        for index, action in enumerate(actions)
        if action.op.is_compute
    }
    for index in marks - cells.keys():
        before = [place for place in cells if place < index]
        after = [place for place in cells if place > index]
        wanted = after[:1] or before[-1:] if actions[index].op.is_receive else before[-1:] or after[:1]
        for place in wanted:
            cells[place] = _Cell(cells[place].op, str(actions[index]), True)
    return list(cells.values())


def _window(num_steps: int, room: int, marked: list[int]) -> list[int | None]:
    """The steps to show in ``room`` columns, None for a gap: around the marks, else both ends."""
    if num_steps <= room:
        return list(range(num_steps))
    if not marked:
        first = room // 2
        return [*range(first), None, *range(num_steps - (room - first - 1), num_steps)]
    inside = max(1, room - 2)  # a gap at either end
    middle = (min(marked) + max(marked)) // 2 if max(marked) - min(marked) < inside else min(marked) + inside // 2
    start = min(max(0, middle - inside // 2), num_steps - inside)
    gap_before: list[int | None] = [None] if start > 0 else []
    gap_after: list[int | None] = [None] if start + inside < num_steps else []
    return [*gap_before, *range(start, start + inside), *gap_after]


def _draw_to_scale(timeline: Timeline, width: int, color: bool) -> str:
    head = f"rank {timeline.num_ranks - 1} "
    columns = max(10, width - len(head))
    span = timeline.makespan or 1.0
    # Each column shows what runs at its middle, so a column stands for the same time everywhere.
    times = [timeline.start + (column + 0.5) * span / columns for column in range(columns)]
    lines = []
    for rank, events in enumerate(timeline.by_rank):
        busy = [event for event in events if event.action.op.is_compute]
        starts = [event.start for event in busy]
        line = f"rank {rank}".ljust(len(head))
        for event, run in groupby(times, key=lambda time: _running(busy, starts, time)):
            line += _block(event, len(list(run)), color)
        lines.append(line)
    end = f"{span:.4g} {timeline.unit}".rstrip()
    lines.append(" " * len(head) + "0" + end.rjust(columns - 1))
    ops = [op for op in _STROKE if any(event.action.op is op for event in timeline.compute)]
    lines.append(" " * len(head) + "   ".join([*(f"{_STROKE[op]} {_WORD[op]}" for op in ops), ". idle"]))
    return "\n".join(lines)


def _running(busy: list[Event], starts: list[float], time: float) -> Event | None:
    place = bisect_right(starts, time) - 1
    return busy[place] if place >= 0 and time < busy[place].end else None


def _block(event: Event | None, length: int, color: bool) -> str:
    if event is None:
        return "." * length
    op, label = event.action.op, str(event.action.micro_batch)
    text = (label if len(label) < length else "").ljust(length, _STROKE[op])
    return f"{_ANSI[op]}{text}{_RESET}" if color else text


def draw_png(timeline: Timeline, path: Path | str, title: str) -> None:
    """The timeline as a picture: one row a rank, blocks labelled with the micro-batch, the bubble in the title.

    The micro-batch stands in each block that is wide enough for it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    ranks = timeline.num_ranks
    figure = Figure(figsize=(12, 1.1 + 0.46 * ranks), dpi=150, facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    span = timeline.makespan or 1.0
    label_width = 0.0078 * span  # of one digit of the label's font
    for rank in range(ranks):
        axes.barh(rank, span, height=0.82, color="#eceef1", zorder=1)
    for op in _FILL:
        blocks = [event for event in timeline.compute if event.action.op is op]
        for rank in range(ranks):
            bars = [(e.start - timeline.start, e.end - e.start) for e in blocks if e.rank == rank]
            # White edges part the blocks; where thousands share the row they would hide them.
            edge = 0.8 if len(timeline.compute) < 120 * ranks else 0.0
            axes.broken_barh(
                bars, (rank - 0.41, 0.82), facecolor=_FILL[op], edgecolor="white", linewidth=edge, zorder=2
            )
        for event in blocks:
            label = str(event.action.micro_batch)
            if event.end - event.start > label_width * (len(label) + 0.4):
                axes.text(
                    (event.start + event.end) / 2 - timeline.start, event.rank, label,
                    ha="center", va="center_baseline", color="white", fontsize=9.5, zorder=3,
                )  # fmt: skip
    axes.set_xlim(0, span)
    axes.set_ylim(ranks - 0.5, -0.5)
    axes.set_yticks(range(ranks), [f"rank {rank}" for rank in range(ranks)])
    axes.set_xlabel(f"time ({timeline.unit})" if timeline.unit else "time", color="#30343b")
    axes.tick_params(length=0, labelsize=10, colors="#30343b")
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_title(
        f"{title}  ·  bubble {timeline.bubble_fraction:.1%}",
        loc="left",
        fontsize=12,
        fontweight="bold",
        color="#1d2026",
    )
    used = [op for op in _FILL if any(event.action.op is op for event in timeline.compute)]
    handles = [Patch(color=_FILL[op], label=_WORD[op]) for op in used] + [Patch(color="#eceef1", label="idle")]
    axes.legend(
        handles=handles, loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.3,
        ncols=len(handles), frameon=False, fontsize=10, handlelength=1.2, handleheight=1.0,
    )  # fmt: skip
    with replacing(Path(path)) as temporary:
        figure.savefig(temporary, format="png")
