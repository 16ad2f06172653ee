"""Modules that are called and return in unusual ways, on the engine: the numbers of plain torch, in float64.

At stage 3 both as ranks of one host do it, who look at each other's shards, and as ranks of several do, who gather.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import megatron_ds
from megatron_ds.errors import ShardedParameterError
from megatron_ds.testing import run_ranks

WIDTH, STEPS = 16, 3
Blocks = Callable[[Any, Tensor], Tensor]


@dataclass
class Output:
    hidden: Tensor
    nothing: None = None


class Box:
    def __init__(self, hidden: Tensor):
        self.hidden = hidden


class Hiding:
    __slots__ = ("hidden",)

    def __init__(self, hidden: Tensor):
        self.hidden = hidden


class Block(nn.Module):
    def __init__(self, wrap: Callable[[Tensor], Any]):
        super().__init__()
        self.up, self.down, self.wrap = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), wrap
        self.scale = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor, again: Tensor | None = None) -> Any:
        assert again is None or again is x  # as attention asks whether its query is its key
        return self.wrap(self.inner(x))

    def inner(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)) * self.scale)


class Rows(nn.Module):
    """A table of positions, of which it returns a view."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4, WIDTH))

    def forward(self, number: int) -> Tensor:
        return self.weight[:number]


class Net(nn.Module):
    def __init__(self, kind: Kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.layers = nn.ModuleList([Block(kind.wrap) for _ in range(3)])
        self.rows, self.head = Rows(), nn.Linear(WIDTH, 4)
        for layer in self.layers:
            if kind.hook is not None:
                kind.hook(layer)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        rows = self.rows(2)
        for layer in self.layers:
            x = self.kind.call(layer, x)
        return self.head(x * rows[0] + rows[1])


def mean_square(model: Any, x: Tensor) -> Tensor:
    return model(x).square().mean()


def penalty(model: Any, x: Tensor) -> Tensor:
    """Of the gradient, as in WGAN-GP: a gradient of a gradient."""
    x = x.clone().requires_grad_()
    y = model(x)
    (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return y.square().mean() + (gradient.square().sum(-1) - 1).square().mean()


@dataclass(frozen=True)
class Kind:
    """How a block is called, what it returns, a hook of the user's, the loss."""

    call: Blocks = lambda block, x: block(x)
    wrap: Callable[[Tensor], Any] = lambda x: x
    hook: Callable[[nn.Module], object] | None = None
    loss: Callable[[Any, Tensor], Tensor] = mean_square


def in_a_thread(block: Any, x: Tensor) -> Tensor:
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(block(x)))
    thread.start()
    thread.join()
    return found[0]


def beside_itself(block: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        target = block(x)
    return block(x) + 0.1 * target


def just_used(block: Any, x: Tensor) -> Tensor:
    """Its weights may lie in memory still, which the next gather frees."""
    y = block(x)
    return nn.functional.linear(torch.tanh(y), block.up.weight.t(), block.scale) + block.down.weight.norm(dim=1)


def functional(block: Any, x: Tensor) -> Tensor:
    return x + torch.func.functional_call(block, dict(block.named_parameters()), (x,))


def recomputed(block: Any, x: Tensor) -> Tensor:
    return checkpoint(block, x if x.requires_grad else x.requires_grad_(), use_reentrant=True)


def differentiating(block: nn.Module) -> None:
    """As a fixed point's gradient is computed: by a hook, which goes through a graph of its own."""

    def after(module: Any, args: Any, output: Tensor) -> None:
        x = args[0].detach().requires_grad_()
        y = module.inner(x)
        output.register_hook(lambda gradient: gradient + torch.autograd.grad(y, x, gradient)[0])

    block.register_forward_hook(after)


KINDS: dict[str, Kind] = {
    "plain": Kind(),
    "a dataclass": Kind(lambda block, x: block(x).hidden, Output),
    "an object": Kind(lambda block, x: block(x).hidden, Box),
    "nested": Kind(lambda block, x: block(x)["a"][0], lambda x: {"a": [x, (None,)], "n": 3}),
    "by keyword": Kind(lambda block, x: block(x=x)),
    "one tensor twice": Kind(lambda block, x: block(x, again=x)),
    "another method": Kind(lambda block, x: block.inner(x)),
    "functional": Kind(functional),
    "a weight elsewhere": Kind(lambda block, x: block(x) + block.up.weight.sum() * 0.01),
    "a weight after its module": Kind(just_used),
    "without gradients too": Kind(beside_itself),
    "detached": Kind(lambda block, x: block(x.detach()) + x),
    "three times": Kind(lambda block, x: block(block(block(x)))),
    "changed in place": Kind(lambda block, x: block(x).mul_(1.1)),
    "in a thread": Kind(in_a_thread),
    "recomputed": Kind(recomputed),
    "a forward hook": Kind(hook=lambda block: block.register_forward_hook(lambda module, args, output: output * 1.1)),
    "a backward hook": Kind(
        hook=lambda block: block.register_full_backward_hook(
            lambda module, given, grads: tuple(None if g is None else g * 1.5 for g in given)
        )
    ),
    "a hook that differentiates": Kind(hook=differentiating),
    "a penalty": Kind(loss=penalty),
    "an iterator": Kind(lambda block, x: next(block(x)), lambda x: iter([x])),
    "two forwards": Kind(loss=lambda model, x: (model(x) - model(x * 0.5)).square().mean()),
}
# Where stage 3 gathers, this needs zero.keep_whole.
HELD = {"hidden beside another": Kind(lambda block, x: block(x)[1].hidden, lambda x: (x * 0.5, Hiding(x * 1.0)))}


# Stage 3 cannot gather inside of them.
TRANSFORMED = Kind(lambda block, x: x + torch.func.grad(lambda y: block(y).square().sum())(x))


def batch(step: int) -> Tensor:
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def plain(kind: Kind) -> tuple[list[float], dict[str, Tensor]]:
    net, losses = Net(kind), []
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = kind.loss(net, batch(step))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: p.detach().clone() for name, p in net.named_parameters()}


def trained(kind: Kind, zero: dict[str, Any]) -> tuple[list[float], dict[str, Tensor]]:
    net = Net(kind)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    engine = megatron_ds.initialize(net, {"zero": {"bucket_mb": 0.001, **zero}}, optimizer, loss=kind.loss)
    axis, losses = engine.mesh.data, []
    for step in range(STEPS):
        losses.append(engine.train_batch([batch(step).chunk(axis.size)[axis.rank]]).loss)
    state = engine.state_dict()
    engine.close()
    return losses, state


def all_trained(stage: int, apart: bool) -> dict[str, Any]:
    """By kind; a message where it cannot be."""
    found: dict[str, Any] = {}
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero["persistence_threshold"] = 0
    for name, kind in (KINDS | HELD).items():
        if apart and name in HELD:
            with pytest.raises(ShardedParameterError) as raised:
                trained(kind, zero)
            found[name + ", not held"] = str(raised.value)
            zero = {**zero, "keep_whole": True}
        found[name] = trained(kind, zero)
        zero.pop("keep_whole", None)
    if stage == 3:
        with pytest.raises(ShardedParameterError, match=r"inside a transform of torch\.func"):
            trained(TRANSFORMED, zero)
    else:
        found["transformed"] = trained(TRANSFORMED, zero)
    return found


@pytest.mark.parametrize("stage, apart", [(2, False), (3, False), (3, True)])
def test_unusual_modules_equal_plain_torch(stage: int, apart: bool) -> None:
    rows = run_ranks(all_trained, 2, stage, apart, apart=apart)
    transformed = {"transformed": TRANSFORMED} if stage < 3 else {}
    for name, kind in (KINDS | HELD | transformed).items():
        losses, parameters = plain(kind)
        for found in rows:
            got, state = found[name]
            assert got == pytest.approx(losses, rel=1e-9), name
            assert all((state[key] - value).abs().max() < 1e-9 for key, value in parameters.items()), name
            if apart and name in HELD:
                assert "set zero.keep_whole=true" in found[name + ", not held"]
