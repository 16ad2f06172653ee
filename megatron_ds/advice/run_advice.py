"""Warnings for settings that work and cost more than they need to, said once on rank 0 while a run is under way.

The rules are :mod:`megatron_ds.advice.rules`. Here they get their numbers: from the optimizer, from what the first
steps took of the device, and from the model's FLOPs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_ds.advice import rules
from megatron_ds.advice.rules import Advice, Adviser, Link, LossScaleWatch
from megatron_ds.host import free_host_memory, peak_memory_bytes
from megatron_ds.mesh import Mesh
from megatron_ds.optim.loss_scaler import LossScaler
from megatron_ds.pipeline.stage import Activations
from megatron_ds.zero.optimizer import ZeroOptimizer

ACHIEVED = 0.4
"""Of a device's peak: what a well-tuned step reaches."""
LINKS = {"cpu": Link(25e9, 25e9, True), "nvme": Link(3e9, 2e9, False)}
"""Assumed of PCIe 4.0 x16 and of one NVMe disk."""
FLOOR = 1e9
"""Bytes of a run below which nothing is said of how it spends memory: it fits anywhere, and who tries stage 3 out on a
laptop wants to see stage 3. (A tenth of the smallest GPU that anybody trains on.)"""
SETTLED = 2
"""Steps after which a device's peak is that of every further step."""


class RunAdvice:
    """Looks at a run after every step.

    Args:
        micro_batches: of a step, on one rank.
        warn: takes a line; called on rank 0 alone.
    """

    def __init__(
        self, zero: ZeroOptimizer, scaler: LossScaler, mesh: Mesh, micro_batches: int, warn: Callable[[str], object]
    ):
        self.zero, self.scaler, self.mesh = zero, scaler, mesh
        self.micro_batches = micro_batches
        self._watch = LossScaleWatch()
        self._adviser = Adviser(warn)
        self._steps = 0

    def before(self, advice: list[Advice | None]) -> None:
        """Say what is known beforehand."""
        if self.mesh.rank == 0:
            self._adviser(advice)

    def after_step(self, skipped: bool) -> None:
        if self.mesh.rank != 0:
            return
        self._steps += 1
        self._adviser([self._watch(self.scaler, skipped)])
        if self._steps == SETTLED and self.zero.config.stage >= 2:
            self._adviser([self._stage()])

    def _stage(self) -> Advice | None:
        layout = self.zero.layout
        if sum(layout.at_stage(0).bytes().by_kind.values()) < FLOOR:
            return None
        device, peak = self.mesh.device, peak_memory_bytes(self.mesh.device)
        if device.type == "cuda":
            free = torch.cuda.mem_get_info(device)[1]
        else:  # as if all ranks were on this machine: rather too little advice than wrong advice
            free = peak + free_host_memory() // self.mesh.world.size
        others = max(0, peak - layout.bytes(self.micro_batches).total("device"))
        return rules.stage_too_high(layout, self.micro_batches, free, others)


def known_beforehand(
    zero: ZeroOptimizer,
    micro_batches: int,
    in_flight: int,
    activations: Activations | None,
    flops: float,
    peak_tflops: float | None,
    ranks_sharing: int,
) -> list[Advice | None]:
    """Advice on a pretraining run that has been built.

    Args:
        in_flight: micro-batches of which this rank keeps activations at once. activations: of one of them, if known.
        flops: of one rank's step. peak_tflops: of its device; None: not known, and nothing is said of transfers.
        ranks_sharing: ranks of a node.
    """
    found = [recomputation(zero, micro_batches, in_flight, activations)]
    if peak_tflops is not None:
        compute = flops / (ACHIEVED * peak_tflops * 1e12)
        found.append(transfers(zero, compute, ranks_sharing))
        found.append(transfers(zero, compute, ranks_sharing, 2 * micro_batches))
    return found


def transfers(zero: ZeroOptimizer, compute: float, ranks_sharing: int, passes: int = 0) -> Advice | None:
    """Whether what is offloaded moves longer than a step computes, in seconds.

    Args:
        passes: of a step, for each of which parameters come in; they go out once. 0: of the optimizer's state.
    """
    offload = zero.config.offload_parameters if passes else zero.config.offload_optimizer
    places, kinds = zero.bytes_by_store(), ("parameters",) if passes else ("master", "optimizer")
    away = sum(places[kind][place] for kind in kinds for place in ("host", "disk"))
    if offload.device == "none" or away < rules.TRIFLE:
        return None
    return rules.offload_outlasts_compute(
        away * (passes or 1),
        away,
        offload.ratio,
        compute,
        LINKS[offload.device],
        of_parameters=passes > 0,
        ranks_sharing=ranks_sharing if offload.device == "nvme" else 1,
    )


def recomputation(
    zero: ZeroOptimizer,
    micro_batches: int,
    in_flight: int,
    activations: Activations | None,
    switch_off: str = "recompute.mode='none'",
) -> Advice | None:
    """Whether a run's recomputation is worth it. ``activations``: None if not known."""
    held = zero.layout.bytes(micro_batches)
    on_device = held.total("device")
    if activations is None or on_device + in_flight * activations.no_recompute < FLOOR:
        return None
    gradients = held.total("device", ("gradients",))
    whole = zero.layout.keeps_gradients_whole(micro_batches)
    once = activations.loss * (in_flight - 1) // in_flight  # of a micro-batch's share, as the losses come one by one
    of_one = (activations.no_recompute - once, activations.stored - once, activations.recompute_peak)
    return rules.recomputation_saves_little(
        micro_batches, in_flight, *of_one, gradients, on_device - gradients, whole, switch_off
    )
