"""Optimizers with the habits of well-known ones outside torch.optim, and the same training by plain torch and engine.

``run`` and ``plain`` take any optimizer; the tool that fills the table of optimizers in the documentation has the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import megatron_ds

STEPS, SAVED_AFTER, LOOKED_AFTER = 6, 3, 2


class Counting(torch.optim.Optimizer):
    """Adam whose step is a number of the group that the first step makes, as AdEMAMix's and Adan's is.

    It puts new tensors in the place of old ones, in its state, its gradients and its parameters.
    """

    def __init__(self, params: Any, lr: float = 0.02, betas: tuple[float, float] = (0.9, 0.99)):
        super().__init__(params, {"lr": lr, "betas": betas, "limit": float("inf"), "computes_in": torch.float64})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            first, second = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["average"], state["square"] = torch.zeros_like(p), torch.zeros_like(p)
                p.grad = p.grad + 0.01 * p.data
                state["average"] = first * state["average"] + (1 - first) * p.grad
                state["square"] = second * state["square"] + (1 - second) * p.grad**2
                mean = state["average"] / (1 - first ** group["step"])
                p.data = p.data - group["lr"] * mean / ((state["square"] / (1 - second ** group["step"])).sqrt() + 1e-8)


class ScheduleFree(torch.optim.Optimizer):
    """Schedule-Free SGD (Defazio et al. 2024): steps are at y; ``eval()`` makes the weights x, their average."""

    def __init__(self, params: Any, lr: float = 0.1, beta: float = 0.9):
        super().__init__(params, {"lr": lr, "beta": beta, "weight_sum": 0.0, "lr_max": -1.0, "train_mode": False})

    def _mode(self, train: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] != train:
                weight = 1 - group["beta"] if train else 1 - 1 / group["beta"]
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.data.lerp_(self.state[p]["z"], weight)
            group["train_mode"] = train

    def train(self) -> None:
        self._mode(True)

    def eval(self) -> None:
        self._mode(False)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if not group["train_mode"]:
                raise RuntimeError("not in train mode")
            group["lr_max"] = max(group["lr_max"], group["lr"])
            group["weight_sum"] += group["lr_max"] ** 2
            share = group["lr_max"] ** 2 / group["weight_sum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                z = self.state[p].setdefault("z", p.detach().clone())
                p.data.lerp_(z, share).add_(p.grad, alpha=group["lr"] * (group["beta"] * (1 - share) - 1))
                z.sub_(p.grad, alpha=group["lr"])


class KeyInState(torch.optim.Optimizer):
    """Counts steps under a key of ``optimizer.state`` that is no parameter, in a tensor, as MADGRAD does.

    And in an attribute of its own, as StableSPAM does. Its groups have no ``lr``, as A2Grad's.
    """

    def __init__(self, params: Any, rate: float = 0.05):
        super().__init__([{"params": group["params"]} for group in params], {"rate": rate})
        self.total_step = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        count = self.state.setdefault("k", torch.tensor([0]))  # type: ignore[arg-type, call-overload]
        self.total_step += 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    momentum.mul_(0.9).add_(p.grad)
                    p.data.sub_(momentum, alpha=group["rate"] / float(count + 1) ** 0.5 / (1 + 0.1 * self.total_step))
        count += 1


class Distance(torch.optim.SGD):
    """Its step is a number of the group that is estimated from all parameters, as Prodigy's ``d`` is."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            here = [p for p in group["params"] if p.grad is not None]
            for p in here:
                self.state[p].setdefault("begin", p.detach().clone())
            moved = sum(float(((self.state[p]["begin"] - p) * p.grad).sum()) for p in here)
            norm = sum(float(p.grad.abs().sum()) for p in here)
            group["d"] = max(group.get("d", 1e-3), moved / max(norm, 1e-30))
            for p in here:
                p.data.sub_(p.grad, alpha=group["d"])


class Clipping(torch.optim.SGD):
    """Clips by the norm over all of its parameters, where that is above 50: of most gradients nobody sees it."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            norm = torch.stack([p.grad.norm() for p in group["params"]]).norm()
            for p in group["params"]:
                p.data.sub_(p.grad * (50 / norm).clamp(max=1), alpha=group["lr"])


class FirstRate(torch.optim.SGD):
    """Has the first group's rate for all groups."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(p.grad, alpha=self.param_groups[0]["lr"])


class Bounded(torch.optim.SGD):
    """Keeps the rates with which the groups began in a list, as AdaBound does."""

    def __init__(self, params: Any, lr: float = 0.1):
        super().__init__(params, lr=lr)
        self.base_lrs = [group["lr"] for group in self.param_groups]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group, base in zip(self.param_groups, self.base_lrs):
            for p in group["params"]:
                p.data.sub_(p.grad, alpha=group["lr"] ** 2 / base)


class Cautious(torch.optim.SGD):
    """Lion that leaves out what is against the gradient, and makes up for that by the mean over the parameter."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                step = average.lerp(p.grad, 0.1).sign()
                agrees = (step * p.grad > 0).to(p.dtype)
                p.data.sub_(step * agrees / agrees.mean().clamp(min=1e-3), alpha=group["lr"])
                average.lerp_(p.grad, 0.01)


class OfImages(torch.optim.SGD):
    """Centres the gradients of convolutions alone, as Ranger can."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                step = p.grad
                if p.dim() == 4:
                    step = step - step.mean((1, 2, 3), keepdim=True)
                p.data.sub_(step, alpha=group["lr"])


class Projecting(torch.optim.SGD):
    """Leaves out of a step what lies along a matrix, where the gradient is almost across it, as AdamP and SGDP do."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                step = p.grad
                along = (step * p).sum() / p.square().sum()
                if p.dim() > 1 and along.abs() * p.norm() < 0.02 * step.norm():
                    step = step - along * p
                p.data.sub_(step, alpha=group["lr"])


class LayerWise(torch.optim.Optimizer):
    """Steps by the norm of each parameter, and keeps a number of each, as LARS and NovoGrad do."""

    def __init__(self, params: Any, lr: float = 0.02):
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state, square = self.state[p], float(p.grad.square().sum())
                state["square"] = 0.9 * state.get("square", square) + 0.1 * square
                momentum = state.setdefault("momentum", torch.zeros_like(p))
                momentum.mul_(0.9).add_(p.grad / (state["square"] ** 0.5 + 1e-8))
                p.data.sub_(momentum, alpha=group["lr"] * (0.1 + float(p.detach().norm())))


class Orthogonal(torch.optim.Optimizer):
    """The nearest orthogonal matrix to the momentum of each matrix, and SGD in groups that say so, as Muon's often do.

    Groups that come are parted by the parameters' dims.
    """

    def __init__(self, groups: Any, lr: float = 0.05):
        parameters = [p for group in groups for p in group["params"]]
        parts = {matrices: [p for p in parameters if (p.dim() > 1) == matrices] for matrices in (True, False)}
        super().__init__([{"params": part, "matrices": flag} for flag, part in parts.items()], {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                step = p.grad
                if group["matrices"]:
                    momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    momentum.mul_(0.9).add_(p.grad)
                    left, _, right = torch.linalg.svd(momentum, full_matrices=False)
                    step = left @ right
                p.data.sub_(step, alpha=group["lr"])


class Failing(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        raise ValueError("not today")


class Shared(torch.optim.SGD):
    """Steps by the norm of each parameter over that of all."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            total = torch.stack([p.norm() for p in group["params"]]).norm()
            for p in group["params"]:
                p.data.sub_(p.grad * p.norm() / total, alpha=group["lr"])


class Small(torch.optim.SGD):
    """Keeps another kind of state of large parameters, in blocks with a scale each, as 8-bit optimizers do."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.numel() < 4096:
                    self.state[p]["state1"] = torch.zeros_like(p)
                else:
                    self.state[p]["state1"] = torch.zeros_like(p, dtype=torch.uint8)
                    self.state[p]["absmax1"] = torch.zeros(p.numel() // 256 + 1)


class Coded(Tensor):
    """Looks like any tensor and is made of another, as torchao's state in 8 bits is."""


class Coding(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            self.state[p]["code"] = torch.zeros_like(p) if p.numel() < 4096 else torch.zeros_like(p).as_subclass(Coded)


class Wrapping(torch.optim.SGD):
    """Updates by another optimizer, and pulls the weights back from time to time, as Lookahead does."""

    def __init__(self, params: Any, lr: float = 0.1):
        parameters = list(params)
        super().__init__(parameters, lr=lr)
        self.inner = torch.optim.SGD(parameters, lr=lr)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inner.step()


class Late(torch.optim.SGD):
    """Keeps the gradient before from its second step on."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                count = self.state[p].setdefault("step", 0)
                if count:
                    self.state[p]["before"] = p.grad.clone()
                self.state[p]["step"] = count + 1
                p.data.sub_(p.grad, alpha=group["lr"])


class Warming(torch.optim.SGD):
    """Counts in an object of its own, as schedules inside of optimizers do."""

    class Count:
        steps = 0

    def __init__(self, params: Any, lr: float = 0.1):
        super().__init__(params, lr=lr)
        self.warmup = Warming.Count()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.warmup.steps += 1
        super().step()


class LaterDistance(torch.optim.SGD):
    """A number of the group that comes to depend on the parameters only after many steps."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            if group["step"] > 20:
                group["d"] = float(group["params"][0].norm())
            for p in group["params"]:
                p.data.sub_(p.grad, alpha=group["lr"])


Make = Callable[[Any], torch.optim.Optimizer]
RIGHT: dict[str, Make] = {"Counting": Counting, "ScheduleFree": ScheduleFree, "KeyInState": KeyInState}


def muon(groups: Any) -> torch.optim.Optimizer:
    """torch's own, which takes matrices alone: the biases are frozen."""
    parameters = [p for group in groups for p in group["params"]]
    for parameter in parameters:
        parameter.requires_grad_(parameter.dim() == 2)
    return torch.optim.Muon([p for p in parameters if p.requires_grad], lr=0.02)


# Those that update whole parameters.
WHOLE: dict[str, Make] = {
    "LayerWise": LayerWise,
    "Orthogonal": Orthogonal,
    "Projecting": lambda params: Projecting(params, lr=0.05),
    "Cautious": lambda params: Cautious(params, lr=0.01),
    "Muon": muon,
}
RIGHT.update(WHOLE)


def model(seed: int = 3) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 1)).double()


def groups(net: nn.Module) -> list[dict[str, Any]]:
    """Two; the second is one small bias, of which some ranks hold nothing."""
    parameters = list(net.parameters())
    return [{"params": parameters[:-1]}, {"params": parameters[-1:], "lr": 0.03}]


def samples(step: int) -> Tensor:
    return torch.randn(12, 6, generator=torch.Generator().manual_seed(100 + step), dtype=torch.float64)


def mode(optimizer: Any, name: str) -> None:
    if hasattr(optimizer, name):
        getattr(optimizer, name)()


def plain(make: Make) -> list[dict[str, Tensor]]:
    """One process, plain torch: the weights in evaluation after some steps, and at the end."""
    net, seen = model(), []
    optimizer = make(groups(net))
    mode(optimizer, "train")
    for step in range(STEPS):
        optimizer.zero_grad()
        net(samples(step)).square().mean().backward()
        optimizer.step()
        if step + 1 in (LOOKED_AFTER, STEPS):
            mode(optimizer, "eval")
            seen.append({name: p.detach().clone() for name, p in net.named_parameters()})
            mode(optimizer, "train")
    return seen


def run(make: Make, stage: int, folder: str | None, zero: dict[str, Any] | None = None) -> list[dict[str, Tensor]]:
    """The same on an engine; with a folder by two engines, the second of which continues from a checkpoint."""
    seen: list[dict[str, Tensor]] = []
    config = {"zero": {"stage": stage, "bucket_mb": 0.0004, "persistence_threshold": 8, **(zero or {})}}
    if stage < 3:
        del config["zero"]["persistence_threshold"]
    engine: Any = None
    for step in range(STEPS):
        if engine is None or (folder is not None and step == SAVED_AFTER):
            if engine is not None:
                engine.save_checkpoint(folder)
                _close(engine)
            net = model(seed=3 + step)
            optimizer = make(groups(net))
            engine = megatron_ds.initialize(net, config, optimizer, loss=lambda net, batch: net(batch).square().mean())
            mode(optimizer, "train")
            if step:
                engine.load_checkpoint(folder)
        axis = engine.mesh.data
        engine.train_batch([samples(step).chunk(axis.size)[axis.rank]])
        if step + 1 in (LOOKED_AFTER, STEPS):
            mode(optimizer, "eval")
            seen.append({name: engine.get_parameter(name).cpu() for name, _ in engine.module.named_parameters()})
            with engine.gathered():  # the model's own are the same
                own = dict(engine.module.named_parameters())
                assert all(torch.equal(own[name].detach().cpu(), value) for name, value in seen[-1].items())
            mode(optimizer, "train")
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    seen.append({"settings": settings})  # type: ignore[dict-item]
    _close(engine)
    return seen


def _close(engine: Any) -> None:
    if dist.is_initialized():
        dist.barrier()
    engine.zero.close()


def run_all(
    names: list[str], stages: list[int], folder: str, zero: dict[str, Any] | None = None, resumed: int | None = None
) -> Any:
    """By name and stage: resumed in the middle, or not where ``resumed`` is 0 or 1: then only every other one is."""
    found = {}
    for number, name in enumerate(names):
        for stage in stages:
            here = None if resumed is not None and (number + stage) % 2 != resumed else f"{folder}/{name}-{stage}"
            found[name, stage] = run(RIGHT[name], stage, here, zero)
    return found


def later() -> str:
    """Steps until the optimizer's numbers come apart."""
    net = model()
    engine = megatron_ds.initialize(
        net, {"zero": {"bucket_mb": 0.0004}}, LaterDistance(net.parameters(), lr=0.01),
        loss=lambda net, batch: net(batch).square().mean(),
    )  # fmt: skip
    try:
        for step in range(30):
            engine.train_batch([samples(step)])
    except RuntimeError as error:
        return str(error)
    return ""
