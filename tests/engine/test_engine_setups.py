"""Modules and schedulers that people have, on the engine: the numbers of plain torch, with a resume in the middle.

Float64, at stages 0 to 3, on one rank and on two that share memory or do not.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import megatron_ds
from megatron_ds.testing import run_ranks

WIDTH, STEPS, RESUMED_AT = 8, 4, 2
Loss = Callable[[Any, Tensor], Tensor]


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return (weight + weight.T) / 2


class Lists(nn.Module):
    """Parameters in lists and dictionaries, a bias under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.matrices = nn.ParameterList(nn.Parameter(torch.randn(WIDTH, WIDTH) / 3) for _ in range(2))
        self.biases = nn.ParameterDict({"a": nn.Parameter(torch.zeros(WIDTH)), "b": nn.Parameter(torch.ones(WIDTH))})
        self.again = nn.ParameterDict({"c": self.biases["a"]})

    def forward(self, x: Tensor) -> Tensor:
        for matrix, bias in zip(self.matrices, self.biases.values()):
            x = torch.tanh(x @ matrix + bias)
        return x * self.again["c"] + x


class Recurrent(nn.Module):
    def __init__(self, cls: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.rnn = cls(WIDTH, WIDTH, num_layers=2, batch_first=True, bidirectional=True)
        self.out = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.rnn(x[:, None].expand(-1, 3, -1))[0].mean(1))
        return y


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        sequence = x[:, None] * torch.arange(1.0, 4.0, dtype=x.dtype)[:, None]
        y: Tensor = self.encoder(sequence).mean(1)
        return y


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.GELU(), nn.Conv2d(4, 2, 3))
        self.net.to(memory_format=torch.channels_last)
        self.out = nn.Linear(2 * 6 * 6, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        image = (x[:, None, :, None] * x[:, None, None, :]).to(memory_format=torch.channels_last)
        y: Tensor = self.out(self.net(image).flatten(1))
        return y


class Sequential(nn.Module):
    """Three blocks, called in some way."""

    def __init__(self, wrap: Callable[[nn.Module], nn.Module] = lambda m: m, call: Any = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(wrap(nn.Linear(WIDTH, WIDTH)), nn.Tanh(), nn.Linear(WIDTH, WIDTH)) for _ in range(3)
        )
        self.call = call or (lambda block, x: block(x))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + self.call(block, x)
        return x


class Looked(nn.Module):
    """Two tables, one read by an EmbeddingBag."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, WIDTH, padding_idx=0, max_norm=None, scale_grad_by_freq=False)
        self.bag = nn.EmbeddingBag(16, WIDTH, mode="sum")

    def forward(self, x: Tensor) -> Tensor:
        index = (x.abs() * 10).long() % 16
        return self.table(index).mean(1) + self.bag(index) * x


class Dropping(nn.Module):
    """Layers that some passes skip, by what the step's number says: all ranks alike."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            if (int(self.count) + number) % 3:  # type: ignore[call-overload]
                x = x + torch.tanh(layer(x))
        if self.training:
            self.count += 1  # type: ignore[operator]
        return x


class Vmapped(nn.Module):
    """An ensemble by torch.func over one module's stacked parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(3, WIDTH, WIDTH) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.vmap(lambda w: torch.tanh(x @ w))(self.weights).mean(0)


class Jacobian(nn.Module):
    """A forward that differentiates: forward-mode and reverse-mode of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y, tangent = torch.func.jvp(lambda v: torch.tanh(self.inner(v)), (x,), (torch.ones_like(x),))
        return y + tangent


class Reset(nn.Module):
    """A hook on a parameter's gradient, as some freeze rows by, and one on the module's output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        mask = torch.ones(WIDTH, WIDTH)
        mask[:3] = 0
        self.first.weight.register_hook(lambda gradient: gradient * mask)
        self.second.register_forward_hook(lambda module, args, output: output * 0.5)
        self.second.register_forward_pre_hook(lambda module, args: (args[0] + 0.1,))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.tanh(self.first(x)))
        return y


def mean_square(model: Any, x: Tensor) -> Tensor:
    return model(x).square().mean()


def contrast(model: Any, x: Tensor) -> Tensor:
    """Three calls, one of them of a detached target."""
    with torch.no_grad():
        target = model(x * 0.5)
    return (model(x) - target).square().mean() + 0.1 * model(x + 1).abs().mean()


def nested_autocast(model: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
        return model(x).square().mean()


def penalty_by_differences(model: Any, x: Tensor) -> Tensor:
    """A penalty on the slope in one direction, without a second backward pass."""
    direction = torch.ones_like(x) / WIDTH
    slope = (model(x + 1e-3 * direction) - model(x)) * 1e3
    return model(x).square().mean() + slope.square().mean()


def penalty_on_weights(model: Any, x: Tensor) -> Tensor:
    """Of all weights, and of one that the loss computes with by itself: on the engine where they are whole."""
    module = getattr(model, "module", model)
    with contextlib.nullcontext() if isinstance(model, nn.Module) else model.gathered():
        decay = sum(p.square().sum() for p in module.parameters())
        again = x @ module.blocks[0][2].weight.t()
    return (model(x) + again).square().mean() + 0.01 * decay


def gradient_in_the_loss(model: Any, x: Tensor) -> Tensor:
    """Adds a tenth of its own gradient to that of one weight."""
    weight = getattr(model, "module", model).blocks[1][0].weight
    loss = mean_square(model, x)
    (gradient,) = torch.autograd.grad(loss, weight, retain_graph=True)
    with contextlib.nullcontext() if isinstance(model, nn.Module) else model.gathered(weight):
        return loss + 0.1 * (gradient * weight).sum()


def forward_mode(model: Any, x: Tensor) -> Tensor:
    """The slope in one direction, and its gradient."""
    with forward_ad.dual_level():
        y, slope = forward_ad.unpack_dual(model(forward_ad.make_dual(x, torch.ones_like(x))))
    assert slope is not None
    return y.square().mean() + slope.square().mean()


def lrs_by_layer(model: nn.Module) -> torch.optim.Optimizer:
    groups = [{"params": [p], "lr": 1e-2 / (1 + n)} for n, p in enumerate(model.parameters())]
    return torch.optim.AdamW(groups, weight_decay=0.1)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=5e-2, momentum=0.9, nesterov=True)


def _schedule(kind: str) -> Callable[[torch.optim.Optimizer], Any]:
    lr = torch.optim.lr_scheduler

    class Grow:
        """A function of the rate with a state of its own."""

        def __init__(self) -> None:
            self.power = 0.5

        def __call__(self, step: int) -> float:
            return float((1 + step) ** -self.power)

    made: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
        "cyclic": lambda o: lr.CyclicLR(o, 1e-3, 1e-1, step_size_up=2, cycle_momentum=True),
        "one cycle": lambda o: lr.OneCycleLR(o, 1e-1, total_steps=9),
        "lambda": lambda o: lr.LambdaLR(o, Grow()),
        "sequential": lambda o: lr.SequentialLR(o, [lr.LinearLR(o, 0.1, total_iters=2), lr.ExponentialLR(o, 0.9)], [2]),
        "chained": lambda o: lr.ChainedScheduler([lr.ConstantLR(o, 0.5, 2), lr.ExponentialLR(o, 0.9)]),
        "warm restarts": lambda o: lr.CosineAnnealingWarmRestarts(o, 2, 2),
        "multiplicative": lambda o: lr.MultiplicativeLR(o, lambda step: 0.9),
    }
    return made[kind]


@dataclass(frozen=True)
class Setup:
    make: Callable[[], nn.Module] = Sequential
    loss: Loss = mean_square
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adamw
    schedule: Callable[[torch.optim.Optimizer], Any] | None = None


def spectral() -> nn.Module:
    return Sequential(lambda module: parametrizations.spectral_norm(module))


def symmetric() -> nn.Module:
    def wrap(module: nn.Module) -> nn.Module:
        parametrize.register_parametrization(module, "weight", Symmetric())
        return module

    return Sequential(wrap)


def orthogonal() -> nn.Module:
    return Sequential(lambda module: parametrizations.orthogonal(module, orthogonal_map="cayley"))


def lazy() -> nn.Module:
    model = nn.Sequential(nn.LazyLinear(WIDTH), nn.Tanh(), nn.LazyLinear(WIDTH))
    model(torch.zeros(1, WIDTH))
    return model


def tied_through_names() -> nn.Module:
    model = Sequential()
    model.blocks[2] = model.blocks[0]
    model.blocks[1][2].bias = model.blocks[0][2].bias
    return model


def recomputed(block: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = checkpoint(block, x, use_reentrant=False, preserve_rng_state=True)
    return y


def functional(block: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = torch.func.functional_call(block, dict(block.named_parameters()), (x,))
    return y


def compiled() -> nn.Module:
    model = Sequential()
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")  # type: ignore[assignment]
    return model


def copied() -> nn.Module:
    return copy.deepcopy(Sequential())


SETUPS: dict[str, Setup] = {
    "weight norm": Setup(lambda: Sequential(lambda m: parametrizations.weight_norm(m))),
    "old weight norm": Setup(lambda: Sequential(lambda m: nn.utils.weight_norm(m))),
    "spectral norm": Setup(spectral),
    "a parametrization": Setup(symmetric),
    "orthogonal": Setup(orthogonal),
    "lists and dictionaries": Setup(Lists),
    "LSTM": Setup(lambda: Recurrent(nn.LSTM)),
    "GRU": Setup(lambda: Recurrent(nn.GRU)),
    "channels last": Setup(Images),
    "lazy": Setup(lazy),
    "tied through names": Setup(tied_through_names),
    "recomputed": Setup(lambda: Sequential(call=recomputed)),
    "functional_call": Setup(lambda: Sequential(call=functional)),
    "a compiled block": Setup(compiled),
    "a copy": Setup(copied),
    "tables": Setup(Looked),
    "skipped layers": Setup(Dropping),
    "vmap": Setup(Vmapped),
    "jvp": Setup(Jacobian),
    "hooks": Setup(Reset),
    "several calls": Setup(loss=contrast),
    "nested autocast": Setup(loss=nested_autocast),
    "a penalty by differences": Setup(loss=penalty_by_differences),
    "a penalty on weights": Setup(loss=penalty_on_weights),
    "a gradient in the loss": Setup(loss=gradient_in_the_loss),
    "forward mode": Setup(loss=forward_mode),
    "a rate a layer": Setup(optimizer=lrs_by_layer),
    "attention": Setup(Attending),
    **{
        kind: Setup(optimizer=sgd, schedule=_schedule(kind))
        for kind in ("cyclic", "one cycle", "lambda", "sequential", "chained", "warm restarts", "multiplicative")
    },
}


def made(setup: Setup, seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return setup.make().double()


def samples(step: int) -> Tensor:
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def plain(setup: Setup) -> dict[str, Tensor]:
    model = made(setup)
    optimizer = setup.optimizer(model)
    scheduler = setup.schedule(optimizer) if setup.schedule else None
    zeros(model)
    for step in range(STEPS):
        setup.loss(model, samples(step)).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        zeros(model)
    return model.state_dict()


def zeros(model: nn.Module) -> None:
    """A parameter that a step does not use has a gradient of zero, as in DDP."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)


def by_engine(setup: Setup, stage: int, folder: str) -> dict[str, Tensor]:
    engine = None
    for part in (range(RESUMED_AT), range(RESUMED_AT, STEPS)):
        model = made(setup, 3 if engine is None else 9)
        optimizer = setup.optimizer(model)
        scheduler = setup.schedule(optimizer) if setup.schedule else None
        zero = {"stage": stage, "bucket_mb": 0.0005, **({"persistence_threshold": 0} if stage == 3 else {})}
        again, engine = engine, megatron_ds.initialize(model, {"zero": zero}, optimizer, scheduler)
        if again is not None:
            engine.load_checkpoint(folder)
        axis = engine.mesh.data
        for step in part:
            engine.backward(setup.loss(engine, samples(step).chunk(axis.size)[axis.rank]))
            engine.step()
        if again is None:
            engine.save_checkpoint(folder)
        state = engine.state_dict()
        engine.close()
    return state


def all_by_engine(folder: str, stages: tuple[int, ...]) -> dict[Any, dict[str, Tensor]]:
    """Each at one of the stages, in turn."""
    rows = [(name, stages[number % len(stages)]) for number, name in enumerate(SETUPS)]
    return {(name, stage): by_engine(SETUPS[name], stage, f"{folder}/{name}") for name, stage in rows}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated", "ignore:Lazy modules are a new feature")
@pytest.mark.parametrize(("ranks", "apart", "stages"), [(1, False, (0, 3)), (2, False, (0, 1, 2, 3)), (2, True, (3,))])
def test_setups_that_people_have_equal_plain_torch(
    ranks: int, apart: bool, stages: tuple[int, ...], tmp_path: Path
) -> None:
    want = {name: plain(setup) for name, setup in SETUPS.items()}
    for found in run_ranks(all_by_engine, ranks, str(tmp_path), stages, apart=apart):
        for (name, stage), state in found.items():
            assert state.keys() == want[name].keys(), name
            for key, value in want[name].items():
                assert (state[key].double() - value.double()).abs().max() < 1e-9, (name, stage, key)
