"""DeepSpeed's warm-up schedules as pure functions of the update's number."""

from __future__ import annotations

import math

from megatron_ds.config.engine import WarmupSchedule


def warmup_rate(schedule: WarmupSchedule, lr: float, step: int) -> float:
    """The learning rate of update number ``step``, counted from 1.

    There the scheduler steps after an update, from -1: so the first update runs at the start of the warm-up, the second
    one too, and update ``n`` at place ``n - 2`` of the schedule. With ``W = max(2, warmup_num_steps)`` and place ``i``,
    the warm-up is ``log(i + 1) / log(W)`` or ``i / W``.

    Args:
        lr: the optimizer's own, of which WarmupCosineLR takes fractions; the others know their rates themselves.
    """
    place, warmup = step - 2, max(2, schedule.warmup_num_steps)
    total = schedule.total_num_steps or warmup
    if place < 0:
        return 0.0 if schedule.name == "WarmupCosineLR" else schedule.warmup_min_lr
    if place < warmup:
        part = math.log(place + 1) / math.log(warmup) if schedule.warmup_type == "log" else place / warmup
    elif schedule.name == "WarmupLR":
        part = 1.0
    elif schedule.name == "WarmupDecayLR":
        part = max(0.0, (total - place) / max(1.0, total - warmup))
    else:
        turn = (1 + math.cos(math.pi * (place - warmup + 1) / max(1, total - warmup))) / 2
        return lr * max(0.0, schedule.cos_min_ratio + (1 - schedule.cos_min_ratio) * turn)
    if schedule.name == "WarmupCosineLR":
        return lr * (schedule.warmup_min_ratio + (1 - schedule.warmup_min_ratio) * part)
    return schedule.warmup_min_lr + (schedule.warmup_max_lr - schedule.warmup_min_lr) * part
