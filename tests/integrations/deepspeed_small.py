"""Small scripts in DeepSpeed's style, one habit of public scripts each; run as those of ``deepspeed_scripts`` are."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deepspeed_scripts import CLASSES, CLASSIFIER, LR, WIDTH, Ran, config, data, layers, listed, net, weights
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

ADAM = {"optimizer": CLASSIFIER["optimizer"]}
STEPS = 3


def start(deepspeed: Any, settings: dict[str, Any], dtype: torch.dtype, model: nn.Module | None = None) -> Any:
    model = (model or net(1, CLASSES)).to(dtype)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return deepspeed.initialize(model=model, model_parameters=trained, config=settings)[0]


def batch(engine: Any, step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    samples, labels = data()
    at = (4 * step + 2 * engine.global_rank) % len(samples)
    return samples[at : at + 2].to(dtype), labels[at : at + 2]


def train(engine: Any, dtype: torch.dtype, steps: int = STEPS, first: int = 0) -> list[float]:
    losses = []
    for step in range(first, first + steps):
        samples, labels = batch(engine, step, dtype)
        loss = cross_entropy(engine(samples), labels)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def end(deepspeed: Any, engine: Any, losses: list[float], rates: list[float] | None = None) -> Ran:
    return Ran([float(loss) for loss in losses], rates or [], weights(deepspeed, engine))


def folder(name: str) -> Path:
    path = Path(os.environ["CHECKPOINTS"]) / name
    path.mkdir(parents=True, exist_ok=True)
    return path


# --- what initialize() is given


def several_groups(deepspeed: Any, stage: int, dtype: torch.dtype) -> Ran:
    """Groups with names, rates and decays of their own, in ``model_parameters``."""
    model = net(1, CLASSES).to(dtype)
    decayed, others = ([p for p in model.parameters() if (p.dim() > 1) is matrix] for matrix in (True, False))
    groups = [
        {"params": decayed, "weight_decay": 0.3, "lr": 2 * LR, "name": "decayed"},
        {"params": others, "weight_decay": 0.0, "name": "others"},
    ]
    engine, optimizer, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=config(stage, **ADAM))
    losses = train(engine, dtype)
    assert [group["name"] for group in optimizer.param_groups] == ["decayed", "others"]
    return end(deepspeed, engine, losses, engine.get_lr())


def callables(deepspeed: Any, stage: int, dtype: torch.dtype) -> Ran:
    """``optimizer`` and ``lr_scheduler`` as functions; the rate is logged after each step."""
    model = net(1, CLASSES).to(dtype)
    engine, _, _, scheduler = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
        config=config(stage),
    )
    losses, rates = [], []
    for step in range(STEPS):
        losses += train(engine, dtype, 1, step)
        rates += [*scheduler.get_last_lr(), *engine.get_lr()]
    return end(deepspeed, engine, losses, rates)


def optimizer_and_scheduler(deepspeed: Any, stage: int, dtype: torch.dtype) -> Ran:
    """Both made by the script, of torch."""
    model = net(1, CLASSES).to(dtype)
    sgd = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, 4)
    engine, *_ = deepspeed.initialize(model=model, optimizer=sgd, lr_scheduler=cosine, config=config(stage, 2))
    losses, rates = [], []
    for step in range(4):
        losses += train(engine, dtype, 1, step)
        rates += [cosine.get_last_lr()[0], engine.get_lr()[0], sgd.param_groups[0]["lr"]]
    return end(deepspeed, engine, losses, rates)


def collated(deepspeed: Any, stage: int, dtype: torch.dtype) -> Ran:
    """``training_data`` with ``collate_fn``, drawn from for more than an epoch."""
    rows = [{"x": sample.to(dtype), "y": label} for sample, label in zip(*data())]

    def collate(chosen: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {key: torch.stack([row[key] for row in chosen]) for key in chosen[0]}

    model = net(1, CLASSES).to(dtype)
    engine, _, loader, _ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        training_data=rows,
        collate_fn=collate,
        config=config(stage, **ADAM),
    )
    endless = iter(deepspeed.utils.RepeatingLoader(loader))
    losses = [float(len(loader))]
    for _ in range(len(loader) + 2):
        drawn = next(endless)
        loss = cross_entropy(engine(drawn["x"]), drawn["y"])
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return end(deepspeed, engine, losses)


def given_as(deepspeed: Any, stage: int, dtype: torch.dtype) -> Ran:
    """The configuration as text in base 64, as a path, and as a dictionary, of which two are ``config_params``."""
    settings = config(stage, **ADAM)
    path = folder("given") / f"{stage}-{os.environ.get('RANK', 0)}.json"
    path.write_text(json.dumps(settings))
    losses = []
    for name, given in (
        ("config", base64.urlsafe_b64encode(json.dumps(settings).encode()).decode()),
        ("config_params", str(path)),
        ("config_params", settings),
    ):
        model = net(1, CLASSES).to(dtype)
        engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), **{name: given})
        losses += train(engine, dtype, 2)
    return end(deepspeed, engine, losses)


# --- loops


def evaluated(deepspeed: Any, stage: int, dtype: torch.dtype) -> Ran:
    """Evaluation before, between and after updates, through the engine and through its module."""
    model = nn.Sequential(net(1, 8), nn.Dropout(0.5), nn.Linear(8, CLASSES))
    engine = start(deepspeed, config(stage, **ADAM), dtype, model)
    losses = []
    for step in range(2):
        engine.eval()
        with torch.no_grad():
            samples, labels = batch(engine, step, dtype)
            losses += [cross_entropy(engine(samples), labels).item(), engine.module(samples).sum().item()]
        engine.train()
        torch.manual_seed(step)
        losses += train(engine, dtype, 1, step)
    engine.eval()
    with torch.inference_mode():
        losses.append(engine(batch(engine, 0, dtype)[0]).sum().item())
    return end(deepspeed, engine, losses)


def own_boundary(deepspeed: Any, stage: int, dtype: torch.dtype) -> Ran:
    """The script says which step updates: windows of different lengths."""
    engine = start(deepspeed, config(stage, 2, **ADAM), dtype)
    losses = []
    for step, last in enumerate((False, False, True, True, False, True)):
        engine.set_gradient_accumulation_boundary(is_boundary=last)
        losses += [*train(engine, dtype, 1, step), engine.was_step_applied(), engine.global_steps]
    return end(deepspeed, engine, losses)


def boundary_logged(deepspeed: Any, stage: int, dtype: torch.dtype) -> Ran:
    """The mean loss is logged at the boundary of accumulation, with the norm of the update before."""
    engine = start(deepspeed, config(stage, 3, **ADAM), dtype)
    total, logged = 0.0, []
    for step in range(6):
        samples, labels = batch(engine, step, dtype)
        loss = cross_entropy(engine(samples), labels)
        engine.backward(loss)
        total += loss.item()
        if engine.is_gradient_accumulation_boundary():
            logged += [total / engine.gradient_accumulation_steps(), step, engine.get_global_grad_norm() or 0.0]
            total = 0.0
        engine.step()
    return end(deepspeed, engine, logged)


def scaled(deepspeed: Any, stage: int, dtype: torch.dtype) -> Ran:
    """fp16 with overflows: what is skipped, and the scale after each step."""
    fp16 = {"enabled": True, "initial_scale_power": 6, "loss_scale_window": 2, "hysteresis": 2}
    model = net(1, CLASSES)
    engine, optimizer, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=config(stage, fp16=fp16, **CLASSIFIER)
    )
    found = []
    for step in range(16):
        samples, labels = batch(engine, step, torch.float16)
        loss = cross_entropy(engine(samples).float(), labels)
        engine.backward(loss * (float("inf") if step in (0, 5, 6, 7) else 1.0))
        engine.step()
        found += [optimizer.cur_scale, engine.skipped_steps, engine.global_steps, optimizer.overflow]
        found += [engine.was_step_applied(), engine.get_lr()[0], optimizer.loss_scale]
    assert engine.fp16_enabled() and model[0].weight.dtype == torch.float16  # type: ignore[index]
    return Ran([float(number) for number in found], [], {})


def compiled(deepspeed: Any, stage: int, dtype: torch.dtype) -> Ran:
    engine = start(deepspeed, config(stage, **ADAM), dtype)
    before = engine.is_compiled
    engine.compile(backend="eager")
    losses = train(engine, dtype)
    return end(deepspeed, engine, [before, engine.is_compiled, *losses])


def destroyed(deepspeed: Any, stage: int, dtype: torch.dtype) -> Ran:
    """A second engine goes on with the first one's weights after that is destroyed."""
    engine = start(deepspeed, config(stage, **ADAM), dtype)
    losses = train(engine, dtype)
    state = {name: torch.tensor(value, dtype=dtype) for name, value in weights(deepspeed, engine).items()}
    engine.destroy()
    other = net(2, CLASSES)
    other.load_state_dict(state)
    again = start(deepspeed, config(stage, **ADAM), dtype, other)
    return end(deepspeed, again, losses + train(again, dtype, 2, STEPS))


class Language(nn.Module):
    """Its ``generate`` calls its own forward, as a language model's does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.embed, self.body, self.head = nn.Embedding(7, 8), nn.Linear(8, 8), nn.Linear(8, 7)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(self.embed(ids)).tanh())
        return logits

    @torch.no_grad()
    def generate(self, ids: Tensor, new: int = 4) -> Tensor:
        for _ in range(new):
            ids = torch.cat([ids, self(ids)[:, -1:].argmax(-1)], 1)
        return ids


def generated(deepspeed: Any, stage: int, dtype: torch.dtype) -> Ran:
    """Samples are drawn by ``engine.generate`` and ``engine.module.generate``, and trained on."""
    engine = start(deepspeed, config(stage, **ADAM), dtype, Language())
    found = []
    for step in range(2):
        engine.eval()
        ids = engine.generate(torch.tensor([[step, 1 + engine.global_rank]]))
        again = engine.module.generate(torch.tensor([[3, 4]]), new=2)
        engine.train()
        loss = cross_entropy(engine(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        engine.backward(loss)
        engine.step()
        found += [loss.item(), *ids.flatten().tolist(), *again.flatten().tolist()]
    return end(deepspeed, engine, found)


def preferences(deepspeed: Any, stage: int, dtype: torch.dtype) -> Ran:
    """A trained policy beside a reference that is only run; both are engines."""
    policy = start(deepspeed, config(stage, **ADAM), dtype, net(1, 1))
    reference, *_ = deepspeed.initialize(model=net(1, 1).to(dtype), config=config(stage if stage == 3 else 0))
    reference.eval()
    losses = []
    for step in range(STEPS):
        chosen, rejected = batch(policy, step, dtype)[0], batch(policy, step + 3, dtype)[0]
        with torch.no_grad():
            wanted = reference(chosen) - reference(rejected)
        both = policy(torch.cat([chosen, rejected]))
        loss = -nn.functional.logsigmoid(both[: len(chosen)] - both[len(chosen) :] - wanted).mean()
        policy.backward(loss)
        policy.step()
        losses.append(loss.item())
    return end(deepspeed, policy, losses)


def scheduled(deepspeed: Any, stage: int, dtype: torch.dtype) -> Ran:
    """OneCycle and LRRangeTest of a file, with what the engine says of rate and betas at each update."""
    cycle = {"cycle_min_lr": 0.001, "cycle_max_lr": 0.02, "cycle_first_step_size": 3, "decay_step_size": 2}
    rise = {"lr_range_test_min_lr": 0.001, "lr_range_test_step_size": 2, "lr_range_test_step_rate": 3}
    losses, rates = [], []
    for kind, params in (("OneCycle", cycle), ("LRRangeTest", rise)):
        engine = start(deepspeed, config(stage, **ADAM, scheduler={"type": kind, "params": params}), dtype)
        for step in range(8):
            rates += [*engine.get_lr(), *engine.get_mom()[0]]
            losses += train(engine, dtype, 1, step)
            rates.append(engine.lr_scheduler.last_batch_iteration)
    return end(deepspeed, engine, losses, rates)


# --- models


class LowRank(nn.Module):
    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.base(hidden) + self.up(self.down(hidden))
        return out


def low_rank(deepspeed: Any, stage: int, dtype: torch.dtype) -> Ran:
    """A frozen body with adapters, and a head that is trained."""
    torch.manual_seed(2)
    model = nn.Sequential(LowRank(nn.Linear(WIDTH, 8)), nn.Tanh(), LowRank(nn.Linear(8, 8)), nn.Linear(8, CLASSES))
    engine = start(deepspeed, config(stage, **ADAM), dtype, model)
    return end(deepspeed, engine, train(engine, dtype))


class Recomputed(nn.Module):
    def __init__(self, checkpoint: Callable[..., Any]):
        super().__init__()
        torch.manual_seed(3)
        self.checkpoint = checkpoint
        self.first, self.last = nn.Linear(WIDTH, 8), nn.Linear(8, CLASSES)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.2)) for _ in range(2))

    def forward(self, samples: Tensor) -> Tensor:
        hidden = self.first(samples)
        for block in self.blocks:
            hidden = self.checkpoint(block, hidden)
        logits: Tensor = self.last(hidden)
        return logits


def recomputed(deepspeed: Any, stage: int, dtype: torch.dtype) -> Ran:
    """Activation checkpointing by ``deepspeed.checkpointing``, with dropout."""
    deepspeed.checkpointing.configure(None, deepspeed_config=None, partition_activations=False, num_checkpoints=2)
    engine = start(deepspeed, config(stage, **ADAM), dtype, Recomputed(deepspeed.checkpointing.checkpoint))
    torch.manual_seed(9)
    return end(deepspeed, engine, train(engine, dtype))


class External(nn.Module):
    """Uses the weight of one of its modules without calling that module."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body = nn.Embedding(CLASSES, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, samples: Tensor) -> Tensor:
        logits: Tensor = self.body(samples).tanh() @ self.embed.weight.t()
        return logits


def built_sharded(deepspeed: Any, stage: int, dtype: torch.dtype) -> Ran:
    """Built under ``zero.Init`` and given values under ``GatheredParameters``, with an external parameter."""
    settings = config(stage, **ADAM)
    with deepspeed.zero.Init(config_dict_or_path=settings):
        model = External()
    generator = torch.Generator().manual_seed(7)
    with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
        if torch.distributed.get_rank() == 0:
            for parameter in model.parameters():
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    deepspeed.zero.register_external_parameter(model, model.embed.weight)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)
    return end(deepspeed, engine, train(engine, dtype))


class Experts(nn.Module):
    """Which of them run depends on the data, and so on the rank."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, samples: Tensor) -> Tensor:
        scores = self.gate(samples).softmax(-1)
        out = torch.zeros_like(samples)
        for number, expert in enumerate(self.experts):
            chosen = (scores.argmax(-1) == number).nonzero()[:, 0]
            if len(chosen):
                out = out.index_add(0, chosen, expert(samples[chosen]) * scores[chosen, number, None])
        return out


def leaf_modules(deepspeed: Any, stage: int, dtype: torch.dtype) -> Ran:
    """A mixture of experts, gathered as one module."""
    torch.manual_seed(8)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Experts(), nn.Linear(WIDTH, CLASSES))
    assert deepspeed.utils.set_z3_leaf_modules(model, [Experts]) == [model[1]]
    settings = config(stage, optimizer={"type": "SGD", "params": {"lr": LR}})
    engine = start(deepspeed, settings, dtype, model)
    return end(deepspeed, engine, train(engine, dtype))


# --- files


def parts_of_a_checkpoint(deepspeed: Any, stage: int, dtype: torch.dtype) -> Ran:
    """Tags, client state, and what of a checkpoint is loaded."""
    path = folder(f"parts{stage}")
    engine = start(deepspeed, config(stage, 2, **CLASSIFIER), dtype)
    found = train(engine, dtype, 6)
    found.append(engine.save_checkpoint(path, tag="one", client_state={"epoch": 3, "best": 0.5}))
    found += train(engine, dtype, 2, 6)
    engine.save_checkpoint(str(path))
    found += train(engine, dtype, 4, 8)
    for options in (
        {"tag": "one"},
        {},
        {"tag": "one", "load_optimizer_states": False, "load_lr_scheduler_states": False},
        {"tag": "one", "load_module_only": True},
        {"tag": "one", "load_module_strict": False},
    ):
        other = start(deepspeed, config(stage, 2, **CLASSIFIER), dtype)
        loaded, client = other.load_checkpoint(path, **options)
        assert Path(loaded).is_relative_to(path)
        found += [client["epoch"], client["best"]] if "tag" in options else ["epoch" in client]
        found += [other.global_steps, other.micro_steps, other.global_samples, *other.get_lr()]
        found += [*train(other, dtype, 4, 8), other.global_steps, *other.get_lr()]
    assert start(deepspeed, config(stage, **ADAM), dtype).load_checkpoint(path / "none") == (None, None)
    return end(deepspeed, engine, found)


def half_weights(deepspeed: Any, stage: int, dtype: torch.dtype) -> Ran:
    """``save_16bit_model``, of which the file's name alone is another here; in fp32, as the model is."""
    path = folder(f"half{stage}")
    settings = config(stage, **ADAM)
    settings["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    engine = start(deepspeed, settings, dtype)
    losses = train(engine, dtype)
    losses.append(engine.save_16bit_model(str(path), "pytorch_model.bin"))
    torch.distributed.barrier()
    theirs, ours = path / "pytorch_model.bin", path / "model.safetensors"
    return Ran(losses, [], listed(torch.load(theirs, weights_only=True) if theirs.is_file() else load_file(ours)))


# --- without an engine, or with another one


def collectives(deepspeed: Any, stage: int, dtype: torch.dtype) -> Ran:
    comm = deepspeed.comm
    rank, group = comm.get_rank(), comm.get_world_group()
    value, parts = torch.tensor([rank + 1.0]), [torch.zeros(1) for _ in range(comm.get_world_size(group))]
    comm.all_reduce(value, op=comm.ReduceOp.SUM)
    comm.all_gather(parts, torch.tensor([float(rank)]))
    objects = [{"rank": rank}]
    comm.broadcast_object_list(objects, src=len(parts) - 1)
    comm.barrier()
    found = [comm.is_initialized(), value.item(), *torch.cat(parts).tolist(), objects[0]["rank"]]
    return Ran([float(number) for number in found], [], {})


def pipeline_evaluated(deepspeed: Any, stage: int, dtype: torch.dtype) -> Ran:
    """A pipeline in a loop of training and evaluation, over its own data."""
    samples, labels = data()
    made = layers(deepspeed)
    model = deepspeed.PipelineModule(made, 1, loss_fn=cross_entropy, seed_layers=True, partition_method="uniform")
    model = model.to(dtype)
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=[p for p in model.parameters() if p.requires_grad],
        training_data=torch.utils.data.TensorDataset(samples.to(dtype), labels),
        config=config(stage, 2, **ADAM),
    )
    losses = []
    for _ in range(2):
        losses.append(engine.train_batch().item())
        pairs = iter(list(zip(samples.to(dtype).split(2), labels.split(2))))
        losses.append(engine.eval_batch(pairs).item())
    return end(deepspeed, engine, [*losses, engine.global_steps, engine.micro_batches])
