"""Hugging Face's Trainer and an Accelerate loop, with and without the engine, on the ranks of a job."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

STEPS = 4
DEEPSPEED: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto", "overlap_comm": True},
}


def llama(seed: int = 5) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=61, max_position_embeddings=16, **sizes))


def dataset() -> list[dict[str, Tensor]]:
    tokens = torch.randint(0, 61, (48, 12), generator=torch.Generator().manual_seed(1))
    labels = tokens.clone()
    for row, mask in enumerate(labels):
        mask[: row % 3] = -100  # so that a mean of means is not the mean
    return [{"input_ids": row, "labels": label} for row, label in zip(tokens, labels)]


def place_in_environment() -> tuple[int, int]:
    """What torchrun sets: Hugging Face looks nowhere else."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    if world > 1:
        values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        os.environ.update({key: str(value) for key, value in values.items()})
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="29500", ACCELERATE_USE_CPU="true")
    return rank, world


def trained(output: str, config: Any, micro_batch: int, ours: bool = True, resume: bool = False, **more: Any) -> Any:
    """(logged losses and norms, whole parameters) of a short training; 4 sequences x 2 micro-batches a step."""
    place_in_environment()
    import transformers

    from megatron_ds.integrations import transformers as integration

    library: Any = integration if ours else transformers
    keywords = {"deepspeed": config} if ours else {}
    arguments = library.TrainingArguments(
        output_dir=output,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        weight_decay=0.1,
        max_grad_norm=0.5,
        use_cpu=True,
        report_to=[],
        logging_steps=1,
        disable_tqdm=True,
        seed=11,
        **{"max_steps": STEPS, "save_strategy": "no", **more, **keywords},
    )
    model = llama()
    trainer = library.Trainer(model=model, args=arguments, train_dataset=dataset())
    trainer.train(resume_from_checkpoint=resume or None)
    logs = [(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "grad_norm" in log]
    if ours:
        trainer.save_model(f"{output}/final")
        state = trainer.engine.state_dict()
        assert trainer.engine.config.zero.stage == (2 if config is DEEPSPEED else trainer.engine.config.zero.stage)
        trainer.engine.zero.close()
    else:
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return logs, state


def trainings(output: str, resumable: bool) -> dict[str, Any]:
    _, world = place_in_environment()
    found = {"deepspeed": trained(f"{output}/a", DEEPSPEED, 4 // world)}
    adam = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}}
    ours = {"zero": {"stage": 3, "persistence_threshold": 20}}
    schedule = {
        "type": "WarmupDecayLR",
        "params": {"warmup_max_lr": "auto", "warmup_num_steps": "auto", "total_num_steps": "auto"},
    }
    whole = {**DEEPSPEED, "optimizer": adam, "scheduler": schedule}
    found["ours"] = trained(f"{output}/b", ours, 4 // world)
    found["optimizer and scheduler"] = trained(f"{output}/c", whole, 4 // world, warmup_steps=2)
    if resumable:
        half = {"save_strategy": "steps", "save_steps": 2}
        trained(f"{output}/d", DEEPSPEED, 4 // world, **half)
        if dist.is_initialized():
            dist.barrier()
        last = Path(output) / "d" / "checkpoint-4"
        if not dist.is_initialized() or dist.get_rank() == 0:
            last.rename(Path(output) / "later")
        if dist.is_initialized():
            dist.barrier()
        found["resumed"] = trained(f"{output}/d", DEEPSPEED, 4 // world, resume=True, **half)
    return found


def accelerated(output: str) -> Any:
    """An Accelerate loop on the engine, at stage 2."""
    _, world = place_in_environment()
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

    from megatron_ds.integrations.accelerate import prepare

    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
    model: Any = llama()
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer = prepare(accelerator, model, optimizer, {"zero": {"stage": 2}})
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    rows = [
        row for row in dataset() if bool((row["labels"] != -100).all())
    ]  # equal counts: a mean of means is the mean
    loader = accelerator.prepare(DataLoader(rows, batch_size=4 // world))  # type: ignore[arg-type]
    norms = []
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            norm = accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            scheduler.step()
            norms.append(float(norm))
    state = accelerator.get_state_dict(model)
    assert accelerator.unwrap_model(model) is model.engine.module
    model.engine.zero.close()
    return norms, state


def plain_loop() -> Any:
    model: Any = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    rows = [row for row in dataset() if bool((row["labels"] != -100).all())]
    norms = []
    for start in range(0, len(rows), 8):
        optimizer.zero_grad()
        part = rows[start : start + 8]
        batch = {key: torch.stack([row[key] for row in part]) for key in part[0]}
        model(**batch).loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        scheduler.step()
    return norms, model.state_dict()
