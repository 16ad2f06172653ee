"""DeepSpeed's learning rate schedules as pure functions of the update's number, counted from 1.

There a scheduler steps after an update, and its own count starts at -1: the first update runs at what it sets when it
is made, update ``n`` at place ``n - 2`` of it.
"""

from __future__ import annotations

import math

from megatron_ds.config.engine import DeepSpeedSchedule

_BETA2 = 0.99  # with a momentum that is cycled


def scheduled_rate(schedule: DeepSpeedSchedule, lr: float, step: int) -> float:
    """The learning rate of update number ``step``.

    Args:
        lr: the optimizer's own, of which WarmupCosineLR takes fractions, and to which WarmupLR rises unless it has a
            rate of its own.
    """
    if schedule.name == "OneCycle":
        return _one_cycle_rate(schedule, step - 1)
    if schedule.name == "LRRangeTest":
        rises = (step - 1) / schedule.lr_range_test_step_size
        rises = math.floor(rises) if schedule.lr_range_test_staircase else rises
        return schedule.lr_range_test_min_lr * (1 + schedule.lr_range_test_step_rate * rises)
    return _warmup_rate(schedule, lr, step - 2)


def scheduled_betas(schedule: DeepSpeedSchedule, step: int) -> tuple[float, float]:
    """OneCycle's betas of update number ``step``: beta1 is low where the rate is high. Update 1 has the lowest."""
    if step == 1:
        return schedule.cycle_min_mom, _BETA2
    low, high = schedule.cycle_min_mom, schedule.cycle_max_mom
    place = step - 1
    if place <= _cycle(schedule):
        return high - (high - low) * _height(schedule, place), _BETA2
    return high * (1 + schedule.decay_mom_rate * _decays(schedule, place)), _BETA2


def _warmup_rate(schedule: DeepSpeedSchedule, lr: float, place: int) -> float:
    """With ``W = max(2, warmup_num_steps)`` the warm-up is ``log(place + 1) / log(W)`` or ``place / W``."""
    warmup = max(2, schedule.warmup_num_steps)
    total = schedule.total_num_steps or warmup
    cosine = schedule.name == "WarmupCosineLR"
    if place < 0:
        return 0.0 if cosine else schedule.warmup_min_lr
    if place < warmup:
        part = math.log(place + 1) / math.log(warmup) if schedule.warmup_type == "log" else place / warmup
    elif cosine:
        turn = (1 + math.cos(math.pi * min(1.0, (place - warmup + 1) / max(1, total - warmup)))) / 2
        return lr * max(0.0, schedule.cos_min_ratio + (1 - schedule.cos_min_ratio) * turn)
    elif schedule.name == "WarmupDecayLR":
        part = max(0.0, (total - place) / max(1.0, total - warmup))
    else:
        part = 1.0
    if cosine:
        return lr * (schedule.warmup_min_ratio + (1 - schedule.warmup_min_ratio) * part)
    top = schedule.warmup_max_lr
    if top is None:
        top = lr if schedule.name == "WarmupLR" else 1e-3
    return schedule.warmup_min_lr + (top - schedule.warmup_min_lr) * part


def _one_cycle_rate(schedule: DeepSpeedSchedule, place: int) -> float:
    low, high = schedule.cycle_min_lr, schedule.cycle_max_lr
    assert low is not None and high is not None
    if place <= _cycle(schedule):
        return low + (high - low) * _height(schedule, place)
    return low / (1 + schedule.decay_lr_rate * _decays(schedule, place))


def _cycle(schedule: DeepSpeedSchedule) -> int:
    """Updates of the cycle."""
    down = schedule.cycle_second_step_size
    return schedule.cycle_first_step_size + (schedule.cycle_first_step_size if down is None else down)


def _height(schedule: DeepSpeedSchedule, place: int) -> float:
    """From 0 at the cycle's ends to 1 at its top, in stairs where there are some."""
    up, stairs = schedule.cycle_first_step_size, schedule.cycle_first_stair_count
    if place == _cycle(schedule):
        return 0.0
    if place <= up:
        done, size = place, up
    else:
        done, size = _cycle(schedule) - place, _cycle(schedule) - up
        stairs = stairs if schedule.cycle_second_stair_count is None else schedule.cycle_second_stair_count
    return math.floor(done * stairs / size) / stairs if stairs else done / size


def _decays(schedule: DeepSpeedSchedule, place: int) -> float:
    return (place - _cycle(schedule)) / schedule.decay_step_size if schedule.decay_step_size else 0.0
