"""A block's fused seams against the sum of their parts: which dropout falls where, and on what the norms stand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_ds.config import ModelConfig
from megatron_ds.layers.attention import AttentionInputs
from megatron_ds.layers.attention_cores import AttentionRules, BlockCore
from megatron_ds.models.block import Block, Stream
from megatron_ds.models.gpt import GPT
from megatron_ds.models.transformer import StageSettings
from megatron_ds.rng import DropoutKeys, keep_mask


@pytest.mark.parametrize("settings", [{}, {"norm": "rmsnorm", "activation": "swiglu"}], ids=str)
def test_a_block_with_dropout_is_the_sum_of_its_parts(settings: dict[str, Any]) -> None:
    config = ModelConfig(num_layers=2, hidden_size=8, num_heads=2, vocab_size=20, hidden_dropout=0.4, **settings)
    model = GPT(config, StageSettings(dtype=torch.float64))
    model.initialize(1)
    block = model.layers["1"]
    assert isinstance(block, Block)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 2, 8, generator=generator, dtype=torch.float64)
    keys = DropoutKeys(7, torch.tensor([11, 12]))
    inputs = AttentionInputs(torch.arange(5).unsqueeze(1).expand(5, 2), BlockCore(AttentionRules()), keys=keys)

    def dropped(y: torch.Tensor, site: int) -> torch.Tensor:
        kept = keep_mask(keys.row_keys(site, 5, 0), torch.arange(8), 0.4)
        assert 0 < kept.sum() < kept.numel()
        return torch.where(kept, y / 0.6, 0.0)

    # The second block: sites 4 (attention), 5 (MLP) and 6 (probabilities) follow the embedding's 0 and the first's 3.
    first = x + dropped(block.attention(block.attention_norm(x), inputs), 4)
    want = first + dropped(block.mlp(block.mlp_norm(first)), 5)
    torch.testing.assert_close(block(Stream(x), inputs).sum(0.4), want, rtol=0, atol=1e-13)
    # The sum that the block before has left to it, and the one that it leaves itself.
    before = Stream(x, first, keys.row_keys(3, 5, 0))
    assert block(Stream(x), inputs).branch is not None
    got, want = block(before, inputs).sum(0.4), block(Stream(x + dropped(first, 3)), inputs).sum(0.4)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-13)


def test_a_block_with_dropout_compiles_whole_and_drops_the_same() -> None:
    """Of other seeds, samples and sites too: what the compiler took for constants it must look at again."""
    config = ModelConfig(num_layers=2, hidden_size=8, num_heads=2, vocab_size=20, hidden_dropout=0.4)
    model = GPT(config, StageSettings(dtype=torch.float64))
    model.initialize(1)
    x = torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    results = []
    for block in model.layers.values():
        assert isinstance(block, Block)

        def run(x: torch.Tensor, inputs: AttentionInputs, block: Block = block) -> torch.Tensor:
            return block(Stream(x, x.tanh(), inputs.keys.row_keys(40, 5, 0)), inputs).sum(0.4)  # type: ignore[union-attr]

        compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
        for seed, samples in ((7, [11, 12]), (8, [11, 12]), (9, [13, 12])):
            keys = DropoutKeys(seed, torch.tensor(samples))
            inputs = AttentionInputs(torch.arange(5).unsqueeze(1).expand(5, 2), BlockCore(AttentionRules()), keys=keys)
            want = run(x, inputs)
            torch.testing.assert_close(compiled(x, inputs), want, rtol=0, atol=1e-13)
            results.append(want)
    assert all(not torch.equal(a, b) for i, a in enumerate(results) for b in results[:i])


def test_row_keys_as_an_operator() -> None:
    torch.library.opcheck(torch.ops.megatron_ds.dropout_row_keys.default, (torch.tensor([3, 2**40]), 2**60, 5, 4, 2))
