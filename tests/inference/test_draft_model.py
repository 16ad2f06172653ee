"""Guesses of a small model change no answer, are taken where it is right, and hold no memory afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import _llama

from megatron_ds.errors import ConfigError
from megatron_ds.inference import LLM, SamplingParams

PROMPTS = [[5, 6, 7, 8], [9] * 30, [3, 1, 4, 1, 5, 9, 2, 6]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and a smaller one."""
    paths = tmp_path_factory.mktemp("large"), tmp_path_factory.mktemp("small")
    for path, sizes in zip(paths, ({}, {"num_hidden_layers": 1, "num_attention_heads": 2})):
        torch.manual_seed(len(sizes))
        _llama(eos_token_id=None, **sizes).save_pretrained(path)
    return paths


def answers(llm: LLM, **settings: Any) -> list[Any]:
    params = SamplingParams(**{"max_tokens": 24, "logprobs": 1, "seed": 3, "temperature": 0.0, **settings})
    return [o for output in llm.generate(PROMPTS, params, use_tqdm=False) for o in output.outputs]


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "n": 3}], ids=["greedy", "drawn"])
@pytest.mark.parametrize("blocks", [64, 14])  # 14: samples are preempted, and the small model's cache is full at times
def test_answers_stay_what_they_are(folders: tuple[Path, Path], blocks: int, settings: dict[str, Any]) -> None:
    common: dict[str, Any] = {"dtype": "float64", "block_size": 4, "num_blocks": blocks, "max_model_len": 56}
    with LLM(folders[0], **common) as llm:
        want = answers(llm, **settings)
    for small in folders:
        with LLM(folders[0], **common, num_speculative_tokens=3, speculative_model=small) as llm:
            found = answers(llm, **settings)
            counters, draft = llm.engine.counters, llm.engine._draft_model
            assert draft is not None
            if small == folders[0] and blocks == 64 and not settings:  # it guesses all but every fourth token
                assert counters.drafted_tokens >= 3 * 15 and counters.steps <= 10
            if small == folders[1] and blocks == 64:
                assert counters.drafted_tokens < counters.answer_tokens / 2, "another model is mostly wrong"
            llm.generate([[1, 2, 3]], SamplingParams(max_tokens=1), use_tqdm=False)
            draft.guess([])
            assert draft.free == blocks, "nothing is held any more"
        for mine, theirs in zip(found, want, strict=True):
            assert mine.token_ids == theirs.token_ids
            for of, wanted in zip(mine.logprobs, theirs.logprobs, strict=True):
                assert of == pytest.approx(wanted, abs=1e-10)


def test_the_first_rank_tells_the_others(folders: tuple[Path, Path]) -> None:
    with LLM(folders[0], dtype="float64") as llm:
        want = [o.token_ids for o in answers(llm)]
    with LLM(folders[0], dtype="float64", tensor_parallel_size=2, num_speculative_tokens=3,
             speculative_model=folders[0]) as llm:  # fmt: skip
        assert [o.token_ids for o in answers(llm)] == want and llm.engine.counters.drafted_tokens >= 45


def test_models_that_cannot_guess_for_another(folders: tuple[Path, Path], tmp_path: Path) -> None:
    _llama(vocab_size=77).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="has a vocabulary of 77 tokens and the model one of 131"):
        LLM(folders[0], num_speculative_tokens=3, speculative_model=tmp_path)
    with pytest.raises(ConfigError, match="num_speculative_tokens=0 tokens; give a number"):
        LLM(folders[0], speculative_model=folders[1])
