"""A language model of transformers in a DeepSpeed script with one changed import, against plain torch in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed_scripts as scripts
import pytest
import torch
from torch import Tensor

from megatron_ds.integrations import deepspeed
from megatron_ds.testing import run_ranks

STEPS, VOCABULARY = 3, 61


def model_of(folder: str) -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)


def ids_of(rank: int, step: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(10 * step + rank))


def fine_tuned(folder: str) -> dict[str, Any]:
    settings = scripts.config(3, optimizer=scripts.CLASSIFIER["optimizer"])
    about = deepspeed.HfDeepSpeedConfig(settings)
    assert deepspeed.is_deepspeed_zero3_enabled() and about.is_zero3()
    with deepspeed.zero.Init(config_dict_or_path=settings):
        model = model_of(folder)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)
    engine.gradient_checkpointing_enable()
    assert engine.is_gradient_checkpointing and engine.can_generate()
    losses = []
    engine.train()
    for step in range(STEPS):
        batch = {"input_ids": ids_of(engine.global_rank, step).to(engine.device)}
        loss = engine(**batch, labels=batch["input_ids"], use_cache=False).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    engine.eval()
    with torch.no_grad():
        logits = engine(ids_of(0, 9)).logits
    greedy: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    texts = [of.generate(ids_of(0, 9), **greedy).tolist() for of in (engine, engine.module)]
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), modifier_rank=0):
        if engine.global_rank == 0:
            engine.module.save_pretrained(f"{folder}/out")
    return {"losses": losses, "logits": logits.tolist(), "texts": texts, "state": engine.module_state_dict()}


def plain(folder: str, ranks: int) -> tuple[list[list[float]], Any]:
    model = model_of(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=scripts.LR, weight_decay=scripts.DECAY)
    losses = []
    for step in range(STEPS):
        each = [model(ids, labels=ids).loss for ids in (ids_of(rank, step) for rank in range(ranks))]
        torch.stack(each).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), scripts.CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append([loss.item() for loss in each])
    return losses, model.eval()


def test_a_language_model_is_fine_tuned(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, vocab_size=VOCABULARY, **sizes)).save_pretrained(tmp_path)
    losses, model = plain(str(tmp_path), 2)
    greedy: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    text = model.generate(ids_of(0, 9), **greedy).tolist()
    with torch.no_grad():
        logits = model(ids_of(0, 9)).logits
    for rank, got in enumerate(run_ranks(fine_tuned, 2, str(tmp_path))):
        assert got["losses"] == pytest.approx([step[rank] for step in losses], rel=1e-9)
        assert (torch.tensor(got["logits"], dtype=torch.float64) - logits).abs().max() < 1e-9
        assert got["texts"] == [text, text]
        assert all((got["state"][name] - value).abs().max() < 1e-9 for name, value in model.state_dict().items())
    saved = model_of(f"{tmp_path}/out").state_dict()
    assert all((saved[name] - value).abs().max() < 1e-9 for name, value in model.state_dict().items())
