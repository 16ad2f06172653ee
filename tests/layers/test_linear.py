"""Split linear layers, embedding, norms and MLP on several ranks against the whole layer in plain torch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ds import comm
from megatron_ds.kernels.accumulate import add_product
from megatron_ds.kernels.cpu import onednn
from megatron_ds.kernels.matmul import linear_input_gradient, linear_of_vocabulary
from megatron_ds.layers.embedding import VocabParallelEmbedding
from megatron_ds.layers.linear import ColumnParallelLinear, RowParallelLinear
from megatron_ds.layers.mlp import MLP
from megatron_ds.layers.norms import Norm
from megatron_ds.mesh import Axis, Mesh, MeshShape
from megatron_ds.rng import initialize_parameters
from megatron_ds.shard import ShardedDim, spec_of
from megatron_ds.testing import device_of_rank, run_ranks
from megatron_ds.zero.main_grad import MainGradient

S, B, H, FFN, VOCAB = 12, 2, 6, 12, 24


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def initialised(layer: nn.Module) -> nn.Module:
    """With the weights of (seed 7, name), and biases and norms that are not what they start as."""
    initialize_parameters(layer.parameters(), 7)
    with torch.no_grad():
        for parameter in layer.parameters():
            spec = spec_of(parameter)
            if spec.init != "normal":
                parameter += spec.slice_of(random(*spec.global_shape, seed=len(spec.name)))
    return layer


def part(whole: Tensor, tp: Axis, sequence_parallel: bool) -> Tensor:
    return comm.slice_dim0(whole, tp).clone() if sequence_parallel else whole.clone()


def whole_gradient(parameter: nn.Parameter, tp: Axis) -> Tensor:
    """What the optimizer makes of a local gradient: summed over tp where the spec says that it is a part."""
    assert parameter.grad is not None
    gradient = parameter.grad.clone()
    return comm.all_reduce(gradient, tp) if spec_of(parameter).reduce_over else gradient


def check(make: Callable[[Axis, bool], nn.Module], x: Tensor, tp: Axis, sequence_parallel: bool, grad: Tensor) -> None:
    """The layer on this rank is the same layer on one rank: output, input gradient and each parameter's gradient."""
    one = initialised(make(Axis("tp"), False))
    whole_x = x.clone().requires_grad_(x.is_floating_point())
    want = one(whole_x)
    want.backward(grad)
    layer = initialised(make(tp, sequence_parallel))
    own_x = part(x, tp, sequence_parallel and x.is_floating_point())  # every rank embeds all token ids
    own_x.requires_grad_(x.is_floating_point())
    got = layer(own_x)
    torch.testing.assert_close(got, part(want.detach(), tp, sequence_parallel), rtol=0, atol=1e-12)
    got.backward(part(grad, tp, sequence_parallel))
    if x.is_floating_point():
        assert whole_x.grad is not None and own_x.grad is not None
        torch.testing.assert_close(own_x.grad, part(whole_x.grad, tp, sequence_parallel), rtol=0, atol=1e-12)
    for (name, own), reference in zip(layer.named_parameters(), one.parameters()):
        want_gradient = spec_of(own).slice_of(reference.grad)
        assert (whole_gradient(own, tp) - want_gradient).abs().max() < 1e-12, name


def mlp(activation: str, bias: bool) -> Callable[[Axis, bool], nn.Module]:
    return lambda tp, sp: MLP(
        "mlp",
        H,
        FFN,
        activation,
        bias=bias,
        tp=tp,
        sequence_parallel=sp,
        stds=(0.5, 0.5),
        dtype=torch.float64,
    )


def embedding(tp: Axis, sp: bool) -> nn.Module:
    return VocabParallelEmbedding("embedding", VOCAB, H, tp=tp, sequence_parallel=sp, init_std=1.0, dtype=torch.float64)


def norm(kind: str) -> Callable[[Axis, bool], nn.Module]:
    return lambda tp, sp: Norm("norm", kind, H, 1e-5, tp=tp, partial=sp, dtype=torch.float64)


def on_a_rank(tp_size: int) -> int:
    tp = Mesh.create(MeshShape(tp=tp_size), device_of_rank(dist.get_rank(), tp_size)).tp
    tokens = torch.randint(VOCAB, (S, B), generator=torch.Generator().manual_seed(3))
    done = 0
    for sequence_parallel in (False, True):
        for activation in ("gelu", "gelu_tanh", "swiglu"):
            for bias in (False, True):
                check(mlp(activation, bias), random(S, B, H), tp, sequence_parallel, random(S, B, H, seed=1))
                done += 1
        check(embedding, tokens, tp, sequence_parallel, random(S, B, H, seed=1))
        for kind in ("layernorm", "rmsnorm"):
            check(norm(kind), random(S, B, H), tp, sequence_parallel, random(S, B, H, seed=1))
        column_alone(tp, sequence_parallel)
        done += 4
    return done


def column_alone(tp: Axis, sequence_parallel: bool) -> None:
    """A column layer's own output is a slice of the features; more than two dims, frozen parts, main gradients."""
    where: dict[str, Any] = {"init_std": 0.5, "dtype": torch.float64}
    shape = (FFN, 3, 2)
    layer = ColumnParallelLinear(
        "c", H, shape, shard_dim=0, bias=True, tp=tp, sequence_parallel=sequence_parallel, **where
    )
    one = ColumnParallelLinear("c", H, shape, shard_dim=0, bias=True, tp=Axis("tp"), sequence_parallel=False, **where)
    initialised(layer), initialised(one)
    x, grad = random(S, B, H), random(S, B, FFN * 6, seed=1)
    own = slice(tp.rank * FFN * 6 // tp.size, (tp.rank + 1) * FFN * 6 // tp.size)
    weight, bias = one.weight.detach().reshape(-1, H), one.bias.detach().reshape(-1)
    want = F.linear(x, weight, bias)
    want_weight = spec_of(layer.weight).slice_of((grad.reshape(-1, FFN * 6).T @ x.reshape(-1, H)).view(*shape, H))
    for x_needs, weight_needs, main_grad in ((True, True, True), (True, False, False), (False, True, False)):
        own_x = part(x, tp, sequence_parallel).requires_grad_(x_needs)
        layer.weight.requires_grad_(weight_needs)
        layer.weight.grad = None
        buffer = torch.full_like(layer.weight, torch.nan)
        if main_grad:
            layer.weight.main_grad = MainGradient("c.weight", lambda main_grad: None, lambda main_grad: None)
            layer.weight.main_grad.view = buffer
        got = layer(own_x)
        torch.testing.assert_close(got, want[..., own], rtol=0, atol=1e-12)
        got.backward(grad[..., own])
        if x_needs:
            want_x = part(grad @ weight, tp, sequence_parallel)
            torch.testing.assert_close(own_x.grad, want_x, rtol=0, atol=1e-12)
        if main_grad:
            assert layer.weight.grad is None
            torch.testing.assert_close(buffer, want_weight, rtol=0, atol=1e-12)
            del layer.weight.main_grad
        elif weight_needs:
            torch.testing.assert_close(layer.weight.grad, want_weight, rtol=0, atol=1e-12)
        else:
            assert layer.weight.grad is None


@pytest.mark.parametrize("tp_size", [2, 3])
def test_split_layers_equal_the_whole(tp_size: int) -> None:
    assert run_ranks(on_a_rank, tp_size, tp_size) == [20] * tp_size


def test_one_rank_equals_plain_torch() -> None:
    """The whole layers themselves, by formula."""
    x = random(S, B, H)
    for activation, formula in (
        ("gelu", lambda v: 0.5 * v * (1 + math.erf(v / math.sqrt(2)))),
        ("gelu_tanh", lambda v: 0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))),
    ):
        layer = initialised(mlp(activation, True)(Axis("tp"), False))
        inner = F.linear(x, layer.up.weight, layer.up.bias).detach()
        inner = inner.apply_(formula)
        want = inner @ layer.down.weight.T + layer.down.bias
        torch.testing.assert_close(layer(x), want, rtol=0, atol=1e-12)
    layer = initialised(mlp("swiglu", False)(Axis("tp"), False))
    gate, up = (x @ weight.T for weight in layer.gate_up.weight)
    torch.testing.assert_close(layer(x), (gate / (1 + (-gate).exp()) * up) @ layer.down.weight.T, rtol=0, atol=1e-12)
    rms, layernorm = (initialised(norm(kind)(Axis("tp"), False)) for kind in ("rmsnorm", "layernorm"))
    torch.testing.assert_close(
        rms(x), x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * rms.weight, rtol=0, atol=1e-12
    )
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(layernorm(x), scaled * layernorm.weight + layernorm.bias, rtol=0, atol=1e-12)


def test_what_is_summed_over_tp_and_what_counts_once() -> None:
    """Under sequence parallelism a row bias sees a part of the sequence; rank 0's copy is the one that counts."""
    for rank in range(2):
        tp = Axis("tp", rank, 2, None, (0, 1))
        for sequence_parallel in (False, True):
            row = RowParallelLinear(
                "r", FFN, H, bias=True, tp=tp, sequence_parallel=sequence_parallel, init_std=1.0, device="meta"
            )
            weight, bias = spec_of(row.weight), spec_of(row.bias)
            assert (bias.reduce_over, bias.replica) == (("tp",) if sequence_parallel else (), rank == 1)
            assert (weight.reduce_over, weight.replica) == ((), False)
            assert (weight.placements, weight.local_shape) == ((ShardedDim(1, "tp", rank, 2),), (H, FFN // 2))
            assert weight.weight_decay and not bias.weight_decay


@pytest.mark.parametrize("shape", [(S, B, H), (1, 1, H)])
def test_fp32_layers_equal_float64(shape: tuple[int, ...]) -> None:
    """fp32 may go through another matmul library than the one torch.nn.functional takes."""
    layer = ColumnParallelLinear(
        "c", H, (FFN,), shard_dim=0, bias=True, tp=Axis("tp"), sequence_parallel=False, init_std=0.5
    )
    initialised(layer)
    x = random(*shape).float().requires_grad_()
    grad = random(*shape[:-1], FFN, seed=1)
    layer(x).backward(grad.float())
    wide = layer.weight.detach().double().requires_grad_()
    wide_x = x.detach().double().requires_grad_()
    want = F.linear(wide_x, wide, layer.bias.detach().double())
    want.backward(grad)
    torch.testing.assert_close(layer(x).double(), want, rtol=0, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), wide_x.grad, rtol=0, atol=1e-5)
    torch.testing.assert_close(layer.weight.grad.double(), wide.grad, rtol=0, atol=1e-5)
    torch.testing.assert_close(layer.bias.grad.double(), grad.flatten(0, -2).sum(0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("slow", [True, False])
@pytest.mark.parametrize("shape", [(), (5,), (3, 4)], ids=str)
def test_products_in_fp32_where_blas_is_slow_and_where_not(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], slow: bool
) -> None:
    """On each kind of CPU, whatever this one is: the three products of a layer, some of them into memory given."""
    monkeypatch.setattr(onednn, "BLAS_IS_SLOW", slow)
    asked: list[Tensor] = []
    product = onednn.product
    monkeypatch.setattr(onednn, "product", lambda *args: (asked.append(args[0]), product(*args))[1])
    x, grad, weight, bias = random(*shape, 40), random(*shape, 2100, seed=1), random(2100, 40, seed=2), random(2100)
    bound, narrow = 1e-6 * 2100, [t.float() for t in (x, grad, weight, bias)]
    close = functools.partial(torch.testing.assert_close, rtol=0, atol=bound, check_dtype=False)
    close(linear_of_vocabulary(narrow[0], narrow[2], narrow[3]), F.linear(x, weight, bias))
    asked.clear()
    close(linear_input_gradient(narrow[1], narrow[2]), grad @ weight)
    assert bool(asked) == (slow and len(shape) > 0 and torch.backends.mkldnn.is_available())
    out = torch.full_like(narrow[0], torch.nan)
    close(linear_input_gradient(narrow[1], narrow[2], out=out), grad @ weight)
    close(out, grad @ weight)
    rows, of_rows = x.reshape(-1, 40), grad.reshape(-1, 2100)
    total = random(2100, 40, seed=3).float()
    want = total.double() + of_rows.t() @ rows
    add_product(total, of_rows.float().t(), rows.float(), first=False)
    close(total, want)
    add_product(total, of_rows.float().t(), rows.float(), first=True)
    close(total, of_rows.t() @ rows)
    add_product(total, of_rows[:0].float().t(), rows[:0].float(), first=True)  # no tokens
    assert not total.any() and linear_input_gradient(narrow[1].flatten()[:0], narrow[2][:0]).tolist() == [0.0] * 40
    assert bool(asked) == (slow and torch.backends.mkldnn.is_available())


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
@pytest.mark.parametrize("features", [(300, 70), (70, 300)], ids=["wide grad", "wide input"])
def test_onednn_adds_a_weight_gradient_by_columns_of_the_wider_operand(
    monkeypatch: pytest.MonkeyPatch, features: tuple[int, int]
) -> None:
    """Each column is put into oneDNN's order once. From parts of wider rows too, for which oneDNN itself would take its
    reference loop."""
    copied: list[tuple[int, int]] = []
    product = onednn.product
    monkeypatch.setattr(
        onednn, "product", lambda *args: (copied.append((args[0].numel(), args[1].numel())), product(*args))[1]
    )
    (wide, narrow), tokens = features, 50
    grad, x = random(tokens, wide + 5)[:, 5:].float(), random(tokens, narrow + 3, seed=1)[:, :narrow].float()
    total = random(wide, narrow, seed=2).float()
    want = total.double() + grad.double().t() @ x.double()
    at_once = total.clone()
    onednn.add_product(at_once, grad.t(), x, False)
    assert copied == [(70 * tokens, 300 * tokens)]
    monkeypatch.setattr(onednn, "_WHOLE_ELEMENTS", 0)
    onednn.add_product(total, grad.t(), x, False)
    torch.testing.assert_close(total, want, rtol=0, atol=1e-5, check_dtype=False)
    assert copied[1:] == [(70 * tokens, 192 * tokens), (70 * tokens, 108 * tokens)] and total.equal(at_once)
    onednn.add_product(total, grad.t(), x, True)
    torch.testing.assert_close(total.double(), grad.double().t() @ x.double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_product_is_added_whole_and_by_blocks_alike(dtype: torch.dtype, first: bool) -> None:
    """3,000 rows are three blocks, the last one short, in half precision; there, it is rounded before it is added."""
    total = random(3000, 384, seed=1).to(torch.promote_types(dtype, torch.float32))
    left, right = random(16, 3000, seed=2).to(dtype).t(), random(16, 384, seed=3).to(dtype)
    exact = left.double() @ right.double()
    want = exact if first else total.double() + exact
    add_product(total, left, right, first)
    ulp = torch.finfo(dtype).eps
    assert ((total.double() - want).abs() <= 2 * ulp * (exact.abs() + 16)).all()
    assert (total.double() - want).norm() <= ulp * exact.norm()


def test_a_product_without_rows_or_with_very_long_ones() -> None:
    total = torch.empty(0, 4)
    add_product(total, torch.empty(0, 3, dtype=torch.bfloat16), torch.ones(3, 4, dtype=torch.bfloat16), first=True)
    wide = torch.empty(2, 600_000)  # a row is more than a block
    add_product(wide, torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(3, 600_000, dtype=torch.bfloat16), first=True)
    assert wide.unique().tolist() == [3.0]
