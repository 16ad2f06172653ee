"""With ``batch_invariant`` a request's log-probabilities are the same bits alone and in company."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hf_models import _llama

from megatron_ds.inference import LLM, SamplingParams
from megatron_ds.inference.serving_recipes import BatchInvariant, PackedWeight
from megatron_ds.kernels.cpu import onednn
from megatron_ds.layers.recipe import OwnPrecision

SIZES = {"hidden_size": 128, "intermediate_size": 344, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    _llama(vocab_size=1031, max_position_embeddings=512, **SIZES).save_pretrained(path)
    return path


@pytest.fixture
def two_threads() -> Iterator[None]:
    """torch cuts tensors between them, wherever that is in a row."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_neighbours_change_no_bit(folder: Path, dtype: str, two_threads: None) -> None:
    draw = random.Random(2)
    prompts = [[draw.randrange(3, 1031) for _ in range(draw.randrange(1, 200))] for _ in range(20)]
    params = [
        SamplingParams(temperature=draw.choice([0.0, 1.0]), seed=i, max_tokens=draw.randrange(5, 20), logprobs=2)
        for i in range(20)
    ]
    with LLM(folder, dtype=dtype, batch_invariant=True, max_num_batched_tokens=160, num_blocks=400) as llm:
        together = llm.generate(prompts, params, use_tqdm=False)
        llm.engine.batcher.pool.reset()
        longest = max(range(20), key=lambda number: len(prompts[number]))
        assert len(prompts[longest]) > 160, "alone it takes two steps, and of the first no token follows"
        for number in (0, 3, 11, longest):
            (alone,) = llm.generate(prompts[number], params[number], use_tqdm=False)
            assert alone.cached == 0
            assert alone.outputs[0].logprobs == together[number].outputs[0].logprobs
        assert llm.engine.batcher.preemptions == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_row_does_not_depend_on_the_number_of_rows(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(1031, 344).to(dtype), torch.randn(300, 344).to(dtype)
    of = [OwnPrecision(), *([PackedWeight(weight)] if onednn.can_pack(weight) else [])]
    for recipe in map(BatchInvariant, of):
        want = recipe.product(x, weight, None)
        for count in (1, 2, 3, 7, 16, 31, 33, 64, 100, 129, 300):
            assert torch.equal(recipe.product(x[:count], weight, None), want[:count]), count
