"""The key/value cache in eight bits: its bytes, and the logits of a model whose keys and values are rounded so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import _llama
from served import VOCAB, config_of, engine_of, stage_of

from megatron_ds.errors import ConfigError
from megatron_ds.inference import LLM, SamplingParams
from megatron_ds.inference.model_runner import CacheSize, ModelRunner
from megatron_ds.inference.pages import Pages
from megatron_ds.mesh import Mesh

E4M3 = torch.float8_e4m3fn


def rounded(rows: torch.Tensor) -> torch.Tensor:
    """To the nearest of e4m3's numbers, by arithmetic: 3 bits of mantissa, the smallest exponent -6."""
    scale = rows.float().abs().amax(-1, keepdim=True) / 448
    relative = rows.float() / scale
    exponent = relative.abs().clamp(min=2.0**-6).log2().floor()
    step = 2.0 ** (exponent - 3)
    return (relative / step).round() * step * scale


def test_rows_come_back_as_the_nearest_numbers_of_the_format() -> None:
    torch.manual_seed(0)
    rows = torch.randn(9, 3, 16) * torch.logspace(-6, 6, 9).view(9, 1, 1)
    pages = Pages(4, 5, 3, 16, E4M3, "cpu")
    slots = torch.tensor([4, 19, 0, 1, 2, 3, 7, 8, 9])
    pages.write(pages.rows_of(slots), rows)
    found = pages.read(slice(0, 20), torch.float32)[:, 0].transpose(0, 1)[slots]
    assert torch.allclose(found, rounded(rows), rtol=1e-6) and not torch.equal(found, rows)
    pages.copy(torch.tensor([0]), torch.tensor([2]))
    blocks = pages.read(pages.blocks_of(torch.tensor([[2, 1], [0, 1]])), torch.float32)
    assert torch.equal(blocks[:, 0], blocks[:, 1])
    assert torch.equal(blocks[:, 1:], pages.read(slice(0, 10), torch.float32))
    pages.clear(torch.tensor([2]))
    assert not pages.read(slice(10, 15), torch.float32).any() and pages.read(slice(5, 10), torch.float32).any()
    assert Pages.bytes_of_token(3, 16, E4M3) * 20 == pages.data.nbytes + pages.scale.nbytes  # type: ignore[union-attr]
    assert Pages.bytes_of_token(3, 16, torch.bfloat16) == 96


def logprobs(dtype: torch.dtype, budget: int, blocks: int, drafts: int = 0) -> list[Any]:
    model = stage_of(config_of("llama"), Mesh.single())
    engine = engine_of(model, None, blocks, 4, 8, budget, True, drafts=drafts)
    engine.runner = ModelRunner(model, engine.mesh, CacheSize(blocks, 4, dtype))
    for number in range(3):
        tokens = [(7 * number + 3 * place) % VOCAB for place in range(11 + number)]
        engine.add(str(number), tokens, SamplingParams(temperature=0.0, max_tokens=12, logprobs=VOCAB, ignore_eos=True))
    found = {}
    while engine.has_work:
        for output in engine.step():
            found[output.request_id] = output.outputs[0]
    return [(found[name].token_ids, found[name].logprobs) for name in sorted(found)]


def test_logits_are_those_of_rounded_keys_and_values_in_any_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = logprobs(torch.float64, 64, 64)
    runs = [logprobs(E4M3, 64, 64), logprobs(E4M3, 17, 14), logprobs(E4M3, 64, 64, drafts=4)]  # chunks, preemption
    write = Pages.write
    monkeypatch.setattr(Pages, "write", lambda self, slots, rows: write(self, slots, rounded(rows)))
    want = logprobs(torch.float64, 64, 64)
    for found in runs:
        for (tokens, of_tokens), (want_tokens, want_of) in zip(found, want, strict=True):
            assert tokens == want_tokens
            for mine, theirs in zip(of_tokens, want_of, strict=True):
                assert [mine[t] for t in range(VOCAB)] == pytest.approx([theirs[t] for t in range(VOCAB)], abs=1e-5)
    exact, less = plain[0][1][0], want[0][1][0]
    assert max(abs(exact[token] - less[token]) for token in range(VOCAB)) > 1e-3, "nothing was rounded"


def test_a_folder_is_served_with_it(tmp_path: Path) -> None:
    folder = tmp_path
    _llama().save_pretrained(folder)
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    with (
        LLM(folder, dtype="bfloat16", num_blocks=16) as plain,
        LLM(folder, dtype="bfloat16", kv_cache_dtype="fp8", num_blocks=16) as less,
    ):
        caches = [llm.engine.runner.cache.keys[0] for llm in (plain, less)]
        assert caches[1].data.nbytes * 2 == caches[0].data.nbytes
        assert len(less.generate([[5, 6, 7, 8]], params, use_tqdm=False)[0].outputs[0].token_ids) == 8
    with pytest.raises(ConfigError, match=r"kv_cache_dtype='int8': Input should be 'auto', .*'fp8'"):
        LLM(folder, kv_cache_dtype="int8")
