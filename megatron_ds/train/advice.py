"""Warnings for settings that work and cost more than they need to, said once on rank 0 while a run is under way.

The rules are :mod:`megatron_ds.zero.advice`; here they get their numbers: from the optimizer, from what the first steps
took of the device, and from the model's FLOPs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from megatron_ds.config import RunConfig
from megatron_ds.host import free_host_memory
from megatron_ds.mesh import Mesh
from megatron_ds.optim.loss_scaler import LossScaler
from megatron_ds.train.callbacks import Callback
from megatron_ds.train.metrics import peak_memory_bytes
from megatron_ds.train.step import StepResult
from megatron_ds.zero.advice import (
    Advice,
    Adviser,
    LossScaleWatch,
    offload_outlasts_compute,
    recomputation_saves_little,
    stage_too_high,
)
from megatron_ds.zero.estimate import Layout, held_on_device
from megatron_ds.zero.optimizer import ZeroOptimizer

ACHIEVED = 0.4
"""Of a device's peak: what a well-tuned step reaches."""
RATES = {"cpu": (25e9, 25e9, True), "nvme": (3e9, 2e9, False)}
"""Bytes a second in and out, assumed for PCIe 4.0 x16 and for one NVMe disk, and whether both run at once."""
SETTLED = 2
"""Steps after which a device's peak is that of every further step."""


class RunAdvice:
    """Looks at a run after every step.

    Args:
        micro_batches: of a step, on one rank.
        say: takes a line; called on rank 0 alone.
    """

    def __init__(
        self, zero: ZeroOptimizer, scaler: LossScaler, mesh: Mesh, micro_batches: int, say: Callable[[str], object]
    ):
        self.zero, self.scaler, self.mesh = zero, scaler, mesh
        self.micro_batches = micro_batches
        self._watch = LossScaleWatch()
        self._adviser = Adviser(say)
        self._steps = 0

    def before(self, advice: list[Advice | None]) -> None:
        """Say what is known beforehand."""
        if self.mesh.rank == 0:
            self._adviser(advice)

    def after_step(self, result: StepResult) -> None:
        if self.mesh.rank != 0:
            return
        self._steps += 1
        self._adviser([self._watch(self.scaler, result.skipped)])
        if self._steps == SETTLED and self.zero.config.stage >= 2:
            self._adviser([self._stage()])

    def _stage(self) -> Advice | None:
        model, layout = self.zero.size, layout_of(self.zero, self.micro_batches)
        device, peak = self.mesh.device, peak_memory_bytes(self.mesh.device)
        if device.type == "cuda":
            free = torch.cuda.mem_get_info(device)[1]
        else:  # as if all ranks were on this machine: rather too little advice than wrong advice
            free = peak + free_host_memory() // self.mesh.world.size
        return stage_too_high(model, layout, free, max(0, peak - held_on_device(model, layout)))


class AdviceCallback(Callback):
    """The same as a callback of the loop, with advice that is ``known`` when it starts."""

    def __init__(self, advice: RunAdvice, known: list[Advice | None]):
        self.advice, self.known = advice, known

    def on_start(self, step: int, total_steps: int, skipped: int) -> None:
        self.advice.before(self.known)

    def on_step(self, step: int, result: StepResult, speed: Mapping[str, float]) -> None:
        self.advice.after_step(result)


def layout_of(zero: ZeroOptimizer, micro_batches: int) -> Layout:
    config = zero.config
    state, parameters = config.offload_optimizer, config.offload_parameters
    return Layout(
        config.stage,
        zero.shard.size if config.stage else zero.replicate.size,
        micro_batches,
        config.keep_whole,
        state.ratio if state.device != "none" else 0.0,
        parameters.ratio if parameters.device != "none" else 0.0,
    )


def known_beforehand(
    config: RunConfig,
    zero: ZeroOptimizer,
    micro_batches: int,
    in_flight: int,
    layers: int,
    flops: float,
    peak_tflops: float | None,
    ranks_sharing: int,
) -> list[Advice | None]:
    """Advice on a pretraining run that has been built.

    Args:
        in_flight: micro-batches of which this rank keeps activations at once. layers: on this rank.
        flops: of one rank's step. peak_tflops: of its device; None: not known, and nothing is said of transfers.
        ranks_sharing: ranks of a node.
    """
    found: list[Advice | None] = [_recomputation(config, zero, micro_batches, in_flight, layers)]
    places = zero.bytes_by_store()
    for key, kinds in (("offload_optimizer", ("master", "optimizer")), ("offload_parameters", ("parameters",))):
        offload = getattr(config.zero, key)
        if offload.device == "none" or peak_tflops is None:
            continue
        read, write, duplex = RATES[offload.device]
        away = sum(places[kind][place] for kind in kinds for place in ("host", "disk"))
        # Parameters come for each pass of each micro-batch, and go back once.
        times = 1 if key == "offload_optimizer" else 2 * micro_batches
        found.append(
            offload_outlasts_compute(
                away * times,
                offload.ratio,
                flops,
                ACHIEVED * peak_tflops * 1e12,
                read,
                write * times,
                duplex,
                f"zero.{key}",
                ranks_sharing if offload.device == "nvme" else 1,
            )
        )
    return found


def _recomputation(
    config: RunConfig, zero: ZeroOptimizer, micro_batches: int, in_flight: int, layers: int
) -> Advice | None:
    if config.recompute.mode not in ("full", "every_n"):
        return None
    model, layout = zero.size, layout_of(zero, micro_batches)
    plain, kept, transient = activation_bytes(config, layers, model.width)
    whole = layout.stage < 2 or layout.keep_whole
    gradients = model.parameters * model.wide // (1 if whole else layout.shard)
    other = held_on_device(model, layout) - gradients
    return recomputation_saves_little(micro_batches, in_flight, plain, kept, transient, gradients, max(0, other), whole)


def activation_bytes(config: RunConfig, layers: int, width: int) -> tuple[int, int, int]:
    """Bytes of one micro-batch on one rank: kept without recomputation, kept with it, and computed again at a time.

    As Korthikanti et al. 2022 (arXiv 2205.05198) count, for an MLP four times as wide as h, without dropout and with a
    fused attention core: 16 elements for each of the b x s x h places of a layer within the tensor-parallel region and
    4 outside (measured: 20.06 on one rank), of which full recomputation keeps the input. The head works in chunks of
    bounded size, which are left out.
    """
    train, model, mesh = config.train, config.model, config.mesh
    places = train.micro_batch * train.sequence_length * model.hidden_size
    shared = mesh.tp if mesh.sequence_parallel else 1
    layer = places * 16 * width // mesh.tp + places * 4 * width // shared
    again = layers if config.recompute.mode == "full" else -(-layers // config.recompute.every)
    return layers * layer, again * (places * width // shared) + (layers - again) * layer, layer
