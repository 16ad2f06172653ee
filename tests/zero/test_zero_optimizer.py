"""Half precision, bytes, direct writes, and what happens when methods are called in the wrong order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from megatron_ds.config import OptimizerConfig, ZeroConfig
from megatron_ds.kernels.square_sum import square_sum
from megatron_ds.mesh import Mesh, MeshShape
from megatron_ds.shard import ShardSpec
from megatron_ds.testing import run_ranks
from megatron_ds.zero.optimizer import ZeroOptimizer

SHAPES = {"a": (33, 7), "b": (5,), "c": (64, 20), "d": (1,)}


def parameters_of(dtype: torch.dtype, shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    parameters = {}
    for name, shape in shapes.items():
        parameters[name] = nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        parameters[name].shard = ShardSpec(name, shape, weight_decay=len(shape) > 1)  # type: ignore[attr-defined]
    return parameters


def optimizer_of(
    parameters: dict[str, nn.Parameter], mesh: Mesh | None = None, stage: int = 1, overlap: bool = True, **options: Any
) -> ZeroOptimizer:
    return ZeroOptimizer(
        parameters.items(),
        mesh or Mesh.single(),
        ZeroConfig(stage=stage, bucket_mb=0.004, overlap=overlap),  # type: ignore[arg-type]
        OptimizerConfig(**{"lr": 0.01, **options}),
    )


def half_gradient(name: str, shape: tuple[int, ...], step: int, micro: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + 10 * micro + ord(name))
    return torch.randn(shape, generator=generator).to(dtype)


def train_half(dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], dict[str, int], dict[str, int]]:
    """Three steps of four micro-batches over the ranks, gradients coming through autograd in ``dtype``."""
    world = dist.get_world_size()
    mesh = Mesh.create(MeshShape(dp=world), torch.device("cpu"))
    parameters = parameters_of(dtype)
    zero = optimizer_of(parameters, mesh)
    for step in range(3):
        zero.start_step()
        mine = list(range(mesh.data.rank, 4, world))
        for micro in mine:
            if micro == mine[-1]:
                zero.start_backward(last=True)
            total = sum(
                (
                    (p * half_gradient(name, p.shape, step, micro, dtype)).float().sum()
                    for name, p in parameters.items()
                ),
                torch.zeros(()),
            )
            total.backward()
        zero.finish_gradients()
        zero.step(0.01, 0.25)
    rows = [(kind, row.nbytes) for b in zero.buckets for kind, row in b.state.acquire().items()]
    measured = {
        "parameters": sum(b.parameters.whole.nbytes for b in zero.buckets),
        "gradients": sum(b.gradients.whole.nbytes for b in zero.buckets),
        "master": sum(size for kind, size in rows if kind == "master"),
        "optimizer": sum(size for kind, size in rows if kind != "master"),
    }
    assert len(rows) == 3 * len(zero.buckets)
    return {name: p.detach().clone() for name, p in parameters.items()}, measured, zero.bytes_report()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("world_size", [1, 2])
def test_half_precision_has_fp32_gradients_and_masters(dtype: torch.dtype, world_size: int) -> None:
    results = run_ranks(train_half, world_size, dtype)
    # By hand: fp32 sums of the half-precision gradients, AdamW on an fp32 copy, rounded back.
    parameters = parameters_of(dtype)
    masters = {name: nn.Parameter(p.detach().float()) for name, p in parameters.items()}
    groups = [
        {"params": [masters[n] for n in ("a", "c")], "weight_decay": 0.1},
        {"params": [masters[n] for n in ("b", "d")], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    for step in range(3):
        for name, master in masters.items():
            micro_batches = [half_gradient(name, master.shape, step, micro, dtype).float() for micro in range(4)]
            master.grad = torch.stack(micro_batches).sum(0) * 0.25
        reference.step()
    for got, _, _ in results:
        for name, master in masters.items():
            want = master.detach().to(dtype)
            # fp32 sums in another order may round the last bit of a half-precision weight the other way.
            torch.testing.assert_close(got[name], want, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
            assert (got[name] == want).float().mean() > 0.99


@pytest.mark.parametrize("world_size", [2, 3])
def test_bytes_are_those_of_the_formula(world_size: int) -> None:
    numel = sum(torch.Size(shape).numel() for shape in SHAPES.values())
    for _, measured, report in run_ranks(train_half, world_size, torch.bfloat16):
        assert measured == report
        padding = 4 * 32 * world_size + 32 * len(SHAPES)
        for kind, want in (
            ("parameters", 2),
            ("gradients", 4),
            ("master", 4 / world_size),
            ("optimizer", 8 / world_size),
        ):
            assert want * numel <= report[kind] + want * 4 and report[kind] <= want * (numel + padding)


def test_parameters_are_views_of_the_flat_buffer_and_master_is_the_parameter() -> None:
    parameters = parameters_of(torch.float32)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    zero = optimizer_of(parameters)
    storages = {b.parameters.whole.untyped_storage().data_ptr() for b in zero.buckets}
    for name, parameter in parameters.items():
        assert parameter.untyped_storage().data_ptr() in storages and parameter.data_ptr() % 64 == 0
        assert torch.equal(parameter, before[name])
    assert all("master" not in b.state.rows for b in zero.buckets)
    for bucket in zero.buckets:
        with bucket.acquire_segments() as segments:
            assert segments[0].master.data_ptr() == bucket.parameters.shard.data_ptr()


def test_direct_writes_equal_autograd_in_any_mixture() -> None:
    """A tied weight: a matmul, rows of a lookup and an ordinary gradient, each first in turn, in two micro-batches."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(5, 33, generator=generator), torch.randn(5, 7, generator=generator)
    indices, rows = torch.tensor([3, 0, 3]), torch.randn(3, 7, generator=generator)
    plain = torch.randn(33, 7, generator=generator)
    top = torch.randn(30, 7, generator=generator)
    once = left.t() @ right + torch.zeros(33, 7).index_add_(0, indices, rows) + plain
    once[:30] += top * 0.3
    for order in (
        "matmul rows scaled plain",
        "rows plain scaled matmul",
        "scaled matmul rows plain",
        "plain scaled rows matmul",
    ):
        parameters = parameters_of(torch.float32)
        zero = optimizer_of(parameters, name="sgd", weight_decay=0.0)
        start = parameters["a"].detach().clone()
        for step in range(2):
            zero.start_step()
            for _ in range(2):
                for way in order.split():
                    main_grad = parameters["a"].main_grad  # type: ignore[attr-defined]
                    if way == "matmul":
                        main_grad.add_matmul(left.t(), right)
                    elif way == "rows":
                        main_grad.add_rows(indices, rows)
                    elif way == "scaled":
                        main_grad.add_scaled(top, torch.tensor(0.3, dtype=torch.float64))
                    else:
                        (parameters["a"] * plain).sum().backward()
            zero.finish_gradients()
            want = (2 * once).double().square().sum()
            torch.testing.assert_close(zero.norm_squared(), want, rtol=1e-6, atol=0)
            zero.step(0.01)
            torch.testing.assert_close(parameters["a"].detach(), start - 0.02 * (step + 1) * once)
        assert parameters["a"].grad is None


def test_half_precision_matmul_goes_to_the_fp32_buffer() -> None:
    parameters = parameters_of(torch.bfloat16)
    zero = optimizer_of(parameters)
    left, right = torch.ones(33, 4, dtype=torch.bfloat16), torch.full((4, 7), 0.5, dtype=torch.bfloat16)
    zero.start_step()
    main_grad = parameters["a"].main_grad  # type: ignore[attr-defined]
    main_grad.add_matmul(left, right)
    main_grad.add_matmul(left, right)
    assert main_grad.view.dtype == torch.float32 and torch.equal(main_grad.view, torch.full((33, 7), 4.0))


def test_methods_out_of_order_say_so() -> None:
    parameters = parameters_of(torch.float32)
    zero = optimizer_of(parameters)
    with pytest.raises(RuntimeError, match=r"a got a gradient between steps; call start_step\(\) before"):
        parameters["a"].sum().backward()
    with pytest.raises(RuntimeError, match=r"step\(\) was called between steps; the order is start_step"):
        zero.step(0.1)
    zero.start_step()
    with pytest.raises(RuntimeError, match=r"start_step\(\) was called accumulating gradients"):
        zero.start_step()
    with pytest.raises(RuntimeError, match=r"norm_squared\(\) was called accumulating gradients"):
        zero.norm_squared()
    zero.start_backward(last=True)
    zero.finish_gradients()
    with pytest.raises(RuntimeError, match="a got a gradient holding reduced gradients"):
        parameters["a"].sum().backward()


def test_a_gradient_that_comes_after_its_bucket_left_is_not_lost_in_silence() -> None:
    """Twice a step where it was once: an error if the bucket has been sent, and simply added without overlap."""
    for overlap in (True, False):
        parameters = parameters_of(torch.float32)
        zero = optimizer_of(parameters, overlap=overlap)
        for step in range(2):
            zero.start_step()
            zero.start_backward(last=True)
            torch.stack([p.sum() for p in parameters.values()]).sum().backward()
            if overlap and step == 1:
                with pytest.raises(RuntimeError, match=r"d got gradient number 2 .* set zero\.overlap=false"):
                    parameters["d"].sum().backward()
                break
            parameters["d"].sum().backward() if step == 1 else None
            zero.finish_gradients()
            want = sum(torch.Size(shape).numel() for shape in SHAPES.values()) + (3 if step == 1 else 0)
            assert zero.norm_squared().item() == pytest.approx(want)
            zero.step(0.0)


def test_a_parameter_belongs_to_one_optimizer_at_a_time() -> None:
    parameters = parameters_of(torch.float32)
    zero = optimizer_of(parameters)
    with pytest.raises(ValueError, match=r"already belongs to a ZeroOptimizer; close\(\) that one first"):
        optimizer_of(parameters)
    zero.close()
    optimizer_of(parameters)


def test_a_sparse_gradient_is_refused() -> None:
    weight = nn.Embedding(4, 3, sparse=True).weight
    weight.shard = ShardSpec("embedding", (4, 3))  # type: ignore[attr-defined]
    zero = optimizer_of({"embedding": weight})
    zero.start_step()
    with pytest.raises(TypeError, match="embedding has a sparse gradient"):
        nn.functional.embedding(torch.tensor([1]), weight, sparse=True).sum().backward()


def test_no_parameters_at_all() -> None:
    zero = optimizer_of({})
    zero.start_step()
    zero.start_backward(last=True)
    zero.finish_gradients()
    assert zero.norm_squared() == 0
    zero.step(0.1)
    assert zero.flat_shards() == [] and set(zero.bytes_report().values()) == {0}


@pytest.mark.parametrize("numel", [0, 1, 4095, 4096, 3_000_000])
def test_squared_norm_is_right_where_fp32_sums_are_not(numel: int) -> None:
    flat = torch.randn(numel, generator=torch.Generator().manual_seed(1))
    want = flat.double().square().sum().item()
    assert square_sum(flat).item() == pytest.approx(want, rel=2e-7)
