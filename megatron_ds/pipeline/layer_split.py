"""How many layers each pipeline stage gets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

from megatron_ds.errors import ConfigError


def split_layers(
    num_layers: int,
    num_stages: int,
    layer_cost: float | Sequence[float] = 1.0,
    first_cost: float = 0.0,
    last_cost: float = 0.0,
    mode: Literal["count", "cost"] | Sequence[int] = "count",
) -> list[int]:
    """Layers per stage, in order; they always sum to ``num_layers``.

    Args:
        num_layers: transformer layers of the model.
        num_stages: stages over all ranks, ``pp * chunks``; each gets at least one layer.
        layer_cost: time of one layer in any unit, or one number per layer. Used by ``"cost"`` only, as are the next.
        first_cost: what the first stage computes besides its layers (the embedding).
        last_cost: what the last stage computes besides its layers (final norm, output head and loss).
        mode: ``"count"`` spreads the layers evenly, whatever they cost. Spare layers go to the middle stages, the
            later first, as those hold fewer activations under 1F1B; then to the first; the last stage, which has the
            output head, never gets one. ``"cost"`` makes the costliest stage as cheap as can be, exactly, and among
            those splits takes the most even (least sum of squares). A list is taken as it is.

    Raises:
        ConfigError: fewer layers than stages, costs that are negative or not one a layer, or a list that does not
            have one number a stage, each at least 1, which sum to ``num_layers``.
    """
    if num_stages < 1 or num_layers < num_stages:
        raise ConfigError(
            f"num_layers={num_layers} cannot fill num_stages={num_stages} (pp x chunks): every stage needs at least "
            f"one layer; use between 1 and {max(num_layers, 1)} stages, or more layers"
        )
    if mode == "count":
        split = _by_count(num_layers, num_stages)
    elif mode == "cost":
        split = _by_cost(_layer_costs(num_layers, layer_cost), num_stages, *_end_costs(first_cost, last_cost))
    elif isinstance(mode, str):
        raise ConfigError(f"split mode {mode!r} is unknown; use 'count', 'cost' or a list of layers per stage")
    else:
        split = list(mode)
        if len(split) != num_stages or min(split) < 1 or sum(split) != num_layers:
            raise ConfigError(
                f"layers_per_stage={split} has {len(split)} stages and sums to {sum(split)}; it needs one number for "
                f"each of num_stages={num_stages} (pp x chunks), each at least 1, that sum to num_layers={num_layers}"
            )
    # Layers lost in the split train a smaller model without a word, so this is checked whatever the mode.
    assert len(split) == num_stages and sum(split) == num_layers and min(split) >= 1, split
    return split


def _by_count(num_layers: int, num_stages: int) -> list[int]:
    each, spare = divmod(num_layers, num_stages)
    split = [each] * num_stages
    last = num_stages - 1
    for stage in [*range(last - 1, 0, -1), 0][:spare]:
        split[stage] += 1
    return split


def _layer_costs(num_layers: int, layer_cost: float | Sequence[float]) -> list[float]:
    costs = list(layer_cost) if isinstance(layer_cost, Sequence) else [layer_cost] * num_layers
    if len(costs) != num_layers:
        raise ConfigError(f"layer_cost lists {len(costs)} layers of num_layers={num_layers}; give one number a layer")
    for layer, cost in enumerate(costs):
        if not 0 <= cost < math.inf:
            raise ConfigError(f"the cost of layer {layer} is {cost}; a cost is finite and not negative")
    return costs


def _end_costs(first_cost: float, last_cost: float) -> tuple[float, float]:
    for name, cost in (("first_cost", first_cost), ("last_cost", last_cost)):
        if not 0 <= cost < math.inf:
            raise ConfigError(f"{name}={cost}; a cost is finite and not negative")
    return first_cost, last_cost


def _by_cost(costs: list[float], num_stages: int, first_cost: float, last_cost: float) -> list[int]:
    """Least maximum, then least sum of squares: two dynamic programs of layers^2 x stages steps each."""
    num_layers = len(costs)
    sums = [0.0, *accumulate(costs)]

    def stage_cost(stage: int, begin: int, end: int) -> float:
        return sums[end] - sums[begin] + first_cost * (stage == 0) + last_cost * (stage == num_stages - 1)

    def ends(stage: int) -> range:
        """Where ``stage`` may end: with a layer for each stage before, itself, and each after."""
        last = stage == num_stages - 1
        return range(num_layers if last else stage + 1, num_layers - (num_stages - 1 - stage) + 1)

    worst = [0.0] + [math.inf] * num_layers  # worst[end]: least maximum over the stages so far, ending at `end`
    for stage in range(num_stages):
        before, worst = worst, [math.inf] * (num_layers + 1)
        for end in ends(stage):
            worst[end] = min(max(before[begin], stage_cost(stage, begin, end)) for begin in range(stage, end))
    limit = worst[num_layers]

    squares = [0.0] + [math.inf] * num_layers
    begins = []
    for stage in range(num_stages):
        before, squares = squares, [math.inf] * (num_layers + 1)
        chosen = [0] * (num_layers + 1)
        for end in ends(stage):
            for begin in range(stage, end):
                cost = stage_cost(stage, begin, end)
                if cost <= limit and before[begin] + cost * cost < squares[end]:
                    squares[end], chosen[end] = before[begin] + cost * cost, begin
        begins.append(chosen)

    split, end = [], num_layers
    for chosen in reversed(begins):
        split.append(end - chosen[end])
        end = chosen[end]
    return split[::-1]
