"""The same training by DistributedDataParallel and by an engine, on the same ranks, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import combinations, product
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from accelerate_cases import clip_to
from engine_cases import NUMBERS, OPTIMIZERS, Ran, look, model, schedule
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import megatron_ds
from megatron_ds.testing import device_of_rank

STEPS = 3
SAMPLES = 36  # a global batch: divides by 1 to 4 ranks x 1 or 3 micro-batches
FACTORS: dict[str, tuple[Any, ...]] = {
    "ranks": (1, 2, 3, 4),
    "stage": (0, 1, 2, 3),
    "optimizer": ("AdamW", "SGD", "NAdam", "RMSprop"),
    "offload": ("none", "cpu", "nvme"),
    "accumulation": (1, 3),
    "clip": (0.0, 0.05),
    "batches": (False, True),
}


class Row(NamedTuple):
    ranks: int
    stage: int
    optimizer: str
    offload: str
    accumulation: int
    clip: float
    batches: bool  # train_batch() instead of a loop


def rows() -> list[Row]:
    """Of all that are legal, few in which every legal pair of settings occurs: each row has the most new pairs."""
    legal = [row for row in map(Row._make, product(*FACTORS.values())) if row.offload == "none" or row.stage > 0]
    missing = {pair for row in legal for pair in pairs(row)}
    chosen = []
    while missing:
        best = max(legal, key=lambda row: len(missing & pairs(row)))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


def pairs(row: Row) -> set[Any]:
    return set(combinations(zip(row._fields, row), 2))


def batches(step: int, accumulation: int, device: torch.device) -> Iterator[Tensor]:
    """This rank's micro-batches."""
    generator = torch.Generator().manual_seed(300 + step)
    whole = torch.randn(SAMPLES, 6, generator=generator, dtype=torch.float64)
    return iter(whole.to(device).chunk(dist.get_world_size())[dist.get_rank()].chunk(accumulation))


def by_ddp(row: Row) -> list[Ran]:
    """Each step's loss, gradients and norm, and with the last one's what training leaves."""
    device = device_of_rank(dist.get_rank(), row.ranks)
    net = model(seed=3 + dist.get_rank()).to(device)  # rank 0's weights hold
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    optimizer = OPTIMIZERS[row.optimizer](trained.values())
    scheduler = schedule(optimizer)
    for parameter in trained.values():  # an unused one has a gradient of zero and not none, so that it decays
        parameter.grad = torch.zeros_like(parameter)
    ddp = DistributedDataParallel(net, find_unused_parameters=True)
    ddp.train()
    steps = []
    for step in range(STEPS):
        optimizer.zero_grad(set_to_none=False)
        ran, total = Ran(), torch.zeros((), dtype=torch.float64, device=device)
        for number, batch in enumerate(batches(step, row.accumulation, device)):
            with ddp.no_sync() if number < row.accumulation - 1 else nullcontext():
                loss = ddp(batch) / row.accumulation
                loss.backward()
            total += loss.detach()
        dist.all_reduce(total)
        ran.losses.append(total.item() / row.ranks)
        ran.gradients = {name: p.grad.clone().cpu() for name, p in trained.items() if p.grad is not None}
        ran.norms.append(clip_to(net, row.clip or 1e9))
        optimizer.step()
        scheduler.step()
        steps.append(ran)
    ran.parameters = {name: p.detach().cpu() for name, p in net.named_parameters()}
    for name, parameter in trained.items():
        ran.state[name] = {
            kind: value.cpu()
            for kind, value in optimizer.state[parameter].items()
            if isinstance(value, Tensor) and value.shape == parameter.shape and kind not in NUMBERS
        }
    return steps


def by_engine(row: Row, folder: str) -> list[Ran]:
    zero: dict[str, Any] = {"stage": row.stage, "bucket_mb": 0.0004}
    if row.stage == 3:
        zero["persistence_threshold"] = 20
    if row.offload != "none":
        place = {"device": row.offload, **({"path": folder} if row.offload == "nvme" else {})}
        zero["offload_optimizer"] = place
        if row.stage == 3:
            zero["offload_parameters"] = place
    net = model(seed=3 + dist.get_rank())
    optimizer = OPTIMIZERS[row.optimizer]([p for p in net.parameters() if p.requires_grad])
    config = {"accumulation": row.accumulation, "optimizer": {"clip_norm": row.clip}, "zero": zero}
    engine = megatron_ds.initialize(net, config, optimizer, schedule(optimizer))
    names = [name for name, p in net.named_parameters() if p.requires_grad]
    steps = []
    for step in range(STEPS):
        ran, own = Ran(), batches(step, row.accumulation, engine.mesh.device)
        if row.batches:
            result = engine.train_batch((batch,) for batch in own)
        else:
            engine.train()
            for batch in own:
                engine.backward(engine(batch))
                if engine.is_boundary:
                    ran.gradients = {name: engine.get_gradient(name).cpu() for name in names}
                maybe = engine.step()
            assert maybe is not None
            result = maybe
        ran.losses.append(result.loss)
        ran.norms.append(result.grad_norm)
        steps.append(ran)
    look(engine, steps[-1])  # a collective a tensor: most of the test's time
    dist.barrier()
    engine.zero.close()
    return steps


def both(own: list[Row], folder: str) -> list[tuple[list[Ran], list[Ran]]]:
    return [(by_engine(row, folder), by_ddp(row)) for row in own]
