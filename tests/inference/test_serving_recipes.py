"""Packed weights: the same products, the memory of the others back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import _llama

from megatron_ds.inference import LLM, SamplingParams
from megatron_ds.inference.serving_recipes import PackedWeight, release, rows_of
from megatron_ds.kernels.cpu import onednn
from megatron_ds.kernels.cpu.allocator import use_huge_pages
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_packed_weights_are_on_huge_pages_where_linux_says_so(dtype: torch.dtype, monkeypatch: Any) -> None:
    moved: dict[int, int] = {}

    def counted(address: int, count: int) -> int:
        return moved.setdefault(address, use_huge_pages(address, count))

    monkeypatch.setattr(onednn, "use_huge_pages", counted)
    weight = (torch.randn(2560, 2048) * 40).to(dtype)
    if not (onednn.can_multiply_int8(weight) if dtype is torch.int8 else onednn.can_pack(weight)):
        pytest.skip(f"this machine has no products of {dtype}")
    packed = onednn.packed_int8(weight) if dtype is torch.int8 else onednn.packed(weight)
    address, count = torch.ops.mkldnn.data_ptr(packed), torch.ops.mkldnn._nbytes(packed)
    assert list(moved) == [address] and count >= weight.nbytes
    if not moved[address]:
        pytest.skip("this machine has no huge pages to give")
    of_weight = [huge for start, end, huge in mappings() if start < address + count and address < end]
    assert sum(of_weight) >= moved[address] << 21
    assert use_huge_pages(address, 4096) == 0, "so few bytes stay where they are"
    x = torch.eye(2048)[:3]
    if dtype is torch.bfloat16:
        assert torch.equal(onednn.product(x.bfloat16(), packed, None), weight[:, :3].t())
    else:
        ones, zeros = torch.ones(2560), torch.zeros(2560, dtype=torch.int32)
        found = onednn.int8_product((x + onednn.INT8_ZERO).to(torch.uint8), packed, ones, zeros)
        assert torch.equal(found, weight[:, :3].t().float())


def mappings() -> Iterator[tuple[int, int, int]]:
    """Of this process's memory: from where to where, and how many bytes of it are on huge pages."""
    start = end = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            start, end = (int(place, 16) for place in first.split("-"))
        elif first == "AnonHugePages:":
            yield start, end, int(rest[0]) << 10


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
