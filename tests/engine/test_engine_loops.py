"""Two engines, two backward passes a step, what ``zero_grad`` drops: the numbers of plain torch, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engine_more import message
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.nn.parallel import DistributedDataParallel

import megatron_ds
from megatron_ds.engine import Engine
from megatron_ds.testing import run_ranks

BATCH, WIDTH, STEPS = 8, 6, 3
STAGES = (0, 1, 2, 3)
States = dict[str, Tensor]


def net(seed: int, outputs: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Linear(16, outputs)).double()


def samples(number: int) -> Tensor:
    return torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(number), dtype=torch.float64)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def loss_of(model: Any, x: Tensor) -> Tensor:
    return model(x).square().mean()


def engine_of(model: nn.Module, stage: int, **config: Any) -> Engine:
    zero = {"stage": stage, "bucket_mb": 0.0005, **({"persistence_threshold": 0} if stage == 3 else {})}
    return megatron_ds.initialize(model, {"zero": zero, **config}, adamw(model), loss=loss_of)


def parts(number: int, ranks: int, rank: int, accumulation: int) -> tuple[Tensor, ...]:
    return samples(number).chunk(ranks)[rank].chunk(accumulation)


def close(*engines: Engine) -> list[States]:
    states = [engine.state_dict() for engine in engines]
    for engine in engines:
        engine.close()
    return states


def same(got: States, want: States) -> bool:
    return got.keys() == want.keys() and all((got[key] - value).abs().max() < 1e-9 for key, value in want.items())


# --- a GAN


def of_discriminator(d: Any, g: Any, real: Tensor, noise: Tensor) -> Tensor:
    return (softplus(-d(real)) + softplus(d(g(noise).detach()))).mean()


def of_generator(d: Any, g: Any, noise: Tensor) -> Tensor:
    return softplus(-d(g(noise))).mean()


def gan(stage: int, accumulation: int, freezes: bool) -> list[States]:
    """``freezes``: the discriminator while the generator trains, and so it needs no ``zero_grad``."""
    g = engine_of(net(1, WIDTH), stage, accumulation=accumulation)
    d = engine_of(net(2, 1), stage, accumulation=accumulation)
    axis = d.mesh.data
    for step in range(STEPS):
        real, noise, other = (parts(3 * step + i, axis.size, axis.rank, accumulation) for i in range(3))
        for x, z in zip(real, noise):
            if not freezes:
                d.zero_grad()
            d.backward(of_discriminator(d, g, x, z))
            d.step()
        d.module.requires_grad_(not freezes)
        for z in other:
            g.zero_grad()
            g.backward(of_generator(d, g, z))
            g.step()
        d.module.requires_grad_(True)
    return close(g, d)


def plain_gan(wrap: Callable[[nn.Module], nn.Module], ranks: int, rank: int) -> list[States]:
    models = net(1, WIDTH), net(2, 1)
    g, d = (wrap(model) for model in models)
    for_g, for_d = (adamw(model) for model in models)
    for step in range(STEPS):
        real, noise, other = (parts(3 * step + i, ranks, rank, 1)[0] for i in range(3))
        for_d.zero_grad()
        of_discriminator(d, g, real, noise).backward()
        for_d.step()
        for_g.zero_grad()
        of_generator(d, g, other).backward()
        for_g.step()
    return [{key: value.detach() for key, value in model.state_dict().items()} for model in models]


def by_ddp() -> list[States]:
    return plain_gan(DistributedDataParallel, dist.get_world_size(), dist.get_rank())


def gans() -> dict[Any, list[States]]:
    cases = [(stage, *more) for stage in STAGES for more in ((1, False), (2, False), (2, True))]
    return {case: gan(*case) for case in cases}


def test_two_engines_in_a_gan_equal_plain_torch_and_ddp() -> None:
    want = plain_gan(lambda model: model, 1, 0)
    for states in run_ranks(by_ddp, 2):
        assert all(map(same, states, want))
    for rows in (run_ranks(gans, 1), run_ranks(gans, 2)):
        for found in rows:
            for case, states in found.items():
                assert all(map(same, states, want)), case


def test_a_step_keeps_the_activations_of_one_micro_batch() -> None:
    """Each forward pass is followed by its backward pass, as in a loop: memory does not grow with the accumulation."""
    passes: list[str] = []
    model = nn.Linear(2, 1)
    model.register_forward_hook(lambda *_: passes.append("forward"))
    model.weight.register_hook(lambda _: passes.append("backward"))
    config = {"accumulation": 3}
    engine = megatron_ds.initialize(model, config, loss=lambda model, x: model(x).mean())
    engine.train_batch(torch.ones(3, 4, 2))
    assert passes == ["forward", "backward"] * 3
    engine.close()


# --- what zero_grad drops

WAYS: dict[str, Callable[[Engine], object]] = {
    "engine": lambda engine: engine.zero_grad(),
    "optimizer": lambda engine: engine.optimizer.zero_grad(),  # type: ignore[union-attr]
    "module": lambda engine: engine.module.zero_grad(),
}


def dropped(stage: int, accumulation: int, way: str) -> States:
    """Of each step the first micro-batch, or all of them, are thought better of."""
    engine = engine_of(net(1, 2), stage, accumulation=accumulation)
    axis = engine.mesh.data
    for step in range(STEPS):
        for x in parts(100 + step, axis.size, axis.rank, accumulation)[: 1 + step]:
            engine.backward(loss_of(engine, x))
        WAYS[way](engine)
        for x in parts(step, axis.size, axis.rank, accumulation):
            loss = loss_of(engine, x)
            engine.backward(loss)
            result = engine.step()
            WAYS[way](engine)  # after a step that only accumulated
        assert result is not None
    (state,) = close(engine)
    return state


def failed(stage: int, accumulation: int) -> States:
    """Of each step a backward pass ends in an error, as for want of memory, with half of the gradients."""
    engine = engine_of(net(1, 2), stage, accumulation=accumulation)
    axis, fails = engine.mesh.data, False

    def fail(gradient: Tensor) -> None:
        if fails:
            raise MemoryError

    def after(module: Any, args: Any, output: Tensor) -> None:
        output.register_hook(fail)

    engine.module[0].register_forward_hook(after)  # type: ignore[index, operator, union-attr]
    for step in range(STEPS):
        batches = [x.square() for x in parts(100 + step, axis.size, axis.rank, accumulation)]
        for x in batches[1:] if step else ():
            engine.backward(loss_of(engine, x))
        fails = True
        with pytest.raises(MemoryError):
            engine.backward(loss_of(engine, batches[0])) if step else engine.train_batch(batches)
        fails = False
        if step:
            assert "zero_grad() to drop" in message(engine.backward, loss_of(engine, batches[0]))
            assert "zero_grad() to drop" in message(engine.step)
            engine.zero_grad()
        engine.train_batch(parts(step, axis.size, axis.rank, accumulation))
    (state,) = close(engine)
    return state


def all_dropped() -> dict[Any, States]:
    cases = [(stage, accumulation) for stage in STAGES for accumulation in (1, 2)]
    ways = {(*case, way): dropped(*case, way) for case in cases for way in WAYS}
    return {**ways, **{case: failed(*case) for case in cases}}


def test_zero_grad_drops_what_there_is() -> None:
    model = net(1, 2)
    optimizer = adamw(model)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, samples(step)).backward()
        optimizer.step()
    for rows in (run_ranks(all_dropped, 1), run_ranks(all_dropped, 2)):
        for found in rows:
            for case, state in found.items():
                assert same(state, model.state_dict()), case


# --- two backward passes a step, several models on one loss


def two_losses(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y = model(x)
    return y.square().mean(), y.abs().mean()


def both(model: Any, x: Tensor) -> Tensor:
    return model["b"](model["a"](x)).square().mean()


class Pair(nn.ModuleDict):
    def forward(self, x: Tensor) -> Tensor:
        return both(self, x)


def pair() -> Pair:
    return Pair({"a": net(1, WIDTH), "b": net(2, 1)})


def passes(stage: int) -> list[States]:
    engine = engine_of(net(1, 2), stage, losses="sum")
    joint = engine_of(pair(), stage)
    axis = engine.mesh.data
    for step in range(STEPS):
        (x,) = parts(step, axis.size, axis.rank, 1)
        first, second = two_losses(engine, x)
        with engine.no_sync():
            engine.backward(first, retain_graph=True)
        engine.backward(second)
        engine.step()
        joint.backward(joint(x))
        joint.step()
    return close(engine, joint)


def all_passes() -> list[list[States]]:
    return [passes(stage) for stage in STAGES]


def test_two_passes_and_two_models_equal_plain_torch() -> None:
    one, joint = net(1, 2), pair()
    for_one, for_joint = adamw(one), adamw(joint)
    for step in range(STEPS):
        for_one.zero_grad()
        torch.stack(two_losses(one, samples(step))).sum().backward()
        for_one.step()
        for_joint.zero_grad()
        joint(samples(step)).backward()
        for_joint.step()
    for rows in (run_ranks(all_passes, 1), run_ranks(all_passes, 2)):
        for found in rows:
            for stage, (got, got_joint) in zip(STAGES, found):
                assert same(got, one.state_dict()) and same(got_joint, joint.state_dict()), stage


# --- what cannot be, with the way out


def refusals(stage: int) -> dict[str, str]:
    said = {}
    g, d = engine_of(net(1, WIDTH), stage), engine_of(net(2, 1), stage)
    x = samples(0)
    before = d.state_dict()
    g.backward(of_generator(d, g, x))
    said["backward"] = message(d.backward, of_discriminator(d, g, x, x))
    said["step"] = message(d.step)
    said["train_batch"] = message(d.train_batch, [x])
    d.zero_grad()
    d.backward(of_discriminator(d, g, x, x))
    said["twice"] = message(d.backward, torch.zeros(()))
    d.module[0].weight.grad = None  # type: ignore[index, union-attr]
    said["one"] = message(d.step)
    d.module.zero_grad()
    said["nothing"] = message(d.step)
    d.zero_grad()
    d(x).sum().backward()
    said["loss.backward"] = message(d.step)
    d.zero_grad()
    assert same(d.state_dict(), before)
    close(g, d)
    return said


@pytest.mark.parametrize("stage", [1, 3])
def test_what_cannot_be_names_the_way(stage: int) -> None:
    for said in run_ranks(refusals, 2, stage):
        for case in ("backward", "step", "train_batch", "loss.backward"):
            assert "and 3 more got gradients in a backward pass that was not this engine's" in said[case], case
            assert "call zero_grad() to go on without them" in said[case] and "nn.ModuleDict" in said[case]
        assert "call step() first" in said["twice"] and "losses='sum' and no_sync()" in said["twice"]
        assert "0.weight.grad was set to None alone" in said["one"] and "engine.zero_grad()" in said["one"]
        assert "step() without a backward pass" in said["nothing"]
