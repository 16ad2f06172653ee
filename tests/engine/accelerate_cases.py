"""Loops of Accelerate on the engine, and of plain torch, for test_accelerate.py. Everything in float64."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from trainer_cases import place_in_environment

import megatron_ds
from megatron_ds.errors import MegatronDSError

STEPS, BATCH, ACCUMULATION = 6, 8, 2
Clip = tuple[str, float] | None


class Net(nn.Module):
    def __init__(self, seed: int = 5) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 1)
        self.double()

    def forward(self, samples: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(samples))).square().mean()


def rows() -> Tensor:
    return torch.randn(STEPS * BATCH, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3


def schedule(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def adamw(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=1e-2)


def clip_to(net: nn.Module, limit: float) -> float:
    return float(nn.utils.clip_grad_norm_(net.parameters(), limit))


def plain(clip: Clip, clipped_steps: int = STEPS) -> tuple[list[float], dict[str, Tensor]]:
    """One process, whole batches: losses and parameters. Only the first steps are clipped."""
    return plain_norms(clip, clipped_steps)[:2]


def plain_norms(clip: Clip, clipped_steps: int) -> tuple[list[float], dict[str, Tensor], list[float]]:
    net, losses, norms = Net(), [], []
    optimizer = adamw(net)
    scheduler = schedule(optimizer)
    for step, batch in enumerate(rows().split(BATCH)):
        optimizer.zero_grad()
        loss = net(batch)
        loss.backward()
        losses.append(loss.item())
        if clip is not None and step < clipped_steps:
            if clip[0] == "norm":
                norms.append(clip_to(net, clip[1]))
            else:
                nn.utils.clip_grad_value_(net.parameters(), clip[1])
        optimizer.step()
        scheduler.step()
    return losses, net.state_dict(), norms


class Run:
    """A loop that can be left and taken up again."""

    def __init__(self, config: dict[str, Any], clip: Clip, seed: int = 5, clipped_steps: int = STEPS):
        _, self.world = place_in_environment()
        from accelerate import Accelerator

        from megatron_ds.integrations.accelerate import prepare

        self.clip, self.clipped_steps = clip, clipped_steps
        self.accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATION, cpu=True)
        net = Net(seed)
        self.model, self.optimizer = prepare(self.accelerator, net, adamw(net), config)
        self.scheduler = schedule(self.optimizer)
        self.accelerator.register_for_checkpointing(self.scheduler)
        batch = BATCH // ACCUMULATION // self.world
        self.loader = self.accelerator.prepare(torch.utils.data.DataLoader(rows(), batch_size=batch))  # type: ignore[arg-type]
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.step = 0

    def micro_batch(self, batch: Tensor) -> None:
        accelerator, parameters = self.accelerator, self.model.parameters()
        with accelerator.accumulate(self.model):
            accelerator.backward(self.model(batch))
            if self.clip is not None and self.step < self.clipped_steps:
                clips = {"norm": accelerator.clip_grad_norm_, "value": accelerator.clip_grad_value_}
                norm = clips[self.clip[0]](parameters, self.clip[1])
                if norm is not None and accelerator.sync_gradients:
                    self.norms.append(float(norm))  # as a script reads it that leaves out a step by its norm
            self.optimizer.step()
            self.optimizer.zero_grad()
        if accelerator.sync_gradients:
            self.scheduler.step()
            self.losses.append(self.model.engine.last.loss)
            self.step += 1

    def until(self, step: int) -> None:
        from accelerate import skip_first_batches

        loader = skip_first_batches(self.loader, self.step * ACCUMULATION)
        for batch in loader:
            self.micro_batch(batch)
            if self.step == step:
                break

    def end(self) -> tuple[list[float], dict[str, Tensor]]:
        state = self.accelerator.get_state_dict(self.model)
        if dist.is_initialized():
            dist.barrier()
        self.model.engine.zero.close()
        return self.losses, state


def whole(config: dict[str, Any], clip: Clip, clipped_steps: int = STEPS) -> tuple[list[float], dict[str, Tensor]]:
    run = Run(config, clip, clipped_steps=clipped_steps)
    run.until(STEPS)
    assert run.norms == pytest.approx(plain_norms(clip, clipped_steps)[2], rel=1e-12)
    return run.end()


def by_hand(config: dict[str, Any]) -> tuple[list[float], dict[str, Tensor]]:
    """Accumulated without accumulate(), by the model's and the accelerator's no_sync()."""
    run = Run(config, None)
    run.accelerator.gradient_accumulation_steps = 1
    alone: list[Any] = [run.model.no_sync, lambda: run.accelerator.no_sync(run.model)]
    for number, batch in enumerate(run.loader):
        last = number % ACCUMULATION == ACCUMULATION - 1
        with contextlib.nullcontext() if last else alone[number // ACCUMULATION % 2]():
            weight = torch.ones((), dtype=torch.float64, requires_grad=True)
            loss = run.model(batch) * weight / ACCUMULATION
            run.accelerator.backward(loss, retain_graph=True)
            torch.autograd.grad(loss, weight)  # the graph is still there
        if last:
            run.optimizer.step()
            run.optimizer.zero_grad()
            run.scheduler.step()
            run.losses.append(run.model.engine.last.loss)
    return run.end()


def all_whole(cases: list[Any]) -> list[tuple[list[float], dict[str, Tensor]]]:
    return [whole(*case) for case in cases]


def prepared_again(config: dict[str, Any]) -> tuple[list[float], dict[str, Tensor], dict[str, str]]:
    """As scripts prepare everything in one call: what the engine's prepare() gave, and what it was given."""
    run = Run(config, ("norm", 0.5))
    accelerator, model, optimizer = run.accelerator, run.model, run.optimizer
    assert accelerator.prepare(model, optimizer) == (model, optimizer)
    assert accelerator.prepare(model.module, model.engine.optimizer) == (model, optimizer)
    other, said = Net(), {}
    said["other"] = message(accelerator.prepare, other)
    assert accelerator.prepare_model(other, evaluation_mode=True) is other
    other.requires_grad_(False)
    assert accelerator.prepare(other) is other
    accelerator._models.remove(other)
    place_in_environment()
    said["again"] = message(megatron_ds.initialize, model.module)
    run.until(STEPS)
    return (*run.end(), said)


def left_at_3(config: dict[str, Any], folder: str) -> Tensor:
    """Saves twice into the same folder: the second is what holds."""
    run = Run(config, ("norm", 0.5))
    run.until(2)
    run.accelerator.save_state(folder)
    run.until(3)
    run.accelerator.save_state(folder)
    drawn = torch.rand(3)
    run.end()
    return drawn


def taken_up(config: dict[str, Any], folder: str) -> tuple[list[float], dict[str, Tensor], Tensor]:
    """In a model with other weights, and from another place of the random numbers."""
    run = Run(config, ("norm", 0.5), seed=99)
    run.accelerator.load_state(folder)
    drawn = torch.rand(3)
    assert run.model.engine.steps == 3
    run.step = 3
    run.until(STEPS)
    return (*run.end(), drawn)


def left_and_taken_up(config: dict[str, Any], other: dict[str, Any], folder: str) -> Any:
    drawn = left_at_3(config, folder)
    if dist.is_initialized():
        dist.barrier()
    losses, state, again = taken_up(other, folder)
    assert torch.equal(drawn, again)
    return losses, state


def automatic_names(folder: str) -> tuple[list[str], int]:
    """Accelerate's own rules of names and limits hold."""
    from accelerate.utils import ProjectConfiguration

    run = Run({"zero": {"stage": 2}}, None)
    run.accelerator.project_configuration = ProjectConfiguration(
        project_dir=folder, automatic_checkpoint_naming=True, total_limit=2
    )
    for step in (1, 2, 3):
        run.until(step)
        run.accelerator.save_state()
    run.accelerator.load_state()
    steps = run.model.engine.steps
    run.end()
    return sorted(path.name for path in (Path(folder) / "checkpoints").iterdir()), steps


def message(function: Any, *arguments: Any, **keywords: Any) -> str:
    try:
        function(*arguments, **keywords)
    except MegatronDSError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def refusals(folder: str) -> dict[str, str]:
    from megatron_ds.integrations.accelerate import prepare

    run, found = Run({"zero": {"stage": 3, "persistence_threshold": 20}}, None), {}
    accelerator, model = run.accelerator, run.model
    parameters, weight = list(model.parameters()), model.module.second.weight
    batches = iter(run.loader)
    assert weight.grad is None
    run.micro_batch(next(batches))
    found["save"] = message(accelerator.save_state, f"{folder}/none")
    found["load"] = message(accelerator.load_state, folder)
    assert not Path(f"{folder}/none").exists()
    with accelerator.accumulate(model):
        accelerator.backward(model(next(batches)))
        found["direct"] = message(nn.utils.clip_grad_norm_, parameters, 1.0)
        found["read"] = message(lambda: weight.grad.abs())
        found["write"] = message(lambda: weight.grad.mul_(2))
        found["harmless"] = f"{list(weight.grad.shape)} {weight.grad.dtype} {weight.grad!r}"
        found["some"] = message(accelerator.clip_grad_norm_, [weight], 1.0)
        found["one"] = message(accelerator.clip_grad_value_, weight, 1.0)
        found["zero"] = message(accelerator.clip_grad_value_, parameters, 0.0)
        found["l1"] = message(accelerator.clip_grad_norm_, parameters, 1.0, norm_type=1)
        found["inputs"] = message(accelerator.backward, torch.zeros(()), inputs=[weight])
        accelerator.clip_grad_norm_(parameters, 1.0)
        found["both"] = message(accelerator.clip_grad_value_, parameters, 1.0)
        run.optimizer.step()
    assert weight.grad is None
    found["missing"] = message(accelerator.load_state, folder)
    theirs = torch.optim.AdamW([weight])
    theirs.state[weight]["step"] = 1
    found["moments"] = message(run.optimizer.load_state_dict, theirs.state_dict())
    saved = run.optimizer.state_dict()
    run.optimizer.load_state_dict(saved)
    found["earlier"] = message(run.optimizer.load_state_dict, {**saved, "updates": 5})
    with model.no_sync():
        accelerator.backward(model(next(batches)))
    found["local"] = message(run.optimizer.step)
    net = Net()
    found["second"] = message(prepare, accelerator, net, adamw(net))
    accelerator.free_memory()
    found["freed"] = str(trained_after_free_memory(accelerator))
    return found


def trained_after_free_memory(accelerator: Any) -> bool:
    """Whether another model and optimizer take a step as in plain torch."""
    from megatron_ds.integrations.accelerate import prepare

    batch, want = rows()[:4], Net()
    want(batch).backward()
    net = Net()
    model, optimizer = prepare(accelerator, net, torch.optim.SGD(net.parameters(), lr=1.0), {"zero": {"stage": 2}})
    accelerator.backward(model(batch) * accelerator.gradient_accumulation_steps)
    optimizer.step()
    accelerator.free_memory()
    model.engine.close()
    return all(torch.allclose(a, b - b.grad, rtol=1e-12) for a, b in zip(net.parameters(), want.parameters()))


def mixed_precision() -> dict[str, str]:
    place_in_environment()
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    from megatron_ds.integrations.accelerate import prepare

    found = {}
    for mixed, config in (("bf16", {}), ("bf16", {"precision": {"dtype": "fp32"}}), ("no", {})):
        AcceleratorState._reset_state(True)
        net = Net().float()
        accelerator = Accelerator(cpu=True, mixed_precision=mixed)
        found[f"{mixed} {len(config)}"] = message(prepare, accelerator, net, adamw(net), config) or str(
            net.first.weight.dtype
        )
    return found


def settings_of_the_accelerator() -> tuple[dict[str, str], list[Any]]:
    """What is refused, and what the loss scale becomes with a configuration that says nothing and one that does."""
    place_in_environment()
    from accelerate import Accelerator, ParallelismConfig
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType, GradScalerKwargs

    from megatron_ds.integrations.accelerate import prepare

    def prepared(config: Any, mixed: str = "no", layout: Any = None, kind: Any = None, **more: Any) -> Any:
        AcceleratorState._reset_state()
        accelerator, net = Accelerator(cpu=True, **more), Net().float()
        # What Accelerate itself sets on GPUs alone.
        accelerator.state.parallelism_config, accelerator.state._mixed_precision = layout, mixed
        accelerator.state.distributed_type = kind or accelerator.state.distributed_type
        engine = prepare(accelerator, net, adamw(net), config)[0].engine
        engine.zero.close()
        return engine.train_step.scaler

    def scale(config: Any = None, **settings: Any) -> Any:
        scaler = prepared(config, mixed="fp16", kwargs_handlers=[GradScalerKwargs(**settings)])
        return scaler.scale, scaler.window, scaler.hysteresis, scaler.dynamic

    refused = {
        "fsdp": message(prepared, None, kind=DistributedType.FSDP),
        "tp": message(prepared, None, layout=ParallelismConfig(tp_size=2)),
        "replicas": message(prepared, None, layout=ParallelismConfig(dp_replicate_size=2)),
        "factor": message(scale, growth_factor=4.0),
    }
    said = {"precision": {"dtype": "fp16", "loss_scale_window": 7}}
    return refused, [scale(init_scale=256.0, growth_interval=50), scale(said, init_scale=256.0), scale(enabled=False)]


def two_schedules() -> str:
    """The configuration's, and the loop's."""
    warmup = {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-2}}
    run = Run({"zero_optimization": {"stage": 1}, "scheduler": warmup}, None)
    said = message(lambda: [run.micro_batch(batch) for batch in run.loader])
    run.model.engine.zero.close()
    return said


def clipped_in_fp16(loss_scale: float) -> Tensor:
    """What SGD with a learning rate of 1 adds to a weight of zero."""
    net = nn.Linear(4, 1, bias=False)
    nn.init.zeros_(net.weight)
    precision = {"dtype": "fp16", "loss_scale": loss_scale}
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    engine = megatron_ds.initialize(
        net, {"precision": precision}, optimizer, loss=lambda call, batch: call(batch).mean()
    )
    engine.train_step.clip_value = 0.25
    engine.train_batch([torch.tensor([[0.125, -0.0625, 2.0, -1.0]]).half()])
    moved = engine.get_parameter("weight")
    engine.zero.close()
    return moved
