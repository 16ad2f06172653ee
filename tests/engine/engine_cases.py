"""Models, data and runs for the tests of the engine: the same training by plain torch and by an engine on any ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import megatron_ds
from megatron_ds.engine import Engine

SAMPLES = 18  # a global batch: divides by 1, 2, 3 ranks x 1, 3 micro-batches
STEPS = 3
NUMBERS = ("step", "mu_product", "eta", "mu")  # of a 0-d parameter these look like its state
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9, dampening=0.2, weight_decay=0.1),
    "SGD plain": lambda p: torch.optim.SGD(p, lr=1e-1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.5, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-1, initial_accumulator_value=0.1),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=1e-2),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=1e-2),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=1e-2),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=1e-2),
}


class Awkward(nn.Module):
    """``[n, 6]`` to a mean loss: layers used twice and shared, parameters frozen, unused, empty, or of one element."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = nn.Linear(6, 8)
        self.twice = nn.Linear(8, 8)
        self.shared = nn.Linear(8, 8, bias=False)
        self.shared_again = nn.Linear(8, 8, bias=False)
        self.shared_again.weight = self.shared.weight
        self.frozen = nn.Linear(8, 8)
        self.frozen.requires_grad_(False)
        self.unused = nn.Linear(3, 5)
        self.empty = nn.Parameter(torch.zeros(0, 4))
        self.scale = nn.Parameter(torch.ones(()))
        self.norm = nn.BatchNorm1d(8, track_running_stats=True)
        self.norm.eval()
        self.output = nn.Linear(8, 1)

    def train(self, mode: bool = True) -> Awkward:
        super().train(mode)
        self.norm.eval()  # statistics of a batch would depend on how it is cut
        return self

    def forward(self, samples: Tensor) -> Tensor:
        hidden = torch.tanh(self.twice(torch.tanh(self.twice(self.inputs(samples)))))
        hidden = self.shared_again(torch.relu(self.shared(hidden)) + self.frozen(hidden)) * self.scale
        return self.output(self.norm(hidden)).square().mean() + self.empty.sum()


@dataclass(frozen=True)
class Case:
    optimizer: str = "AdamW"
    stage: int = 1
    accumulation: int = 1
    clip: float = 0.0
    scheduler: bool = True
    batches: bool = False  # train_batch() instead of a loop
    zero: dict[str, Any] = field(default_factory=dict)
    empty: bool = False  # parameters without memory at first

    @property
    def config(self) -> dict[str, Any]:
        zero = {"stage": self.stage, "bucket_mb": 0.0004, **self.zero}
        if self.stage == 3:
            zero["persistence_threshold"] = 20
        return {"accumulation": self.accumulation, "optimizer": {"clip_norm": self.clip}, "zero": zero}


@dataclass
class Ran:
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)  # of the last step
    parameters: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def model(seed: int = 3) -> Awkward:
    torch.manual_seed(seed)
    return Awkward().double()


def samples(step: int) -> Tensor:
    return torch.randn(SAMPLES, 6, generator=torch.Generator().manual_seed(100 + step), dtype=torch.float64)


def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))


def plain(case: Case, steps: int = STEPS) -> Ran:
    """One process, plain torch, the whole batch at once. An unused parameter has a gradient of zero, as in DDP."""
    net, ran = model(), Ran()
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    optimizer = OPTIMIZERS[case.optimizer](trained.values())
    scheduler = schedule(optimizer) if case.scheduler else None
    net.train()
    for step in range(steps):
        for parameter in trained.values():
            parameter.grad = torch.zeros_like(parameter)
        loss = net(samples(step))
        loss.backward()
        ran.losses.append(loss.item())
        ran.gradients = {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}
        ran.norms.append(nn.utils.clip_grad_norm_(trained.values(), case.clip or math.inf).item())
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    ran.parameters = {name: p.detach() for name, p in net.named_parameters()}
    for name, parameter in trained.items():
        kept = optimizer.state[parameter].items()
        ran.state[name] = {
            k: v for k, v in kept if isinstance(v, Tensor) and v.shape == parameter.shape and k not in NUMBERS
        }
    return ran


def engine_of(case: Case, net: nn.Module | None = None) -> Engine:
    net = model() if net is None else net
    optimizer = OPTIMIZERS[case.optimizer]([p for p in net.parameters() if p.requires_grad])
    return megatron_ds.initialize(net, case.config, optimizer, schedule(optimizer) if case.scheduler else None)


def own_samples(engine: Engine, step: int) -> list[Tensor]:
    """This rank's micro-batches of a step."""
    axis = engine.mesh.data
    return list(samples(step).chunk(axis.size)[axis.rank].chunk(engine.sizes.accumulation))


def take_step(engine: Engine, step: int, ran: Ran, batches: bool = False) -> None:
    if batches:
        result = engine.train_batch(iter([(batch,) for batch in own_samples(engine, step)]))
    else:
        engine.train()
        for batch in own_samples(engine, step):
            loss = engine(batch.to(engine.mesh.device))
            engine.backward(loss)
            if engine.is_boundary and step == STEPS - 1:
                names = [name for name, p in engine.module.named_parameters() if p.requires_grad]
                ran.gradients = {name: engine.get_gradient(name).cpu() for name in names}
            maybe = engine.step()
        assert maybe is not None
        result = maybe
    ran.losses.append(result.loss)
    ran.norms.append(result.grad_norm)


def look(engine: Engine, ran: Ran) -> None:
    ran.parameters = {name: engine.get_parameter(name).cpu() for name, _ in engine.module.named_parameters()}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            ran.state[name] = {
                kind: engine.get_optimizer_state(name, kind).cpu() for kind in engine.zero.kinds_of(name)
            }


def run(case: Case) -> Ran:
    engine, ran = engine_of(case), Ran()
    for step in range(STEPS):
        take_step(engine, step, ran, case.batches)
    look(engine, ran)
    whole = engine.state_dict()
    for name, tensor in ran.parameters.items():
        assert torch.equal(whole[name], tensor), name
    assert whole["shared_again.weight"] is whole["shared.weight"] and "norm.running_mean" in whole
    engine.zero.close()
    return ran


def run_all(cases: list[Case]) -> list[Ran]:
    return [run(case) for case in cases]
