"""What a ZeRO stage holds and moves, as arithmetic on integers: bytes a rank, before anything is built.

After Rajbhandari et al. 2020 (arXiv 1910.02054): memory from section 5 (figure 1: 2P + 2P + KP, the last, the last
two, or all three parts divided by the ranks at stages 1, 2, 3), communication from section 7 (a reduce-scatter and an
all-gather of the model at stages 1 and 2, as much as plain data parallelism; one all-gather more at stage 3). Two
things differ here: gradients are summed in fp32, so that they take and move 4 bytes each, and what accumulation
multiplies is counted.

The exact numbers of a model that has been built, padding and small parameters included, are those of
:func:`megatron_ds.zero.buckets.bytes_report`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_ds.zero.buckets import ParameterInfo


@dataclass(frozen=True)
class ModelSize:
    """``parameters`` elements of ``width`` bytes, and ``kinds`` elements of optimizer state for each (AdamW: 2)."""

    parameters: int
    width: int = 2
    kinds: float = 2

    @staticmethod
    def of(parameters: Iterable[ParameterInfo]) -> ModelSize:
        """Of the trainable ones among a rank's parameters."""
        trainable = [info for info in parameters if info.trainable]
        numel = sum(info.numel for info in trainable)
        state = sum(info.numel * len(info.rule.kinds) for info in trainable)
        return ModelSize(numel, max((info.dtype.itemsize for info in trainable), default=4), state / max(numel, 1))

    @property
    def wide(self) -> int:
        """Bytes of a gradient, a master weight and an element of optimizer state."""
        return 8 if self.width == 8 else 4

    @property
    def state(self) -> int:
        """Bytes of master weights (where the parameters are not their own) and of optimizer state, unsharded."""
        return round(self.parameters * self.wide * (self.kinds + (self.width < self.wide)))


@dataclass(frozen=True)
class Layout:
    """How a model's state is spread.

    ``shard``: ranks over which it is divided. ``micro_batches``: of a step, on one rank. ``state_ratio`` and
    ``parameter_ratio``: shares that are offloaded.
    """

    stage: int
    shard: int
    micro_batches: int = 1
    keep_whole: bool = False
    state_ratio: float = 0.0
    parameter_ratio: float = 0.0


def held(model: ModelSize, layout: Layout) -> dict[str, int]:
    """Bytes one rank keeps on all stores, by kind: ``parameters``, ``gradients``, ``state``."""

    def share(whole: int, from_stage: int) -> int:
        return -(-whole // layout.shard) if layout.stage >= from_stage else whole

    return {
        "parameters": share(model.parameters * model.width, 3),
        "gradients": share(model.parameters * model.wide, 2),
        "state": share(model.state, 1),
    }


def memory_bytes_on_device(model: ModelSize, layout: Layout) -> int:
    """Bytes of :func:`held` that are not offloaded. Whole gradients that stay during accumulation count."""
    parts = held(model, layout)
    if layout.keep_whole and layout.micro_batches > 1:
        parts["gradients"] = model.parameters * model.wide
    stay = round(parts["parameters"] * (1 - layout.parameter_ratio if layout.stage == 3 else 1))
    return stay + parts["gradients"] + round(parts["state"] * (1 - layout.state_ratio))


def communication_bytes(model: ModelSize, layout: Layout) -> int:
    """Bytes one rank sends over the shard axis in a step (and receives as many).

    A ring's reduce-scatter or all-gather of a buffer sends ``(n - 1) / n`` of it. Gradients are reduced once a step at
    stages 0 and 1, after every micro-batch at stages 2 and 3; parameters are gathered once a step up to stage 2, and
    for every forward and every backward pass at stage 3. ``keep_whole`` makes both once a step.
    """
    times = 1 if layout.keep_whole else layout.micro_batches
    reductions = times if layout.stage >= 2 else 1
    gathers = (1 if layout.keep_whole else 2 * times) if layout.stage == 3 else 1
    gradients, parameters = model.parameters * model.wide, model.parameters * model.width
    if layout.stage == 0:  # an all-reduce is both, of the gradients
        whole = 2 * gradients
    else:
        whole = reductions * gradients + gathers * parameters
    return whole * (layout.shard - 1) // layout.shard
