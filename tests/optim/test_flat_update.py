"""AdamW in one pass over flat memory: torch's own numbers, few ranges, and weights that others have written.

The kernel is stood in for by its reference.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from megatron_ds.config import OptimizerConfig, ZeroConfig
from megatron_ds.kernels import registry
from megatron_ds.kernels.adamw import AdamWNumbers, adamw_reference_
from megatron_ds.mesh import Mesh
from megatron_ds.optim.factory import ConfigRule
from megatron_ds.optim.rule import OptimizerSegment
from megatron_ds.shard import ShardSpec
from megatron_ds.zero.optimizer import ZeroOptimizer

ADAMW = OptimizerConfig(name="adamw", beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.2)
SHAPES = {"a": (5, 7), "b": (7,), "c": (3, 40), "d": (40,), "e": (1,)}


@pytest.fixture
def calls() -> Iterator[list[int]]:
    """Elements of each call of the kernel."""
    made: list[int] = []

    def adamw_(master: Tensor, *rest: Any) -> None:
        made.append(master.numel())
        adamw_reference_(master, *rest[:5], AdamWNumbers(*rest[5:]))

    with (
        registry.use({"adamw": "triton"}),
        patch.object(registry, "load_twin", lambda *_: SimpleNamespace(adamw_=adamw_)),
    ):
        yield made


def parameters(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    found = {}
    for name, shape in SHAPES.items():
        found[name] = nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        found[name].shard = ShardSpec(name, shape, weight_decay=len(shape) > 1)  # type: ignore[attr-defined]
    return found


def plain(like: dict[str, nn.Parameter]) -> tuple[dict[str, nn.Parameter], torch.optim.AdamW]:
    """torch's AdamW over master weights in fp32."""
    wide = {name: nn.Parameter(p.detach().float()) for name, p in like.items()}
    groups = [
        {"params": [p for p in wide.values() if (p.dim() > 1) == decayed], "weight_decay": 0.2 * decayed}
        for decayed in (True, False)
    ]
    return wide, torch.optim.AdamW(groups, lr=0.1, betas=(0.8, 0.9), eps=1e-6, foreach=False)


def step(
    zero: ZeroOptimizer, gradients: dict[str, Tensor], own: dict[str, nn.Parameter], scale: float | Tensor = 0.5
) -> None:
    zero.start_step()
    zero.start_backward(True)
    for name, gradient in gradients.items():
        own[name].main_grad.add(gradient)  # type: ignore[attr-defined]
    zero.end_backward()
    zero.finish_gradients()
    zero.step(0.1, scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_updates_equal_torchs(dtype: torch.dtype, calls: list[int]) -> None:
    own = parameters(dtype)
    want, reference = plain(own)
    zero = ZeroOptimizer(own.values(), Mesh.single(), ZeroConfig(bucket_mb=0.0001), ADAMW)
    generator = torch.Generator().manual_seed(5)
    for number in range(1, 7):
        if number == 3:  # a loop or a module writes into weights; every element of a master weight looks for itself
            for p in (own, want):
                p["c"].data[1, 2:4] = torch.tensor([0.7578125, -3.0])  # numbers of bf16
                p["d"].data[5] = 0.5
        own["d"].requires_grad_(number != 4)  # frozen for a step, and one update late from then on
        want["d"].requires_grad_(number != 4)
        gradients = {name: torch.randn(p.shape, generator=generator) for name, p in own.items() if p.requires_grad}
        for name, p in want.items():
            p.grad = gradients[name] * 0.5 if name in gradients else None
        reference.step()
        calls.clear()
        step(zero, gradients, own)
        # One range with weight decay, "c" and "a", and one without, "e", "d" and "b".
        assert len(calls) == (2 if number < 4 else 3 if number == 4 else 4), calls
        masters = {s.name: s.data.view(s.box_shape) for s in zero.flat_shards() if s.kind == "param"}
        for name, p in want.items():
            assert (masters[name] - p.detach()).abs().max() < 2e-6, f"{name} after update {number}"
            assert torch.equal(own[name].detach(), masters[name].to(dtype)), name
    assert zero.late() == {"d": {"step": 5.0}}


def test_a_step_that_the_device_skips_is_as_if_it_had_not_been(calls: list[int]) -> None:
    """The factor is NaN, which the host does not know before the next step."""
    found = []
    for skips in (False, True):
        own = parameters(torch.bfloat16)
        zero = ZeroOptimizer(own.values(), Mesh.single(), ZeroConfig(), ADAMW)
        for number in range(1, 5):
            gradients = {name: torch.full(p.shape, 0.1 * number) for name, p in own.items()}
            if skips and number == 3:
                calls.clear()
                step(zero, gradients, own, torch.tensor(torch.nan, dtype=torch.float64))
                assert len(calls) == 2, "in one pass"
                zero.take_back()
            step(zero, gradients, own, torch.tensor(0.5, dtype=torch.float64))
        found.append({f"{s.kind} {s.name}": s.data.clone() for s in zero.flat_shards()})
    for name, want in found[0].items():
        assert torch.equal(found[1][name], want), name


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_segments_in_memory_of_their_own_are_updated_one_by_one(name: str, calls: list[int]) -> None:
    """And only AdamW's by its kernel."""
    config = ADAMW.model_copy(update={"name": name, "momentum": 0.0})
    rule, weight = ConfigRule(config), torch.arange(1.0, 8.0)
    segments = [
        OptimizerSegment(part.clone(), part / 2, {kind: torch.zeros_like(part) for kind in rule.group.kinds}, True, "w")
        for part in weight.split([3, 4])
    ]
    rule.over(segments).step(0.1, 0.5)
    assert calls == ([3, 4] if name == "adamw" else [])
    parameter = nn.Parameter(weight.clone())
    parameter.grad = weight / 4
    theirs: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.2, "foreach": False}
    if name == "adamw":
        torch.optim.AdamW([parameter], betas=(0.8, 0.9), eps=1e-6, **theirs).step()
    else:
        torch.optim.SGD([parameter], **theirs).step()
    torch.testing.assert_close(torch.cat([segment.master for segment in segments]), parameter.detach())


def test_one_rank_alone_has_one_bucket(calls: list[int]) -> None:
    own = parameters(torch.bfloat16)
    assert len(ZeroOptimizer(own.values(), Mesh.single(), ZeroConfig(bucket_mb=0.0001), ADAMW).buckets) == 1
    offloaded = ZeroConfig.model_validate({"bucket_mb": 0.0001, "offload_optimizer": {"device": "cpu"}})
    own = parameters(torch.bfloat16)
    zero = ZeroOptimizer(own.values(), Mesh.single(), offloaded, ADAMW)
    assert len(zero.buckets) > 1, "what is fetched bucket by bucket is"
    before = own["a"].detach().clone()
    step(zero, {"a": torch.ones(5, 7)}, own)
    assert (own["a"] != before).all()
