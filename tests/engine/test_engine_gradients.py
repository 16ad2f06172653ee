"""Hooks that change gradients on their way, and layers frozen around a step: the numbers of DDP, in float64."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import megatron_ds
from megatron_ds.testing import run_ranks

STEPS, ACCUMULATION = 3, 2


def net() -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    for parameter in model[2].parameters():
        parameter.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))
    model[4].register_full_backward_hook(lambda module, given, gradients: (given[0].clamp(-0.002, 0.002),))
    return model


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def batches(step: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
    return torch.randn(8, 6, generator=generator, dtype=torch.float64).chunk(ACCUMULATION)


def masked_late(model: nn.Module) -> None:
    """Rows are left out by a hook that comes after the wrapper's, or the engine's, own."""

    def mask(parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad[:3] = 0

    model[2].weight.register_post_accumulate_grad_hook(mask)  # type: ignore[index]


def flip(model: nn.Module, step: int, number: int | None) -> None:
    """Before a step's micro-batch ``number``, or before its update: layers are frozen that have a gradient or none."""
    first, middle, last = model[0], model[2], model[4]  # type: ignore[index]
    first.requires_grad_(number is not None)  # always frozen when the update comes
    middle.requires_grad_(number is None or step != 1)  # in one step only then not
    last.requires_grad_(number != 1)  # in the first micro-batch alone


def by_ddp() -> dict[str, Tensor]:
    model = net()
    optimizer, ddp = adamw(model), DistributedDataParallel(model, find_unused_parameters=True)
    masked_late(model)
    for step in range(STEPS):
        optimizer.zero_grad()
        for number, batch in enumerate(batches(step)):
            flip(model, step, number)
            # Summed by hand: DDP would not see what is frozen in the micro-batch that it reduces.
            with ddp.no_sync():
                (ddp(batch).square().mean() / ACCUMULATION).backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()
        flip(model, step, None)
        optimizer.step()
    return model.state_dict()


def by_engine(stage: int) -> dict[str, Tensor]:
    model = net()
    zero = {"stage": stage, "bucket_mb": 0.0005, **({"persistence_threshold": 0} if stage == 3 else {})}
    config = {"zero": zero, "accumulation": ACCUMULATION}
    engine = megatron_ds.initialize(model, config, adamw(model))
    masked_late(model)
    for step in range(STEPS):
        for number, batch in enumerate(batches(step)):
            flip(model, step, number)
            engine.backward(engine(batch).square().mean())
            flip(model, step, None)
            engine.step()
    state = engine.state_dict()
    engine.close()
    return state


def both() -> tuple[dict[str, Tensor], dict[int, dict[str, Tensor]]]:
    return by_ddp(), {stage: by_engine(stage) for stage in range(4)}


def test_gradients_are_changed_and_kept_as_in_ddp() -> None:
    for want, found in run_ranks(both, 2):
        for stage, state in found.items():
            for key, value in want.items():
                assert (state[key] - value).abs().max() < 1e-9, (stage, key)
