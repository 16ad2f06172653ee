"""Models of transformers and diffusers, small and in float64, and their training with and without the engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import megatron_ds

SAMPLES, STEPS = 6, 3


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=61, n_positions=16)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    return GPT2LMHeadModel(config)


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, vocab_size=61, max_position_embeddings=16, **sizes))


def mixtral() -> nn.Module:
    """Experts are one parameter here and many tensors in a file."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"num_local_experts": 3, "tie_word_embeddings": True}
    return MixtralForCausalLM(
        MixtralConfig(num_hidden_layers=1, vocab_size=61, max_position_embeddings=16, **sizes, **experts)
    )


def bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForMaskedLM(
        BertConfig(num_hidden_layers=2, vocab_size=61, max_position_embeddings=16, **sizes, **dropout)
    )


def unet() -> nn.Module:
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        dropout=0.0,
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": gpt2,
    "llama": llama,
    "mixtral": mixtral,
    "bert": bert,
    "unet": unet,
}


def made(name: str) -> nn.Module:
    torch.manual_seed(7)
    return eager(MODELS[name]().double())


def eager(model: nn.Module) -> nn.Module:
    """With experts one after the other: torch has no grouped product of float64."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model


def batch_of(name: str, step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    if name == "unet":
        images = torch.randn(SAMPLES, 1, 8, 8, generator=generator, dtype=torch.float64)
        return {"sample": images, "timestep": torch.arange(SAMPLES) * 10, "noise": torch.flip(images, [0])}
    tokens = torch.randint(0, 61, (SAMPLES, 12), generator=generator)
    return {"input_ids": tokens, "labels": tokens.clone()}


def loss_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    if "noise" not in batch:
        logits = model(input_ids=batch["input_ids"]).logits  # their own loss is computed in fp32
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    return (model(batch["sample"], batch["timestep"]).sample - batch["noise"]).square().mean()


def plain(name: str) -> tuple[list[float], dict[str, Tensor]]:
    model, losses = made(name), []
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, batch_of(name, step))
        loss.backward()
        for parameter in model.parameters():  # an unused one (a pooler) has a gradient of zero, as in DDP
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        losses.append(loss.item())
    return losses, {key: value.detach().clone() for key, value in model.state_dict().items()}


def files(folder: str) -> dict[str, Any]:
    """What a folder of a library holds: settings, and of tensors names, shapes and dtypes."""
    found: dict[str, Any] = {path.name: json.loads(path.read_text()) for path in Path(folder).glob("*.json")}
    for path in Path(folder).glob("*.safetensors"):
        found[path.name] = {name: (t.shape, t.dtype) for name, t in load_file(path).items()}
    return found


def on_the_engine(name: str, stage: int, folder: str) -> tuple[list[float], dict[str, Tensor], list[float]]:
    """Two changed lines; odd steps through train_batch. Then saved, and loaded by the library itself."""
    model, losses = made(name), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    config = {"zero": {"stage": stage, "bucket_mb": 0.01}, "optimizer": {"clip_norm": 0.5}}
    engine = megatron_ds.initialize(model, config, optimizer, loss=loss_of)
    axis = engine.mesh.data
    for step in range(STEPS):
        own = {key: value.chunk(axis.size)[axis.rank] for key, value in batch_of(name, step).items()}
        if step % 2:
            result = engine.train_batch([own])
        else:
            engine.train()
            engine.backward(loss_of(engine, own))
            maybe = engine.step()
            assert maybe is not None
            result = maybe
        losses.append(result.loss)
    evaluated = engine.eval_batch({key: value.chunk(axis.size)[axis.rank] for key, value in batch_of(name, 9).items()})
    state = engine.state_dict()
    engine.save_pretrained(folder)
    loaded = type(model).from_pretrained(folder, torch_dtype=torch.float64)  # type: ignore[attr-defined]
    assert {key: value.dtype for key, value in loaded.state_dict().items()}.keys() == state.keys()
    for key, value in loaded.state_dict().items():
        assert torch.equal(value.double(), state[key]), key
    if axis.rank == 0:
        model = made(name)
        model.load_state_dict(state)
        model.save_pretrained(f"{folder}-own")  # type: ignore[operator]
        assert files(folder) == files(f"{folder}-own")
    with torch.no_grad():
        again = loss_of(eager(loaded.double().eval()), batch_of(name, 9)).item()
    engine.zero.close()
    return losses, state, [evaluated, again]


def all_on_the_engine(stages: list[int], folder: str) -> dict[tuple[str, int], Any]:
    return {
        (name, stage): on_the_engine(name, stage, f"{folder}/{name}-{stage}") for name in MODELS for stage in stages
    }
