"""Warnings for the classic mistakes, decided from estimates and given with the numbers.

Each rule is a function of numbers that returns an :class:`Advice`, or None. None of them changes anything: a setting
that cannot work is an error elsewhere; these can work, and somebody may know why they are wanted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_ds.errors import listed
from megatron_ds.files import gb
from megatron_ds.optim.loss_scaler import LossScaler
from megatron_ds.zero.layout import ZeroLayout

HARDLY = 0.1
"""Less than this share of the peak is not worth computing the forward pass twice for."""
TRIFLE = 10_000_000
"""Fewer bytes a step are not worth a word: a toy, or a test."""
PATIENCE = 4
"""A loss scale should have grown in so many windows."""


@dataclass(frozen=True)
class Advice:
    """``rule``: a short name, by which each is said once. ``message``: what was found, with the numbers."""

    rule: str
    message: str
    action: str

    def __str__(self) -> str:
        return f"{self.message}; {self.action}"


class Adviser:
    """Gives each rule's advice once. ``warn``: takes a line; give it on one rank."""

    def __init__(self, warn: Callable[[str], object]):
        self._warn = warn
        self._given: set[str] = set()

    def __call__(self, advice: Iterable[Advice | None]) -> None:
        for each in advice:
            if each is not None and each.rule not in self._given:
                self._given.add(each.rule)
                self._warn(str(each))


def stage_too_high(layout: ZeroLayout, micro_batches: int, free: int, activations: int) -> Advice | None:
    """A lower stage would fit on the device and move fewer bytes.

    Args:
        micro_batches: of a step, on one rank.
        free: bytes of the device for everything. activations: what of them activations and buffers will take.
    """
    stage, here = layout.config.stage, layout.communication_bytes(micro_batches)
    lower = [layout.at_stage(below) for below in range(1, max(stage, 1))]
    found = [(other.communication_bytes(micro_batches), other) for other in lower]
    sizes = [other.bytes(micro_batches).total("device") for other in lower]
    fitting = [
        (sent, other.config.stage, size)
        for (sent, other), size in zip(found, sizes)
        if size <= free - activations and sent < here - TRIFLE
    ]
    if not fitting:
        return None
    sent, best, size = min(fitting)
    return Advice(
        "stage",
        f"zero.stage={stage} sends {gb(here)} a rank and step; stage {best} would send {gb(sent)}, and its {gb(size)} "
        f"of parameters, gradients and optimizer state a rank with {gb(activations)} of activations fit into "
        f"{gb(free)}",
        f"use zero.stage={best}",
    )


class Link(NamedTuple):
    """A bus or a disk: bytes a second towards the device and away; ``duplex``: both at once (PCIe; a disk does not)."""

    read: float
    write: float
    duplex: bool


def offload_outlasts_compute(
    read: int,
    written: int,
    ratio: float,
    compute: float,
    link: Link,
    of_parameters: bool = False,
    ranks_sharing: int = 1,
) -> Advice | None:
    """Bringing offloaded state in and out takes longer than a step computes, so that it cannot be hidden.

    Args:
        read, written: bytes of a rank that come in and go out in a step, at ``ratio``.
        compute: seconds of a rank's step.
        of_parameters: it comes once a pass, however large a micro-batch, and not once a step.
        ranks_sharing: ranks of the node that share the link.
    """
    inwards, outwards = read * ranks_sharing / link.read, written * ranks_sharing / link.write
    transfer = max(inwards, outwards) if link.duplex else inwards + outwards
    if transfer <= compute or ratio == 0:
        return None
    fits = math.floor(100 * ratio * compute / transfer) / 100
    key = f"zero.{'offload_parameters' if of_parameters else 'offload_optimizer'}.ratio"
    more = "samples a micro-batch" if of_parameters else "micro-batches a step"
    return Advice(
        key,
        f"{key}={ratio:g} moves {gb(read)} in and {gb(written)} out a rank and step, {transfer:.3g} s at "
        f"{link.read / 1e9:.3g} and {link.write / 1e9:.3g} GB/s for {ranks_sharing} rank(s), but a step computes for "
        f"{compute:.3g} s",
        f"use a ratio of at most {fits:g} if the rest fits on the device, or {math.ceil(transfer / compute)} times the "
        f"{more}",
    )


def recomputation_saves_little(
    micro_batches: int,
    in_flight: int,
    no_recompute: int,
    stored: int,
    recompute_peak: int,
    gradients: int,
    other: int,
    whole_gradients: bool,
    switch_off: str = "recompute.mode='none'",
) -> Advice | None:
    """Recomputing under accumulation, although the peak is made of something else.

    Activations are of one micro-batch (times those in flight), however many accumulate; what stays through all of
    them is the gradients.

    Args:
        in_flight: micro-batches whose activations are kept at once (1 without a pipeline).
        no_recompute: bytes of one micro-batch's activations without recomputation. stored: with it.
        recompute_peak: bytes of the part that is computed again at a time, and whatever recomputation does not touch
            (logits).
        gradients: bytes that stay while micro-batches accumulate. other: parameters and state on the device.
        whole_gradients: they are not sharded during accumulation.
        switch_off: what ends the recomputation.
    """
    with_it = other + gradients + in_flight * stored + recompute_peak
    without = other + gradients + in_flight * no_recompute
    if micro_batches < 2 or stored >= no_recompute or without - with_it >= HARDLY * without:
        return None
    parts = {"gradients": gradients, "parameters and state": other, "activations": in_flight * stored + recompute_peak}
    largest = max(parts, key=lambda name: parts[name])
    action = f"use {switch_off}"
    if whole_gradients and gradients > in_flight * no_recompute:
        action += ", or free the gradients instead: zero.stage=2 keeps a rank's share of them between micro-batches"
    elif micro_batches > 1 and largest == "activations":
        action += ", and a smaller micro-batch: what is left is computed at once whatever the mode"
    return Advice(
        "recompute",
        f"recomputation takes {gb(in_flight * (no_recompute - stored))} off the activations, but the peak only from "
        f"{gb(without)} to {gb(with_it)}: with {micro_batches} micro-batches a step it is "
        + ", ".join(f"{gb(size)} {name}" for name, size in parts.items()),
        action,
    )


def missing_masters(
    bits: int, masters: bool, lr: float, weight: float = 0.02, name: str = "bf16", action: str | None = None
) -> Advice | None:
    """Low-precision parameters that are updated directly.

    Half of a number's last place is at least ``2^-(bits + 1)`` of it: a smaller update rounds to nothing.

    Args:
        bits: of the significand, the implied one included: bf16 8, fp16 11, fp32 24.
        weight: a typical size of weights (their initial standard deviation).
    """
    if masters or bits >= 24:
        return None
    return Advice(
        "masters",
        f"{name} parameters without fp32 master weights: an update below {2.0 ** -(bits + 1):.2g} of a weight rounds "
        f"to nothing, and lr={lr:g} moves a weight of {weight:g} by about {lr / weight:.2g} of it, those above "
        f"{lr * 2 ** (bits + 1):.2g} not at all",
        action or "keep fp32 master weights (ZeroOptimizer does), at 4 bytes a parameter over the shard's ranks",
    )


def untrained(names: Sequence[str]) -> Advice:
    """Parameters that require a gradient and belong to nobody's buffers."""
    return Advice(
        "untrained",
        f"{listed(names, 1)} are not among what the engine trains: the optimizer does not have them, or they were not "
        "there when initialize() was called, and gradients that autograd leaves in them are this rank's alone",
        "give the optimizer all that will ever be unfrozen, or add_param_group(); add new ones before initialize()",
    )


def unused(names: Sequence[str]) -> Advice:
    """Parameters that no rank's backward pass of the first step came to."""
    return Advice(
        "unused",
        f"{listed(names, 1)} got no gradient in the first step on any rank, which counts as a gradient of zero: weight "
        "decay and momentum change what plain torch would leave as it is",
        "freeze what a step does not use, requires_grad_(False)",
    )


def scheduled_twice() -> Advice:
    return Advice(
        "scheduled twice",
        "the loop steps the lr_scheduler that initialize() was given, and so does the engine after each update: the "
        "learning rate moves at twice its pace",
        "leave it to the engine, or do not give it to initialize()",
    )


class LossScaleWatch:
    """Looks at a dynamic loss scale after every step.

    ``watch(scaler, skipped)`` returns advice as often as the condition holds; an :class:`Adviser` says it once.
    """

    def __init__(self) -> None:
        self._last: float | None = None
        self._steps = self._overflows = 0  # since the scale last grew

    def __call__(self, scaler: LossScaler, skipped: bool) -> Advice | None:
        """``skipped``: the gradients of the step were not finite. To be called after ``scaler.update``."""
        if not scaler.dynamic:
            return None
        self._steps += 1
        self._overflows += skipped
        if (self._last is not None and scaler.scale > self._last) or scaler.scale >= scaler.max_scale:
            self._steps = self._overflows = 0
        self._last = scaler.scale
        if skipped and scaler.at_floor:
            return Advice(
                "loss scale floor",
                f"the fp16 loss scale is at its floor, precision.min_loss_scale={scaler.min_scale:g}, and gradients "
                "still overflow: they are not finite whatever the scale",
                "lower optimizer.lr or look for the NaN, or use precision.dtype='bf16', which needs no scale",
            )
        if self._steps >= PATIENCE * scaler.window and self._overflows:
            between = self._steps // (self._overflows + 1)  # good steps between two overflows
            lower = f"lower precision.loss_scale_window below {between}, or " if between > 1 else ""
            return Advice(
                "loss scale growth",
                f"the fp16 loss scale is {scaler.scale:g} and has not grown for {self._steps} steps: {self._overflows} "
                f"of them overflowed, and it takes precision.loss_scale_window={scaler.window} good ones in a row",
                f"{lower}use precision.dtype='bf16', which needs no scale",
            )
        return None
