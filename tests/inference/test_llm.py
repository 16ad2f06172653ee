"""``LLM`` against `transformers`, and as a user calls it: folders, checkpoints, texts, conversations, mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import FAMILIES, MODELS, make

from megatron_ds.errors import ConfigError
from megatron_ds.inference import LLM, SamplingParams

REFUSED = {"roberta": "no decoder", "modernbert": "no decoder", "llama-dynamic": "turns all keys anew"}
DECODERS = sorted({**MODELS, **FAMILIES}.keys() - REFUSED)
GREEDY = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)


def prompts(vocab: int = 131) -> list[list[int]]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(3, vocab, (length,), generator=draw).tolist() for length in (5, 17)]


def by_transformers(model: Any, tokens: list[int], count: int) -> list[int]:
    """Token by token over the whole text: their cache and their masks have no part in it."""
    text = list(tokens)
    with torch.no_grad():
        for _ in range(count):
            text.append(int(model(torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
    return text[len(tokens) :]


@pytest.mark.parametrize("name", DECODERS)
def test_greedy_answers_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    theirs = make(name)
    theirs.save_pretrained(tmp_path)
    with LLM(tmp_path, block_size=8, max_num_batched_tokens=80) as llm:
        found = llm.generate(prompts(), GREEDY, use_tqdm=False)
    for tokens, output in zip(prompts(), found, strict=True):
        assert output.outputs[0].token_ids == by_transformers(theirs, tokens, GREEDY.max_tokens or 0)


@pytest.mark.parametrize(("name", "why"), REFUSED.items())
def test_what_cannot_be_served_is_refused(tmp_path: Path, name: str, why: str) -> None:
    make(name).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=why):
        LLM(tmp_path)
