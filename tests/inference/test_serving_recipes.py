"""Packed weights: the same products, the memory of the others back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hf_models import _llama

from megatron_ds.inference import LLM, SamplingParams
from megatron_ds.inference.serving_recipes import PackedWeight, release, rows_of
from megatron_ds.kernels.cpu import onednn
from megatron_ds.layers.linear import RepeatedKVLinear
from megatron_ds.layers.recipe import OwnPrecision
from megatron_ds.mesh import Mesh


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_are_those_of_the_weight(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(131, 96).to(dtype), torch.randn(131).to(dtype)
    if not onednn.can_pack(weight):
        pytest.skip(f"this machine has no products in {dtype}")
    recipe = PackedWeight(weight)
    for count in (1, 8, 33):
        x = torch.randn(count, 1, 96).to(dtype)
        for added in (None, bias):
            want = x.double() @ weight.double().t() + (0.0 if added is None else added.double())
            found = recipe.product(x, weight.new_zeros(()).expand(weight.shape), added)
            assert found.shape == want.shape and found.dtype == dtype
            bound = 1e-6 if dtype is torch.float32 else torch.finfo(dtype).eps  # whose sums are of fp32
            assert (found - want).norm() / want.norm() < bound, (count, added is None)


@pytest.mark.parametrize("tied", [False, True])
def test_a_served_model_has_packed_weights_alone(tmp_path: Path, tied: bool) -> None:
    torch.manual_seed(0)
    _llama(tie_word_embeddings=tied).save_pretrained(tmp_path)
    asked = SamplingParams(temperature=0.0, max_tokens=3, prompt_logprobs=2)
    answers = []
    for dtype in ("float32", "float64"):
        with LLM(tmp_path, dtype=dtype) as llm:
            answers.append(llm.generate(list(range(3, 40)), asked, use_tqdm=False)[0])
            model = llm.engine.runner.model
            layers = [layer for layer in model.modules() if isinstance(getattr(layer, "recipe", None), PackedWeight)]
            assert len(layers) == (4 * len(model.layers) if dtype == "float32" else 0), "those of float64 stay"
            if dtype == "float32":
                assert all(layer.weight.untyped_storage().nbytes() == 4 for layer in layers)
                assert isinstance(llm.engine.runner.head_recipe, PackedWeight)
                held = model.output_weight.untyped_storage().nbytes()
                assert held == (4 * model.output_weight.numel() if tied else 4), "the embedding needs its own"
            else:
                assert isinstance(llm.engine.runner.head_recipe, OwnPrecision)
    found, want = (answer.prompt_logprobs or [] for answer in answers)
    for mine, theirs in zip(found[1:], want[1:], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)
    assert answers[0].outputs[0].token_ids == answers[1].outputs[0].token_ids


def test_a_projection_of_repeated_heads_copies_no_weight_that_its_recipe_has(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = RepeatedKVLinear(
        "qkv", 16, (1, 4, 8), bias=False, tp=Mesh.single().tp, sequence_parallel=False, init_std=0.02
    )
    layer.weight.data.normal_()
    x = torch.randn(3, 1, 16)
    with torch.no_grad():
        want = layer(x)
        layer.recipe = PackedWeight(rows_of(layer, layer.weight))
        release(layer.weight)
        monkeypatch.setattr(layer, "own", lambda _: pytest.fail("the placeholder was copied"))
        assert torch.allclose(layer(x), want, atol=1e-6)
