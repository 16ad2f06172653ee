"""Quantised weights: the closed form of their products, the same on every mesh, near the unquantised model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import _llama
from served import config_of, engine_of, stage_of

from megatron_ds.errors import ConfigError
from megatron_ds.inference import LLM, SamplingParams
from megatron_ds.inference.model_runner import CacheSize, ModelRunner
from megatron_ds.inference.quantization import SCHEMES, QuantizedWeight, quantize
from megatron_ds.inference.serving_recipes import use_serving_recipes
from megatron_ds.kernels.cpu import int4_product, onednn
from megatron_ds.mesh import Mesh, MeshShape
from megatron_ds.testing import run_ranks

WORST = {"int8": 0.011, "w8a8": 0.015, "fp8": 0.05, "int4": 0.16}
"""Relative error of a product of normal numbers, a little above what the bits give (measured: two thirds of it)."""


EXACT = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}


def dequantized(weight: QuantizedWeight) -> torch.Tensor:
    """``[out, in]``: the weight that products with this one are those of."""
    groups = weight.values.double().unflatten(1, (weight.scale.shape[1], -1))
    return (groups * weight.scale.double().unsqueeze(2)).flatten(1)


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_products_are_those_of_the_dequantised_weight(
    scheme: str, dtype: torch.dtype, packs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``packs``: with the kernels of this machine, where it has some; outputs are widened in more than one part."""
    monkeypatch.setattr(int4_product, "_WIDENED", 128)
    if not packs:
        monkeypatch.setattr(onednn, "can_multiply_int8", lambda weight: False)
        monkeypatch.setattr(int4_product, "can_pack", lambda values, group: False)
    torch.manual_seed(0)
    weight = (torch.randn(192, 96) * torch.rand(192, 1)).to(dtype)
    quantized = quantize(weight, scheme)
    recipe, whole = SCHEMES[scheme].recipe(quantized, None, dtype), dequantized(quantized)
    relative = (whole - weight.double()).norm() / weight.double().norm()
    assert relative < WORST[scheme], "the weight"
    for count in (1, 8, 33, 130):
        x = torch.randn(count, 96).to(dtype)
        if scheme in ("int8", "int4"):
            x[:, 0] *= 1000  # a feature that is much larger than the others, as models have
        out, want = recipe.product(x, weight, None).double(), x.double() @ whole.t()
        relative = (out - want).norm() / want.norm()
        inputs = WORST[scheme] if scheme in ("w8a8", "fp8") else 0.0
        assert relative < inputs + EXACT[dtype], count
        assert scheme not in ("w8a8", "fp8") or relative > 1e-4, "the inputs were not quantised"


def test_groups_that_no_kernel_knows_are_multiplied_all_the_same() -> None:
    """Folders of others have groups of any size."""
    values, scale = torch.randint(-8, 8, (32, 96)).to(torch.int8), torch.rand(32, 6).to(torch.bfloat16)
    x, weight = torch.randn(3, 96, dtype=torch.bfloat16), QuantizedWeight("int4", values, scale)
    out, want = SCHEMES["int4"].recipe(weight, None, x.dtype).product(x, x, None), x.double() @ dequantized(weight).t()
    assert (out - want).norm() < EXACT[x.dtype] * want.norm()


def test_sums_that_int32_does_not_hold_are_not_made() -> None:
    """Of ones: the product is the number of inputs."""
    inputs = 2**31 // 127**2 + 100
    ones = torch.ones(16, inputs, dtype=torch.bfloat16)
    product = SCHEMES["int8"].recipe(quantize(ones, "int8"), None, ones.dtype).product(ones[:2], ones, None)
    assert torch.all((product.double() / inputs - 1).abs() < 0.01)
    with pytest.raises(
        ConfigError, match=r"sums 133244 int8 products of a layer in int32, which may overflow beyond 133144"
    ):
        SCHEMES["w8a8"].recipe(quantize(ones, "w8a8"), None, ones.dtype)


def logprobs_of(scheme: str, ranks: int) -> Any:
    mesh = Mesh.create(MeshShape(tp=ranks), torch.device("cpu"))
    config = config_of("llama").model_copy(update={"hidden_size": 128, "ffn_hidden_size": 128, "vocab_multiple": 16})
    model = stage_of(config, mesh)
    head = use_serving_recipes(model, scheme)
    engine = engine_of(model, mesh, budget=12)
    engine.runner = ModelRunner(model, mesh, CacheSize(64, 4, torch.float64), head)
    if mesh.rank > 0:
        engine.follow()
        return None
    # Of the prompt's first step no token follows: the head has no rows.
    engine.add("a", [3, 1, 4, 1, 5] * 3, SamplingParams(temperature=0.0, max_tokens=6, logprobs=3))
    while engine.has_work:
        for output in engine.step():
            assert output.request_id == "a"
    engine.stop()
    return output.outputs[0].token_ids, output.outputs[0].logprobs


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_mesh_has_the_same_quantised_model(scheme: str) -> None:
    tokens, want = logprobs_of(scheme, 1)
    found, logprobs = run_ranks(logprobs_of, 2, scheme, 2)[0]
    assert found == tokens
    for mine, theirs in zip(logprobs, want, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-9)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_served_model_stays_near_itself_and_gives_memory_back(tmp_path: Path, scheme: str) -> None:
    torch.manual_seed(0)
    _llama(hidden_size=192, intermediate_size=256).to(torch.bfloat16).save_pretrained(tmp_path)
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    tokens = list(range(3, 60))
    sums = []
    for quantization in (None, scheme):
        with LLM(tmp_path, quantization=quantization) as llm:
            (output,) = llm.generate(tokens, params, use_tqdm=False)
            sums.append(sum(of[t] for t, of in zip(tokens[1:], (output.prompt_logprobs or [])[1:]) if of is not None))
            linears = llm.engine.runner.model.layers["0"].mlp
            held = sum(p.untyped_storage().nbytes() for p in linears.parameters())
            held += sum(b.untyped_storage().nbytes() for b in linears.buffers())
            whole = 2 * sum(p.numel() for p in linears.parameters())
            of_head = llm.engine.runner.model.output_weight
            assert of_head.untyped_storage().nbytes() == of_head.itemsize, "the head's recipe has it"
            assert held < (1.01 if quantization is None else 0.35 if scheme == "int4" else 0.54) * whole
    assert sums[1] != sums[0] and abs(sums[1] - sums[0]) / 56 < 0.05, "log-probability of a token"


def test_schemes_and_layers_that_do_not_go_together(tmp_path: Path) -> None:
    _llama(hidden_size=24).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="quantization='int5': Input should be 'int8', 'w8a8', 'fp8' or 'int4'"):
        LLM(tmp_path, quantization="int5")
    with pytest.raises(ConfigError, match="24 on a rank; use 'int8'"):
        LLM(tmp_path, quantization="int4")
    with pytest.raises(ConfigError, match="batch_invariant=True goes with quantization=None"):
        LLM(tmp_path, quantization="int8", batch_invariant=True)
