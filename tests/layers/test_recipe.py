"""Linear layers ask their recipe for every product, and a checkpoint keeps a recipe's state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_ds.checkpoint.load import load
from megatron_ds.checkpoint.save import save
from megatron_ds.layers.linear import ColumnParallelLinear, RowParallelLinear
from megatron_ds.layers.recipe import OwnPrecision, Recipe, use_recipe
from megatron_ds.mesh import Axis, Mesh, MeshShape
from megatron_ds.rng import initialize_parameters
from megatron_ds.shard import ShardedDim, ShardSpec
from megatron_ds.shard.flat_shards import buffers_with_shards
from megatron_ds.testing import run_ranks
from megatron_ds.zero.main_grad import MainGradient

S, B, H, FFN = 4, 2, 6, 12


class Factors(Recipe):
    """The products times 2, 3 and 5, so that each is known by its factor. State: forward products, a number a row."""

    calls: Tensor
    rows: Tensor

    def __init__(self, weight: ShardSpec):
        super().__init__()
        self.add_state(weight, "calls", torch.zeros(1, dtype=torch.float64))
        cut = tuple(p for p in weight.placements if p.dim == 0)
        self.add_state(weight, "rows", torch.arange(float(weight.global_shape[0])), cut or None)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        self.calls.add_(1.0)
        out = 2.0 * (x @ weight.t())
        return out if bias is None else out + bias

    def input_gradient(self, grad: Tensor, weight: Tensor) -> Tensor:
        return 3.0 * (grad @ weight)

    def weight_gradient(self, grad: Tensor, x: Tensor) -> Tensor:
        return 5.0 * torch.einsum("sbo,sbi->oi", grad, x)


def pair(tp: Axis, sequence_parallel: bool = False) -> nn.Sequential:
    """A column layer and a row layer."""
    make: dict[str, Any] = {"bias": True, "tp": tp, "sequence_parallel": sequence_parallel, "init_std": 0.5}
    layers = nn.Sequential(
        ColumnParallelLinear("up", H, (FFN,), shard_dim=0, dtype=torch.float64, **make),
        RowParallelLinear("down", FFN, H, dtype=torch.float64, **make),
    )
    initialize_parameters(layers.parameters(), 1)
    return layers


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("which", [0, 1], ids=["column", "row"])
def test_every_product_is_the_recipes(which: int, compiled: bool) -> None:
    layers = pair(Axis("tp"))
    layer: Any = layers[which]
    x = random(S, B, layer.weight.shape[1]).requires_grad_()
    grad = random(S, B, layer.weight.shape[0])
    plain = torch.autograd.grad(layer(x), (x, layer.weight, layer.bias), grad)
    want = layer(x)
    use_recipe(layers, Factors)
    run = torch.compile(layer.forward, backend="aot_eager", fullgraph=True) if compiled else layer
    got = run(x)
    torch.testing.assert_close(got, 2.0 * want, rtol=0, atol=1e-12)  # the bias is 0
    for ours, theirs, factor in zip(
        torch.autograd.grad(got, (x, layer.weight, layer.bias), grad), plain, (3.0, 5.0, 1.0), strict=True
    ):
        torch.testing.assert_close(ours, factor * theirs, rtol=0, atol=1e-12)
    assert layer.recipe.calls.item() == 1.0


@pytest.mark.parametrize("later", [False, True], ids=["at once", "later"])
def test_the_main_gradient_gets_the_recipes_product(later: bool) -> None:
    """Twice, the first time into memory that holds something else; or kept for an action of its own."""
    layer: Any = pair(Axis("tp"))[1]
    x, grad = random(S, B, FFN), random(S, B, H)
    (plain,) = torch.autograd.grad(layer(x), layer.weight, grad)
    use_recipe(layer, Factors)
    main_grad = MainGradient("weight", lambda main_grad: None, lambda main_grad: None)
    main_grad.view = torch.full((H, FFN), 7.0, dtype=torch.float64)
    main_grad.deferred = [] if later else None
    layer.weight.main_grad = main_grad
    for _ in range(2):
        layer(x).backward(grad)
    if main_grad.deferred is not None:
        writes, main_grad.deferred = main_grad.deferred, None
        assert len(writes) == 2 and not main_grad.written
        for write in writes:
            write()
    torch.testing.assert_close(main_grad.view, 10.0 * plain, rtol=0, atol=1e-12)


def two_ranks(path: Path) -> None:
    mesh = Mesh.create(MeshShape(tp=2), torch.device("cpu"))
    for sequence_parallel in (False, True):
        whole, layers = pair(Axis("tp")), pair(mesh.tp, sequence_parallel)
        for model in (whole, layers):
            use_recipe(model, Factors)
        x, grad = random(S, B, H), random(S, B, H)
        part = slice(mesh.tp.rank * S // 2, (mesh.tp.rank + 1) * S // 2) if sequence_parallel else slice(None)
        results = []
        for model, own in ((whole, slice(None)), (layers, part)):
            given = x[own].clone().requires_grad_()
            out = model(given)
            out.backward(grad[own])
            results.append((out.detach(), given.grad))
        for one, ours in zip(*results):
            assert one is not None and ours is not None
            torch.testing.assert_close(ours, one[part], rtol=0, atol=1e-12)
    with torch.no_grad():
        layers[1].recipe.calls.fill_(41.0)  # type: ignore[union-attr, operator]
        layers[0].recipe.rows.add_(100.0)  # type: ignore[union-attr, operator]
    save(path, 1, buffers_with_shards([layers], False, mesh.data.is_first), {}, mesh.world)
    dist.barrier()


def test_on_two_ranks_and_its_state_loaded_on_one(tmp_path: Path) -> None:
    run_ranks(two_ranks, 2, tmp_path)
    layers: Any = pair(Axis("tp"))
    use_recipe(layers, Factors)
    flat_shards = buffers_with_shards([layers], True, True)
    assert [s.name for s in flat_shards] == [f"{x}.recipe.{y}" for x in ("up", "down") for y in ("calls", "rows")]
    load(tmp_path, flat_shards)
    assert [layer.recipe.calls.item() for layer in layers] == [1.0, 41.0]
    assert torch.equal(layers[0].recipe.rows, torch.arange(float(FFN)) + 100.0)
    assert torch.equal(layers[1].recipe.rows, torch.arange(float(H)))


def test_a_layer_begins_with_the_recipe_without_state() -> None:
    layers = pair(Axis("tp"))
    assert all(type(layer.recipe) is OwnPrecision for layer in layers) and not list(layers.buffers())


def test_state_sharded_over_an_axis_is_this_ranks_part() -> None:
    cut = ShardedDim(0, "tp", 1, 2)
    recipe = Factors(ShardSpec("up.weight", (FFN, H), (cut,)))
    assert recipe.rows.tolist() == list(range(FFN // 2, FFN))
    assert recipe.calls.shard.replica and not recipe.rows.shard.replica  # type: ignore[attr-defined]
