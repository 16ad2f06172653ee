"""Training scripts in DeepSpeed's style: what they do with ``deepspeed`` they do with any module of its names.

Each returns its losses, learning rates and final weights. ``python deepspeed_scripts.py SCRIPT:STAGE ...`` runs them
with DeepSpeed itself, where it is installed, and prints them as JSON: for tests/integrations/test_against_deepspeed.py.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, softplus

WIDTH, CLASSES, SAMPLES = 6, 3, 24
LR, WARMUP, CLIP, DECAY = 0.02, 4, 0.2, 0.1
MICRO = 2


class Ran(NamedTuple):
    losses: list[float]
    rates: list[float]
    weights: dict[str, Any]


def net(seed: int, outputs: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Linear(16, outputs))


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(SAMPLES, WIDTH, generator=generator), torch.randint(0, CLASSES, (SAMPLES,), generator=generator)


def config(stage: int, accumulation: int = 1, **more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": MICRO,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1000000,
        **more,
    }


CLASSIFIER: dict[str, Any] = {
    "optimizer": {"type": "AdamW", "params": {"lr": LR, "weight_decay": DECAY, "torch_adam": True}},
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_num_steps": WARMUP, "warmup_type": "linear", "warmup_max_lr": LR},
    },
}


def classifier(deepspeed: Any, stage: int, dtype: torch.dtype) -> Ran:
    """Two epochs over ``training_data``, configured by a file that ``args`` names."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ds.json"
        path.write_text(json.dumps(config(stage, 2, **CLASSIFIER)))
        args = deepspeed.add_config_arguments(argparse.ArgumentParser()).parse_args(
            ["--deepspeed", "--deepspeed_config", str(path)]
        )
        args.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        model = net(1, CLASSES).to(dtype)
        samples, labels = data()
        engine, optimizer, loader, scheduler = deepspeed.initialize(
            args=args,
            model=model,
            model_parameters=model.parameters(),
            training_data=torch.utils.data.TensorDataset(samples.to(dtype), labels),
        )
    assert scheduler is not None and optimizer.param_groups
    losses, rates = [], []
    for _ in range(2):
        for batch, target in loader:
            rates.append(engine.get_lr()[0])
            loss = cross_entropy(engine(batch.to(engine.device)), target.to(engine.device))
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    return Ran(losses, rates, weights(deepspeed, engine))


def gan_frozen(deepspeed: Any, stage: int, dtype: torch.dtype) -> Ran:
    """The same in one backward pass a step, with the discriminator frozen while the generator learns."""
    return gan(deepspeed, stage, dtype, frozen=True)


def gan(deepspeed: Any, stage: int, dtype: torch.dtype, frozen: bool = False) -> Ran:
    """Two engines; two backward passes in a step of one, and one loss through both."""
    generator, discriminator = net(2, WIDTH).to(dtype), net(3, 1).to(dtype)
    engines = []
    for model in (generator, discriminator):
        adam = torch.optim.Adam(model.parameters(), lr=LR, betas=(0.5, 0.9))
        settings = config(stage, gradient_clipping=0.0)
        engine, *_ = deepspeed.initialize(model=model, optimizer=adam, config=settings)
        engines.append(engine)
    g, d = engines
    losses = []
    for step in range(4):
        real, noise = gan_batch(step, d.world_size, d.global_rank, dtype)
        d.zero_grad()
        of_real = softplus(-d(real)).mean()
        if not frozen:
            d.backward(of_real)
        fake = g(noise)
        of_fake = softplus(d(fake.detach())).mean()
        d.backward(of_real + of_fake if frozen else of_fake)
        d.step()
        d.requires_grad_(not frozen)
        of_generator = softplus(-d(fake)).mean()
        g.backward(of_generator)
        g.step()
        d.requires_grad_(True)
        losses.append((of_real + of_fake + of_generator).item())
    found = {f"g.{name}": value for name, value in weights(deepspeed, g).items()}
    return Ran(losses, [], found | {f"d.{name}": value for name, value in weights(deepspeed, d).items()})


def gan_batch(step: int, ranks: int, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """This rank's part of the step's samples and noise."""
    both = torch.randn(2, 8, WIDTH, generator=torch.Generator().manual_seed(50 + step)).to(dtype)
    return tuple(both.chunk(ranks, dim=1)[rank])  # type: ignore[return-value]


def layers(deepspeed: Any) -> list[Any]:
    spec = deepspeed.pipe.LayerSpec
    torch.manual_seed(4)
    return [spec(nn.Linear, WIDTH, 16), torch.tanh, spec(nn.Linear, 16, 16), torch.tanh, nn.Linear(16, CLASSES)]


def pipeline(deepspeed: Any, stage: int, dtype: torch.dtype, stages: int = 1) -> Ran:
    """A list of layers on one stage or on several, by whole batches."""
    model = deepspeed.pipe.PipelineModule(
        layers(deepspeed), num_stages=stages, loss_fn=cross_entropy, seed_layers=True, partition_method="uniform"
    ).to(dtype)
    engine, *_ = deepspeed.initialize(
        model=model,
        config=config(stage, 2, optimizer=CLASSIFIER["optimizer"]),
        model_parameters=[p for p in model.parameters() if p.requires_grad],
    )
    ranks = engine.dp_world_size
    samples, labels = (part.chunk(ranks)[engine.global_rank % ranks] for part in data())
    pairs = iter(list(zip(samples.to(dtype).split(MICRO), labels.split(MICRO))))
    losses = [engine.train_batch(pairs).item() for _ in range(3 if ranks > 1 else 6)]
    return Ran(losses, [], weights(deepspeed, engine))


def pipeline_of_two(deepspeed: Any, stage: int, dtype: torch.dtype) -> Ran:
    return pipeline(deepspeed, stage, dtype, stages=2)


class Odd(nn.Module):
    """Shared, frozen and persistent beside what is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.frozen = nn.Embedding(7, 5), nn.Linear(5, 5).requires_grad_(False)
        # A bias in front of a BatchNorm has no gradient but rounding, which Adam makes a step of.
        self.body = nn.Sequential(nn.Linear(5, 3, bias=False), nn.BatchNorm1d(3), nn.Linear(3, 5))
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.frozen(self.body(self.embed(ids))))
        return logits.square().mean()


def checkpoint(deepspeed: Any, stage: int, dtype: torch.dtype) -> Ran:
    """Two groups, a checkpoint after two updates in CHECKPOINTS/STAGE, and its whole weights by ``zero_to_fp32``."""
    torch.manual_seed(6)
    model = Odd().to(dtype)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.dim() > 1]},
        {"params": [parameter for parameter in trained if parameter.dim() == 1], "weight_decay": 0.0},
    ]
    settings = config(stage, optimizer=CLASSIFIER["optimizer"])
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=settings)
    losses = []
    for step in range(2):
        generator = torch.Generator().manual_seed(10 * step + engine.global_rank)
        loss = engine(torch.randint(0, 7, (4,), generator=generator))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    folder = f"{os.environ['CHECKPOINTS']}/{stage}"
    engine.save_checkpoint(folder, client_state={"epoch": 3})
    tool = importlib.import_module(f"{deepspeed.utils.__name__}.zero_to_fp32")
    torch.distributed.barrier()
    return Ran(losses, [], listed(tool.get_fp32_state_dict_from_zero_checkpoint(folder)))


def names(deepspeed: Any, stage: int, dtype: torch.dtype) -> Ran:
    """What the engine answers to scripts' names before and after each call of a loop, as numbers."""
    model = net(1, CLASSES).to(dtype)
    engine, optimizer, _, scheduler = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=config(stage, 2, **CLASSIFIER)
    )
    sizes = [engine.train_batch_size(), engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()]
    sizes += [engine.zero_optimization_stage(), engine.global_rank, engine.world_size]
    sizes += [engine.dp_world_size, engine.fp16_enabled(), engine.bfloat16_enabled(), engine.gradient_clipping()]
    sizes += [engine.zero_optimization(), engine.device.type == "cpu", len(list(engine.named_parameters()))]
    found: list[Any] = [sizes]

    def look() -> None:
        norm = engine.get_global_grad_norm()
        row = [engine.global_steps, engine.micro_steps, engine.skipped_steps, engine.global_samples]
        row += [engine.is_gradient_accumulation_boundary(), engine.was_step_applied(), -1.0 if norm is None else norm]
        row += [engine.get_lr()[0], optimizer.param_groups[0]["lr"], scheduler.last_batch_iteration]
        found.append([*row, *engine.get_mom()[0]])

    samples, labels = data()
    look()
    for number in range(6):
        loss = cross_entropy(engine(samples[number : number + 2].to(dtype)), labels[number : number + 2])
        returned = engine.backward(loss)
        found.append([loss.item(), returned.item()])
        look()
        engine.step()
        look()
    engine.set_gradient_accumulation_boundary(is_boundary=True)
    engine.backward(cross_entropy(engine(samples[:2].to(dtype)), labels[:2]))
    engine.step()
    look()
    return Ran([float(number) for row in found for number in row], [], {})


def weights(deepspeed: Any, engine: Any) -> dict[str, Any]:
    whole = engine.zero_optimization_stage() == 3
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=whole):
        return listed(engine.module.state_dict())


def listed(state: dict[str, Tensor]) -> dict[str, Any]:
    return {name: value.detach().clone().tolist() for name, value in state.items()}


def run(deepspeed: Any, wanted: list[str], dtype: torch.dtype) -> dict[str, Ran]:
    """``SCRIPT:STAGE`` each, of this module or of ``deepspeed_small``."""
    scripts = vars(importlib.import_module("deepspeed_small")) | globals()
    return {one: scripts[one.partition(":")[0]](deepspeed, int(one.partition(":")[2]), dtype) for one in wanted}


def main(wanted: list[str]) -> None:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled now
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    found = run(deepspeed, wanted, torch.float32)
    print("\n" + json.dumps({one: ran._asdict() for one, ran in found.items()}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
