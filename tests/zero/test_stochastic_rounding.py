"""Gradients that are rounded by chance on their way: without bias over the steps, independently in every message."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import megatron_ds
from megatron_ds.config import OptimizerConfig, RunConfig, ZeroConfig, from_dict
from megatron_ds.kernels.quantized_blocks import BLOCK, LARGEST
from megatron_ds.mesh import Mesh, MeshShape
from megatron_ds.models.gpt import GPTTask
from megatron_ds.shard import ShardSpec
from megatron_ds.testing import run_ranks
from megatron_ds.train.build import build
from megatron_ds.zero import gradient_sums
from megatron_ds.zero.optimizer import ZeroOptimizer

RANKS, STEPS, SIZE = 4, 16, 2 * 4 * BLOCK
CASES: dict[str, tuple[dict[str, Any], int]] = {  # settings, and backward passes of a step
    "whole gradients": ({"stage": 1}, 2),
    "each micro-batch": ({"stage": 2}, 2),
    "replicas": ({"stage": 1, "shard_size": 2}, 1),
    "in a node first": ({"stage": 2, "secondary_size": 2}, 1),
}


def gradient() -> Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def errors(settings: dict[str, Any], passes: int, mesh: Mesh, seed: int = 0) -> Tensor:
    """``[STEPS, shard]``: what this rank's sums are off by, where all ranks have one gradient in all passes."""
    parameter = nn.Parameter(torch.zeros(SIZE, dtype=torch.float64))
    parameter.shard = ShardSpec("weight", (SIZE,))  # type: ignore[attr-defined]
    config = ZeroConfig(quantized_gradients="int4", quantized_stochastic=True, **settings)
    zero = ZeroOptimizer([parameter], mesh, config, OptimizerConfig(name="sgd"))
    zero.seed, found = seed, []
    for _ in range(STEPS):
        zero.start_step()
        for number in range(passes):
            zero.start_backward(last=number == passes - 1)
            parameter.main_grad.add(gradient())  # type: ignore[attr-defined]
            zero.end_backward()
        zero.finish_gradients()
        (shard,) = zero.gradient_shards()
        found.append(shard.tensor(None) - passes * RANKS * gradient()[shard.start : shard.stop])
        zero.step(0.0)
    return torch.stack(found)


def keys() -> list[tuple[object, ...]]:
    """What the key of each sum is made of: two buckets, two steps of two passes each, over shards and replicas."""
    mesh, made = Mesh.create(MeshShape(dp=RANKS), torch.device("cpu")), list[tuple[object, ...]]()
    parameters = [nn.Parameter(torch.zeros(SIZE, dtype=torch.float64)) for _ in range(2)]
    for number, parameter in enumerate(parameters):
        parameter.shard = ShardSpec(f"weight {number}", (SIZE,))  # type: ignore[attr-defined]
    how = {"quantized_gradients": "int4", "quantized_stochastic": True}
    config = from_dict(ZeroConfig, {"stage": 2, "shard_size": 2, "bucket_mb": SIZE * 8 / 1e6, **how}, "test")
    zero = ZeroOptimizer(parameters, mesh, config, OptimizerConfig(name="sgd"))
    assert len(zero.buckets) == 2

    def note(*names: object) -> int:
        made.append(names)
        return 5

    with patch.object(gradient_sums, "derive_seed", note):
        for _ in range(2):
            zero.start_step()
            for last in (False, True):
                zero.start_backward(last)
                for parameter in parameters:
                    parameter.main_grad.add(gradient())  # type: ignore[attr-defined]
                zero.end_backward()
            zero.finish_gradients()
            zero.step(0.0)
    return made


def on_this_rank() -> tuple[dict[bool, dict[str, Tensor]], list[tuple[object, ...]]]:
    """Errors as they are, and with one key for all messages; ranks of all samples and of all parts of a sequence sum.
    And what the keys are made of."""
    mesh, found = Mesh.create(MeshShape(dp=RANKS // 2, cp=2), torch.device("cpu")), {}
    for one_key in (False, True):
        with patch.object(gradient_sums, "derive_seed", lambda *names: 5) if one_key else nullcontext():
            found[one_key] = {name: errors(*case, mesh) for name, case in CASES.items()}
    found[False]["another seed"] = errors(*CASES["whole gradients"], mesh, seed=1)
    return found, keys()


Ranks = list[tuple[dict[bool, dict[str, Tensor]], list[tuple[object, ...]]]]


@pytest.fixture(scope="module")
def ranks() -> Ranks:
    return run_ranks(on_this_rank, RANKS)


@pytest.fixture(scope="module")
def by_key(ranks: Ranks) -> dict[bool, dict[str, Tensor]]:
    """All ranks' errors side by side."""
    return {
        key: {name: torch.cat([found[key][name] for found, _ in ranks], dim=1) for name in names}
        for key, names in ranks[0][0].items()
    }


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


@pytest.mark.parametrize("name", CASES)
def test_the_mean_error_falls_with_the_root_of_the_steps(name: str, by_key: dict[bool, dict[str, Tensor]]) -> None:
    found = by_key[False][name]
    assert rms(found.mean(0)) == pytest.approx(rms(found) / STEPS**0.5, rel=0.08)
    same = by_key[True][name]
    assert rms(same.mean(0)) > 0.9 * rms(same), "with one key it stays"


@pytest.mark.parametrize("name", ["whole gradients", "each micro-batch"])
def test_messages_are_rounded_independently(name: str, by_key: dict[bool, dict[str, Tensor]]) -> None:
    """The variance of a sum is that of one message times their number; of messages that share draws, its square."""
    blocks = gradient().view(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True) / LARGEST["int4"]
    fraction = blocks / scale % 1
    deviation = rms((fraction * (1 - fraction)).sqrt() * scale)
    whole = name == "whole gradients"
    messages, size = (RANKS - 1) * (1 if whole else 2), 2.0 if whole else 1.0
    assert rms(by_key[False][name]) == pytest.approx(messages**0.5 * size * deviation, rel=0.03)
    assert rms(by_key[True][name]) == pytest.approx(messages * size * deviation, rel=0.1)


def test_no_two_sums_have_one_key(ranks: Ranks) -> None:
    """A rank sums two passes over its shards and once over replicas, of each bucket and in each step."""
    every = [key for _, of_rank in ranks for key in of_rank]
    assert len(set(every)) == len(every) == RANKS * 2 * 2 * (2 + 1)


def test_runs_of_two_seeds_are_rounded_independently(by_key: dict[bool, dict[str, Tensor]]) -> None:
    one, other = by_key[False]["whole gradients"], by_key[False]["another seed"]
    assert rms((one + other) / 2) == pytest.approx(rms(one) / 2**0.5, rel=0.03)


def test_the_seed_is_that_of_the_run_or_of_the_engine() -> None:
    model = {"num_layers": 1, "hidden_size": 8, "num_heads": 2, "vocab_size": 10, "max_positions": 4}
    config = from_dict(RunConfig, {"model": model, "data": {"synthetic": True}, "seed": 7}, "test")
    assert build(config, Mesh.single(), GPTTask(config), torch.device("meta")).optimizer.seed == 7
    engine = megatron_ds.initialize(nn.Linear(2, 2), {"seed": 8})
    assert engine.zero.seed == 8
    engine.close()
