"""LoRA adapters of `peft` that take turns (``set_adapter``): the numbers of plain torch, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

import megatron_ds
from megatron_ds.testing import run_ranks

TURNS = ("a", "a", "b", "b", "a", "b")
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


def adapted() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    lora = {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0, "init_lora_weights": False}
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2))
    model = peft.get_peft_model(model, peft.LoraConfig(**lora), adapter_name="a")
    model.add_adapter("b", peft.LoraConfig(**lora))
    model.set_adapter("a")
    return model.double()


def adam(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(list(model.parameters()), lr=1e-2)


def sample(rank: int, step: int) -> Tensor:
    return torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(100 * step + rank))


def by_torch(ranks: int) -> dict[str, Tensor]:
    model = adapted()
    optimizer = adam(model)
    for step, turn in enumerate(TURNS):
        model.set_adapter(turn)
        for rank in range(ranks):
            tokens = sample(rank, step)
            (model(input_ids=tokens, labels=tokens).loss / ranks).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {name: value.detach() for name, value in model.named_parameters() if "lora" in name}


def by_engine(stages: tuple[int, ...], folder: str) -> list[dict[str, Tensor]]:
    """With a resume in the middle."""
    found = []
    for stage in stages:
        model = adapted()
        engine = megatron_ds.initialize(model, {"zero": {"stage": stage}}, adam(model))
        for step, turn in enumerate(TURNS):
            if step == 3:
                engine.save_checkpoint(f"{folder}/{stage}")
                engine.close()
                model = adapted()
                engine = megatron_ds.initialize(model, {"zero": {"stage": stage}}, adam(model))
                engine.load_checkpoint(f"{folder}/{stage}")
            model.set_adapter(turn)
            tokens = sample(dist.get_rank() if dist.is_initialized() else 0, step)
            engine.backward(engine(input_ids=tokens, labels=tokens).loss)
            engine.step()
        found.append({name: value.clone() for name, value in engine.state_dict().items() if "lora" in name})
        engine.close()
    return found


def of_embeddings() -> Any:
    """Its two matrices are in dictionaries of parameters, which the embedding looks into."""
    torch.manual_seed(0)
    lora = {"r": 4, "target_modules": ["embed_tokens"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    return peft.get_peft_model(adapted().unload(), peft.LoraConfig(**lora)).double().eval()


def generated(model: Any) -> list[int]:
    tokens: list[int] = model.generate(input_ids=sample(0, 0)[:1], max_new_tokens=6, do_sample=False).tolist()
    return tokens


def by_ranks() -> list[int]:
    model = of_embeddings()
    engine = megatron_ds.initialize(model, {"zero": {"stage": 3, "persistence_threshold": 0}}, adam(model))
    tokens = generated(engine.module)
    engine.close()
    return tokens


def prompts() -> Any:
    """Two prompts of virtual tokens, of which one is frozen."""
    torch.manual_seed(0)
    tuned = [peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length) for length in (3, 4)]
    model = peft.get_peft_model(adapted().unload(), tuned[0], adapter_name="a").double()
    model.add_adapter("b", tuned[1])
    model.prompt_encoder["b"].requires_grad_(False)
    return model


def prompts_saved(folder: str) -> list[tuple[Tensor, Tensor]]:
    """As they are in the files, and as they are: the moving average."""
    model, found = prompts(), []
    config = {"zero": {"stage": 3, "persistence_threshold": 0}, "optimizer": {"ema_decay": 0.9}}
    engine = megatron_ds.initialize(model, config, adam(model))
    for step in range(2):
        tokens = sample(0, step)
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
    engine.save_pretrained(folder)
    average = engine.state_dict(average=True)
    for name in "ab":
        saved = load_file(f"{folder}/{name}/adapter_model.safetensors")["prompt_embeddings"]
        found.append((saved, average[f"prompt_encoder.{name}.embedding.weight"]))
    assert not torch.equal(found[0][0], engine.get_parameter("prompt_encoder.a.embedding.weight"))
    engine.close()
    return found


def both(stages: tuple[int, ...], folder: str) -> tuple[list[dict[str, Tensor]], list[int], list[Any]]:
    return by_engine(stages, folder), by_ranks(), prompts_saved(f"{folder}/prompts")


@pytest.mark.parametrize(("ranks", "apart"), [(1, False), (2, False), (2, True)])
def test_adapters_of_peft_take_turns_and_generate_as_in_plain_torch(tmp_path: Path, ranks: int, apart: bool) -> None:
    want = by_torch(ranks)
    assert len(want) == 16
    found, tokens, saved = run_ranks(both, ranks, (0, 2, 3), str(tmp_path), apart=apart)[0]
    assert tokens == generated(of_embeddings())
    assert all(torch.equal(*pair) for pair in saved)
    for of_stage in found:
        assert of_stage.keys() == want.keys()
        for name, value in want.items():
            assert (of_stage[name] - value).abs().max() < 1e-12, name
