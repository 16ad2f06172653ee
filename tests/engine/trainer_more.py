"""Longer lives of a Trainer, plain and on the engine, for test_trainer_use.py: resumed, limited, frozen, run twice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from trainer_cases import DEEPSPEED, dataset, llama, place_in_environment
from transformers import TrainerCallback

from megatron_ds.errors import MegatronDSError

STAGE_3 = {"zero": {"stage": 3, "persistence_threshold": 20}}


class Streamed(IterableDataset[dict[str, Tensor]]):
    """Rows without a length: the epoch ends in the middle of a step."""

    def __init__(self, rows: list[dict[str, Tensor]]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(self.rows)


class Adapted(nn.Module):
    """As PEFT has it: a frozen model inside, a few parameters of one's own, and files that hold those alone."""

    def __init__(self) -> None:
        super().__init__()
        self.base_model = llama()
        self.base_model.requires_grad_(False)
        self.config = self.base_model.config
        self.peft_config = {"default": {"r": 2}}
        torch.manual_seed(8)
        self.lora_down, self.lora_up = nn.Linear(61, 2, bias=False), nn.Linear(2, 61, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **keywords: Any) -> Any:
        output = self.base_model(input_ids=input_ids)
        output.logits = output.logits + self.lora_up(torch.tanh(self.lora_down(output.logits)))
        if labels is not None:
            output.loss = self.base_model.loss_function(output.logits, labels, 61, **keywords)  # type: ignore[operator]
        return output

    def save_pretrained(self, folder: str, state_dict: dict[str, Tensor] | None = None, **keywords: Any) -> None:
        from safetensors.torch import save_file

        state = self.state_dict() if state_dict is None else state_dict
        assert list(self.lora_up.state_dict()) == ["weight"]  # as PEFT looks at modules_to_save
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file({k: v for k, v in state.items() if "lora_" in k}, Path(folder) / "adapter_model.safetensors")


class Embedder(nn.Module):
    """Of a library that writes its models itself, and has a Trainer that lets them, as SentenceTransformer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = llama()
        self.config = self.inner.config

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        return self.inner(input_ids=input_ids, labels=labels)

    def save_pretrained(self, folder: str) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        torch.save(self.state_dict(), Path(folder) / "embedder.pt")


def frozen_llama() -> nn.Module:
    """All but the last layer's norms and the head."""
    model = llama()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1.post" in name or "lm_head" in name or "layers.1.mlp" in name)
    return model


def trainer_of(output: str, config: Any, model: Any, init: Any = None, streamed: bool = False, **more: Any) -> Any:
    """The plain one without ``config``. 4 sequences x 2 micro-batches a step on any ranks, as long as they divide."""
    _, world = place_in_environment()
    import transformers

    from megatron_ds.integrations import transformers as integration

    library: Any = transformers if config is None else integration
    arguments = library.TrainingArguments(
        output_dir=output,
        per_device_train_batch_size=4 // world,
        per_device_eval_batch_size=4 // world,
        max_grad_norm=0.5,
        use_cpu=True,
        report_to=[],
        logging_steps=1,
        disable_tqdm=True,
        seed=11,
        **{
            "gradient_accumulation_steps": 2,
            "max_steps": 4,
            "save_strategy": "no",
            "learning_rate": 1e-2,
            **more,
            **({} if config is None else {"deepspeed": config}),
        },
    )
    rows = dataset()
    train = Streamed(rows[:28]) if streamed else rows[:40]
    datasets: dict[str, Any] = {"train_dataset": train, "eval_dataset": rows[40:]}
    return library.Trainer(model=model, model_init=init, args=arguments, **datasets)


def found(trainer: Any) -> dict[str, Any]:
    """What a training has left: logs, parameters, folders, and which was the best."""
    engine, history = getattr(trainer, "engine", None), trainer.state.log_history
    state = trainer.model.state_dict() if engine is None else engine.state_dict()
    if dist.is_initialized():
        dist.barrier()
    best = trainer.state.best_model_checkpoint
    return {
        "losses": [log["loss"] for log in history if "grad_norm" in log],
        "norms": [log["grad_norm"] for log in history if "grad_norm" in log],
        "eval": [log["eval_loss"] for log in history if "eval_loss" in log],
        "state": {name: tensor.clone() for name, tensor in state.items()},
        "folders": sorted(path.name for path in Path(trainer.args.output_dir).glob("checkpoint-*")),
        "best": best and Path(best).name,
    }


def end(trainer: Any) -> dict[str, Any]:
    result = found(trainer)
    if getattr(trainer, "engine", None) is not None:
        trainer.engine.zero.close()
    return result


def frozen(output: str, config: Any) -> dict[str, Any]:
    trainer = trainer_of(output, config, frozen_llama())
    trainer.train()
    return end(trainer)


def best_of_few(output: str, config: Any) -> dict[str, Any]:
    """Of other rows it learns nothing: an early one is best. A limit of one keeps it besides the last."""
    every = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
    trainer = trainer_of(output, config, llama(), save_total_limit=1, **every, **best)
    trainer.train()
    result = end(trainer)
    assert config is None or trainer.engine.steps == 4
    return result


def twice(output: str, config: Any) -> dict[str, Any]:
    trainer = trainer_of(output, config, llama(), max_steps=2)
    trainer.train()
    trainer.train()
    return end(trainer)


def anew(output: str, config: Any) -> dict[str, Any]:
    """With model_init, each training has a model of its own."""
    trainer = trainer_of(output, config, None, lambda: llama(), max_steps=2)
    trainer.train()
    first = getattr(trainer, "engine", None)
    trainer.train()
    assert config is None or (first is not trainer.engine and trainer.engine.steps == 2)
    return end(trainer)


def adapted(output: str, config: Any) -> dict[str, Any]:
    trainer = trainer_of(output, config, Adapted(), save_strategy="steps", save_steps=2)
    trainer.train()
    return end(trainer)


def habits(output: str, config: Any) -> dict[str, Any]:
    """Recomputed, with smoothed labels and a scheduler of its own; the epoch leaves a remainder of one."""
    rates = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-3}, "warmup_steps": 1}
    more = {"gradient_checkpointing": True, "label_smoothing_factor": 0.1}
    epoch = {"max_steps": -1, "num_train_epochs": 1, "gradient_accumulation_steps": 3}
    trainer = trainer_of(output, config, llama(), **rates, **more, **epoch)
    trainer.train()
    assert trainer.state.global_step == 4
    return end(trainer)


def streamed(output: str, config: Any) -> dict[str, Any]:
    """It saves and loads with micro-batches of a step that later ones complete, or none."""
    every = {"save_strategy": "epoch", "eval_strategy": "epoch", "load_best_model_at_end": True}
    trainer = trainer_of(output, config, llama(), streamed=True, gradient_accumulation_steps=3, max_steps=5, **every)
    trainer.train()
    return end(trainer)


def generated(output: str, config: Any) -> list[Any]:
    """What a Seq2SeqTrainer predicts, and two texts besides: an end comes at another token on each rank."""
    _, world = place_in_environment()
    import transformers

    from megatron_ds.integrations import transformers as integration

    arguments: Any = transformers.Seq2SeqTrainingArguments
    trainer_class: Any = transformers.Seq2SeqTrainer
    if config is not None:
        arguments = dataclass(type("Arguments", (integration.TrainingArguments, arguments), {}))
        trainer_class = type("Trainer", (integration.Trainer, trainer_class), {})
    torch.manual_seed(5)
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 4, "dropout_rate": 0.0}
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=61, decoder_start_token_id=0, **sizes)
    )
    model.generation_config.eos_token_id = list(range(1, 61, 5))
    settings = arguments(
        output_dir=output,
        per_device_eval_batch_size=2 // world,
        predict_with_generate=True,
        max_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        **({} if config is None else {"deepspeed": config}),
    )
    rows = dataset()
    trainer = trainer_class(model=model, args=settings, train_dataset=rows)
    trainer.train()
    predicted = trainer.predict(rows[:4], max_length=8).predictions
    texts = _of_a_loop(trainer.model, rows[2:4])
    if config is not None:
        trainer.engine.zero.close()
    return [[int(token) for token in row if token > 0] for row in [*predicted, *texts]]


def _of_a_loop(model: Any, rows: list[dict[str, Tensor]]) -> list[list[int]]:
    """As TRL's GRPO generates, which says nothing of the ranks: the text of each ends elsewhere."""
    rank, world = place_in_environment()
    prompts = [rows[number]["input_ids"].unsqueeze(0) for number in range(rank, 2, world)]
    texts = [model.generate(prompt, max_length=8)[0].tolist() for prompt in prompts]
    if world == 1:
        return texts
    of_ranks: list[Any] = [None] * world
    dist.all_gather_object(of_ranks, texts)
    return [text for texts in of_ranks for text in texts]


def full_eval(output: str) -> list[float]:
    """Evaluation after a training in bf16, without and with bf16_full_eval, and once more after another training."""
    losses = []
    for switch in (False, True):
        trainer = trainer_of(output, STAGE_3, llama(), bf16=True, bf16_full_eval=switch, max_steps=1)
        trainer.train()
        losses.append(trainer.evaluate()["eval_loss"])
    trainer.train()
    losses.append(trainer.evaluate()["eval_loss"])
    trainer.engine.zero.close()
    return losses


def resumed(output: str, config: Any, kind: Any, step: int) -> dict[str, Any]:
    model = kind()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)  # all of it has to come from the checkpoint, what is frozen too
    trainer = trainer_of(output, config, model)
    trainer.train(resume_from_checkpoint=f"{output}/checkpoint-{step}")
    return end(trainer)


def by_itself(output: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a Trainer beside the library's lets the model write, at stage 3, and what it is."""
    trainer = trainer_of(output, STAGE_3, Embedder(), max_steps=1, save_strategy="steps", save_steps=1)
    trainer._save = lambda folder, state_dict: trainer.model.save_pretrained(folder)
    trainer.train()
    state = trainer.engine.state_dict()
    trainer.engine.close()
    return torch.load(f"{output}/checkpoint-1/embedder.pt"), state


CASES = {
    "frozen": frozen,
    "best": best_of_few,
    "twice": twice,
    "anew": anew,
    "adapted": adapted,
    "habits": habits,
    "streamed": streamed,
}


def everything(output: str) -> dict[str, Any]:
    results = {f"{name} 2": case(f"{output}/{name}-2", DEEPSPEED) for name, case in CASES.items()}
    results |= {f"{name} 3": case(f"{output}/{name}-3", STAGE_3) for name, case in CASES.items()}
    results["full eval"] = full_eval(f"{output}/full")
    results["by itself"] = by_itself(f"{output}/itself")
    results["resumed 3"] = resumed(f"{output}/adapted-2", STAGE_3, Adapted, 2)
    return results


class Rates(TrainerCallback):
    """The learning rates of each update, of every group."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_step_begin(self, *_: Any, optimizer: Any, **keywords: Any) -> None:
        self.seen.append([float(group["lr"]) for group in optimizer.param_groups])


RANGE_TEST = {
    "type": "LRRangeTest",
    "params": {"lr_range_test_min_lr": 2e-3, "lr_range_test_step_size": 2},
}


def two_groups(model: nn.Module) -> torch.optim.Optimizer:
    head, *others = reversed(list(model.parameters()))
    return torch.optim.AdamW([{"params": [head], "lr": 3e-3}, {"params": others}], lr=1e-2)


def configured(output: str) -> tuple[dict[str, Any], dict[str, Any], list[list[float]]]:
    """A plain Trainer, one whose configuration names the decay alone, and the rates of two trainings of another."""
    trained = []
    for config, decay in ((None, 0.3), ({"optimizer": {"weight_decay": 0.3}}, 0.0)):
        trainer = trainer_of(output, config, llama(), max_steps=3, weight_decay=decay, warmup_steps=1)
        trainer.train()
        trained.append(end(trainer))
    trainer = trainer_of(output, {"optimizer": {"name": "sgd", "ema_decay": 0.5}}, llama(), max_steps=2)
    trainer.train()
    average, weights = (trainer.engine.tensors(kind).parameter("lm_head.weight").clone() for kind in (True, False))
    assert not torch.equal(average, weights)
    trainer.engine.zero.close()
    trainer = trainer_of(output, {"zero_optimization": {"stage": 1}, "scheduler": RANGE_TEST}, llama(), max_steps=3)
    trainer.optimizer = two_groups(trainer.model)
    trainer.add_callback(rates := Rates())
    trainer.train()
    trainer.train()
    trainer.engine.zero.close()
    return trained[0], trained[1], rates.seen


def refusals(output: str) -> dict[str, str]:
    every = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}

    def message(function: Any) -> str:
        try:
            function()
        except MegatronDSError as error:
            return f"{type(error).__name__}: {error}"
        return ""

    def other(optimizer: bool, config: Any, **more: Any) -> str:
        trainer = trainer_of(output, config, llama(), **more)
        made = two_groups(trainer.model)
        trainer.optimizer = made if optimizer else None
        trainer.lr_scheduler = None if optimizer else torch.optim.lr_scheduler.StepLR(made, 1)
        return message(trainer.train)

    ranged = {"zero_optimization": {"stage": 1}, "scheduler": RANGE_TEST}
    plain = trainer_of(f"{output}/plain", None, llama(), max_steps=1, **{"save_strategy": "steps", "save_steps": 1})
    plain.train()
    return {
        "optimizer": other(True, {"optimizer": {"lr": 0.1}}),
        "scheduler": other(False, ranged),
        "dtype": message(lambda: trainer_of(output, {"precision": {"dtype": "fp32"}}, llama(), bf16=True).train()),
        "muon": message(lambda: trainer_of(output, {"optimizer": {"name": "muon"}}, llama()).train()),
        "no rate": message(lambda: trainer_of(output, ranged, llama(), learning_rate=0.0).train()),
        "only model": message(
            lambda: trainer_of(
                output, STAGE_3, llama(), load_best_model_at_end=True, save_only_model=True, **every
            ).train()
        ),
        "full eval": message(lambda: trainer_of(output, STAGE_3, llama(), bf16_full_eval=True).train()),
        "batch size": message(lambda: trainer_of(output, STAGE_3, llama(), auto_find_batch_size=True).train()),
        "plain": message(
            lambda: trainer_of(output, STAGE_3, llama()).train(resume_from_checkpoint=f"{output}/plain/checkpoint-1")
        ),
    }
