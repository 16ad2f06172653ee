"""A node's second shard, and sums inside a node first, where experts are sharded over its ranks already."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_ds.comm.quantized_buffers import QuantizedGathered
from megatron_ds.config import OptimizerConfig, ZeroConfig
from megatron_ds.errors import ConfigError
from megatron_ds.kernels.quantized_blocks import BLOCK
from megatron_ds.mesh import Mesh, MeshShape
from megatron_ds.shard import ShardedDim, ShardSpec, empty_parameter
from megatron_ds.testing import run_ranks
from megatron_ds.zero.nodes import node_size
from megatron_ds.zero.optimizer import ZeroOptimizer

RANKS, EXPERTS, WIDTH = 4, 2, 16
GRID = BLOCK // WIDTH  # rows that are one block


class Layer(nn.Module):
    """A dense weight and this rank's expert."""

    def __init__(self, name: str, mesh: Mesh):
        super().__init__()
        expert = ShardSpec(f"{name}.expert", (EXPERTS, 2 * GRID, WIDTH), (ShardedDim.over(mesh.ep, 0),))
        self.dense = empty_parameter(ShardSpec(f"{name}.dense", (2 * GRID, WIDTH)), dtype=torch.float64)
        self.expert = empty_parameter(expert, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.dense.t() @ self.expert[0])


class Model(nn.Module):
    def __init__(self, mesh: Mesh):
        super().__init__()
        self.layers = nn.ModuleList(Layer(str(number), mesh) for number in range(3))
        for p in self.parameters():
            whole = torch.randn(p.shard.global_shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
            p.data.copy_(p.shard.slice_of(whole) / 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().sum()


def trained(mesh: Mesh, **settings: Any) -> tuple[list[Tensor], dict[str, int]]:
    """Weights after two steps of two micro-batches; ranks from which each weight is gathered again."""
    model = Model(mesh)
    config = ZeroConfig(stage=3, persistence_threshold=0, **settings)
    zero = ZeroOptimizer(
        model.named_parameters(), mesh, config, OptimizerConfig(name="sgd"), shared_memory=False, root=model
    )
    for step in range(2):
        zero.start_step()
        for last in (False, True):
            generator = torch.Generator().manual_seed(10 * step + last + 100 * mesh.rank)
            zero.start_backward(last)
            model(torch.randn(3, WIDTH, generator=generator, dtype=torch.float64)).backward()
            zero.end_backward()
        zero.finish_gradients()
        zero.step(0.01)
    nodes = {}
    for bucket in zero.buckets:
        memory = bucket.parameters._memory  # type: ignore[union-attr]
        if isinstance(memory, QuantizedGathered) and memory._second is not None:
            nodes[bucket.layout.slots[0].spec.name.split(".")[1]] = memory.whole.numel() // memory._second.numel()
    zero.close()
    return [p.detach().clone() for p in model.parameters()], nodes


def on_this_rank() -> None:
    mesh = Mesh.create(MeshShape(dp=RANKS, ep=EXPERTS), torch.device("cpu"))
    want, _ = trained(mesh)
    for size, nodes in ((2, {"dense": 2}), (4, {"dense": 4, "expert": 2})):
        found, second = trained(mesh, secondary_size=size)
        assert second == nodes
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True)), f"second shards of {size}"
        near, _ = trained(mesh, secondary_size=size, quantized_gradients="int8")
        for a, b, start in zip(near, want, Model(mesh).parameters(), strict=True):
            assert 0 < (a - b).norm() < 0.02 * (b - start).norm(), f"gradients of {size} in few bits"


def test_experts_are_gathered_again_from_ranks_that_hold_the_same() -> None:
    run_ranks(on_this_rank, RANKS)


def test_a_node_holds_all_parts_equally_often() -> None:
    axes = {(): (24, 1), ("ep",): (6, 1)}  # of four experts' ranks

    def size(secondary: int | None, *over: str) -> int | None:
        return node_size(ZeroConfig(stage=3, secondary_size=secondary), axes, over)

    assert [size(secondary) for secondary in (None, 2, 8)] == [None, 2, 8]
    assert [size(secondary, "ep") for secondary in (None, 2, 4, 8, 24)] == [None, None, None, 2, 6]
    with pytest.raises(ConfigError, match=r"zero\.secondary_size=6 and ep=4: a node would hold some"):
        size(6, "ep")
