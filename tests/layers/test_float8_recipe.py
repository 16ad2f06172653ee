"""FP8 recipes of a linear layer against the same quantised values in float64, and which layers take one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_ds.config import PrecisionConfig, RunConfig, from_dict
from megatron_ds.config.diffusion import DiffusionRun
from megatron_ds.kernels.float8 import E4M3, E5M2, Block, block_amax, quantize
from megatron_ds.kernels.float8_weight import matrix_shape
from megatron_ds.layers import float8_layers
from megatron_ds.layers import float8_recipe as float8
from megatron_ds.layers.linear import ColumnParallelLinear, RowParallelLinear
from megatron_ds.layers.recipe import OwnPrecision
from megatron_ds.mesh import Axis, Mesh, MeshShape
from megatron_ds.models.dit_task import DiTTask
from megatron_ds.models.families import task_of
from megatron_ds.pipeline.stage import StageSpan
from megatron_ds.rng import initialize_parameters
from megatron_ds.shard import spec_of
from megatron_ds.testing import run_ranks
from megatron_ds.zero.placeholder import CodesAlone

S, B, H, FFN, SIDE = 8, 3, 16, 32, 4
ONE = Axis("cp")
RECIPES = ["tensorwise", "rowwise", "blockwise"]


def settings(fp8: str, **more: Any) -> PrecisionConfig:
    block = {"fp8_block": SIDE} if fp8 == "blockwise" else {}
    return PrecisionConfig(fp8=fp8, fp8_min_features=0, fp8_emulate=True, **block, **more)  # type: ignore[arg-type]


class Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        gate, up = x.view(*x.shape[:2], 2, -1).unbind(2)
        return gate * up


def pair(tp: Axis, dtype: torch.dtype = torch.float64, sequence_parallel: bool = False) -> nn.Sequential:
    """A column layer whose output features are cut in two halves each, and a row layer."""
    make: dict[str, Any] = {"bias": True, "tp": tp, "sequence_parallel": sequence_parallel, "init_std": 0.5}
    layers = nn.Sequential(
        ColumnParallelLinear("up", H, (2, FFN // 2), shard_dim=1, dtype=dtype, **make),
        RowParallelLinear("down", FFN // 2, H, dtype=dtype, **make),
    )
    layers.insert(1, Gate())
    initialize_parameters(layers.parameters(), 1)
    return layers


def random(*shape: int) -> Tensor:
    """Each sequence, token and feature has its own magnitude, so that a scale of another one would show."""
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    for dim, size in enumerate(shape):
        factors = 10.0 ** torch.rand(size, generator=generator, dtype=torch.float64)
        x *= factors.view([-1 if d == dim else 1 for d in range(len(shape))])
    return x


def stands_for(x: Tensor, block: Block, dtype: torch.dtype) -> Tensor:
    return quantize(x, block_amax(x, block), block, dtype).dequantize(torch.float64)


def expected(fp8: str, x: Tensor, weight: Tensor, grad: Tensor, gradients: torch.dtype) -> tuple[Tensor, ...]:
    """Forward product, input gradient and weight gradient, sequence by sequence."""
    block, side = {
        "tensorwise": (Block(None, None), Block(None, None)),
        "rowwise": (Block(1, None), Block(1, None)),
        "blockwise": (Block(1, SIDE), Block(SIDE, SIDE)),
    }[fp8]
    w, w_t = stands_for(weight, side, E4M3), stands_for(weight.t(), side, E4M3)
    out, grad_x, grad_w = [], [], torch.zeros_like(weight)
    for sequence in range(x.shape[1]):
        one, its = x[:, sequence], grad[:, sequence]
        out.append(stands_for(one, block, E4M3) @ w.t())
        grad_x.append(stands_for(its, block, gradients) @ w_t.t())
        grad_w += stands_for(its.t(), block, gradients) @ stands_for(one.t(), block, E4M3).t()
    return torch.stack(out, 1), torch.stack(grad_x, 1), grad_w


def run(layer: Any, x: Tensor, grad: Tensor, forward: Any = None) -> list[Tensor]:
    x = x.clone().requires_grad_()
    out = (forward or layer)(x)
    out.backward(grad)
    gradients = [x.grad, layer.weight.grad.view(-1, layer.weight.shape[-1]), layer.bias.grad.view(-1)]
    layer.zero_grad()
    return [out.detach(), *gradients]  # type: ignore[list-item]


@pytest.mark.parametrize("which", [0, 2], ids=["column", "row"])
@pytest.mark.parametrize("fp8", RECIPES)
def test_the_products_of_a_layer(fp8: str, which: int) -> None:
    layer: Any = pair(Axis("tp"))[which]
    out, features = matrix_shape(layer.weight.shape)
    x, grad, weight = random(S, B, features), random(S, B, out), layer.weight.detach().view(out, features)
    float8_layers.use_float8(layer, settings(fp8), ONE)
    format_ = E5M2 if fp8 == "tensorwise" else E4M3
    want = [*expected(fp8, x, weight, grad, format_), grad.sum((0, 1))]
    for got, wanted in zip(run(layer, x, grad), want, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-13, atol=1e-11)
    differs = (run(layer, x, grad)[0] - (x @ weight.t())).abs().max()
    assert differs > 1e-3, "nothing was rounded"


@pytest.mark.parametrize("fp8", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_in_the_dtypes_of_training(dtype: torch.dtype, fp8: str) -> None:
    layer: Any = pair(Axis("tp"), dtype)[2]
    x, grad = random(S, B, FFN // 2).to(dtype), random(S, B, H).to(dtype)
    float8_layers.use_float8(layer, settings(fp8, fp8_from_masters=False), ONE)
    format_ = E5M2 if fp8 == "tensorwise" else E4M3
    want = expected(fp8, x.double(), layer.weight.detach().double(), grad.double(), format_)
    for got, wanted in zip(run(layer, x, grad), want):
        error = (got.double() - wanted).abs().max() / wanted.abs().max()
        assert got.dtype == dtype and error < {torch.float32: 1e-6, torch.bfloat16: 2.0**-8}[dtype]


def test_the_settings_reach_the_products() -> None:
    layer: Any = pair(Axis("tp"))[2]
    x, grad = random(S, B, FFN // 2), random(S, B, H)
    plain = run(layer, x, grad)
    weight = layer.weight.detach()
    float8_layers.use_float8(layer, settings("rowwise", fp8_weight_gradient=False, fp8_gradients="e5m2"), ONE)
    got = run(layer, x, grad)
    torch.testing.assert_close(got[2], plain[2], rtol=1e-13, atol=1e-11)
    torch.testing.assert_close(got[1], expected("rowwise", x, weight, grad, E5M2)[1], rtol=1e-13, atol=1e-11)
    float8_layers.use_float8(layer, settings("rowwise", fp8_power_of_two=True), ONE)
    exact = torch.ldexp(torch.randint(-7, 8, (S, B, FFN // 2)).double(), torch.randint(-3, 4, (S, B, 1)))
    layer.weight.data.copy_(torch.randint(-7, 8, (H, FFN // 2)))
    torch.testing.assert_close(layer(exact), exact @ layer.weight.t(), rtol=0, atol=0)  # the values lie on the grid


@pytest.mark.parametrize("fp8", RECIPES)
def test_compiled_is_eager(fp8: str) -> None:
    layer: Any = pair(Axis("tp"))[0]
    float8_layers.use_float8(layer, settings(fp8), ONE)
    x, grad = random(S, B, H), random(S, B, FFN)
    eager = run(layer, x, grad)
    compiled = torch.compile(layer.forward, backend="aot_eager", fullgraph=True)
    for got, wanted in zip(run(layer, x, grad, compiled), eager, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-13, atol=1e-11)
    both = float8.quantize_both(layer.weight.detach().flatten(0, -2), (None, None), layer.recipe.weight_block, E4M3)
    codes = [both[0].values, both[1].values.t().contiguous()][: layer.recipe.gathered.form.codes]
    layer.recipe.gathered.give(codes, [each.scale for each in both][: len(codes)])
    layer.weight.untyped_storage().resize_(0)
    layer.weight.__class__ = CodesAlone  # as ZeRO stage 3 leaves it
    for got, wanted in zip(run(layer, x, grad, compiled), eager, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-13, atol=1e-11)


def cut_layers() -> None:
    mesh = Mesh.create(MeshShape(tp=2), torch.device("cpu"))
    for fp8 in RECIPES:
        for sequence_parallel in (False, True):
            whole, layers = pair(Axis("tp")), pair(mesh.tp, sequence_parallel=sequence_parallel)
            for model in (whole, layers):
                float8_layers.use_float8(model, settings(fp8), ONE)
            x, grad = random(S, B, H), random(S, B, H)
            part = slice(mesh.tp.rank * S // 2, (mesh.tp.rank + 1) * S // 2) if sequence_parallel else slice(None)
            results = []
            for model, own in ((whole, slice(None)), (layers, part)):
                given = x[own].clone().requires_grad_()
                out = model(given)
                out.backward(grad[own])
                results.append([out.detach(), given.grad, *(p.grad for p in model.parameters())])
            specs = [None, None, *(p.shard for p in layers.parameters())]  # type: ignore[attr-defined]
            for spec, one, ours in zip(specs, *results, strict=True):
                assert one is not None and ours is not None
                if spec is None:
                    want = one[part]
                elif "tp" in spec.reduce_over:  # the row layer's bias: this rank's tokens alone
                    want = grad[part].sum((0, 1))
                else:
                    want = spec.slice_of(one)
                torch.testing.assert_close(ours, want, rtol=1e-12, atol=1e-9)


def test_two_ranks_have_the_scales_of_one() -> None:
    """Float64, so that a scale of half a row would show: it rounds every value another way."""
    run_ranks(cut_layers, 2)


# --- which layers ------------------------------------------------------------------------------------------------


SMALL: dict[str, Any] = {"num_layers": 1, "hidden_size": 32, "num_heads": 4}
MODELS: dict[str, tuple[type[Any], dict[str, Any], tuple[str, ...]]] = {
    "gpt": (RunConfig, {"vocab_size": 64, "max_positions": 16, "tied_embeddings": False}, ("layers.0",)),
    "dit": (DiffusionRun, {"image_size": 8}, ("layers.0",)),
    "joint": (DiffusionRun, {"image_size": 8, "condition": "text", "text_tokens": 8}, ("layers.0.image",)),
}


@pytest.mark.parametrize("name", MODELS)
def test_embeddings_head_norms_and_adaln_stay_in_high_precision(name: str) -> None:
    kind, more, streams = MODELS[name]
    data = {"synthetic": True} if kind is RunConfig else {"path": "nowhere"}
    train = {"sequence_length": 16} if kind is RunConfig else {}
    config = from_dict(kind, {"output": "nowhere", "model": {**SMALL, **more}, "data": data, "train": train}, name)
    task: Any = task_of(config) if kind is RunConfig else DiTTask(config)
    model = task.make_stage(StageSpan(0, 1), Mesh.single("meta"), torch.device("meta"), torch.float32)
    found = {layer for layer, _ in float8_layers.linear_layers(model)}
    own = {
        f"{stream}.{part}" for stream in streams for part in ("attention.qkv", "attention.out", "mlp.up", "mlp.down")
    }
    assert found == own | ({"layers.0.text.attention.qkv"} if name == "joint" else set())
    matrices = {spec_of(p).name.removesuffix(".weight") for p in model.parameters() if p.dim() > 1}
    high = {"gpt": {"embedding", "head"}}.get(name, {"condition.time_in", "final_modulation", "final"})
    assert high | {f"{stream}.modulation" for stream in streams if name != "gpt"} <= matrices - found


def test_layers_are_chosen_by_name_and_global_size() -> None:
    layers = pair(Axis("tp"))
    chosen = PrecisionConfig(fp8="rowwise", fp8_min_features=16, fp8_exclude=("down",))
    float8_layers.use_float8(layers, chosen, ONE)
    assert [type(layer.recipe) for _, layer in float8_layers.linear_layers(layers)] == [
        float8.Float8Recipe,
        OwnPrecision,
    ]
    text, faults = float8_layers.describe(layers, chosen)
    assert text == "FP8 (rowwise): 1 of 2 linear layers; 1 stay in fp32, excluded by 'down': down" and not faults
    _, faults = float8_layers.describe(layers, PrecisionConfig(fp8="rowwise"))
    assert faults == [
        "precision.fp8='rowwise' finds no layer to compute in FP8 (fewer than precision.fp8_min_features=2048 features "
        "in or out: up, down)"
    ]
    _, faults = float8_layers.describe(
        layers, PrecisionConfig(fp8="rowwise", fp8_min_features=0, fp8_exclude=("layers.*",))
    )
    assert faults == ["precision.fp8_exclude has 'layers.*', which names no linear layer; they are up, down"]


def test_shapes_that_tensor_cores_refuse_are_refused_on_a_cpu() -> None:
    for fp8 in RECIPES:
        for features, out in ((24, 16), (16, 24)):
            layer = RowParallelLinear(
                "down", features, out, bias=False, tp=Axis("tp"), sequence_parallel=False, init_std=1.0
            )
            fault = float8_layers.fault(layer, PrecisionConfig(fp8=fp8))  # type: ignore[arg-type]
            assert fault is not None and fault.startswith(
                f"{out} x {features} on a tensor-parallel rank, and FP8 takes multiples of 16; change"
            )
    cut = Mesh.described(MeshShape(tp=2), 0).tp
    layer = RowParallelLinear("down", 320, 16, bias=False, tp=cut, sequence_parallel=False, init_std=1.0)
    assert float8_layers.fault(layer, PrecisionConfig(fp8="rowwise")) is None
    fault = float8_layers.fault(layer, PrecisionConfig(fp8="blockwise"))
    assert fault is not None and "160 consecutive features" in fault and "fp8='rowwise'" in fault


def test_a_fault_of_many_layers_is_said_once() -> None:
    def layer(name: str) -> RowParallelLinear:
        return RowParallelLinear(name, 24, 16, bias=False, tp=Axis("tp"), sequence_parallel=False, init_std=1.0)

    model = torch.nn.Sequential(*(layer(f"layers.{index}.mlp.down") for index in range(5)))
    _, faults = float8_layers.describe(model, PrecisionConfig(fp8="rowwise", fp8_min_features=0))
    assert faults == [
        "layers.0.mlp.down, layers.1.mlp.down, layers.2.mlp.down and 2 more: 16 x 24 on a tensor-parallel rank, and "
        "FP8 takes multiples of 16; change the model's size or mesh.tp=1, or leave out: "
        "precision.fp8_exclude=['layers.*.mlp.down']"
    ]
    _, faults = float8_layers.describe(
        model, PrecisionConfig(fp8="rowwise", fp8_min_features=0, fp8_exclude=("layers.[0-3].mlp.down",))
    )
    assert len(faults) == 1 and faults[0].startswith("layers.4.mlp.down: 16 x 24")


def test_a_device_without_fp8_is_refused_unless_asked_to_emulate() -> None:
    wanted = PrecisionConfig(fp8="blockwise")
    fault = float8_layers.device_fault(torch.device("cpu"), wanted)
    assert fault == "precision.fp8='blockwise': cpu has no FP8; emulate it with precision.fp8_emulate=true"
    assert float8_layers.device_fault(torch.device("cpu"), wanted.model_copy(update={"fp8_emulate": True})) is None


def test_a_gpu_is_asked_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, wanted = torch.device("cuda"), PrecisionConfig(fp8="blockwise")
    properties = SimpleNamespace(name="A100", major=8, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert float8_layers.device_fault(gpu, wanted) == (
        "precision.fp8='blockwise': A100 has compute capability 8.0 and FP8 begins with 8.9; emulate it with "
        "precision.fp8_emulate=true"
    )
    properties.major = 9
    assert float8_layers.device_fault(gpu, wanted) is None
    fault = float8_layers.device_fault(gpu, wanted.model_copy(update={"fp8_block": 64}))
    assert fault == "precision.fp8_block=64: CUDA has blocks of 128; leave it out"


def test_a_write_inside_a_run_is_noticed() -> None:
    layer: Any = pair(Axis("tp"))[2]
    float8_layers.use_float8(layer, settings("tensorwise"), ONE)
    x = random(S, B, FFN // 2)
    with torch.no_grad(), float8.weights_kept(float8.recipes_of([layer]), whole=True):
        layer(x)
        layer.weight.mul_(-2.0)
        got = layer(x)
    torch.testing.assert_close(got, layer(x), rtol=0, atol=0)
    assert layer.recipe._kept is None
